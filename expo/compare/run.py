"""What a run is to those who compare: its answers, and what reward models gave them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


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


@dataclass(frozen=True)
class Run:
    """One model's answers to a task, and their rewards."""

    name: str
    task: str
    rows: tuple[RunRow, ...]
    rewards: Mapping[str, tuple[float | None, ...]]
    """Reward model → the reward of each row, in the order of `rows`; None where a row has none."""
    alpha: float | None = None
    """The α of θ(α), where its files say so; 0 is not assumed."""
