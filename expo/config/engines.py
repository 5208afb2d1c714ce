"""The settings of whatever runs a model: generate, score and sweep."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, TypeAlias

from expo.config.pair import CommonConfig, Dtype
from expo.settings import (
    Setting,
    changes_rows,
    require,
    require_choice,
    require_device,
    require_text,
    spelling,
)

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
class EngineConfig(CommonConfig):
    """How a model is run over prompts or conversations."""

    HEADING = "The engine"

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
            "Argument passed on to the engine; VALUE is read as JSON if it is valid JSON; repeatable.",
            metavar="KEY=VALUE",
            absent=(),
            needs="engine_arg",
        ),
    ] = ()
    tensor_parallel: Annotated[
        int | None, Setting("Number of GPUs per engine (vllm). [default: all]", metavar="N", needs="tensor_parallel")
    ] = None

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
        require_tensor_parallel("--tensor-parallel", self.tensor_parallel)
        require_engine_args("--engine-arg", self.engine_arg)


def require_tensor_parallel(flag: str, value: int | None) -> None:
    """Refuse a number of GPUs below 1.

    Raises:
        InputError: It is; the message names the flag.
    """
    require(value is None or value > 0, f"{flag} must be positive, not {value}")


def require_engine_args(flag: str, pairs: tuple[str, ...]) -> None:
    """Refuse what is not KEY=VALUE.

    Raises:
        InputError: One is not; the message names the flag.
    """
    bad = [pair for pair in pairs if not re.match(r"[A-Za-z_]\w*=", pair)]
    require(not bad, f"{flag} takes KEY=VALUE, not {bad[:1]}")
