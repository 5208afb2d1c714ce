"""The settings of every command, one frozen dataclass each, and the TOML files they may come from.

Every default exists here and only here: the command line takes its defaults from these classes. A value is
validated in `__post_init__`, so that Python users are checked as flags are.
To add a setting, add a field with its docstring here and one option in `commands/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from expo.errors import InputError
from expo.files import is_utf8, shown
from expo.parts import read_part, require_one_way

Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Missing: TypeAlias = Literal["error", "copy-dpo"]
Vocab: TypeAlias = Literal["error", "common"]
GenerateEngine: TypeAlias = Literal["auto", "vllm", "transformers"]
ScoreEngine: TypeAlias = Literal["auto", "transformers"]

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")

HUB_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""A user's, an organisation's or a repository's name on the hub."""


def is_hub_id(text: str) -> bool:
    """Whether the text is spelled as the hub spells a repository: `name` or `owner/name`."""
    parts = text.split("/")
    return len(parts) <= 2 and all(map(HUB_NAME.fullmatch, parts)) and not re.search(r"--|\.\.|\.git$", text)


MAX_ALPHA = 3.4028234663852886e38
"""The largest float32, in which the arithmetic is done."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_choice(flag: str, value: str, choices: object) -> None:
    names = get_args(choices)
    _require(value in names, f"{flag} is one of {', '.join(names)}, not {value!r}")


def _require_device(value: str) -> None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None
    _require(known, f"--device is auto, cpu, cuda or cuda:N, not {value!r}")


def _require_regexes(flag: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{flag} {pattern!r} is not a regular expression: {error}") from error


BYTE_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)},
}


def _read_bytes(flag: str, value: str) -> int:
    """A size such as 5GB (10⁹) or 5GiB (2³⁰) in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)", value, re.IGNORECASE)
    units = {name.upper(): size for name, size in BYTE_UNITS.items()}
    nbytes = int(float(found[1]) * units[found[2].upper()]) if found and found[2].upper() in units else 0
    _require(nbytes > 0, f"{flag} is a size such as 500MB or 5GB, not {value!r}")
    return nbytes


