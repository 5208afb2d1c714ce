"""expo sweep --search modules: which tensors have an α together, the search on made rewards, and with engines."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import save_adapter
from crashes import ended, forked, killed_when
from helpers import tree
from peft import LoraConfig
from safetensors.torch import load_file
from sizes import sized
from test_sweep import (  # fixtures, too
    cache,  # noqa: F401
    drawn,  # noqa: F401
    engines,  # noqa: F401
    pictures,  # noqa: F401
    processes,  # noqa: F401
    reward_model,  # noqa: F401
    swept,  # noqa: F401
    verdicts,  # noqa: F401
)
from test_sweep_processes import wait_until_no_row_is_written
from test_sweep_race import rows_in

from expo.arguments import arguments_of
from expo.cli import program as cli
from expo.config import ExtrapolateConfig, GenerateConfig, ReportConfig, SweepConfig
from expo.errors import InputError
from expo.theta.decide import match_patterns
from expo.theta.names import is_of_modules, named_alpha
from expo.theta.plan import PairSettings
from expo.verbs import extrapolate, generate, report, sweep as verb
from expo.verbs.compare.answers import read_answers
from expo.verbs.compare.finding import task_called
from expo.verbs.sweep import estimate
from expo.verbs.sweep.confirm import confirm
from expo.verbs.sweep.estimate import Seen, plan_with_cost
from expo.verbs.sweep.modules import plan as plan_modules
from expo.verbs.sweep.modules.classes import GROUPS, classes, groups, patterns
from expo.verbs.sweep.modules.search import UNIFORM, Step, Wanted, arms_of, most_rows, search
from expo.verbs.sweep.race import ONE_LEFT, Answered, Rules
from expo.verbs.sweep.vector import Vector

pytestmark = pytest.mark.xdist_group("modules")  # they share what was searched

QUESTIONS = 24

# --- classes ----------------------------------------------------------------------------------------------------------


def layered(stack: str, layers: int, attention: list[str], mlp: list[str], norms: list[str]) -> dict[str, str]:
    """The tensors of layers → the class of each."""
    found = {}
    for layer in range(layers):
        third = ("first", "middle", "last")[min(2, 3 * layer // layers)]
        found |= {f"{stack}.{layer}.{name}": f"attention.{third}" for name in attention}
        found |= {f"{stack}.{layer}.{name}": f"mlp.{third}" for name in mlp}
        found |= {f"{stack}.{layer}.{name}": "norms" for name in norms}
    return found


MODELS: dict[str, dict[str, str]] = {
    "llama, tied": {
        "model.embed_tokens.weight": "embeddings",
        **layered(
            "model.layers",
            12,  # of which two have a number that begins with another one's
            [f"self_attn.{name}_proj.weight" for name in "qkvo"],
            [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")],
            ["input_layernorm.weight", "post_attention_layernorm.weight"],
        ),
        "model.norm.weight": "norms",
    },
    "phi-3: fused, untied": {
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "embeddings",
        **layered("model.layers", 3, ["self_attn.qkv_proj.weight"], ["mlp.gate_up_proj.weight"], ["norm.weight"]),
        "model.norm.weight": "norms",
    },
    "qwen3 moe: norms within attention": {
        "model.embed_tokens.weight": "embeddings",
        **layered(
            "model.layers",
            6,
            ["self_attn.q_proj.weight", "self_attn.k_proj.weight"],
            ["mlp.gate.weight", *(f"mlp.experts.{n}.down_proj.weight" for n in range(12))],
            ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
        ),
    },
    "gpt-2: norms with numbers": {
        "transformer.wte.weight": "embeddings",
        "transformer.wpe.weight": "rest",
        **layered("transformer.h", 3, ["attn.c_attn.bias"], ["mlp.c_fc.weight"], ["ln_1.weight", "ln_2.bias"]),
        "transformer.ln_f.bias": "norms",
    },
    "opt: MLP without a name of its own": {
        "model.decoder.embed_positions.weight": "rest",
        **layered("model.decoder.layers", 3, ["self_attn.q_proj.bias"], ["fc1.weight", "fc2.bias"], ["norm.bias"]),
    },
    "dbrx: attention within a module called norm": {
        "transformer.wte.weight": "embeddings",
        **layered(
            "transformer.blocks",
            3,
            ["norm_attn_norm.attn.Wqkv.weight"],
            ["ffn.experts.mlp.w1", "ffn.router.layer.weight"],
            ["norm_attn_norm.norm_1.weight"],
        ),
    },
    "vision and language: a tower of its own": {
        "model.visual.blocks.0.attn.qkv.weight": "rest",
        "model.visual.blocks.0.norm1.weight": "norms",
        "model.language_model.embed_tokens.weight": "embeddings",
        **layered("model.language_model.layers", 3, ["self_attn.q_proj.weight"], ["mlp.up_proj.weight"], []),
    },
    "a name that is a parameter's alone": {"weight": "rest"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_is_in_one_class_which_its_pattern_selects(name):
    tensors = MODELS[name]
    divided = classes(tensors)
    assert {tensor: label for label, names in divided.items() for tensor in names} == tensors
    assert sum(map(len, divided.values())) == len(tensors)
    found = patterns(divided)
    for label, names in divided.items():  # as --alpha-for has them
        settings = PairSettings((1.0,), alpha_for=((found[label], 0.5),))
        (match,) = match_patterns(SimpleNamespace(tensors=dict.fromkeys(tensors)), settings)  # type: ignore[arg-type]
        assert set(match.names) == set(names), found[label]
    for group, labels in groups(divided).items():
        assert labels
        assert set(labels) <= set(GROUPS[group]) & set(divided)


def test_thirds_of_few_layers_lie_at_the_ends():
    for depth, wanted in {1: ["middle"], 2: ["first", "last"], 4: ["first", "middle", "middle", "last"]}.items():
        names = [f"h.{layer}.attn.weight" for layer in range(depth)]
        third_of = {name: label.partition(".")[2] for label, own in classes(names).items() for name in own}
        assert [third_of[name] for name in names] == wanted


def test_a_vectors_name_is_its_own_and_is_of_no_single_alpha():
    labels = [label for labels in GROUPS.values() for label in labels] + ["norms"]
    chance, seen = random.Random(0), dict[str, Vector]()
    for _ in range(200):
        vector = Vector(0.5).having({label: chance.choice([0.0, 0.25, 0.5, 1.0]) for label in chance.sample(labels, 4)})
        name = f"dpo-ExPO-a0.5{vector.suffix}"
        assert seen.setdefault(name, vector) == vector
        assert is_of_modules(name) == bool(vector.own) == (named_alpha(name) is None)
    assert len(seen) > 100
    assert max(map(len, seen)) < 150


# --- the search -------------------------------------------------------------------------------------------------------

LABELS = ("attention.first", "attention.last", "embeddings", "mlp.first", "mlp.last", "norms")
RULES = Rules(100, 40, 10, 0.95, 0.05, refine=False, resamples=200)


def driven(
    going: Generator[Wanted, Mapping[Vector, Answered], tuple[Step, ...]],
    answers: Callable[[Wanted], Mapping[Vector, Answered]],
) -> tuple[Step, ...]:
    """The steps of a search that is given these answers."""
    wanted = next(going)
    while True:
        try:
            wanted = going.send(answers(wanted))
        except StopIteration as ended_with:
            return tuple(ended_with.value)


def searched(gain: Callable[[Vector], float], seed: int, spread: float = 1.0) -> tuple[tuple[Step, ...], bool | None]:
    """A search over rewards that are made up, two a question, and whether its end is shown to be better."""
    asked = dict[Vector, int]()
    clusters = np.repeat(np.arange(RULES.questions + RULES.confirmation), 2)
    race = clusters[clusters < RULES.questions]

    def rewards(vector: Vector) -> np.ndarray:
        own = np.random.default_rng([seed, *str(vector).encode()])
        common = np.random.default_rng(seed).normal(size=len(clusters))
        return common + gain(vector) + spread * own.normal(size=len(clusters))

    def answers(wanted: Wanted) -> Mapping[Vector, Answered]:
        count = 2 * wanted.questions
        asked.update({one: max(asked.get(one, 0), wanted.questions) for one in wanted.vectors})
        return {one: Answered(rewards(one)[:count], np.full(count, 10.0), np.ones(count)) for one in wanted.vectors}

    steps = driven(search(RULES, (1.0, 2.0), groups(LABELS), race, norms=True), answers)
    most = most_rows(RULES, 3, groups(LABELS), norms=True) - 3 * RULES.confirmation
    assert sum(asked.values()) <= most
    assert all(step.course.last.ends != ONE_LEFT for step in steps[1:]), "the vector as it was may win, too"
    first, last = steps[0].vector, steps[-1].vector
    if not first.alpha or first == last:
        return steps, None
    aside = slice(2 * RULES.questions, None)
    found = confirm(1.0, rewards(last)[aside], rewards(first)[aside], clusters[aside] - RULES.questions, resamples=200)
    return steps, found.is_shown


def test_the_search_finds_what_helps_and_only_multiplies_alpha_by_factors():
    """MLP wants none of it, attention of the first layers twice as much; the rest does not matter."""

    def gain(vector: Vector) -> float:
        attention, mlp = vector.of("attention.first"), (vector.of("mlp.first") + vector.of("mlp.last")) / 2
        return (
            0.4 * min(attention, 4.0) - 0.4 * mlp + 0.8 * min(vector.of("embeddings"), 2.0) - 0.5 * (vector.alpha > 1)
        )

    steps, shown = searched(gain, 3, spread=0.3)
    assert [step.name for step in steps] == [
        "one α for all",
        "norms",
        "attention",
        "mlp",
        "embeddings",
        "first",
        "last",
    ]
    final = steps[-1].vector
    assert shown
    assert final.of("mlp.first") == final.of("mlp.last") == 0.0
    assert final.of("attention.first") >= 2 * steps[0].vector.alpha
    assert gain(final) > gain(steps[0].vector) + 0.5
    for step, before in zip(steps[1:], steps, strict=False):
        assert step.arms[0.0].vector == before.vector, "each begins with what the one before it left"
        assert len({arm.vector for arm in step.arms.values()}) == len(step.arms)


def test_with_noise_alone_it_is_rarely_said_to_be_better():
    """At most in 5 of 100; were it tested on the prompts of the races, in more than half."""
    count = sized(ci=20, full=400)
    found = [searched(lambda _: 0.0, seed)[1] for seed in range(count)]
    tested = [one for one in found if one is not None]
    assert len(tested) > count / 2
    assert sum(tested) <= 0.05 * len(tested) + 3 * np.sqrt(0.05 * 0.95 * len(tested))


def test_nothing_is_searched_where_no_alpha_is_ahead():
    steps, shown = searched(lambda vector: -vector.alpha, 0)
    assert (len(steps), steps[0].taken, shown) == (1, 0.0, None)


def test_an_arm_whose_answers_stop_ending_is_not_taken():
    def answers(limit: float, wanted: Wanted) -> Mapping[Vector, Answered]:
        values = {one: np.full(wanted.questions, one.of("mlp.first")) for one in wanted.vectors}
        return {one: Answered(own, np.ones(len(own)), (own < limit).astype(float)) for one, own in values.items()}

    for limit, wanted_label in ((9.0, "times 2"), (2.0, "as it was")):
        going = search(RULES, (1.0,), {"mlp": ("mlp.first",)}, np.arange(RULES.questions), norms=False)
        steps = driven(going, partial(answers, limit))
        assert steps[1].arms[steps[1].taken].label == wanted_label


def test_arms_that_are_the_same_take_part_once():
    present = Vector(1.0).having({"mlp.first": 0.0})
    assert [arm.label for arm in arms_of("mlp", present, {"mlp": ("mlp.first",)})] == ["as it was"]
    assert len(list(arms_of("first", present, {"first": ("mlp.first", "attention.first")}))) == 5


# --- with engines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = ({"prompt": f"w{n} w{n * 7 % 50} w{n * 3 % 50}"} for n in range(QUESTIONS))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def modules(swept, monkeypatch):  # noqa: F811
    """A function that gives the settings of a small search, over two groups."""
    for group in ("mlp", "first", "middle", "last"):
        monkeypatch.delitem(GROUPS, group)  # type: ignore[arg-type]

    def settings(**others: Any) -> SweepConfig:
        own = {"search": "modules", "alpha": (2.0,), "max_tokens": 6, "batch_tokens": 400, "reward_batch_tokens": 400}
        return swept(**{**own, **others})

    return settings


FOUND = 4
"""A seed with which an α is ahead of 0, so that there is a search; with most versions of torch."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the search lies that is made once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def one(modules, kept: Path) -> SweepConfig:
    """The settings of a finished search."""
    for seed in (FOUND, *range(20)):
        config: SweepConfig = modules(seed=seed, output=str(kept / str(seed)))
        if (kept / str(seed)).exists() or verb.run(config).record["uniform"]["alpha"]:
            return config
    pytest.fail("no seed gives an α that is ahead")


