"""What a choice of α consists of: a frozen tree, from which sweep.json, the table and the picture are made."""

from __future__ import annotations

from dataclasses import dataclass

from expo.compare.figures import Comparison, ModelFigures, Table
from expo.files import Row
from expo.stats.resampling import LEVEL, RESAMPLES

OF_ALPHA = (
    "name",
    "mean",
    "standard_error",
    "n",
    "difference",
    "interval",
    "p",
    "win_rate",
    "win_rate_interval",
    "standardized_difference",
    "difference_at_equal_length",
    "difference_at_equal_length_curved",
)
"""What sweep.json says of an α by each reward model, with compare's names."""
OF_ANSWERS = ("tokens", "characters", "finish_reasons", "ended", "ended_difference")
"""What it says of its answers, whoever scores them."""
OF_CHOICE = ("mean_on_shared_rows", "rejected", "dropped_after")
"""What it says of what became of an α."""


def figures_of_equal(alpha: float, name: str) -> Row:
    """What sweep.json says of an α where SFT and DPO are equal: no answers, and no difference from α = 0."""
    known: Row = {"alpha": alpha, "name": name, "n": 0}
    same: Row = {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0, "win_rate": 0.5} if alpha else {}
    return {**dict.fromkeys(("alpha", *OF_ALPHA, *OF_ANSWERS, *OF_CHOICE)), **known, **same}


@dataclass(frozen=True)
class Rejection:
    """A test that an α does not pass, though it gains."""

    mark: str
    """A word or two, for a table."""
    says: str
    """In words."""
    figure: str
    """The figure behind them."""

    def __str__(self) -> str:
        return f"{self.says} ({self.figure})"


@dataclass(frozen=True)
class AlphaFigures:
    """One α of a sweep."""

    alpha: float
    figures: ModelFigures
    """By the first reward model."""
    further: tuple[ModelFigures, ...]
    """By each of the others."""
    ranked_by: float | None
    """The mean over the rows that all candidates and α = 0 have a reward of; None for what is not ranked."""
    rejections: tuple[Rejection, ...]

    @property
    def difference(self) -> float | None:
        """The mean reward minus that of α = 0, over the rows that they share."""
        return self.figures.paired.difference if self.figures.paired else None

    @property
    def gains(self) -> bool:
        """Whether its answers have a higher mean reward than those of α = 0, by chance or not."""
        return self.difference is not None and self.difference > 0

    @property
    def passes(self) -> bool:
        """Whether it may be chosen."""
        return self.alpha > 0 and self.gains and not self.rejections

    def describe(self) -> Row:
        """As plain data, with the contract's names."""
        found = self.figures.describe(is_baseline=False)
        return {
            "alpha": self.alpha,
            **{name: found[name] for name in (*OF_ALPHA, *OF_ANSWERS)},
            "mean_on_shared_rows": self.ranked_by,
            "rejected": "; ".join(map(str, self.rejections)) or None,
            "dropped_after": None,
        }


@dataclass(frozen=True)
class Choice:
    """What a sweep finds."""

    best_alpha: float
    """0 where no α is to be preferred."""
    verdict: str
    """The choice in one to three sentences."""
    notes: tuple[str, ...]
    """What a reader must know of the rows, and what could not be judged."""
    comparison: Comparison
    """Every α with α = 0, which is the first."""
    alphas: tuple[AlphaFigures, ...]
    """In order of α, 0 among them."""
    shared_rows: int
    """The rows that α are ranked by."""

    def describe(self) -> Row:
        """As plain data, with the contract's names."""
        first, *further = self.comparison.tables
        return {
            "best_alpha": self.best_alpha,
            "verdict": self.verdict,
            "notes": list(self.notes),
            "task": self.comparison.task,
            **_scored_by(first),
            "baseline": self.comparison.baseline,
            "n": self.comparison.n,
            "prompts": self.comparison.prompts,
            "shared_rows": self.shared_rows,
            "level": LEVEL,
            "resamples": RESAMPLES,
            "alphas": [one.describe() for one in self.alphas],
            "further": [{**_scored_by(table), "alphas": _by_another(table)} for table in further],
        }


def _scored_by(table: Table) -> Row:
    return {"reward_model": table.reward_model, "revision": table.revision}


def _by_another(table: Table) -> list[Row]:
    models = sorted(table.models, key=lambda model: model.alpha or 0.0)
    described = [model.describe(is_baseline=False) for model in models]
    return [{name: one[name] for name in ("alpha", *OF_ALPHA)} for one in described]