def _read_alpha_for(value: str) -> tuple[str, float]:
    """`REGEX=A` as a pattern and a number; the last `=` counts."""
    pattern, equals, number = value.rpartition("=")
    try:
        alpha = float(number)
    except ValueError:
        alpha = math.nan
    _require(
        bool(equals and pattern) and math.isfinite(alpha),
        f"--alpha-for is REGEX=A with a finite number A, such as 'self_attn=0.5', not {value!r}",
    )
    _require_regexes("--alpha-for", (pattern,))
    return pattern, alpha + 0.0


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every command that writes something shares."""

    overwrite: bool = False
    """Replace an output made with other settings; the old one stays until the new one is whole."""
    dry_run: bool = False
    """Print the plan and write nothing."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolateConfig(CommonConfig):
    """`expo extrapolate`: write θ(α) = θ_dpo + α(θ_dpo − θ_sft)."""

    sft: str
    """The SFT checkpoint θ_sft: a directory, a hub id, or `id@revision`."""
    dpo: str
    """The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it."""
    alpha: tuple[float, ...] = ()
    """The extrapolation strengths, one output folder each; 0 is DPO itself, −1 is SFT."""
    output: str | None = None
    """Output folder; may hold `{alpha}`. Default `checkpoints/<DPO name>-ExPO-a<alpha>`."""
    device: str = "auto"
    """Where the arithmetic runs: auto, cpu, cuda or cuda:N (auto: the CPU, which keeps up with the disk)."""
    dtype: Dtype = "auto"
    """Data type of the written floating-point tensors; auto keeps each DPO tensor's own."""
    workers: int | None = None
    """Threads that read, combine and write pieces. Default: the CPU count, at most 4."""
    max_shard_size: str = "keep"
    """Most bytes of one output file, such as 500MB or 5GB; keep has DPO's files."""
    alpha_for: tuple[str, ...] = ()
    """`REGEX=A`: tensors (the pattern is searched in their names) with an α of their own; the first match wins."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors that are copied from DPO, whatever `alpha_for` says."""
    missing: Missing = "error"
    """What to do with a tensor that SFT lacks: refuse, or copy it from DPO."""
    vocab: Vocab = "error"
    """Where vocabularies differ in size: refuse, or extrapolate the common rows and copy DPO's further rows."""
    allow_pickle: bool = False
    """Read weights that exist as .bin files only, which are pickles, with torch's weights_only loader."""
    allow_nonfinite: bool = False
    """Write NaN and infinity instead of refusing them."""
    fsync: bool = True
    """Force every file to the disk before it gets its final name."""
    push_to_hub: str | None = None
    """Upload the finished output to this model repository; with several α it holds `{alpha}`."""
    private: bool = False
    """Make that repository private where it does not exist yet."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        for flag, path in (("--sft", self.sft), ("--dpo", self.dpo), ("--output", self.output or "")):
            _require(is_utf8(path), f"{flag} {shown(path)} is not UTF-8; rename the folder")
        _require(len(self.alpha) > 0, "--alpha is missing: give at least one, such as --alpha 0.3")
        for alpha in self.alpha:
            _require(math.isfinite(alpha), f"--alpha must be a finite number, not {alpha!r}")
            _require(abs(alpha) <= MAX_ALPHA, f"--alpha {alpha!r} is more than float32 holds")
        duplicates = sorted({a for a in self.alpha if self.alpha.count(a) > 1})
        _require(not duplicates, f"--alpha {duplicates[:1]} is given more than once")
        object.__setattr__(self, "alpha", tuple(float(alpha) + 0.0 for alpha in self.alpha))  # −0.0 becomes 0.0
        _require_choice("--dtype", self.dtype, Dtype)
        _require_choice("--missing", self.missing, Missing)
        _require_choice("--vocab", self.vocab, Vocab)
        _ = self.max_shard_bytes, self.alphas_for  # read them once, so that they are checked
        _require_device(self.device)
        _require_regexes("--exclude", self.exclude)
        _require(self.workers is None or self.workers > 0, f"--workers must be positive, not {self.workers}")
        _require(self.push_to_hub is not None or not self.private, "--private is for --push-to-hub, which is missing")
        _require_repositories(self.repositories, inputs=(self.sft, self.dpo))

    @property
    def repositories(self) -> tuple[str, ...]:
        """Where on the hub each α's output goes, in the order of `alpha`; empty where none does."""
        if self.push_to_hub is None:
            return ()
        return tuple(self.push_to_hub.replace("{alpha}", repr(alpha)) for alpha in self.alpha)

    @property
    def max_shard_bytes(self) -> int | None:
        """`max_shard_size` in bytes; None keeps DPO's files."""
        return None if self.max_shard_size == "keep" else _read_bytes("--max-shard-size", self.max_shard_size)

    @property
    def alphas_for(self) -> tuple[tuple[str, float], ...]:
        """`alpha_for` as patterns and numbers."""
        return tuple(map(_read_alpha_for, self.alpha_for))