def record_of(config: SweepConfig) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(str(config.output)) / "modules.json").read_text())
    return record


def test_a_search_with_engines(one, tmp_path, processes):  # noqa: F811
    """Its figures are those of its files, its vectors those of extrapolate, and a second run makes nothing."""
    record, folder = record_of(one), Path(str(one.output))
    assert [step["step"] for step in record["steps"]] == [UNIFORM, "norms", "attention", "embeddings"]
    assert record["rows"] == sum(one["n"] for one in record["vectors"]) <= record["most_rows"]
    job = plan_modules(one)
    aside = set(job.race.order.to_confirm)
    rewards = {}
    for vector in record["vectors"]:
        ids = ids_of(folder / "outputs_questions" / f"{vector['name']}.jsonl")
        values = (folder / "rewards_questions" / f"{vector['name']}.jsonl").read_text().splitlines()
        of = dict(zip(ids, map(float, values), strict=True))
        assert len(of) == vector["n"]
        assert np.mean(list(of.values())) == pytest.approx(vector["mean"])
        rewards[vector["alpha"], tuple(sorted(vector["own"].items()))] = {k: of[k] for k in aside & of.keys()}
    zero = rewards[0.0, ()]
    for over in record["over_dpo"]:
        own = rewards[over["alpha"], tuple(sorted(over["own"].items()))]
        assert own.keys() == zero.keys() == aside
        assert over["difference"] == pytest.approx(np.mean([own[k] - zero[k] for k in aside]))
    started = len(processes)
    again = verb.run(one)
    assert (again.status, len(processes)) == ("already complete", started)
    assert record_of(one) == record
    assert "α = 1:" not in str(again), "arms are no α"
    taken = [step["arms"][step["taken"]] for step in record["steps"]]
    assert taken[-1]["own"] == record["final"]["own"]
    own = max(record["vectors"], key=lambda vector: len(vector["own"]))
    vector = Vector(own["alpha"], tuple(sorted(own["own"].items())))
    model = assert_written_as_it_says(job.extrapolating(vector), vector, one, tmp_path)
    sampling = {"seed": one.seed, "max_tokens": one.max_tokens, "engine": "transformers", "dtype": "float32"}
    plain = GenerateConfig(task=one.task, model=str(model), output_dir=str(tmp_path), name="plain", **sampling)
    output = folder / "outputs_questions" / f"{own['name']}.jsonl"
    theirs = generate.run(plain).output.read_text().splitlines()
    assert output.read_text().splitlines() == [theirs[int(name)] for name in ids_of(output)], "the checkpoint's answers"
    assert read_answers(output, task_called("questions"), None).alpha is None, "no curve over α has it"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ids_of(output: Path) -> list[str]:
    meta = json.loads(output.with_name(f"{output.stem}.meta.json").read_text())
    return list(meta["per_row"]["id"])


