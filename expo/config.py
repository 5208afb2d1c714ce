"""The settings of every command, one frozen dataclass each; `config_files.py` reads them from files.

Every default exists here and only here: the command line takes its defaults from these classes. A value is
validated in `__post_init__`, so that Python users are checked as flags are.
To add a setting, add a field with its docstring here and one option in `commands/`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

from expo.checks import (
    read_alpha_for,
    read_bytes,
    require,
    require_alpha,
    require_base_url,
    require_choice,
    require_device,
    require_name,
    require_regexes,
    require_repositories,
    require_text,
)
from expo.files import is_utf8, shown
from expo.parts import read_part, require_one_way

Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Missing: TypeAlias = Literal["error", "copy-dpo"]
Vocab: TypeAlias = Literal["error", "common"]
GenerateEngine: TypeAlias = Literal["auto", "vllm", "transformers", "openai"]
ScoreEngine: TypeAlias = Literal["auto", "transformers"]

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


DEFAULT_TEMPERATURE = 0.7
"""The paper's, where neither the user nor the task says another."""

ONE_ANSWER_TASKS = ("alpaca", "mtbench")
"""The tasks whose files have room for one answer per prompt."""


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every command that writes something shares."""

    overwrite: bool = False
    """Replace an output made with other settings; the old one stays until the new one is whole."""
    dry_run: bool = False
    """Print the plan and write nothing."""


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """How θ_sft and θ_dpo are combined, beside α."""

    rule: str = "linear"
    """The formula that combines them, by its name in `expo.theta.rules.RULES`; linear is θ_dpo + α(θ_dpo − θ_sft)."""
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
    """Take NaN and infinity in the result instead of refusing them."""

    def _require_rules(self) -> None:
        require_choice("--missing", self.missing, Missing)
        require_choice("--vocab", self.vocab, Vocab)
        _ = self.alphas_for  # read once, so that they are checked
        require_regexes("--exclude", self.exclude)

    @property
    def alphas_for(self) -> tuple[tuple[str, float], ...]:
        """`alpha_for` as patterns and numbers."""
        return tuple(map(read_alpha_for, self.alpha_for))


RULES = tuple(field.name for field in fields(RulesConfig))


@dataclass(frozen=True, kw_only=True)
class ThetaConfig(RulesConfig):
    """One θ(α) that an engine makes while it loads, without a checkpoint of it on the disk."""

    sft: str
    """The SFT checkpoint θ_sft: a directory, a hub id, or `id@revision`."""
    dpo: str
    """The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it."""
    alpha: float
    """The extrapolation strength; 0 is DPO itself, −1 is SFT."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        for flag, path in (("--sft", self.sft), ("--dpo", self.dpo)):
            require(is_utf8(path), f"{flag} {shown(path)} is not UTF-8; rename the folder")
        require_alpha(self.alpha)
        object.__setattr__(self, "alpha", float(self.alpha) + 0.0)  # −0.0 becomes 0.0
        self._require_rules()


