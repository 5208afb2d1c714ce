"""What a comparison consists of: a frozen tree, from which the table, the JSON and the report are made.

A figure is None where the rows do not determine it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expo.config.logit_space import LOGITS, Space
from expo.files import Row
from expo.stats.agreement import Agreement
from expo.stats.means import Interval
from expo.stats.resampling import LEVEL, RESAMPLES
from expo.verbs.compare.pairing import LeftOut


@dataclass(frozen=True)
class Measured:
    """A difference with its interval."""

    difference: float
    interval: Interval | None

    def describe(self) -> Row:
        """As plain data."""
        return {"difference": self.difference, "interval": _listed(self.interval)}


@dataclass(frozen=True)
class Paired:
    """A model's paired figures against the baseline, over all rows or those of a subset."""

    n: int
    """How many rows went in."""
    mean: float | None
    baseline_mean: float | None
    """The baseline's mean over the same rows."""
    difference: float | None
    interval: Interval | None
    """Simultaneous over the models that are not apart."""
    p: float | None
    """As the interval."""
    win_rate: float | None
    win_rate_interval: Interval | None
    """Of this model alone."""

    def describe(self) -> Row:
        """As plain data, but for the means."""
        return {
            "difference": self.difference,
            "interval": _listed(self.interval),
            "p": self.p,
            "win_rate": self.win_rate,
            "win_rate_interval": _listed(self.win_rate_interval),
        }


@dataclass(frozen=True)
class Flip:
    """A row that a model wins, or loses, by much."""

    label: str
    """The row's id, with its sample and turn where they are not the first."""
    id: str
    sample: int
    turn: int
    difference: float

    def describe(self) -> Row:
        """As plain data."""
        turn = {"turn": self.turn} if self.turn else {}
        return {"id": self.id, "sample": self.sample, **turn, "difference": self.difference}


@dataclass(frozen=True)
class ModelFigures:
    """A model in a table."""

    name: str
    n: int
    """The rows of its figures: the baseline's own, or those paired with it."""
    mean: float | None
    standard_error: float | None
    """Cluster-robust."""
    tokens: float | None
    """Mean of the generated tokens; None where some are unknown."""
    characters: float | None
    """Mean length of the answers; None where they are not there."""
    truncated: int
    """Rows of which the reward model saw only the beginning."""
    alpha: float | None = None
    space: Space = "weights"
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    """Finish reason → answers, also those without a reward; empty where none is known."""
    ended: float | None = None
    """The share of answers that came to their end (stop), of those that did or were cut (length)."""
    paired: Paired | None = None
    """None for the baseline, and where there are no rewards."""
    standardized_difference: float | None = None
    """In standard deviations of the baseline's rewards."""
    longer: Measured | None = None
    """The paired difference of lengths, in characters."""
    at_equal_length: Measured | None = None
    at_equal_length_curved: Measured | None = None
    """The same where the reward may bend with the length (`at_zero`), to be asked before a gain is believed."""
    ends_more: Measured | None = None
    """The paired difference of the share of answers that end, from −1 to 1."""
    subsets: Mapping[str, Paired] = field(default_factory=dict)
    flips: tuple[Flip, ...] = ()
    """The rows it wins and loses by the most, the largest difference first."""

    def describe(self, *, is_baseline: bool) -> Row:
        """As plain data, with the contract's names."""
        own = {
            "name": self.name,
            "alpha": self.alpha,
            **({"space": self.space} if self.space == LOGITS else {}),
            "n": self.n,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "tokens": self.tokens,
            "characters": self.characters,
            "truncated": self.truncated,
            "finish_reasons": dict(self.finish_reasons),
            "ended": self.ended,
        }
        if is_baseline:
            return own
        paired = self.paired or Paired(0, None, None, None, None, None, None, None)
        return {
            **own,
            **paired.describe(),
            "standardized_difference": self.standardized_difference,
            "characters_difference": self.longer.describe() if self.longer else None,
            "difference_at_equal_length": self.at_equal_length.describe() if self.at_equal_length else None,
            "difference_at_equal_length_curved": (
                self.at_equal_length_curved.describe() if self.at_equal_length_curved else None
            ),
            "ended_difference": self.ends_more.describe() if self.ends_more else None,
            "subsets": {
                name: {"n": one.n, "mean": one.mean, "baseline_mean": one.baseline_mean, **one.describe()}
                for name, one in self.subsets.items()
            },
            "flips": [flip.label for flip in self.flips],
            "flip_rows": [flip.describe() for flip in self.flips],
        }


@dataclass(frozen=True)
class Table:
    """All models by one reward model."""

    reward_model: str | None
    """None where there are no rewards, or where no file says which reward model gave them."""
    revision: str | None
    key: str | None
    """The reward model's key in `Run.rewards`; None where there are no rewards."""
    models: tuple[ModelFigures, ...]
    """The baseline first."""
    left_out: tuple[LeftOut, ...]

    @property
    def baseline(self) -> ModelFigures:
        """The model that the others are compared with."""
        return self.models[0]

    @property
    def others(self) -> tuple[ModelFigures, ...]:
        """The models that are compared with it."""
        return self.models[1:]


@dataclass(frozen=True)
class Agreed:
    """Whether two reward models agree about one model."""

    name: str
    reward_models: tuple[str, str]
    figures: Agreement

    def describe(self) -> Row:
        """As plain data."""
        gains = self.figures.gains or ()
        return {
            "name": self.name,
            "reward_models": list(self.reward_models),
            "n": self.figures.n,
            "correlation": self.figures.correlation,
            "same_sign": self.figures.same_sign,
            "gains": [
                {"reward_model": model, **vars(gain)} for model, gain in zip(self.reward_models, gains, strict=False)
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """What `expo compare` finds."""

    task: str
    baseline: str
    n: int
    """The rows that all runs have."""
    prompts: int
    tables: tuple[Table, ...]
    """One per reward model that scored all runs; one without rewards where there is none."""
    agreement: tuple[Agreed, ...]
    notes: tuple[str, ...]
    apart: tuple[str, ...] = ()
    """Models that are compared each alone."""

    @property
    def together(self) -> int:
        """How many models intervals and p hold for at once."""
        return len(self.tables[0].others) - len(self.apart)

    @property
    def simultaneous(self) -> bool:
        """Whether intervals and p hold for several models at once."""
        return self.together > 1

    def describe(self) -> Row:
        """As plain data, with the contract's names: the first reward model's table, and what is beside it."""
        first, *further = map(self._describe_table, self.tables)
        return {
            **first,
            "prompts": self.prompts,
            "further": further,
            "agreement": [one.describe() for one in self.agreement],
            "notes": list(self.notes),
        }

    def _describe_table(self, table: Table) -> Row:
        return {
            "task": self.task,
            "reward_model": table.reward_model,
            "revision": table.revision,
            "baseline": self.baseline,
            "n": self.n,
            "level": LEVEL,
            "resamples": RESAMPLES,
            "simultaneous": self.simultaneous,
            "models": [one.describe(is_baseline=one is table.baseline) for one in table.models],
            "left_out": [one.describe() for one in table.left_out],
        }


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
