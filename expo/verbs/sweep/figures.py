"""What a choice of α consists of: a frozen tree, from which sweep.json, the table and the picture are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from expo.config.course import step_of
from expo.files import Row
from expo.stats.resampling import LEVEL, RESAMPLES
from expo.verbs.compare.figures import Comparison, ModelFigures, Table
from expo.verbs.sweep.confirm import LEVEL as LEVEL_OF_CONFIRMATION, Confirmation
from expo.verbs.sweep.race import Course, Look
from expo.verbs.sweep.race_plan import RacePlan

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
OF_CHOICE = ("mean_on_shared_rows", "rejected", "dropped_after", "answered")
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
class Answered:
    """How many prompts an α of a race has answered."""

    race: int
    confirmation: int
    dropped_after: int | None = None
    """Those of the race after which it was dropped; None where it was not."""

    def describe(self) -> Row:
        """As plain data."""
        return {"race": self.race, "confirmation": self.confirmation}


@dataclass(frozen=True)
class Raced:
    """A race, and what became of the α that it found."""

    plan: RacePlan
    course: Course
    candidate: float | None
    """The α that was to be confirmed, fixed before the prompts that were set aside were answered; None where no α is
    ahead of α = 0."""
    passed_over: Mapping[float, tuple[Rejection, ...]]
    """α that were ahead of the candidate → what spoke against them on the race's prompts."""
    confirmation: Confirmation | None
    """None where there is no candidate."""
    rejections: tuple[Rejection, ...]
    """What speaks against the candidate on the confirmation's prompts."""
    share: float
    """What was spent, of what the grid would have cost."""

    @property
    def best_alpha(self) -> float:
        """The candidate, if it is confirmed and nothing speaks against it; else 0."""
        return 0.0 if self.candidate is None or self.rejections else self.candidate

    def asked_of(self, alpha: float) -> set[str]:
        """The prompts that an α was asked, by id: on disk may be more."""
        asked, order = self._answered(alpha), self.plan.order
        return {*order.in_race(asked.race), *(order.to_confirm if asked.confirmation else ())}

    def told(self, one: AlphaFigures) -> AlphaFigures:
        """An α with what became of it in the race."""
        return replace(one, rejections=tuple(self._against(one.alpha)), answered=self._answered(one.alpha))

    def _answered(self, alpha: float) -> Answered:
        looks = [look.questions for look in self.course.looks if alpha in look.asked]
        confirms = self.confirmation is not None and alpha in (0.0, self.candidate)
        asked = looks[-1] if looks else self.course.looks[0].questions  # θ_sft, for reference
        return Answered(asked, self.plan.rules.confirmation if confirms else 0, self.course.dropped.get(alpha))

    def _against(self, alpha: float) -> Iterator[Rejection]:
        for look in self.course.looks:
            for out in (out for out in look.dropped if out.alpha == alpha):
                figure = f"{-out.lead.difference:+.3g}, {-out.lead.standardized:+.2f} sd, p = {out.p:.4f}"
                yield Rejection(
                    f"dropped after {look.questions}",
                    f"the race dropped it after {look.questions} prompts: it is worse than α = {out.behind:g}",
                    figure,
                )
            if alpha in look.unscored:
                why = f"the race dropped it after {look.questions} prompts: too few of its answers have a reward"
                yield Rejection(f"dropped after {look.questions}", why, f"{look.rows} rows are compared without it")
        is_candidate, aside = alpha == self.candidate, self.plan.rules.confirmation
        for reasons, prompts in (
            (self.passed_over.get(alpha, ()), f"the race's {self.course.last.questions} prompts"),
            (self.rejections if is_candidate else (), f"the {aside} confirmation prompts"),
        ):
            yield from (replace(reason, figure=f"{reason.figure} on {prompts}") for reason in reasons)

    def describe(self) -> Row:
        """As plain data: the race, and its confirmation."""
        return {
            "race": {
                "settings": self.plan.settings,
                "looks": [describe_look(look) for look in self.course.looks],
                "ended": self.course.last.ends,
                "candidate": self.candidate,
                "passed_over": [
                    {"alpha": alpha, "why": "; ".join(map(str, why))} for alpha, why in self.passed_over.items()
                ],
                "share_of_grid": self.share,
            },
            "confirmation": self._describe_confirmation(),
        }

    def _describe_confirmation(self) -> Row | None:
        found = self.confirmation
        if found is None:
            return None
        return {
            "alpha": found.candidate,
            "prompts": found.questions,
            "n": found.rows,
            "difference": found.difference if found.rows else None,
            "interval": None if found.interval is None else list(found.interval),
            "level": LEVEL_OF_CONFIRMATION,
            "p_one_sided": found.p,
            "standardized_by_differences": found.standardized,
            "rejected": "; ".join(map(str, self.rejections)) or None,
        }


def describe_look(look: Look) -> Row:
    """A look as plain data."""
    return {
        "look": look.number,
        "prompts": look.questions,
        "n": look.rows,
        "leader": look.leader,
        "means": [{"alpha": alpha, "mean": mean} for alpha, mean in look.means.items()],
        "error": look.error,
        "dropped": [
            {
                "alpha": one.alpha,
                "behind": one.behind,
                "difference": -one.lead.difference,
                "standardized_by_differences": -one.lead.standardized,
                "p": one.p,
            }
            for one in look.dropped
        ],
        "unscored": list(look.unscored),
        "added": list(look.added),
        "expected_loss": look.expected_loss if math.isfinite(look.expected_loss) else None,
        "ends": look.ends,
    }


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
    answered: Answered | None = None
    """Of a race: which of its prompts the figures are of."""

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
            "dropped_after": self.answered.dropped_after if self.answered else None,
            "answered": self.answered.describe() if self.answered else None,
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
    raced: Raced | None = None
    """How the race went, where they had one."""
    last_step: float | None = None
    """Of a training run's last checkpoint, which is α = 0; None for a pair."""

    def _step(self, name: str, alpha: float) -> Row:
        """The step that an α stands for; nothing for a pair."""
        return {} if self.last_step is None else {name: step_of(alpha, self.last_step)}

    def describe(self) -> Row:
        """As plain data, with the contract's names."""
        first, *further = self.comparison.tables
        return {
            "best_alpha": self.best_alpha,
            **self._step("best_step", self.best_alpha),
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
            "alphas": [{**one.describe(), **self._step("target_step", one.alpha)} for one in self.alphas],
            "further": [{**_scored_by(table), "alphas": _by_another(table)} for table in further],
            **(self.raced.describe() if self.raced else {}),
        }


def _scored_by(table: Table) -> Row:
    return {"reward_model": table.reward_model, "revision": table.revision}


def _by_another(table: Table) -> list[Row]:
    models = sorted(table.models, key=lambda model: model.alpha or 0.0)
    described = [model.describe(is_baseline=False) for model in models]
    return [{name: one[name] for name in ("alpha", *OF_ALPHA)} for one in described]
