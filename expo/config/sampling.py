"""The settings of how answers are sampled: generate's and sweep's. The defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from expo.config.engines import BatchTokens, EngineConfig
from expo.config.logit_space import SpaceSetting
from expo.settings import Setting, changes_rows, flag, require, require_choice

SeedMode: TypeAlias = Literal["row", "shared"]

DEFAULT_TEMPERATURE = 0.7
"""The paper's, where neither the user nor the task says another."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(EngineConfig):
    """How a policy answers prompts."""

    HEADING = "Prompts and sampling"

    engine: Annotated[
        str, Setting("Inference engine; auto is vLLM if it is installed and can run, else transformers.")
    ] = "auto"
    dataset: Annotated[
        str | None, Setting("Read the task's prompts from a local file or another hub dataset.", metavar="PATH|ID")
    ] = None
    system: Annotated[
        str | None, changes_rows("System message put before every prompt.", metavar="TEXT", absent=None)
    ] = None
    n: Annotated[int, changes_rows("Number of samples per prompt.", metavar="N", absent=1)] = 1
    batch_tokens: BatchTokens = 16384
    space: SpaceSetting = "weights"
    temperature: Annotated[
        float | None,
        changes_rows(
            f"Sampling temperature; 0 is greedy decoding. [default: {DEFAULT_TEMPERATURE}; mtbench: by category]",
            metavar="T",
            absent=None,
        ),
    ] = None
    top_k: Annotated[
        int,
        changes_rows(
            "Sample from the k most likely tokens; 0 or -1 for all (-1 is not sent to openai servers).",
            metavar="K",
            absent=50,
        ),
    ] = 50
    top_p: Annotated[
        float,
        changes_rows(
            "Sample from the most likely tokens that together have this probability.", metavar="P", absent=0.9
        ),
    ] = 0.9
    presence_penalty: Annotated[
        float, changes_rows("Presence penalty on generated tokens.", metavar="X", absent=0.1)
    ] = 0.1
    frequency_penalty: Annotated[
        float, changes_rows("Frequency penalty on generated tokens.", metavar="X", absent=0.1)
    ] = 0.1
    seed: Annotated[int, changes_rows("Seed of all random numbers.", metavar="N", absent=42)] = 42
    seed_mode: Annotated[
        SeedMode,
        changes_rows(
            "row: each row has a seed of its own, the same for every model and α; shared: every request uses --seed.",
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
