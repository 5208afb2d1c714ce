"""The settings of the commands that work row by row: generate and score."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal, TypeAlias

from expo.config.pair import PAIR_SETTINGS, CommonConfig, Dtype, PairConfig, ThetaConfig
from expo.files import repeated
from expo.parts import MAX_PARTS, read_part
from expo.settings import (
    Setting,
    changes_rows,
    flag,
    require,
    require_base_url,
    require_choice,
    require_device,
    require_name,
    require_text,
    spelling,
)

SeedMode: TypeAlias = Literal["row", "shared"]
Bos: TypeAlias = Literal["auto", "template", "none"]

DEFAULT_TEMPERATURE = 0.7
"""The paper's, where neither the user nor the task says another."""
DEFAULT_REWARD_MODEL = "weqweasdas/RM-Mistral-7B"
"""The paper's, where no reward is named."""
DEFAULT_BETA = 0.1
"""The usual strength of the KL penalty in DPO training."""

BatchTokens: TypeAlias = Annotated[
    int,
    Setting(
        "Token budget of one batch of the transformers engine, padding included (score on a CPU: at most 2,048).",
        metavar="N",
        changes="batches",
        absent=16384,
    ),
]


@dataclass(frozen=True, kw_only=True)
class RowsConfig(CommonConfig):
    """What the commands that work row by row share."""

    task: Annotated[
        str,
        Setting(
            "ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.", metavar="TASK", positional=True
        ),
    ]
    output_dir: Annotated[str, Setting("Folder that holds outputs_<task>/ and rewards_<task>/.", metavar="DIR")] = "."
    limit: Annotated[
        int | None, Setting("Use only the first N prompts; a larger limit later extends the run.", metavar="N")
    ] = None
    device: Annotated[
        str, Setting("Device of the transformers engine.", metavar="auto|cpu|cuda[:i]", needs="local")
    ] = "auto"
    dtype: Annotated[
        Dtype,
        changes_rows(
            "Data type the model runs in; auto keeps the checkpoint's own, or is float32 for transformers on a CPU "
            "without bfloat16 arithmetic.",
            absent="auto",
            needs="local",
        ),
    ] = "auto"
    chat_template: Annotated[
        str | None,
        Setting("Jinja file to use instead of the model's own chat template.", metavar="FILE", needs="local"),
    ] = None
    trust_remote_code: Annotated[bool, Setting("Run Python code that comes with the model.", needs="local")] = False
    engine_arg: Annotated[
        tuple[str, ...],
        changes_rows(
            "Argument passed to the engine unchanged, VALUE as JSON if it is JSON; repeatable.",
            metavar="KEY=VALUE",
            absent=(),
            needs="engine_arg",
        ),
    ] = ()
    tensor_parallel: Annotated[
        int | None, Setting("Number of GPUs per engine (vllm). [default: all]", metavar="N", needs="tensor_parallel")
    ] = None
    data_parallel: Annotated[
        int, Setting("Number of processes that share the rows, each with an engine and GPUs of its own.", metavar="N")
    ] = 1
    part: Annotated[
        str | None,
        Setting(
            "Do the i-th of N parts of the rows (from 0); slurm takes both from the array job.", metavar="i/N|slurm"
        ),
    ] = None
    join: Annotated[int | None, Setting("Check that all N parts are finished and join them.", metavar="N")] = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), str):
                require_text(spelling(type(self), field.name), value)
        require(self.limit is None or self.limit > 0, f"--limit must be positive, not {self.limit}")
        require_choice("--dtype", self.dtype, Dtype)
        require_device(self.device)
        tensor_parallel = self.tensor_parallel
        require(
            tensor_parallel is None or tensor_parallel > 0,
            f"--tensor-parallel must be positive, not {tensor_parallel}",
        )
        bad = [pair for pair in self.engine_arg if not re.match(r"[A-Za-z_]\w*=", pair)]
        require(not bad, f"--engine-arg takes KEY=VALUE, not {bad[:1]}")
        self._require_one_way()
        if self.part is not None:
            object.__setattr__(self, "part", str(read_part(self.part, os.environ)))

    def _require_one_way(self) -> None:
        """Refuse flags that each say how a run is cut up, given together."""
        given = [
            *(["--part"] if self.part is not None else []),
            *(["--join"] if self.join is not None else []),
            *(["--data-parallel"] if self.data_parallel != 1 else []),
        ]
        by_itself = (
            "it makes and joins the parts itself" if "--data-parallel" in given else "join when all parts are made"
        )
        require(len(given) < 2, f"{' and '.join(given)} do not go together: {by_itself}")
        for flag_given, count in (("--data-parallel", self.data_parallel), ("--join", self.join)):
            known = count is None or 1 <= count <= MAX_PARTS
            require(known, f"{flag_given} must be 1 to {MAX_PARTS} parts, not {count}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PairConfig, RowsConfig):
    """`expo generate`: answer a task's prompts. The decoding defaults are the paper's.

    The model is `model`, or the θ(α) that `sft`, `dpo`, `alpha` and the rules make while the engine loads.
    """

    model: Annotated[
        str | None,
        Setting("The model: a directory, hub id, or id@revision; for openai, its name on the server.", metavar="MODEL"),
    ] = None
    sft: Annotated[
        str | None,
        Setting(
            "Instead of --model, θ(α) made while the engine loads: the SFT checkpoint θ_sft.",
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
    name: Annotated[
        str | None,
        Setting(
            "Name of the output and its generator. [default: the model's, or <DPO name>-ExPO-a<A>]", metavar="NAME"
        ),
    ] = None
    engine: Annotated[
        str, Setting("Inference engine; auto is vLLM where it is installed and can run, else transformers.")
    ] = "auto"
    base_url: Annotated[
        str | None,
        Setting(
            "URL of the openai engine's server, whose API key is read from OPENAI_API_KEY.",
            metavar="URL",
            needs="server",
        ),
    ] = None
    concurrency: Annotated[
        int, Setting("Maximum number of concurrent requests (openai).", metavar="N", needs="server")
    ] = 32
    dataset: Annotated[
        str | None, Setting("Read the task's prompts from a local file or another hub dataset.", metavar="PATH|ID")
    ] = None
    system: Annotated[
        str | None, changes_rows("System message put before every prompt.", metavar="TEXT", absent=None)
    ] = None
    n: Annotated[int, changes_rows("Number of samples per prompt.", metavar="N", absent=1)] = 1
    batch_tokens: BatchTokens = 16384
    temperature: Annotated[
        float | None,
        changes_rows(
            f"Sampling temperature; 0 is greedy decoding. [default: {DEFAULT_TEMPERATURE}; mtbench: by category]",
            absent=None,
        ),
    ] = None
    top_k: Annotated[
        int,
        changes_rows(
            "Sample from the k most likely tokens; 0 or -1 for all (-1 is not sent to openai servers).", absent=50
        ),
    ] = 50
    top_p: Annotated[
        float, changes_rows("Sample from the most likely tokens of this total probability.", absent=0.9)
    ] = 0.9
    presence_penalty: Annotated[float, changes_rows("Presence penalty on generated tokens.", absent=0.1)] = 0.1
    frequency_penalty: Annotated[float, changes_rows("Frequency penalty on generated tokens.", absent=0.1)] = 0.1
    seed: Annotated[int, changes_rows("Seed of all random numbers.", absent=42)] = 42
    seed_mode: Annotated[
        SeedMode,
        changes_rows(
            "row: each row has a seed of its own, the same for every model and α; shared: every request has --seed.",
            absent="shared",
        ),
    ] = "row"
    max_tokens: Annotated[int, changes_rows("Maximum number of new tokens per answer.", metavar="N", absent=2048)] = (
        2048
    )
    stop_token_id: Annotated[
        tuple[int, ...], changes_rows("Additional token id that ends an answer; repeatable.", metavar="ID", absent=())
    ] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        self._require_source()
        require_base_url(self.base_url)
        require(self.concurrency > 0, f"--concurrency must be positive, not {self.concurrency}")
        require(
            self.temperature is None or (math.isfinite(self.temperature) and self.temperature >= 0),
            f"--temperature must be 0 or more, not {self.temperature}",
        )
        require(self.top_k >= -1, f"--top-k must be -1 or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"--top-p must lie in (0, 1], not {self.top_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            require(-2 <= penalty <= 2, f"{flag(name)} must lie in [-2, 2], not {penalty}")
        require_choice("--seed-mode", self.seed_mode, SeedMode)
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")
        require(self.max_tokens > 0, f"--max-tokens must be positive, not {self.max_tokens}")
        require(min(self.stop_token_id, default=0) >= 0, f"--stop-token-id must be 0 or more, not {self.stop_token_id}")
        require(self.n > 0, f"--n must be positive, not {self.n}")
        require(self.batch_tokens > 0, f"--batch-tokens must be positive, not {self.batch_tokens}")
        require_name(self.name)

    def _require_source(self) -> None:
        pair = {"--sft": self.sft, "--dpo": self.dpo, "--alpha": self.alpha}
        given = [name for name, value in pair.items() if value is not None]
        if self.model is None:
            lacking = ", ".join(name for name in pair if name not in given)
            require(bool(given), "no model given: pass --model, or --sft, --dpo and --alpha")
            require(not lacking, f"θ(α) is made from --sft, --dpo and --alpha: {lacking} is missing")
        else:
            rules = [flag(name) for name in PAIR_SETTINGS if getattr(self, name) != getattr(PairConfig, name)]
            require(
                not given, f"--model and {', '.join(given)} are two models: give --model, or --sft, --dpo and --alpha"
            )
            require(not rules, f"{', '.join(rules)} is for --sft, --dpo and --alpha, not for --model")
        _ = self.theta  # made once, so that it is checked

    @property
    def theta(self) -> ThetaConfig | None:
        """The θ(α) that answers; None where a model does."""
        if self.sft is None or self.dpo is None or self.alpha is None:
            return None
        rules = {name: getattr(self, name) for name in PAIR_SETTINGS}
        return ThetaConfig(sft=self.sft, dpo=self.dpo, alpha=self.alpha, **rules)


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
            "A reward model, which has one label: a directory, hub id, or id@revision; repeatable: each further one "
            f"writes NAME@<its name>.jsonl. [default: {DEFAULT_REWARD_MODEL}]",
            metavar="RM",
        ),
    ] = ()
    implicit_reward: Annotated[
        bool,
        Setting(
            "Score with the implicit reward β(log π_dpo − log π_sft) of --dpo over --sft; beside reward models it "
            "writes NAME@implicit.jsonl."
        ),
    ] = False
    sft: Annotated[str | None, Setting("Of the implicit reward: the SFT checkpoint π_sft.", metavar="SFT")] = None
    dpo: Annotated[
        str | None,
        Setting(
            "Of the implicit reward: the checkpoint π_dpo trained from it, whose tokenizer and chat template count.",
            metavar="DPO",
            flags=("--aligned",),
        ),
    ] = None
    beta: Annotated[float, Setting("Of the implicit reward: β, which all rewards are multiplied by.")] = DEFAULT_BETA
    engine: Annotated[
        str,
        Setting(
            "Engine that runs the reward model; auto is vLLM on a GPU where it is installed and expo has tested the "
            "architecture, else transformers, and goes on with the engine of the output that is there."
        ),
    ] = "auto"
    batch_tokens: BatchTokens = 16384
    max_length: Annotated[
        int | None,
        changes_rows(
            "Maximum conversation length in tokens; longer ones lose their end. [default: its recipe's, else its own]",
            metavar="N",
            absent=None,
        ),
    ] = None
    bos: Annotated[
        Bos,
        changes_rows(
            "template: rows begin as the chat template gives them; none: without its BOS token, for reward models that "
            "were trained so; auto: as the model's recipe says, else template.",
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
        if isinstance(self.reward_model, str):  # type: ignore[unreachable]  # as Python users may write one
            object.__setattr__(self, "reward_model", (self.reward_model,))  # type: ignore[unreachable]
        for model in self.reward_model:
            require_text("--reward-model", model)
            require(bool(model.strip()), f"--reward-model {model!r} names no model")
        again = repeated(self.reward_model)
        require(again is None, f"--reward-model {again} is given twice; each reward model scores once")
        self._require_implicit()

    def _require_implicit(self) -> None:
        """Check what belongs to the implicit reward."""
        sides = {"--sft": self.sft, "--dpo": self.dpo}
        if not self.implicit_reward:
            given = [name for name, value in sides.items() if value is not None]
            given += ["--beta"] if self.beta != DEFAULT_BETA else []
            verb = "is" if len(given) == 1 else "are"
            require(not given, f"{' and '.join(given)} {verb} for --implicit-reward, which is not given")
            return
        lacking = [name for name, value in sides.items() if value is None]
        require(not lacking, f"--implicit-reward compares --dpo with --sft: {' and '.join(lacking)} is missing")
        require(math.isfinite(self.beta) and self.beta > 0, f"--beta must be a positive number, not {self.beta}")

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The reward models that score, in order; none where only the implicit reward is asked for."""
        return self.reward_model or (() if self.implicit_reward else (DEFAULT_REWARD_MODEL,))