def assert_written_as_it_says(config: ExtrapolateConfig, vector: Vector, one: SweepConfig, folder: Path) -> Path:
    """The tensors of each class are those of θ at its α."""
    [written] = extrapolate.run(config)
    ours = tensors_of(written.path)
    for alpha in {vector.alpha, *dict(vector.own).values()}:
        plain = ExtrapolateConfig(sft=one.sft, dpo=one.dpo, alpha=(alpha,), output=str(folder / f"plain{alpha}"))
        theirs = tensors_of(extrapolate.run(plain)[0].path)
        for label, names in classes(ours).items():
            if vector.of(label) == alpha:
                assert all(ours[name].equal(theirs[name]) for name in names), label
    return written.path


def test_a_killed_search_ends_as_it_would_have(one, modules, tmp_path):
    other = modules(seed=one.seed, output=str(tmp_path / "killed"))
    words, folder, chance = ["sweep", *arguments_of(other)], Path(str(other.output)), random.Random(3)
    total, codes = rows_in(Path(str(one.output))), []
    for share in sorted(chance.uniform(0.1, 0.9) for _ in range(sized(ci=1, full=4))):
        codes.append(killed_when(lambda: rows_in(folder) >= share * total, lambda: cli.run(words)))  # noqa: B023
        wait_until_no_row_is_written(folder)
    assert -signal.SIGKILL in codes
    assert record_of(other)["verdict"] is None
    assert ended(forked(lambda: cli.run(words))) == 0
    ours, theirs = record_of(other), record_of(one)
    for name in ("verdict", "uniform", "final", "test", "steps", "vectors", "tokens"):
        assert ours[name] == theirs[name], name
    files = [tree(Path(str(config.output))) for config in (one, other)]
    ours, theirs = ({name: rows for name, rows in of.items() if name.endswith(".jsonl")} for of in files)
    assert ours == theirs


