"""What gives log-probabilities of answers: under the two models of a pair, for the implicit reward, or under θ(α).

To add one, write a module with classes that satisfy `LogProbs` and `ThetaLogProbs`, and a line in each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from expo.engines import Engine, EngineSpec

if TYPE_CHECKING:
    from expo.config import ScoreConfig

Side: TypeAlias = Literal["dpo", "sft"]


class Answered(NamedTuple):
    """A conversation as token ids, and where its answer begins."""

    token_ids: tuple[int, ...]
    start: int
    """The position of the answer's first token; all from there on are the answer's."""


@dataclass(frozen=True)
class LogProbSetup:
    """What an engine of the implicit reward is started with."""

    config: ScoreConfig
    dpo: Path
    """The folder of π_dpo."""
    sft: Path
    """The folder of π_sft."""

    def takes_over(self, started: LogProbSetup) -> bool:
        """Whether an engine that was started with another setup can go on with this one."""
        settings = ("device", "dtype", "trust_remote_code")
        return (self.dpo, self.sft) == (started.dpo, started.sft) and all(
            getattr(self.config, name) == getattr(started.config, name) for name in settings
        )


class LogProbs(Engine, Protocol):
    """Gives log-probabilities of answers. Made from a `LogProbSetup`; one of the two models is in memory at a time."""

    def log_probs(self, side: Side, rows: Sequence[Answered]) -> list[float]:
        """Log π(y|x) = Σ log π(y_t | x, y_<t) of each row's answer, in nats; 0 for one without tokens.

        Args:
            side: Whose π; the model is loaded when the other one was used before, which is let go.
            rows: One batch, of any lengths.
        """


class ThetaLogProbs(Engine, Protocol):
    """Gives log-probabilities of answers under one θ(α), and goes on to the next. Made from a `GeneratorSetup`."""

    def log_probs(self, rows: Sequence[Answered]) -> list[float]:
        """As `LogProbs` does, under θ(α).

        Args:
            rows: One batch, of any lengths.
        """


LOG_PROBS = {
    "transformers": EngineSpec(
        "expo.engines.transformers_log_probs:TransformersLogProbs",
        can=frozenset({"local"}),
        pads=True,
        settle="expo.engines.torch_tools:with_run_dtype",
    )
}
"""Engine of the implicit reward → what is known of it."""

THETA_LOG_PROBS = {
    "transformers": EngineSpec(
        "expo.engines.transformers_log_probs:TransformersThetaLogProbs",
        can=frozenset({"local"}),
        pads=True,
        settle="expo.engines.torch_tools:with_run_dtype",
    )
}
"""The same, of those that read θ(α)."""
