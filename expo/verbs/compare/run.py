"""What a run is to those who compare: its answers, and what reward models gave them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from expo.config.logit_space import Space

UNKNOWN = "an unnamed reward model"
"""Stands in `Run.rewards` for the reward model of files that do not name theirs."""


class RowKey(NamedTuple):
    """Identifies an answer across runs: rows are paired by it, never by their position."""

    prompt: str
    """Identifies what was asked, whatever file it is read from: equal for equal conversations."""
    sample: int
    """Which of the prompt's samples."""
    turn: int = 0
    """Which of the prompt's turns."""


@dataclass(frozen=True)
class RunRow:
    """One answer."""

    key: RowKey
    id: str
    """The prompt's id as people know it: its data set's, or its number."""
    prompt: str
    """What was asked: the last turn of the user; empty where only rewards are there."""
    context: tuple[tuple[str, str], ...]
    """The turns before it, as (role, content)."""
    output: str | None
    """The answer; None where only rewards are there."""
    subset: str | None
    """The prompt's subset or category, where its task has them."""
    tokens: int | None
    """Generated tokens, where that is known."""
    finish_reason: str | None
    """stop, length or error, where that is known."""

    @property
    def label(self) -> str:
        """The row's id for people: the prompt's, with its sample and turn where they are not the first."""
        sample = f"#{self.key.sample}" if self.key.sample else ""
        return f"{self.id}{sample}" + (f" turn {self.key.turn + 1}" if self.key.turn else "")


@dataclass(frozen=True)
class Scoring:
    """What is known of one reward model's rewards of a run, beside the rewards."""

    model: str | None
    """The reward model as its files name it; None where nothing says which it was."""
    revision: str | None
    """Its commit on the hub, where that is known."""
    truncated: frozenset[int] = frozenset()
    """The rows whose conversation lost its end."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Row → why it has no reward."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The fingerprint of the rewards, where they have one."""


@dataclass(frozen=True)
class Run:
    """One model's answers to a task, and their rewards."""

    name: str
    task: str
    rows: tuple[RunRow, ...]
    rewards: Mapping[str, tuple[float | None, ...]]
    """Reward model → the reward of each row, in the order of `rows`; None where a row has none.

    The first is the one whose file has the run's plain name, if there is one.
    """
    alpha: float | None = None
    """The α of θ(α), where its files say so; 0 is not assumed."""
    scorings: Mapping[str, Scoring] = field(default_factory=dict)
    """Reward model → what else its files say; the keys are those of `rewards`."""
    space: Space = "weights"
    """Where its α acts."""