def test_what_else_is_done_with_its_folder(one, modules, tmp_path):
    folder = shutil.copytree(str(one.output), tmp_path / "copy")
    with pytest.raises(InputError, match=r"with --search modules, which report has no page for"):
        report.run(ReportConfig(runs=(str(folder),), output=str(tmp_path / "report.html")))
    with pytest.raises(InputError, match="with --search modules, which has compared the rows"):
        verb.run(modules(seed=one.seed, output=str(folder), search="race", alpha=(1.0, 2.0)))
    for changed, named in (({"confidence": 0.9, "overwrite": True}, "confidence"), ({"alpha": (1.0, 2.0)}, "alphas")):
        with pytest.raises(InputError, match=f"different rules .*{named}"):
            verb.run(modules(seed=one.seed, output=str(folder), **changed))
    with pytest.raises(InputError, match="different max-tokens"):
        verb.run(modules(seed=one.seed, output=str(folder), max_tokens=5))
    assert plan_with_cost(one).describe()["rows_to_generate"] == 0
    (folder / "modules.json").rename(folder / "sweep.json")
    with pytest.raises(InputError, match="a sweep without --search modules"):
        verb.run(modules(seed=one.seed, output=str(folder)))


def test_the_plan_says_what_it_takes_at_most(modules, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "_probe", lambda _: [Seen(label, 1, 6.0, 1.0, 1.0, 1) for label in ("policy", "rm")])
    plan = plan_with_cost(modules()).describe()
    cli.print_plan(plan, as_json=False)
    assert "half of what the arms of each race" in capsys.readouterr().out
    rules = plan_modules(modules()).race.rules
    races = 2 + 2 * 5  # arms of the norms' race, and of two groups'
    aside = rules.confirmation
    assert plan["rows_to_generate"] == QUESTIONS - 2 * aside + races * rules.questions // 2 + 3 * aside


