"""Which rows and which reward models several runs share, and what is left out, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from expo.errors import InputError, listed
from expo.files import Row
from expo.stats.means import Floats, Whole
from expo.verbs.compare.run import UNKNOWN, RowKey, Run, RunRow, Scoring

NOT_ASKED = "it was not asked"
"""Why a run has no answer to a prompt that others answer."""


@dataclass(frozen=True)
class LeftOut:
    """A row that is in no figure, or not in those of a run."""

    id: str
    sample: int
    turn: int
    run: str
    """The run that lacks it, or its reward."""
    reason: str

    def describe(self) -> Row:
        """As plain data."""
        turn = {"turn": self.turn} if self.turn else {}
        return {"id": self.id, "sample": self.sample, **turn, "run": self.run, "reason": self.reason}


def with_rows_of(base: Run, run: Run) -> Run:
    """A run with a row, without an answer or a reward, for each that it lacks: others keep theirs.

    Such rows are in no figure of the run, and are not named as left out of them.
    """
    there = {row.key for row in run.rows}
    missing = [row for row in base.rows if row.key not in there]
    if not missing:
        return run
    empty = tuple(replace(row, output=None, tokens=None, finish_reason=None) for row in missing)
    rewards = {model: (*values, *(None for _ in missing)) for model, values in run.rewards.items()}
    reasons = dict.fromkeys(range(len(run.rows), len(run.rows) + len(missing)), NOT_ASKED)
    known = {model: run.scorings.get(model, Scoring(model, None)) for model in run.rewards}
    scorings = {model: replace(one, reasons={**one.reasons, **reasons}) for model, one in known.items()}
    return replace(run, rows=(*run.rows, *empty), rewards=rewards, scorings=scorings)


def of_rows(run: Run, keys: Collection[RowKey]) -> Run:
    """A run with some of its rows only."""
    places = [place for place, row in enumerate(run.rows) if row.key in keys]
    now = {place: number for number, place in enumerate(places)}
    scorings = {
        model: replace(
            one,
            truncated=frozenset(now[place] for place in one.truncated if place in now),
            reasons={now[place]: why for place, why in one.reasons.items() if place in now},
        )
        for model, one in run.scorings.items()
    }
    return replace(
        run,
        rows=tuple(run.rows[place] for place in places),
        rewards={model: tuple(values[place] for place in places) for model, values in run.rewards.items()},
        scorings=scorings,
    )


@dataclass(frozen=True)
class Pairing:
    """Runs whose rows are paired: row i of one is row i of all."""

    runs: tuple[Run, ...]
    keys: tuple[RowKey, ...]
    """The rows they share, sorted, so that no figure depends on the order in a file."""
    numbers: tuple[Whole, ...]
    """For each run: (n,), where each row lies in it."""
    left_out: tuple[LeftOut, ...]
    """Rows that not all runs have."""

    @cached_property
    def clusters(self) -> Whole:
        """(n,): the number of each row's prompt."""
        _, numbers = np.unique([key.prompt for key in self.keys], return_inverse=True)
        return numbers.astype(np.int64)

    def rows(self, run: int) -> list[RunRow]:
        """The rows of a run, in the order of `keys`."""
        rows = self.runs[run].rows
        return [rows[number] for number in self.numbers[run]]

    def rewards(self, run: int, model: str) -> Floats:
        """(n,): a run's rewards; NaN for a row that has none."""
        return np.array(self.runs[run].rewards[model], dtype=np.float64)[self.numbers[run]]


def pair(runs: Sequence[Run], *, intersect: bool = False) -> Pairing:
    """Pair the rows of runs.

    Args:
        runs: Two or more, the baseline first.
        intersect: Take the rows that all of them have; otherwise all of them must have the same.

    Raises:
        InputError: They are of different tasks, or have different rows, or none in common.
    """
    if len(runs) < 2:
        raise InputError(f"a comparison takes two or more runs, not {len(runs)}")
    other = next((run for run in runs if run.task != runs[0].task), None)
    if other is not None:
        raise InputError(
            f"runs of different tasks cannot be paired: {runs[0].name} is of {runs[0].task}, and {other.name} of "
            f"{other.task}"
        )
    places = [{row.key: number for number, row in enumerate(run.rows)} for run in runs]
    common = set.intersection(*(set(place) for place in places))
    if not intersect:
        for run, place in zip(runs[1:], places[1:], strict=True):
            _require_same(runs[0], run, places[0], place, len(common))
    if not common:
        raise InputError(f"{' and '.join(run.name for run in runs)} have no prompt in common: nothing can be paired")
    keys = tuple(sorted(common))
    numbers = tuple(np.array([place[key] for key in keys], dtype=np.int64) for place in places)
    return Pairing(tuple(runs), keys, numbers, tuple(_dropped(runs, places)))