@dataclass(frozen=True, kw_only=True)
class ExtrapolateConfig(CommonConfig, RulesConfig):
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
    verify: bool = False
    """Read all weights once more: of the inputs, whose checksums are recorded, and of an output that is complete; they
    are compared with what its expo.json says."""
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
            require(is_utf8(path), f"{flag} {shown(path)} is not UTF-8; rename the folder")
        require(len(self.alpha) > 0, "--alpha is missing: give at least one, such as --alpha 0.3")
        for alpha in self.alpha:
            require_alpha(alpha)
        twice = next((alpha for alpha in self.alpha if self.alpha.count(alpha) > 1), None)
        require(twice is None, f"--alpha {twice} is given more than once")
        object.__setattr__(self, "alpha", tuple(float(alpha) + 0.0 for alpha in self.alpha))  # −0.0 becomes 0.0
        require_choice("--dtype", self.dtype, Dtype)
        self._require_rules()
        _ = self.max_shard_bytes  # read once, so that it is checked
        require_device(self.device)
        require(self.workers is None or self.workers > 0, f"--workers must be positive, not {self.workers}")
        require(self.push_to_hub is not None or not self.private, "--private is for --push-to-hub, which is missing")
        require_repositories(self.repositories, inputs=(self.sft, self.dpo))

    @property
    def repositories(self) -> tuple[str, ...]:
        """Where on the hub each α's output goes, in the order of `alpha`; empty where none does."""
        if self.push_to_hub is None:
            return ()
        return tuple(self.push_to_hub.replace("{alpha}", repr(alpha)) for alpha in self.alpha)

    @property
    def max_shard_bytes(self) -> int | None:
        """`max_shard_size` in bytes; None keeps DPO's files."""
        return None if self.max_shard_size == "keep" else read_bytes("--max-shard-size", self.max_shard_size)


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
        require(known, f"--output is a picture ({', '.join(PICTURE_SUFFIXES)}), not {self.output!r}")
        require_device(self.device)
        require(self.workers is None or self.workers > 0, f"--workers must be positive, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class RowsConfig(CommonConfig):
    """What the commands that work row by row share."""

    task: str
    """`ultrafeedback`, `alpaca`, `mtbench`, or a prompt file (.jsonl, .json, .parquet, .csv)."""
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
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), str):
                require_text("TASK" if field.name == "task" else f"--{field.name}".replace("_", "-"), value)
        require(self.limit is None or self.limit > 0, f"--limit must be positive, not {self.limit}")
        require_choice("--dtype", self.dtype, Dtype)
        require_device(self.device)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RowsConfig, RulesConfig):
    """`expo generate`: answer a task's prompts. The decoding defaults are the paper's.

    What answers is `model`, or the θ(α) that `sft`, `dpo`, `alpha` and the rules make while the engine loads.
    """

    model: str | None = None
    """The model that answers: a directory, a hub id, or `id@revision`; for openai the server's name for it."""
    sft: str | None = None
    """The SFT checkpoint θ_sft of the θ(α) that answers."""
    dpo: str | None = None
    """The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it."""
    alpha: float | None = None
    """The extrapolation strength."""
    name: str | None = None
    """Name of the output files and of the generator in them. Default: the model's, or `<DPO name>-ExPO-a<alpha>`."""
    engine: GenerateEngine = "auto"
    """auto takes vLLM where it is installed and can run, else transformers."""
    base_url: str | None = None
    """The openai engine's server, as `http://localhost:8000/v1`; the key is read from OPENAI_API_KEY alone."""
    concurrency: int = 32
    """Most requests the openai engine has under way at once."""
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
    temperature: float | None = None
    """Softmax temperature; 0 decodes greedily. Default: the row's category's where the task has some, else 0.7."""
    top_k: int = 50
    """Sample among the k likeliest tokens; −1 or 0 for all. −1 sends the openai engine's server no field of vLLM's."""
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
        self._require_source()
        require_choice("--engine", self.engine, GenerateEngine)
        require_base_url(self.base_url)
        require(self.concurrency > 0, f"--concurrency must be positive, not {self.concurrency}")
        require(
            self.temperature is None or (math.isfinite(self.temperature) and self.temperature >= 0),
            f"--temperature must be 0 or more, not {self.temperature}",
        )
        require(self.top_k >= -1, f"--top-k must be -1 or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"--top-p must lie in (0, 1], not {self.top_p}")
        for flag, penalty in (
            ("--presence-penalty", self.presence_penalty),
            ("--frequency-penalty", self.frequency_penalty),
        ):
            require(-2 <= penalty <= 2, f"{flag} must lie in [-2, 2], not {penalty}")
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")
        require(self.max_tokens > 0, f"--max-tokens must be positive, not {self.max_tokens}")
        require(min(self.stop_token_id, default=0) >= 0, f"--stop-token-id must be 0 or more, not {self.stop_token_id}")
        require(self.n > 0, f"--n must be positive, not {self.n}")
        one_answer = self.n > 1 and self.task in ONE_ANSWER_TASKS
        require(not one_answer, f"--n above 1 is not for {self.task}: one answer per row")
        require(self.batch_tokens > 0, f"--batch-tokens must be positive, not {self.batch_tokens}")
        tensor_parallel = self.tensor_parallel
        require(
            tensor_parallel is None or tensor_parallel > 0,
            f"--tensor-parallel must be positive, not {tensor_parallel}",
        )
        require_one_way(self.part, self.join, self.data_parallel)
        if self.part is not None:
            object.__setattr__(self, "part", str(read_part(self.part, os.environ)))
        bad = [pair for pair in self.engine_arg if not re.match(r"[A-Za-z_]\w*=", pair)]
        require(not bad, f"--engine-arg takes KEY=VALUE, not {bad[:1]}")
        require_name(self.name)

    def _require_source(self) -> None:
        pair = {"--sft": self.sft, "--dpo": self.dpo, "--alpha": self.alpha}
        given = [flag for flag, value in pair.items() if value is not None]
        if self.model is None:
            lacking = ", ".join(flag for flag in pair if flag not in given)
            require(bool(given), "what answers is missing: give --model, or --sft, --dpo and --alpha")
            require(not lacking, f"θ(α) is made from --sft, --dpo and --alpha: {lacking} is missing")
        else:
            rules = [
                f"--{name}".replace("_", "-") for name in RULES if getattr(self, name) != getattr(RulesConfig, name)
            ]
            require(not given, f"--model answers as it is, and {', '.join(given)} make another model: give either")
            require(not rules, f"{', '.join(rules)} is for --sft, --dpo and --alpha, not for --model")
        _ = self.theta  # made once, so that it is checked

    @property
    def theta(self) -> ThetaConfig | None:
        """The θ(α) that answers; None where a model does."""
        if self.sft is None or self.dpo is None or self.alpha is None:
            return None
        rules = {name: getattr(self, name) for name in RULES}
        return ThetaConfig(sft=self.sft, dpo=self.dpo, alpha=self.alpha, **rules)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(RowsConfig):
    """`expo score`: rate a generate output with a reward model."""

    name: str
    """Name of the output to score, as given to (or made by) `expo generate`."""
    outputs: str | None = None
    """The file to score, where it is not `outputs_<task>/<name>`."""
    dataset: str | None = None
    """The questions from elsewhere, for mtbench, whose answers come without them: a local file or a hub dataset id."""
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
        require_choice("--engine", self.engine, ScoreEngine)
        require(self.batch_tokens > 0, f"--batch-tokens must be positive, not {self.batch_tokens}")
        require(
            self.max_length is None or self.max_length > 0,
            f"--max-length must be positive, not {self.max_length}",
        )
        require_name(self.name)


COMMANDS: dict[str, type[ExtrapolateConfig] | type[GenerateConfig] | type[InspectConfig] | type[ScoreConfig]] = {
    "extrapolate": ExtrapolateConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
    "score": ScoreConfig,
}
