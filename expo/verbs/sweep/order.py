"""The order in which a race asks its prompts, and which are set aside to confirm what it finds: pure.

A question that a task has twice is one question here: both are asked in the same slice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash


class Asked(NamedTuple):
    """A prompt, as far as its place depends on it."""

    id: str
    question: Hashable
    """Equal for prompts that ask the same."""
    subset: str | None
    """The part of the task that it belongs to."""


@dataclass(frozen=True)
class Order:
    """Questions in the order in which they are asked, each as the ids of its prompts."""

    confirmation: tuple[tuple[str, ...], ...]
    """Set aside first; the race does not see them."""
    race: tuple[tuple[str, ...], ...]

    def in_race(self, questions: int) -> tuple[str, ...]:
        """The ids of the first so many questions of the race."""
        return tuple(name for ids in self.race[:questions] for name in ids)

    @property
    def to_confirm(self) -> tuple[str, ...]:
        """The ids of the questions that are set aside."""
        return tuple(name for ids in self.confirmation for name in ids)


def put_in_order(prompts: Sequence[Asked], *, seed: int, confirm: float) -> Order:
    """Put prompts into an order by chance, of which every beginning has its share of each subset to within a question.

    (So what follows those that are set aside has it to within two.)

    A question's place in its subset is by a hash of the seed and its first id, so that the order in the file plays no
    part. The first `confirm` of all questions are set aside.

    Args:
        prompts: All prompts.
        seed: Of the order.
        confirm: The share of questions to set aside.
    """
    questions: dict[Hashable, list[str]] = {}
    subset_of: dict[Hashable, str] = {}
    for prompt in sorted(prompts, key=lambda one: one.id):
        questions.setdefault(prompt.question, []).append(prompt.id)
        subset_of.setdefault(prompt.question, prompt.subset or "")
    subsets: dict[str, list[tuple[str, ...]]] = {}
    for question, ids in questions.items():
        subsets.setdefault(subset_of[question], []).append(tuple(ids))
    names = sorted(subsets, key=lambda subset: (_hash(seed, f"subset {subset}"), subset))
    queues = [iter(sorted(subsets[name], key=lambda ids: (_hash(seed, ids[0]), ids))) for name in names]
    ordered = [next(queues[turn]) for turn in _turns([len(subsets[name]) for name in names])]
    aside = set_aside(len(ordered), confirm)
    return Order(tuple(ordered[:aside]), tuple(ordered[aside:]))


def _turns(sizes: Sequence[int]) -> Iterator[int]:
    """Which subset each place goes to, so that after m places each subset has m times its share, to within one.

    Of the subsets that are behind by 1/(2S − 2) or more, the one whose next place is due first (Tijdeman, The chairman
    assignment problem, Discrete Mathematics 32, 1980); where several are, the first of them.
    """
    if len(sizes) < 2:
        yield from [0] * sum(sizes)
        return
    of = np.array(sizes, dtype=np.int64)
    total, slack = int(of.sum()), 2 * len(sizes) - 2
    behind = np.zeros_like(of)  # in 1/total of a place
    for _ in range(total):
        behind += of
        due = np.where(behind * slack >= total, ((slack - 1) * total - behind * slack) / of, np.inf)
        turn = int(np.argmin(due))
        behind[turn] -= total
        yield turn


def set_aside(questions: int, confirm: float) -> int:
    """How many of so many questions are set aside to confirm what a race finds."""
    return round(confirm * questions)


def _hash(seed: int, text: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed} {text}".encode())
