"""What sweep.json says of a race: each look, who was dropped on what evidence, and what became of the α that it found.

A record may be unfinished or damaged: what cannot be read is not there, and the rest is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from expo.files import Row
from expo.stats.means import Interval


@dataclass(frozen=True)
class DropRecord:
    """Why an α left the race."""

    alpha: float
    behind: float | None
    """The α that it is worse than."""
    difference: float | None
    """Its mean reward less that one's, over the rows that both have."""
    standardized: float | None
    """The same in standard deviations of the paired difference."""
    p: float | None
    """Simultaneous over all pairs of α in the race."""


@dataclass(frozen=True)
class LookRecord:
    """What was seen after a slice."""

    number: int
    """From 1."""
    prompts: int
    """Of the race, which all α in it have answered."""
    rows: int | None
    """Those of which all of them have a reward."""
    means: Mapping[float, float]
    """α in the race → mean reward over these rows."""
    leader: float | None
    error: float | None
    """The p at or below which an α is dropped."""
    dropped: tuple[DropRecord, ...]
    unscored: tuple[float, ...]
    """The α that left because too few of their answers have a reward."""
    added: tuple[float, ...]
    expected_loss: float | None
    """In standard deviations of the paired difference; None where it is not known, or not finite."""
    ends: str | None
    """Why the race ends here; None where it goes on."""


@dataclass(frozen=True)
class ConfirmationRecord:
    """The one test of the α that the race found, on prompts that the race did not see."""

    alpha: float
    prompts: int | None
    rows: int | None
    difference: float | None
    """The mean paired difference from α = 0."""
    interval: Interval | None
    level: float | None
    """Of the interval."""
    p: float | None
    """One-sided."""
    standardized: float | None
    """The difference in standard deviations of the paired difference."""
    rejected: str | None
    """What speaks against the α; None where it is confirmed."""


@dataclass(frozen=True)
class Prompts:
    """How many prompts an α has answered."""

    race: int
    confirmation: int


@dataclass(frozen=True)
class RaceRecord:
    """A race, as far as it went."""

    looks: tuple[LookRecord, ...]
    questions: int | None
    """The prompts that it could ask."""
    aside: int | None
    """The prompts that are set aside to confirm what it finds."""
    ended: str | None
    """Why it ended; None where it is not finished."""
    candidate: float | None
    """The α that it found."""
    passed_over: Mapping[float, str]
    """α ahead of the candidate → what speaks against it."""
    share_of_grid: float | None
    """What it took, with its confirmation, of the tokens that the grid would have."""
    confirmation: ConfirmationRecord | None
    answered: Mapping[float, Prompts]

    @property
    def dropped(self) -> Mapping[float, int]:
        """α that was dropped → the prompts of the race that it had answered."""
        gone = ((look, (*(one.alpha for one in look.dropped), *look.unscored)) for look in self.looks)
        return {alpha: look.prompts for look, alphas in gone for alpha in alphas}


def read_race(record: Row) -> RaceRecord | None:
    """The race of a sweep's record; None where it says of none."""
    race = record.get("race")
    if not isinstance(race, dict):
        if record.get("search") != "race":
            return None
        race = {}
    settings = race.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    return RaceRecord(
        looks=tuple(_looks(race.get("looks"))),
        questions=_count(settings.get("questions")),
        aside=_count(settings.get("confirmation")),
        ended=_text(race.get("ended")),
        candidate=number(race.get("candidate")),
        passed_over={alpha: _text(one.get("why")) or "" for alpha, one in _by_alpha(race.get("passed_over"))},
        share_of_grid=number(race.get("share_of_grid")),
        confirmation=_confirmation(record.get("confirmation")),
        answered={
            alpha: found
            for alpha, one in _by_alpha(record.get("alphas"))
            if (found := _prompts(one.get("answered"))) is not None
        },
    )


def _looks(listed: object) -> Iterator[LookRecord]:
    for place, one in enumerate(_rows(listed), 1):
        prompts = _count(one.get("prompts"))
        if prompts is None:
            continue
        means = {
            alpha: mean for alpha, of in _by_alpha(one.get("means")) if (mean := number(of.get("mean"))) is not None
        }
        yield LookRecord(
            number=_count(one.get("look")) or place,
            prompts=prompts,
            rows=_count(one.get("n")),
            means=means,
            leader=number(one.get("leader")),
            error=number(one.get("error")),
            dropped=tuple(_drop(alpha, of) for alpha, of in _by_alpha(one.get("dropped"))),
            unscored=_alphas(one.get("unscored")),
            added=_alphas(one.get("added")),
            expected_loss=number(one.get("expected_loss")),
            ends=_text(one.get("ends")),
        )


def _alphas(listed: object) -> tuple[float, ...]:
    return tuple(a for one in listed if (a := number(one)) is not None) if isinstance(listed, list) else ()


def _drop(alpha: float, one: Row) -> DropRecord:
    return DropRecord(
        alpha,
        number(one.get("behind")),
        number(one.get("difference")),
        number(one.get("standardized_by_differences")),
        number(one.get("p")),
    )


def _confirmation(one: object) -> ConfirmationRecord | None:
    alpha = number(one.get("alpha")) if isinstance(one, dict) else None
    if alpha is None or not isinstance(one, dict):
        return None
    ends = one.get("interval")
    low, high = map(number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return ConfirmationRecord(
        alpha=alpha,
        prompts=_count(one.get("prompts")),
        rows=_count(one.get("n")),
        difference=number(one.get("difference")),
        interval=None if low is None or high is None else (low, high),
        level=number(one.get("level")),
        p=number(one.get("p_one_sided")),
        standardized=number(one.get("standardized_by_differences")),
        rejected=_text(one.get("rejected")),
    )


def _prompts(one: object) -> Prompts | None:
    counts = [_count(one.get(name)) for name in ("race", "confirmation")] if isinstance(one, dict) else []
    known = [count for count in counts if count is not None]
    return Prompts(*known) if len(known) == 2 else None


# --- JSON of whatever kind --------------------------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _rows(listed: object) -> list[Row]:
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _by_alpha(listed: object) -> Iterator[tuple[float, Row]]:
    """The entries of a list that are of an α."""
    for one in _rows(listed):
        alpha = number(one.get("alpha"))
        if alpha is not None:
            yield alpha, one