def _require_repositories(repositories: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    for repository in repositories:
        well_formed = "/" in repository and is_hub_id(repository)
        _require(well_formed, f"--push-to-hub takes a hub id such as me/my-model, not {repository!r}")
        known = [model.partition("@")[0].lower() for model in inputs]
        _require(repository.lower() not in known, f"--push-to-hub {repository} is an input; choose another repository")
    if len(set(repositories)) < len(repositories):
        raise InputError(f"--push-to-hub {repositories[0]} takes one α; with several, put {{alpha}} in the name")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(CommonConfig):
    """`expo inspect`: how far θ_dpo is from θ_sft, and whether the pair looks like one ExPO suits."""

    sft: str
    """The SFT checkpoint θ_sft: a directory, a hub id, or `id@revision`."""
    dpo: str
    """The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it."""
    output: str | None = None
    """A picture (.png, .svg or .pdf) of ‖Δ‖/‖θ_sft‖ by layer and module; by default there is none."""
    device: str = "auto"
    """Where the norms are computed: auto, cpu, cuda or cuda:N (auto: the CPU, which keeps up with the disk)."""
    workers: int | None = None
    """Threads that read and measure pieces. Default: the CPU count, at most 4."""
    allow_pickle: bool = False
    """Read weights that exist as .bin files only, which are pickles, with torch's weights_only loader."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        known = self.output is None or Path(self.output).suffix.lower() in PICTURE_SUFFIXES
        _require(known, f"--output is a picture ({', '.join(PICTURE_SUFFIXES)}), not {self.output!r}")
        _require_device(self.device)
        _require(self.workers is None or self.workers > 0, f"--workers must be positive, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class RowsConfig(CommonConfig):
    """What the commands that work row by row share."""

    task: str
    """`ultrafeedback`, `alpaca`, or a prompt file (.jsonl, .json, .parquet, .csv)."""
    output_dir: str = "."
    """The folder that holds `outputs_<task>/` and `rewards_<task>/`."""
    limit: int | None = None
    """Use only the first rows; a larger limit later extends the run."""
    device: str = "auto"
    """Where the transformers engine runs: auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "auto"
    """Data type the model runs in; auto keeps the checkpoint's own."""
    chat_template: str | None = None
    """A Jinja file used instead of the model's own chat template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        _require(self.limit is None or self.limit > 0, f"--limit must be positive, not {self.limit}")
        _require_choice("--dtype", self.dtype, Dtype)
        _require_device(self.device)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RowsConfig):
    """`expo generate`: answer a task's prompts. The decoding defaults are the paper's."""

    model: str
    """The model that answers: a directory, a hub id, or `id@revision`."""
    name: str | None = None
    """Name of the output files and of the generator in them. Default: the model's name."""
    engine: GenerateEngine = "auto"
    """auto takes vLLM where it is installed and can run, else transformers."""
    engine_arg: tuple[str, ...] = ()
    """`KEY=VALUE` pairs handed to the engine as they are (VALUE read as JSON where it is JSON)."""
    dataset: str | None = None
    """The task's prompts from elsewhere: a local file or a hub dataset id."""
    system: str | None = None
    """A system message put before every prompt."""
    n: int = 1
    """Samples per prompt; sample j has seed + j."""
    tensor_parallel: int | None = None
    """GPUs one vLLM engine is spread over. Default: all."""
    data_parallel: int = 1
    """Processes, each with an engine and GPUs of its own, that share the rows."""
    part: str | None = None
    """`i/N`: do the i-th of N parts of the rows; `slurm` takes both from the array job's environment."""
    join: int | None = None
    """Join the finished output of this many parts."""
    batch_tokens: int = 16384
    """Token budget (prompt and answer, padding counted) of one batch of the transformers engine."""
    temperature: float = 0.7
    """Softmax temperature; 0 decodes greedily."""
    top_k: int = 50
    """Sample among the k likeliest tokens; −1 or 0 for all."""
    top_p: float = 0.9
    """Sample within this probability mass."""
    presence_penalty: float = 0.1
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.1
    """Subtracted from a token's logit once per time it was generated."""
    seed: int = 42
    """Seed of every request."""
    max_tokens: int = 2048
    """Most new tokens per answer."""
    stop_token_id: tuple[int, ...] = ()
    """Further token ids that end an answer."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        _require_choice("--engine", self.engine, GenerateEngine)
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"--temperature must be 0 or more, not {self.temperature}",
        )
        _require(self.top_k >= -1, f"--top-k must be -1 or more, not {self.top_k}")
        _require(0 < self.top_p <= 1, f"--top-p must lie in (0, 1], not {self.top_p}")
        for flag, penalty in (
            ("--presence-penalty", self.presence_penalty),
            ("--frequency-penalty", self.frequency_penalty),
        ):
            _require(-2 <= penalty <= 2, f"{flag} must lie in [-2, 2], not {penalty}")
        _require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")
        _require(self.max_tokens > 0, f"--max-tokens must be positive, not {self.max_tokens}")
        _require(self.n > 0, f"--n must be positive, not {self.n}")
        _require(self.n == 1 or self.task != "alpaca", "--n above 1 is not for alpaca: one answer per row")
        _require(self.batch_tokens > 0, f"--batch-tokens must be positive, not {self.batch_tokens}")
        tensor_parallel = self.tensor_parallel
        _require(
            tensor_parallel is None or tensor_parallel > 0,
            f"--tensor-parallel must be positive, not {tensor_parallel}",
        )
        require_one_way(self.part, self.join, self.data_parallel)
        if self.part is not None:
            object.__setattr__(self, "part", str(read_part(self.part, os.environ)))
        bad = [pair for pair in self.engine_arg if not re.match(r"[A-Za-z_]\w*=", pair)]
        _require(not bad, f"--engine-arg takes KEY=VALUE, not {bad[:1]}")
        _require_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(RowsConfig):
    """`expo score`: rate a generate output with a reward model."""

    name: str
    """Name of the output to score, as given to (or made by) `expo generate`."""
    outputs: str | None = None
    """The file to score, where it is not `outputs_<task>/<name>`."""
    reward_model: str = "weqweasdas/RM-Mistral-7B"
    """The reward model: a directory, a hub id, or `id@revision`; one label."""
    engine: ScoreEngine = "auto"
    """The engine that runs the reward model."""
    batch_tokens: int = 16384
    """Token budget of one batch, padding counted."""
    max_length: int | None = None
    """Longest conversation in tokens; longer ones lose their end and are marked. Default: the model's own."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        _require_choice("--engine", self.engine, ScoreEngine)
        _require(self.batch_tokens > 0, f"--batch-tokens must be positive, not {self.batch_tokens}")
        _require(
            self.max_length is None or self.max_length > 0,
            f"--max-length must be positive, not {self.max_length}",
        )
        _require_name(self.name)


def _require_name(name: str | None) -> None:
    plain = name is None or (name == Path(name).name and not name.startswith("."))
    _require(plain, f"--name {name!r} is not a plain file name")


COMMANDS: dict[str, type[ExtrapolateConfig] | type[GenerateConfig] | type[InspectConfig] | type[ScoreConfig]] = {
    "extrapolate": ExtrapolateConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
    "score": ScoreConfig,
}

Tables: TypeAlias = dict[str, dict[str, Any]]


def field_names(command: str) -> set[str]:
    """The names of a command's settings, as Python spells them."""
    return {field.name for field in dataclasses.fields(COMMANDS[command])}


def load_tables(path: Path, *, extra_tables: frozenset[str] = frozenset()) -> Tables:
    """Read a TOML file with one table per command and `[common]`.

    Args:
        path: The file.
        extra_tables: Further table names that are allowed and returned unchecked.

    Returns:
        Table name → key → value, keys spelled with underscores.

    Raises:
        InputError: No such file, no TOML, or an unknown table or key (the nearest one is named).
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    known_tables = {"common", *COMMANDS, *extra_tables}
    tables: Tables = {}
    for table, content in document.items():
        if table not in known_tables or not isinstance(content, dict):
            raise InputError(f"{path}: unknown table [{table}]{_nearest(table, known_tables)}")
        tables[table] = content if table in extra_tables else _checked_keys(path, table, content)
    return tables


def _checked_keys(path: Path, table: str, content: dict[str, Any]) -> dict[str, Any]:
    known = set().union(*map(field_names, COMMANDS)) if table == "common" else field_names(table)
    values = {key.replace("-", "_"): value for key, value in content.items()}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r} in [{table}]{_nearest(key, known)}")
        repeatable = key in _repeatable_names()
        if isinstance(value, (list, dict)) and not repeatable:
            raise InputError(f"{path}: {key!r} in [{table}] takes one value, not {value!r}")
        values[key] = [value] if repeatable and not isinstance(value, list) else value
    return values


def _repeatable_names() -> set[str]:
    fields = (field for kind in COMMANDS.values() for field in dataclasses.fields(kind))
    return {field.name for field in fields if isinstance(field.default, tuple)}


def _nearest(word: str, known: set[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def values_for(command: str, tables: Tables) -> dict[str, Any]:
    """The values a file holds for one command: its own table over `[common]`."""
    shared = {key: value for key, value in tables.get("common", {}).items() if key in field_names(command)}
    return {**shared, **tables.get(command, {})}
