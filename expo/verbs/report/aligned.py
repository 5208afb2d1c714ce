"""The rows of several runs beside each other: what the page's figures, flips and browser are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from expo.verbs.compare.run import RowKey, Run, RunRow
from expo.verbs.report.text import digits_for

Numbers = tuple[float | None, ...]
"""A number per row; None where a row has none."""


@dataclass(frozen=True)
class Aligned:
    """Runs whose rows are matched by prompt, sample and turn."""

    runs: tuple[Run, ...]
    """The first is the baseline."""
    keys: tuple[RowKey, ...]
    """Of all rows of all runs: the baseline's in its order, then those it lacks."""
    rows: tuple[tuple[RunRow | None, ...], ...]
    """Run → its row for each key."""
    reward_models: tuple[str, ...]
    """Those that scored all runs, as they are called in `Run.rewards`."""
    by_pairs: bool = False
    """Whether each run is compared on the rows that it shares with the baseline, as the α of a sweep are; else on those
    that all runs have."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def first(self) -> tuple[RunRow, ...]:
        """For each key a row that has its prompt, if any run does."""
        found = []
        for alike in zip(*self.rows, strict=True):
            there = [row for row in alike if row is not None]
            found.append(next((row for row in there if row.prompt), there[0]))
        return tuple(found)

    @cached_property
    def _rewards(self) -> dict[tuple[str, int], Numbers]:
        return {
            (model, number): self._read(model, number)
            for model in self.reward_models
            for number in range(len(self.runs))
        }

    def _read(self, model: str, number: int) -> Numbers:
        run = self.runs[number]
        found = dict(zip((row.key for row in run.rows), run.rewards.get(model, ()), strict=False))
        return tuple(_finite(found.get(key)) for key in self.keys)

    def rewards(self, model: str, number: int) -> Numbers:
        """The rewards that a reward model gave a run."""
        return self._rewards[model, number]

    @cached_property
    def shared(self) -> tuple[bool, ...]:
        """Whether the comparison is about the row: all runs have it, or the baseline does where runs go by pairs."""
        asked = self.rows[:1] if self.by_pairs else self.rows
        return tuple(all(row is not None for row in alike) for alike in zip(*asked, strict=True))

    def shared_rewards(self, model: str, number: int) -> Numbers:
        """The rewards of the rows that are compared."""
        found = zip(self.rewards(model, number), self.shared, strict=True)
        return tuple(reward if shared else None for reward, shared in found)

    def differences(self, model: str, number: int) -> Numbers:
        """Reward minus the baseline's, where both have one and the row is compared."""
        pairs = zip(self.shared_rewards(model, number), self.shared_rewards(model, 0), strict=True)
        return tuple(None if mine is None or base is None else mine - base for mine, base in pairs)

    @cached_property
    def decimals(self) -> dict[str, int]:
        """Reward model → with how many decimals its rewards are shown: three digits of the range that they span."""
        found = {}
        for model in self.reward_models:
            known = [value for run in range(len(self.runs)) for value in self.rewards(model, run) if value is not None]
            found[model] = digits_for([(max(known) - min(known)) / 10]) if known else 2
        return found

    def outputs(self, number: int) -> tuple[str | None, ...]:
        """A run's answers."""
        return tuple(None if row is None else row.output for row in self.rows[number])

    @cached_property
    def unit(self) -> str:
        """What lengths are counted in: tokens where every answer has a count, else characters."""
        rows = [row for rows in self.rows for row in rows if row is not None]
        return "tokens" if rows and all(row.tokens is not None for row in rows) else "characters"

    def lengths(self, number: int) -> Numbers:
        """The length of each answer, in `unit`."""
        rows = self.rows[number]
        if self.unit == "tokens":
            return tuple(None if row is None else row.tokens for row in rows)
        return tuple(None if row is None or row.output is None else len(row.output) for row in rows)

    def finish_reasons(self, number: int) -> tuple[str | None, ...]:
        """Why each answer ended, where that is known."""
        return tuple(None if row is None else row.finish_reason for row in self.rows[number])

    @cached_property
    def subsets(self) -> tuple[str, ...]:
        """The names of the prompts' subsets."""
        return tuple(dict.fromkeys(row.subset for row in self.first if row.subset))


def align(runs: Sequence[Run], reward_models: Sequence[str], *, by_pairs: bool = False) -> Aligned:
    """Match the rows of runs by their keys.

    Args:
        runs: The runs, the baseline first.
        reward_models: Those that scored all of them.
        by_pairs: Whether each run is compared on the rows that it shares with the baseline, whichever these are.
    """
    keys = tuple(dict.fromkeys(row.key for run in runs for row in run.rows))
    by_key = [{row.key: row for row in run.rows} for run in runs]
    rows = tuple(tuple(found.get(key) for key in keys) for found in by_key)
    return Aligned(tuple(runs), keys, rows, tuple(reward_models), by_pairs)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