def _require_same(first: Run, second: Run, one: Mapping[RowKey, int], other: Mapping[RowKey, int], common: int) -> None:
    sides = [
        (run.name, [run.rows[place[key]].label for key in place if key not in rest])
        for run, place, rest in ((first, one, other), (second, other, one))
    ]
    if not any(only for _, only in sides):
        return
    parts = [part for name, only in sides for part in listed(f"{counted(len(only))} only in {name}", only)]
    advice = f"--intersect compares the {common} that all share" if common else "none is in both"
    raise InputError(f"{first.name} and {second.name} answer different prompts: {'; '.join(parts)}; {advice}")


def _dropped(runs: Sequence[Run], places: Sequence[Mapping[RowKey, int]]) -> Iterable[LeftOut]:
    """The rows that some run lacks, each named as the first run that has it does."""
    seen: set[RowKey] = set()
    for run in runs:
        for row in run.rows:
            if row.key in seen:
                continue
            seen.add(row.key)
            for other, place in zip(runs, places, strict=True):
                if row.key not in place:
                    yield LeftOut(row.id, row.key.sample, row.key.turn, other.name, f"{other.name} has no such row")


def counted(rows: int) -> str:
    """A number of rows in words."""
    return "1 row" if rows == 1 else f"{rows} rows"


# --- reward models --------------------------------------------------------------------------------------------------


def common_reward_models(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The reward models that scored all runs, the baseline's own first, and notes about others.

    Returns:
        No reward model where a run has no rewards at all: lengths can still be compared.

    Raises:
        InputError: All runs have rewards, but of different reward models.
    """
    without = [run.name for run in runs if not run.rewards]
    if without:
        some = " ".join(listed("without rewards", without)) if len(without) < len(runs) else "no run has rewards"
        return [], [f"{some}: only lengths are compared; `expo score` makes rewards"]
    shared = [model for model in runs[0].rewards if all(model in run.rewards for run in runs)]
    if not shared:
        scored = "; ".join(f"{run.name} by {', '.join(run.rewards)}" for run in runs)
        raise InputError(f"rewards of different reward models cannot be compared: {scored}; score all runs with one")
    for model in shared:
        _require_one_model(model, runs)
    notes = [note for model in shared for note in _different_settings(model, runs)]
    if UNKNOWN in shared:
        notes.append("no file says which reward model gave these rewards: they are assumed to come from one")
    others = sorted({model for run in runs for model in run.rewards} - set(shared))
    return shared, [*notes, *(f"rewards by {model} are ignored: not all runs have them" for model in others)]


def _settings(model: str, run: Run) -> Mapping[str, Any]:
    return run.scorings[model].settings if model in run.scorings else {}


def _require_one_model(model: str, runs: Sequence[Run]) -> None:
    """Refuse two reward models in folders of one name, which the hashes of their headers tell apart."""
    headers: dict[str, str] = {}
    for run in runs:
        source = _settings(model, run).get("reward_model")
        if isinstance(source, dict) and source.get("headers_xxh3") is not None:
            headers.setdefault(str(source["headers_xxh3"]), run.name)
    if len(headers) > 1:
        first, second, *_ = headers.values()
        raise InputError(
            f"{first} and {second} were scored by two reward models that are both called {model}: score them with one"
        )


def _different_settings(model: str, runs: Sequence[Run]) -> list[str]:
    """Settings of scoring that differ, which move rewards a little or, as a template does, a lot."""
    known = [run for run in runs if _settings(model, run)]
    notes = []
    for run in known[1:]:
        first, second = _settings(model, known[0]), _settings(model, run)
        names = sorted(key for key in {*first, *second} - {"task", "output"} if first.get(key) != second.get(key))
        if names:
            what = ", ".join(name.replace("_", "-") for name in names)
            notes.append(f"{known[0].name} and {run.name} were scored by {model} with a different {what}")
    return notes
