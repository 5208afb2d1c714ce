"""The settings of the commands that combine a pair of checkpoints: extrapolate, inspect, and θ(α) made in an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from expo.config.as_adapter import require_alone, require_rank
from expo.config.course import CourseConfig
from expo.config.parts import PartsConfig
from expo.files import is_utf8, shown
from expo.settings import (
    Setting,
    changes_weights,
    read_alpha_for,
    read_bytes,
    require,
    require_alpha,
    require_choice,
    require_device,
    require_regexes,
    require_repositories,
)

Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Missing: TypeAlias = Literal["error", "copy-dpo"]
Vocab: TypeAlias = Literal["error", "common"]

NO_DPO = "--dpo is missing: give the DPO model, or a training run's --checkpoint STEP=MODEL"
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


Sft: TypeAlias = Annotated[
    str,
    Setting(
        "The SFT checkpoint θ_sft, or the model a training run began with: a directory, hub id, or id@revision.",
        metavar="SFT",
    ),
]
Dpo: TypeAlias = Annotated[
    str,
    Setting(
        "The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it. [default: the last "
        "--checkpoint]",
        metavar="DPO",
        flags=("--aligned",),
    ),
]
AllowPickle: TypeAlias = Annotated[
    bool, Setting("Read weights that exist only as pickles (.bin), with torch's weights_only loader.")
]
Workers: TypeAlias = Annotated[
    int | None, Setting("Number of threads. [default: the CPU count, at most 4]", metavar="N")
]


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """What every command with settings shares."""

    HEADING = "All commands"

    @property
    def derived(self) -> frozenset[str]:
        """The settings that follow from others, and are left out of a command line."""
        return frozenset()

    dry_run: Annotated[bool, Setting("Print the plan and write nothing.")] = False


@dataclass(frozen=True, kw_only=True)
class CommonConfig(CommandConfig):
    """What every command that writes something shares."""

    overwrite: Annotated[
        bool, Setting("Replace an output made with different settings, once the new one is complete.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PairConfig(CourseConfig):
    """How θ_sft and θ_dpo are combined, beside α."""

    HEADING = "How the pair is combined"

    alpha_for: Annotated[
        tuple[str, ...],
        changes_weights(
            "Use another α for tensors whose names match; repeatable, the first match wins.",
            metavar="REGEX=A",
            absent=(),
        ),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        changes_weights(
            "Copy tensors whose names match from DPO, whatever --alpha-for says; repeatable.",
            metavar="REGEX",
            absent=(),
        ),
    ] = ()
    missing: Annotated[
        Missing,
        changes_weights(
            "Tensors that only one model has: refuse the pair, or copy DPO's and drop SFT's.", absent="error"
        ),
    ] = "error"
    vocab: Annotated[
        Vocab,
        changes_weights(
            "Vocabularies of different sizes: refuse the pair, or extrapolate the rows both have and copy DPO's rest.",
            absent="error",
        ),
    ] = "error"
    allow_pickle: AllowPickle = False
    allow_nonfinite: Annotated[
        bool, changes_weights("Accept NaN and infinity in θ(α) instead of refusing them.", absent=False)
    ] = False

    def _require_pair_settings(self) -> None:
        require_choice("--missing", self.missing, Missing)
        require_choice("--vocab", self.vocab, Vocab)
        _ = self.alphas_for  # read once, so that they are checked
        require_regexes("--exclude", self.exclude)

    @property
    def alphas_for(self) -> tuple[tuple[str, float], ...]:
        """`alpha_for` as patterns and numbers."""
        return tuple(map(read_alpha_for, self.alpha_for))


PAIR_SETTINGS = tuple(field.name for field in fields(PairConfig))
"""Those that a command which combines a pair has beside the pair itself and α."""


@dataclass(frozen=True, kw_only=True)
class ThetaConfig(PairConfig):
    """One θ(α) that an engine makes while it loads, without a checkpoint of it on the disk."""

    sft: Sft
    alpha: Annotated[float, Setting("Extrapolation strength α; 0 is DPO itself, −1 is SFT.", metavar="A")] = math.nan
    dpo: Dpo = ""
    target_step: Annotated[
        float | None, Setting("With checkpoint: the step to extrapolate to, in place of α.", metavar="T")
    ] = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        self._settle_course(self.dpo)
        for spelling, path in (("--sft", self.sft), ("--dpo", self.dpo)):
            require(is_utf8(path), f"{spelling} {shown(path)} is not UTF-8; rename the folder")
        if self.target_step is not None:
            given = () if math.isnan(self.alpha) else (self.alpha,)
            object.__setattr__(self, "alpha", self._alphas_of_steps(given, (self.target_step,))[0])
            object.__setattr__(self, "target_step", None)  # α says it, also where it is replaced
        require_alpha(self.alpha)
        object.__setattr__(self, "alpha", float(self.alpha) + 0.0)  # −0.0 becomes 0.0
        self._require_pair_settings()


@dataclass(frozen=True, kw_only=True)
class ExtrapolateConfig(PairConfig, PartsConfig, CommonConfig):
    """`expo extrapolate`: write θ(α) = θ_dpo + α(θ_dpo − θ_sft), or a training run's θ at a later step."""

    sft: Sft
    dpo: Dpo = ""
    alpha: Annotated[
        tuple[float, ...],
        Setting(
            "Extrapolation strength α; 0 is DPO itself, −1 is SFT; repeatable, one output each.  [required]",
            metavar="A",
        ),
    ] = ()
    target_step: Annotated[
        tuple[float, ...],
        Setting("With --checkpoint: a step to extrapolate to; repeatable, one output each.", metavar="T"),
    ] = ()
    output: Annotated[
        str | None,
        Setting(
            "Output folder; may contain {alpha} or {step}. [default: checkpoints/<DPO name>-ExPO-a<A>, or -t<T>]",
            metavar="DIR",
        ),
    ] = None
    as_adapter: Annotated[
        bool,
        changes_weights(
            "Write a LoRA adapter that makes θ(α) of SFT, where DPO is one or with --rank, instead of a checkpoint.",
            absent=False,
        ),
    ] = False
    rank: Annotated[
        int | None,
        changes_weights(
            "With --as-adapter, where DPO is a whole checkpoint: the rank of the factors that approximate "
            "θ_dpo − θ_sft, layer by layer.",
            metavar="R",
            absent=None,
        ),
    ] = None
    device: Annotated[
        str,
        Setting("Device to compute on; auto is the CPU, which keeps up with the disk.", metavar="auto|cpu|cuda[:i]"),
    ] = "auto"
    dtype: Annotated[
        Dtype, changes_weights("Data type of the written weights; auto keeps each DPO tensor's own.", absent="auto")
    ] = "auto"
    workers: Workers = None
    stream_sft: Annotated[
        bool,
        Setting(
            "Read SFT's tensors from the hub by byte ranges while they are combined, instead of downloading a copy."
        ),
    ] = False
    max_shard_size: Annotated[
        str,
        changes_weights(
            "Maximum size of an output file, such as 500MB or 5GB; keep preserves the DPO shard layout.",
            metavar="keep|SIZE",
            absent="keep",
        ),
    ] = "keep"
    verify: Annotated[
        bool,
        Setting(
            "Checksum all weights: record the inputs' checksums, and check finished outputs against their manifest."
        ),
    ] = False
    fsync: Annotated[bool, Setting("Flush every file to disk before it gets its final name.")] = True
    push_to_hub: Annotated[
        str | None,
        Setting("Upload the finished output to this model repository; may contain {alpha} or {step}.", metavar="ID"),
    ] = None
    private: Annotated[bool, Setting("Create that repository as private, if it does not exist yet.")] = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        self._settle_course(self.dpo)
        require(bool(self.dpo), NO_DPO)
        for spelling, path in (("--sft", self.sft), ("--dpo", self.dpo), ("--output", self.output or "")):
            require(is_utf8(path), f"{spelling} {shown(path)} is not UTF-8; rename the folder")
        object.__setattr__(self, "alpha", self._alphas_of_steps(self.alpha, self.target_step))
        require(len(self.alpha) > 0, "--alpha is missing: give at least one, such as --alpha 0.3")
        for alpha in self.alpha:
            require_alpha(alpha)
        for name, values in (("--target-step", self.target_step), ("--alpha", self.alpha)):
            twice = next((value for value in values if values.count(value) > 1), None)
            require(twice is None, f"{name} {twice} is given more than once")
        object.__setattr__(self, "alpha", tuple(float(alpha) + 0.0 for alpha in self.alpha))  # −0.0 becomes 0.0
        require_choice("--dtype", self.dtype, Dtype)
        self._require_pair_settings()
        _ = self.max_shard_bytes  # read once, so that it is checked
        require_device(self.device)
        require(self.workers is None or self.workers > 0, f"--workers must be positive, not {self.workers}")
        require(self.push_to_hub is not None or not self.private, "--private needs --push-to-hub")
        several = self.stream_sft and len(self.checkpoint) > 1
        require(not several, "--stream-sft and several --checkpoint cannot be combined: each tensor is read twice")
        self._require_one_way()
        if self.as_adapter:
            require_alone(self, ranked=self.rank is not None)
        require_rank(self.rank, as_adapter=self.as_adapter)
        require_repositories(self.repositories, inputs=(self.sft, self.dpo))

    @property
    def repositories(self) -> tuple[str, ...]:
        """Where on the hub each α's output goes, in the order of `alpha`; empty where none does."""
        if self.push_to_hub is None:
            return ()
        return tuple(self.named_by(self.push_to_hub, alpha) for alpha in self.alpha)

    @property
    def max_shard_bytes(self) -> int | None:
        """`max_shard_size` in bytes; None keeps DPO's files."""
        return None if self.max_shard_size == "keep" else read_bytes("--max-shard-size", self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class InspectConfig(CourseConfig, CommonConfig):
    """`expo inspect`: how far θ_dpo is from θ_sft, and whether the pair looks like one ExPO suits.

    With several checkpoints of a training run also whether it moves along straight lines.
    """

    sft: Sft
    dpo: Dpo = ""
    output: Annotated[
        str | None,
        Setting(
            "Plot ‖Δ‖/‖θ_sft‖ by layer and module, or a training run's way over its steps, to this file (.png, .svg or "
            ".pdf).",
            metavar="FILE",
        ),
    ] = None
    device: Annotated[
        str,
        Setting("Device to compute on; auto is the CPU, which keeps up with the disk.", metavar="auto|cpu|cuda[:i]"),
    ] = "auto"
    workers: Workers = None
    allow_pickle: AllowPickle = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        self._settle_course(self.dpo)
        require(bool(self.dpo), NO_DPO)
        known = self.output is None or Path(self.output).suffix.lower() in PICTURE_SUFFIXES
        require(known, f"--output must be a picture ({', '.join(PICTURE_SUFFIXES)}), not {self.output!r}")
        require_device(self.device)
        require(self.workers is None or self.workers > 0, f"--workers must be positive, not {self.workers}")
