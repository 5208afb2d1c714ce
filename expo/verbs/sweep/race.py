"""The race over α, pure: it says whose answers it needs to how many questions, is given them, and ends with a ranking.

All α answer a first slice of the questions, then slices are added. After each one is a look: an α that is worse than
another one by more than chance explains is dropped, with an error that was fixed before the first look and is shared
out among the questions, so that looking often is paid for. α = 0 is never dropped: it is what the others are measured
by. The race ends when one α is left, when little is expected to be lost by taking its leader (what is left differs too
little, or the leader is far ahead), or when its questions, or half of what the grid would cost, are used up. No shape
of the curve is assumed.

The race is a function of the rewards alone. Whoever runs it, from engines or from recorded rows, gets the same course,
and a race that was interrupted is run again from the rows that are there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from expo.settings import MAX_ALPHA
from expo.stats.means import Floats, Whole
from expo.stats.racing import Lead, lead, pairwise_sign_flip_p, shared_sums
from expo.stats.resampling import RESAMPLES
from expo.verbs.sweep.endings import stops_ending
from expo.verbs.sweep.order import set_aside

SHARE_OF_GRID = 0.5
"""A race, with what confirms it, costs no more than this share of what the grid would."""
MARGIN = 0.25
"""How much of the share is kept back, in standard errors of an α's mean tokens over that mean: what the other answers
cost is not yet known (`benchmarks/race.py`)."""
LEAST_SLICE = 0.5
"""The share of a slice below which no further look is taken."""
BEYOND = 2.0
"""An α beyond all that have answered is taken to cost so many times what the costliest one in the race does."""
LEAST_REWARDS = 0.5
"""Of the rows in which α = 0 has a reward, so many must have one by all α, since all are compared by these: those α
leave the race that have the fewest."""
LEAST = 5
"""The fewest questions of a first slice, and to confirm a candidate: of fewer no one-sided p by signs is below 5 %."""
CLOSE = 0.2
"""Two α that differ by less than this share of the larger have no further one between them."""
FAR = 4.0
"""Two α of which one is more than this many times the other have their geometric mean between them."""
ROUNDING = 1e-9
DIGITS = 3
"""Significant digits of an α that a race adds."""


@dataclass(frozen=True)
class Rules:
    """What is fixed before the first look."""

    questions: int
    """Of the race."""
    confirmation: int
    """How many questions are set aside."""
    slice: int
    """How many questions are added at a time."""
    confidence: float
    """1 − δ: with this probability no α is dropped that does as well as what it is dropped for."""
    indifference: float
    """In standard deviations of the paired difference."""
    refine: bool
    resamples: int = RESAMPLES
    """Sign vectors of a look, where there are more."""

    def error(self, added: int) -> float:
        """δ_k, of a look after so many more questions: δ = 1 − confidence in proportion to them, so that Σ δ_k ≤ δ.

        The linear spending function of Lan and DeMets, Biometrika 70, 1983, by which it does not matter how many looks
        there turn out to be. Slices are as planned, but for one that is cut short by what answers cost, which rewards
        decide in part; in simulation the error stays below δ (`benchmarks/race.py`).
        """
        return (1 - self.confidence) * added / self.questions

    def first_slice(self) -> int:
        """The most questions of the first slice, so that it and the confirmation take half of the grid at most.

        What answers cost is not known before. For N questions of which A are set aside, s in the slice, and costs c
        of a question, these take s Σ c + A (c_0 + c_candidate) ≤ (s + A) Σ c: no more than half of the grid's N Σ c
        if s ≤ N/2 − A, whatever the costs are.
        """
        asked = self.questions + self.confirmation
        return min(self.slice, self.questions, math.floor(SHARE_OF_GRID * asked) - self.confirmation)

    @property
    def is_enough(self) -> bool:
        """Whether there are `LEAST` questions for the first slice, and as many to confirm what the race finds."""
        return self.confirmation >= LEAST and replace(self, slice=self.questions).first_slice() >= LEAST


def least_questions(confirm: float) -> int:
    """The fewest questions of a task, those set aside among them, from which on any number is enough for a race.

    Args:
        confirm: The share of questions to set aside, from 0.01 to less than 0.5.
    """
    asked = math.ceil((LEAST + 2) / min(confirm, SHARE_OF_GRID - confirm))  # enough, rounding included
    while _rules_of(asked - 1, confirm).is_enough:
        asked -= 1
    return asked


def _rules_of(asked: int, confirm: float) -> Rules:
    aside = set_aside(asked, confirm)
    return Rules(asked - aside, aside, asked, 1.0, 0.0, refine=False)


class Ask(NamedTuple):
    """What the race needs to go on."""

    alphas: tuple[float, ...]
    """Whose answers."""
    questions: int
    """To so many of its questions, the first ones in its order."""
    looks: tuple[Look, ...] = ()
    """What was seen so far."""


@dataclass(frozen=True)
class Answered:
    """An α's answers to the first questions of the race, a value per row in the race's order of rows."""

    rewards: Floats
    """(rows,): NaN for a row without one."""
    tokens: Floats
    """(rows,): what was generated; NaN where it is not known."""
    ended: Floats
    """(rows,): 1 for an answer that ended, 0 for one that was cut, NaN where it is not known."""


@dataclass(frozen=True)
class Dropped:
    """Why an α left the race."""

    alpha: float
    behind: float
    """The α that it is worse than."""
    lead: Lead
    """Of that one over it."""
    p: float
    """Simultaneous over all pairs of α in the race."""


@dataclass(frozen=True)
class Look:
    """What was seen after a slice."""

    number: int
    """From 1."""
    questions: int
    """The questions that all α in the race have answered."""
    rows: int
    """The rows of which all of them have a reward."""
    means: Mapping[float, float]
    """α in the race → mean reward over these rows; without those that are unscored."""
    leader: float
    error: float
    """δ_k: the p at or below which an α is dropped."""
    dropped: tuple[Dropped, ...]
    unscored: tuple[float, ...]
    """The α that leave the race because too few of their rows have a reward (`LEAST_REWARDS`)."""
    added: tuple[float, ...]
    """By `--refine`."""
    expected_loss: float
    """What is expected to be lost, at most, by taking the leader now, in standard deviations of the paired difference:
    the sum over what else is left."""
    ends: str | None = None
    """Why the race ends here; None where it goes on."""

    @property
    def asked(self) -> tuple[float, ...]:
        """The α whose answers it is of."""
        return (*self.means, *self.unscored)

    @property
    def left(self) -> tuple[float, ...]:
        """The α that are still in the race, those that were added apart."""
        out = {one.alpha for one in self.dropped}
        return tuple(alpha for alpha in self.means if alpha not in out)


@dataclass(frozen=True)
class Course:
    """A race as it went."""

    rules: Rules
    looks: tuple[Look, ...]

    @property
    def last(self) -> Look:
        """The look at which it ended."""
        return self.looks[-1]

    @property
    def ranking(self) -> tuple[float, ...]:
        """The α above 0 that are left and have a higher mean than α = 0, best first: the first is to be confirmed."""
        means = self.last.means
        ahead = [alpha for alpha in self.last.left if means[alpha] > means[0.0]]
        return tuple(sorted(ahead, key=lambda alpha: (-means[alpha], alpha)))

    @property
    def alphas(self) -> tuple[float, ...]:
        """Every α that took part, in order."""
        return tuple(sorted({alpha for look in self.looks for alpha in look.asked}))

    @property
    def dropped(self) -> Mapping[float, int]:
        """α that left the race → the questions that it had answered."""
        gone = ((look, (*(one.alpha for one in look.dropped), *look.unscored)) for look in self.looks)
        return {alpha: look.questions for look, alphas in gone for alpha in alphas}


ONE_LEFT = "only one α is left"
NONE_LEFT = "no α above 0 is left"
ALIKE = "choosing its leader is expected to lose less than --indifference"
USED_UP = "its prompts are used up"
HALF = "going on would take more than half of the grid's tokens"
NO_ROWS = "no row has a reward for every α"


def race(
    rules: Rules, alphas: Iterable[float], clusters: Whole, *, zero_may_win: bool = False
) -> Generator[Ask, Mapping[float, Answered], Course]:
    """Run a race: yields what it needs, is sent the answers, returns its course.

    Args:
        rules: Fixed beforehand.
        alphas: The candidates; 0 takes part whether it is among them or not.
        clusters: (rows,): the number of the question of each row of the race, in order, from 0.
        zero_may_win: Whether the race goes on where only 0 is left beside its leader: nobody is to test afterwards
            which of the two is better.

    Raises:
        ValueError: There are too few questions for a first slice of one (`Rules.is_enough`).
    """
    live: tuple[float, ...] = tuple(sorted({0.0, *alphas}))
    costs = _Costs(rules, live, len(clusters) / max(rules.questions, 1))
    tested, looks = set(live), list[Look]()
    size, questions = rules.first_slice(), 0
    if size < 1:
        raise ValueError(f"{rules.questions} questions are too few for a race of {len(live)} α")
    while True:
        questions += size
        answered = yield Ask(live, questions, tuple(looks))
        of = clusters[clusters < questions]
        costs = costs.after(answered, questions)
        look = _look(len(looks) + 1, questions, answered, of, rules, rules.error(size))
        added = _added(look, tested, answered, of, costs) if rules.refine and look.rows else ()
        size = _next_size(look, costs, added)
        look = replace(look, added=added, ends=None if added else _ending(look, rules, size, zero_may_win))
        looks.append(look)
        if look.ends is not None:
            return Course(rules, tuple(looks))
        tested |= set(look.added)
        live = tuple(sorted({*look.left, *look.added}))


# --- a look ---------------------------------------------------------------------------------------------------------


def _look(
    number: int, questions: int, answered: Mapping[float, Answered], clusters: Whole, rules: Rules, error: float
) -> Look:
    """Who leads, who is dropped, and what is expected to be lost by stopping."""
    scored = _scored({alpha: one.rewards for alpha, one in sorted(answered.items())})
    unscored = tuple(alpha for alpha in sorted(answered) if alpha not in scored)
    alphas, columns = list(scored), list(scored.values())
    sums, rows = shared_sums(columns, clusters)
    values = sums.sum(axis=0) / rows if rows else np.zeros(len(alphas))
    means = {alpha: float(mean) for alpha, mean in zip(alphas, values, strict=True)}
    leader = max(alphas, key=lambda alpha: (means[alpha], -alpha))
    p = pairwise_sign_flip_p(sums, resamples=rules.resamples)
    dropped = tuple(_dropped(alphas, means, p, columns, clusters, error))
    out = {leader, *(one.alpha for one in dropped)}
    losses = [lead(scored[leader], scored[rival], clusters).expected_loss for rival in alphas if rival not in out]
    return Look(number, questions, rows, means, leader, error, dropped, unscored, (), sum(losses))


def _scored(rewards: Mapping[float, Floats]) -> dict[float, Floats]:
    """Without those that have the fewest rewards, as long as too few rows have one by all (`LEAST_REWARDS`)."""
    left, known = dict(rewards), np.isfinite(rewards[0.0])
    while len(left) > 1:
        has = {alpha: np.isfinite(column[known]) for alpha, column in left.items()}
        if np.stack(list(has.values())).all(axis=0).sum() >= LEAST_REWARDS * known.sum():
            break
        del left[min((alpha for alpha in left if alpha), key=lambda alpha: (has[alpha].sum(), -alpha))]
    return left


def _dropped(
    alphas: Sequence[float],
    means: Mapping[float, float],
    p: Floats,
    columns: Sequence[Floats],
    clusters: Whole,
    error: float,
) -> Iterable[Dropped]:
    """The α that are worse than another one: none of them is the best."""
    for place, alpha in enumerate(alphas):
        better = [one for one in range(len(alphas)) if means[alphas[one]] > means[alpha] and p[place, one] <= error]
        if alpha == 0 or not better:
            continue
        by = min(better, key=lambda one: (p[place, one], -means[alphas[one]]))
        yield Dropped(alpha, alphas[by], lead(columns[by], columns[place], clusters), float(p[place, by]))


def _ending(look: Look, rules: Rules, size: int, zero_may_win: bool) -> str | None:
    """Why the race ends after a look, if it does.

    Args:
        look: The look.
        rules: The race's.
        size: How many questions could come next.
        zero_may_win: As `race` has it.
    """
    candidates = [alpha for alpha in look.left if alpha > 0]
    remaining = rules.questions - look.questions
    if not look.rows:
        return NO_ROWS
    if not candidates:
        return NONE_LEFT
    if candidates == [look.leader] and not zero_may_win:
        return ONE_LEFT
    if look.expected_loss < rules.indifference:
        return ALIKE
    if not remaining:
        return USED_UP
    return HALF if size < min(LEAST_SLICE * rules.slice, remaining) else None


def _next_size(look: Look, costs: _Costs, added: Collection[float] = ()) -> int:
    """How many questions can come next: a slice, or what is left of the questions, or of what may be spent."""
    rules, live = costs.rules, {*look.left, *added}
    return min(rules.slice, rules.questions - look.questions, costs.affordable(live, look.questions, added))


# --- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Costs:
    """What was spent, and what the grid would cost: in tokens, or in rows where tokens are not known."""

    rules: Rules
    given: tuple[float, ...]
    """The α of the grid."""
    rows: float
    """Per question."""
    tokens: Mapping[float, float] = field(default_factory=dict)
    """α → the tokens of an answer, as far as it has answered; NaN where they are not known."""
    variation: float = 0.0
    """The standard deviation of the tokens of an α's answers, over their mean: the largest of any α."""
    answered: Mapping[float, int] = field(default_factory=dict)
    """α → the questions that it has answered."""

    def after(self, answered: Mapping[float, Answered], questions: int) -> _Costs:
        """The same after these answers to the first so many questions."""
        known = {alpha: one.tokens[np.isfinite(one.tokens)] for alpha, one in answered.items()}
        means = {alpha: float(tokens.mean()) if len(tokens) else math.nan for alpha, tokens in known.items()}
        spreads = [float(known[alpha].std()) / mean for alpha, mean in means.items() if mean > 0]
        return replace(
            self,
            tokens={**self.tokens, **means},
            variation=max(spreads, default=0.0),
            answered={**self.answered, **dict.fromkeys(answered, questions)},
        )

    @property
    def each(self) -> Mapping[float, float]:
        """α → what its answers to a question cost: tokens, or rows for all where those of one are not known."""
        known = np.isfinite(list(self.tokens.values())).all() and sum(self.tokens.values()) > 0
        return {alpha: self.rows * (tokens if known else 1.0) for alpha, tokens in self.tokens.items()}

    def affordable(self, live: Iterable[float], questions: int, added: Collection[float] = ()) -> int:
        """How many more questions these α can answer.

        Args:
            live: The α in the race.
            questions: How many they have answered.
            added: Those of them that have still to answer these, and are taken to cost as much as the costliest.
        """
        seen = self.each
        most = max(seen[alpha] for alpha in live if alpha in seen)
        each = {alpha: seen.get(alpha, most * (BEYOND if alpha > max(seen) else 1.0)) for alpha in live}
        asked = self.rules.questions + self.rules.confirmation
        grid = sum(seen[alpha] for alpha in self.given) * asked
        confirmation = (each[0.0] + max(each.values())) * self.rules.confirmation
        spent = sum(seen[alpha] * count for alpha, count in self.answered.items())
        spent += sum(each[alpha] for alpha in added) * questions
        share = SHARE_OF_GRID - MARGIN * self.variation / math.sqrt(self.rows * questions)
        return math.floor((share * grid - confirmation - spent) / sum(each.values()) + ROUNDING)


