"""The settings of the commands that work row by row: generate and score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from expo.config.course import PAIR_RULE
from expo.config.engines import BatchTokens, EngineConfig
from expo.config.logit_space import LOGITS, require_space
from expo.config.pair import PAIR_SETTINGS, PairConfig, ThetaConfig
from expo.config.parts import PartsConfig
from expo.config.sampling import SamplingConfig
from expo.errors import InputError
from expo.files import repeated
from expo.settings import (
    Setting,
    changes_rows,
    flag,
    require,
    require_base_url,
    require_choice,
    require_name,
    require_text,
)

Bos: TypeAlias = Literal["auto", "template", "none"]

DEFAULT_REWARD_MODEL = "weqweasdas/RM-Mistral-7B"
"""The paper's, where no reward is named."""
DEFAULT_BETA = 0.1
"""The usual strength of the KL penalty in DPO training."""


@dataclass(frozen=True, kw_only=True)
class RowsConfig(EngineConfig, PartsConfig):
    """What the commands that work row by row share."""

    HEADING = "Output"

    task: Annotated[
        str,
        Setting(
            "ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.", metavar="TASK", positional=True
        ),
    ]
    output_dir: Annotated[str, Setting("Folder that holds outputs_<task>/ and rewards_<task>/.", metavar="DIR")] = "."
    template_date: Annotated[
        str | None,
        Setting(
            "The moment for a chat template that writes the date, such as 2024-03-01T10:00, so that outputs to compare "
            "have the same prompts; an existing output keeps its own. [default: now]",
            metavar="DATE",
            needs="local",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        self._require_one_way()
        if self.template_date is not None:
            object.__setattr__(self, "template_date", _moment(self.template_date))


def _moment(text: str) -> str:
    """A local date and time as outputs record it.

    Raises:
        InputError: It is none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is not None:
        raise InputError(f"--template-date must be a local date or time such as 2024-03-01T10:00, not {text!r}")
    return moment.isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PairConfig, SamplingConfig, RowsConfig):
    """`expo generate`: answer a task's prompts. The decoding defaults are the paper's.

    The model is `model`, or the θ(α) that `sft`, `dpo`, `alpha` and the rules make while the engine loads, or that of
    a training run's `checkpoint`s and a `target_step`.
    """

    model: Annotated[
        str | None,
        Setting("The model: a directory, hub id, or id@revision; for openai, its name on the server.", metavar="MODEL"),
    ] = None
    sft: Annotated[
        str | None,
        Setting(
            "The SFT checkpoint θ_sft. With --dpo and --alpha, the engine loads θ(α) instead of --model.",
            metavar="SFT",
            needs="local",
        ),
    ] = None
    dpo: Annotated[
        str | None,
        Setting(
            "The DPO/RLHF checkpoint θ_dpo trained from it, or a LoRA adapter trained on it.",
            metavar="DPO",
            flags=("--aligned",),
            needs="local",
        ),
    ] = None
    alpha: Annotated[float | None, Setting("Extrapolation strength α.", metavar="A", needs="local")] = None
    target_step: Annotated[
        float | None,
        Setting("With --checkpoint: the step to extrapolate to, in place of α.", metavar="T", needs="local"),
    ] = None
    name: Annotated[
        str | None,
        Setting(
            "Name of the output files, and of the generator in them. [default: the model's, or <DPO name>-ExPO-a<A>, "
            "-a<A>-logits or -t<T>]",
            metavar="NAME",
        ),
    ] = None
    base_url: Annotated[
        str | None,
        Setting(
            "URL of the server (openai); its API key is read from OPENAI_API_KEY.",
            metavar="URL",
            needs="server",
        ),
    ] = None
    concurrency: Annotated[
        int, Setting("Maximum number of concurrent requests (openai).", metavar="N", needs="server")
    ] = 32

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        self._require_source()
        require_base_url(self.base_url)
        require(self.concurrency > 0, f"--concurrency must be positive, not {self.concurrency}")
        require_name(self.name)

    def _require_source(self) -> None:
        if self.model is None:
            self._settle_course(self.dpo)
            steps = () if self.target_step is None else (self.target_step,)
            alphas = self._alphas_of_steps(() if self.alpha is None else (self.alpha,), steps)
            object.__setattr__(self, "alpha", alphas[0] if alphas else None)
        pair = {"--sft": self.sft, "--dpo": self.dpo, "--alpha": self.alpha}
        given = [name for name, value in pair.items() if value is not None]
        if self.model is None:
            lacking = ", ".join(name for name in pair if name not in given)
            require(bool(given), "no model given: pass --model, or --sft, --dpo and --alpha")
            require(not lacking, f"θ(α) needs --sft, --dpo and --alpha; missing: {lacking}")
        else:
            object.__setattr__(self, "rule", self.rule_name)
            defaults = {name: getattr(PairConfig, name) for name in PAIR_SETTINGS}
            defaults |= {"target_step": None, "rule": PAIR_RULE}
            rules = [flag(name) for name, default in defaults.items() if getattr(self, name) != default]
            require(
                not given,
                f"--model and {', '.join(given)} cannot be combined: give either --model, or --sft, --dpo and --alpha",
            )
            require(
                not rules, f"{', '.join(rules)} cannot be combined with --model, only with --sft, --dpo and --alpha"
            )
        require(
            self.space != LOGITS or self.model is None,
            "--space logits is between two models: give --sft, --dpo and --alpha in place of --model",
        )
        require_space(self, self.space)
        _ = self.theta  # made once, so that it is checked

    @property
    def theta(self) -> ThetaConfig | None:
        """The θ(α) that answers; None where a model does."""
        if self.sft is None or self.dpo is None or self.alpha is None:
            return None
        rules = {name: getattr(self, name) for name in PAIR_SETTINGS}
        return ThetaConfig(sft=self.sft, dpo=self.dpo, alpha=self.alpha, **rules)


def checked_reward_models(models: tuple[str, ...]) -> tuple[str, ...]:
    """The reward models of `--reward-model`, which Python users may give as one text.

    Raises:
        InputError: One is empty, not UTF-8, or given twice.
    """
    each = (models,) if isinstance(models, str) else models  # type: ignore[unreachable]
    for model in each:
        require_text("--reward-model", model)
        require(bool(model.strip()), f"--reward-model {model!r} names no model")
    again = repeated(each)
    require(again is None, f"--reward-model {again} is given twice: give each reward model once")
    return each


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(RowsConfig):
    """`expo score`: rate a generate output with a reward model."""

    name: Annotated[
        str, Setting("Name of the output to score, as given to or chosen by `expo generate`.", metavar="NAME")
    ]
    outputs: Annotated[
        str | None, Setting("The file to score, if it is not outputs_<task>/<name>.", metavar="FILE")
    ] = None
    dataset: Annotated[
        str | None, Setting("Read mtbench's questions from a local file or another hub dataset.", metavar="PATH|ID")
    ] = None
    reward_model: Annotated[
        tuple[str, ...],
        Setting(
            "A reward model with one label: a directory, hub id, or id@revision; repeatable: each one after the first "
            f"writes NAME@<its name>.jsonl. [default: {DEFAULT_REWARD_MODEL}]",
            metavar="RM",
        ),
    ] = ()
    implicit_reward: Annotated[
        bool,
        Setting(
            "Score with the implicit reward β(log π_dpo − log π_sft) of --dpo over --sft; alongside reward models, "
            "it writes NAME@implicit.jsonl."
        ),
    ] = False
    sft: Annotated[str | None, Setting("The SFT checkpoint π_sft (implicit reward).", metavar="SFT")] = None
    dpo: Annotated[
        str | None,
        Setting(
            "The DPO checkpoint π_dpo trained from it; its tokenizer and chat template are used (implicit reward).",
            metavar="DPO",
            flags=("--aligned",),
        ),
    ] = None
    beta: Annotated[float, Setting("β, the scale of the implicit reward.", metavar="B")] = DEFAULT_BETA
    engine: Annotated[
        str,
        Setting(
            "Engine that runs the reward model; auto is vLLM on a GPU if it is installed and expo has tested the "
            "architecture, else transformers; an existing output keeps its engine."
        ),
    ] = "auto"
    batch_tokens: BatchTokens = 16384
    max_length: Annotated[
        int | None,
        changes_rows(
            "Maximum conversation length in tokens; longer ones are cut at the end. [default: the recipe's, else the "
            "model's]",
            metavar="N",
            absent=None,
        ),
    ] = None
    bos: Annotated[
        Bos,
        changes_rows(
            "template: rows begin as the chat template writes them; none: its BOS token is dropped, for reward models "
            "trained without it; auto: as the reward model's recipe says, else template.",
            absent="template",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        require_choice("--bos", self.bos, Bos)
        require(self.batch_tokens > 0, f"--batch-tokens must be positive, not {self.batch_tokens}")
        require(
            self.max_length is None or self.max_length > 0,
            f"--max-length must be positive, not {self.max_length}",
        )
        require_name(self.name)
        object.__setattr__(self, "reward_model", checked_reward_models(self.reward_model))
        self._require_implicit()

    def _require_implicit(self) -> None:
        """Check what belongs to the implicit reward."""
        sides = {"--sft": self.sft, "--dpo": self.dpo}
        if not self.implicit_reward:
            given = [name for name, value in sides.items() if value is not None]
            given += ["--beta"] if self.beta != DEFAULT_BETA else []
            verb = "needs" if len(given) == 1 else "need"
            require(not given, f"{' and '.join(given)} {verb} --implicit-reward")
            return
        lacking = [name for name, value in sides.items() if value is None]
        require(not lacking, f"--implicit-reward needs --sft and --dpo; missing: {', '.join(lacking)}")
        require(math.isfinite(self.beta) and self.beta > 0, f"--beta must be a positive number, not {self.beta}")

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The reward models that score, in order; none where only the implicit reward is asked for."""
        return self.reward_model or (() if self.implicit_reward else (DEFAULT_REWARD_MODEL,))
