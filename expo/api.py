"""The commands as functions: `expo.extrapolate(sft=…, dpo=…, alpha=0.3)` does what `expo extrapolate` does.

The keyword arguments are the settings of the command's config class (`expo/config/`), so that nothing is said twice:
signatures and the argument lists of the docstrings are made from it, and `expo/__init__.pyi` has them for editors and
type checkers (`python tools/make_stub.py` writes it). A path may be whatever `os.fspath` takes, results of other
functions included, and where several values are meant one may be given as it is. Values are checked as flags are,
and messages name settings as the command line spells them: `--max-tokens` is `max_tokens`.

To add a function: a verb in `expo/verbs/`, its config class, and a function here with an example that can be run
(`tests/test_api.py` runs it); the rest follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expo.config import (
    CompareConfig,
    ExtrapolateConfig,
    GenerateConfig,
    InspectConfig,
    ReportConfig,
    ScoreConfig,
    SweepConfig,
)
from expo.keywords import takes
from expo.recipes import Recipe, RewardRecipe, load

if TYPE_CHECKING:
    from expo.output.findings import Inspection
    from expo.verbs.compare import Compared
    from expo.verbs.extrapolate import Extrapolated
    from expo.verbs.generate import Generated
    from expo.verbs.report import Report
    from expo.verbs.score import Scored
    from expo.verbs.sweep import Swept


@takes(ExtrapolateConfig)
def extrapolate(config: ExtrapolateConfig) -> Extrapolated:
    """Write θ(α) = θ_dpo + α(θ_dpo − θ_sft) as a checkpoint, streaming both in constant memory.

    >>> made = expo.extrapolate(sft="my-sft", dpo="my-dpo", alpha=0.3, output="my-expo")
    >>> made.path
    PosixPath('my-expo')
    >>> [one.status for one in expo.extrapolate(sft="my-sft", dpo="my-dpo", alpha=[0.1, 0.2], output="grid")]
    ['written', 'written']

    The checkpoints of a training run take the place of `dpo`, and a step that of α: `checkpoint=["100=a", "200=b"],
    target_step=500`.

    Returns:
        An `Extrapolated`: one output per α, with `path`, `status` and `to_pandas()`. It can be given wherever a path of
        a model is expected.

    Raises:
        InputError: The settings or inputs are at fault; nothing is left behind.
        EnvironmentFailure: I/O or the hub failed; the same call continues.
    """
    from expo.verbs import extrapolate as verb

    return verb.run(config)


@takes(InspectConfig)
def inspect(config: InspectConfig) -> Inspection:
    """Measure ‖θ_dpo − θ_sft‖ per tensor, layer and module, and judge whether ExPO suits the pair.

    >>> found = expo.inspect(sft="my-sft", dpo="my-dpo")
    >>> found.suits
    'likely'
    >>> list(found.to_pandas())[:3]
    ['name', 'layer', 'module']

    Returns:
        An `Inspection` with `suits`, `verdict`, `total`, `modules`, `layers`, `tensors`, and `to_pandas()`, a row per
        tensor; with several `checkpoint`s of a training run also `trajectory`, how straight its way over the steps is.

    Raises:
        InputError: The settings or inputs are at fault, or the picture would replace something else.
        EnvironmentFailure: Reading failed.
    """
    from expo.verbs import inspect as verb

    return verb.run(config)


@takes(GenerateConfig)
def generate(config: GenerateConfig) -> Generated:
    """Answer a task's prompts with a model, or with θ(α), of which nothing is then written.

    >>> dpo = expo.generate("prompts.jsonl", model="my-dpo", limit=4, max_tokens=8)
    >>> dpo.output
    PosixPath('outputs_prompts/my-dpo.jsonl')
    >>> theta = expo.generate("prompts.jsonl", sft="my-sft", dpo="my-dpo", alpha=2.0, limit=4, max_tokens=8)
    >>> list(theta.to_pandas())
    ['prompt', 'output', 'length', 'finish_reason']

    Returns:
        A `Generated` with the files `output` and `meta`, `rows`, `failed`, and `to_pandas()`, a row per answer. Rows
        that failed are marked and do not raise: look at `failed` and `reason`.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call continues.
    """
    from expo.verbs import generate as verb

    return verb.run(config)


@takes(ScoreConfig)
def score(config: ScoreConfig) -> Scored:
    """Score answers with reward models: raw logits, one per answer.

    >>> scored = expo.score("prompts.jsonl", name="my-dpo", reward_model="my-rm")
    >>> scored.n, scored.rewards
    (4, PosixPath('rewards_prompts/my-dpo.jsonl'))
    >>> list(scored.to_pandas())
    ['reward_model', 'id', 'sample', 'reward', 'tokens', 'truncated']

    Returns:
        A `Scored` with the files `rewards` and `meta`, `n`, `mean`, `standard_error`, `failed`, `further` (the results
        of further reward models), and `to_pandas()`, a row per answer and reward model.

    Raises:
        InputError: The settings or inputs are at fault; what was finished before stays.
        EnvironmentFailure: The engine, the disk or the network failed; the same call continues.
    """
    from expo.verbs import score as verb

    return verb.run(config)


@takes(CompareConfig)
def compare(config: CompareConfig) -> Compared:
    """Compare runs on the prompts they share; the first is the baseline.

    >>> scored = expo.score("prompts.jsonl", name="my-dpo-ExPO-a2.0", reward_model="my-rm")
    >>> compared = expo.compare("my-dpo", scored, task="prompts")
    >>> compared.to_pandas()[["name", "n"]].values.tolist()
    [['my-dpo', 4], ['my-dpo-ExPO-a2.0', 4]]
    >>> print(compared)  # doctest: +ELLIPSIS
    prompts, rewards by my-rm: 4 rows, 4 prompts
    ...

    Returns:
        A `Compared` with `comparison`, `text`, which is what it prints as, and `to_pandas()`, a row per reward model
        and run.

    Raises:
        InputError: A run is missing or damaged, or they cannot be paired.
    """
    from expo.verbs import compare as verb

    return verb.run(config)


@takes(SweepConfig)
def sweep(config: SweepConfig) -> Swept:
    """Find the α whose answers a reward model prefers, with one live engine for every θ(α).

    >>> found = expo.sweep(sft="my-sft", dpo="my-dpo", reward_model="my-rm", alpha=[1, 2], task="prompts.jsonl",
    ...                    limit=16, max_tokens=16, output="my-sweep")
    >>> found.to_pandas()["alpha"].tolist()
    [0.0, 1.0, 2.0]
    >>> found.best_alpha in (0.0, 1.0, 2.0), found.picture
    (True, PosixPath('my-sweep/sweep.png'))

    Returns:
        A `Swept` with `best_alpha`, `verdict`, `picture`, `record` (sweep.json), `text`, which is what it prints as,
        and `to_pandas()`, a row per α.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: An engine, the disk or the network failed; the same call continues.
    """
    from expo.verbs import sweep as verb

    return verb.run(config)


@takes(ReportConfig)
def report(config: ReportConfig) -> Report:
    """Write one HTML page about two or more runs, or a sweep: who wins, by how much, is it only longer, and where.

    >>> page = expo.report("my-sweep", output="my-sweep.html")
    >>> page.page, page.rows
    (PosixPath('my-sweep.html'), 16)

    Returns:
        A `Report` with `page`, `headline`, `notes`, `runs` and `figures`.

    Raises:
        InputError: The runs, or what is where the page goes, are at fault.
        EnvironmentFailure: Writing failed.
    """
    from expo.verbs import report as verb

    return verb.run(config)


def recipe(name: str) -> Recipe | RewardRecipe:
    """A known model by its name: its pair, α, source and published scores; or a known reward model.

    >>> pair = expo.recipe("zephyr-7b-beta")
    >>> pair.sft, pair.dpo, pair.alpha
    ('HuggingFaceH4/mistral-7b-sft-beta', 'HuggingFaceH4/zephyr-7b-beta', 0.1)

    Raises:
        InputError: There is none of that name; the message has those that are spelled like it.
    """
    return load(name)