@pytest.mark.filterwarnings("ignore")
def test_of_an_adapter_what_it_moves_is_searched_and_of_other_pairs_what_is_not_excluded(modules, llama_pair, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    adapter = str(save_adapter(llama_pair[0], tmp_path / "adapter", lora))
    job = plan_modules(modules(dpo=adapter))
    assert {label.partition(".")[0] for label in job.classes} == {"attention"}
    assert {name.split(".")[-2] for names in job.classes.values() for name in names} == {"q_proj"}
    vector = Vector(2.0).having({next(iter(job.classes)): 1.0})
    assert job.sweep.job_of(vector).name.startswith("adapter-ExPO-a2.0-for-attn")
    kept = plan_modules(modules(exclude=("norm", "embed_tokens")))
    assert kept.classes.keys().isdisjoint({"norms"})
    assert kept.classes["embeddings"] == ("lm_head.weight",)
    with pytest.raises(InputError, match="no attention, MLP or embeddings that move"):
        plan_modules(modules(exclude=("attn", "mlp", "embed", "head")))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"refine": True}, "--refine"),
        ({"with_sft": True}, "--with-sft"),
        ({"alpha_for": ("mlp=0",)}, "--alpha-for"),
        ({"switch": "adapter"}, "--switch adapter"),
        ({"ray": "auto"}, "--ray"),
        ({"space": "logits", "engine": "transformers"}, "--space logits"),
        ({"reward_model": ("a", "b")}, "a second --reward-model"),
        ({"alpha": (-0.5, 1.0)}, "an --alpha below 0"),
    ],
)
def test_settings_that_it_refuses(modules, changed, named):
    with pytest.raises(InputError, match=f"--search modules does not take {named}"):
        modules(**changed)