# --- further α ------------------------------------------------------------------------------------------------------


def _added(
    look: Look, tested: Collection[float], answered: Mapping[float, Answered], clusters: Whole, costs: _Costs
) -> tuple[float, ...]:
    """α beside the leader to be tried: all of them or none.

    It must cost no more for them to catch up than a slice does for all, and half a slice more must be affordable.
    Where only one is, it takes the tokens that tell the others apart, and the candidate is worse for it.
    """
    stop = [alpha for alpha, one in answered.items() if stops_ending(one.ended, answered[0.0].ended, clusters)]
    found = [alpha for alpha in _beside(look.leader, tested, min(stop, default=math.inf)) if alpha not in tested]
    if len(found) * look.questions > costs.rules.slice * len({*look.left, *found}):
        return ()
    return tuple(found) if _next_size(look, costs, found) >= LEAST_SLICE * costs.rules.slice else ()


def _beside(leader: float, tested: Collection[float], end: float) -> list[float]:
    """The α between the leader and those next to it, and beyond it where it is the largest.

    Args:
        leader: The α with the highest mean; 0 has none below it.
        tested: Every α that has been tried.
        end: The smallest α from which answers stop ending: nothing beyond it is tried.
    """
    below = max((alpha for alpha in tested if 0 <= alpha < leader), default=None)
    above = min((alpha for alpha in tested if alpha > leader), default=None)
    found = [] if below is None else [_between(below, leader)]
    if above is not None:
        found.append(_between(leader, above))
    elif 2 * leader <= min(end, MAX_ALPHA):
        found.append(2 * leader)
    return [float(f"{alpha:.{DIGITS}g}") for alpha in found if alpha is not None]


def _between(low: float, high: float) -> float | None:
    """An α between two; None where they are close."""
    if high - low < CLOSE * high:
        return None
    return math.sqrt(low * high) if 0 < FAR * low < high else (low + high) / 2
