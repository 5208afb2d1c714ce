"""The search over modules, pure: it says whose answers it needs, is given them, and ends with the steps that it took.

A race over the candidates for one α for all tensors comes first. From the α that it finds, each group of modules is
visited once, in a fixed order: a race between the vector as it is and the same with this group's α times `FACTORS`. Who
leads it goes on, unless its answers stop ending. Norms are left alone, but for a step that compares them copied.

Nothing here is a test: who leads on the prompts of the races has been chosen for it. What the search is worth is tested
once, on the prompts that were set aside.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from expo.settings import MAX_ALPHA
from expo.stats.means import Whole
from expo.verbs.sweep.endings import stops_ending
from expo.verbs.sweep.race import Answered, Course, Look, Rules, race
from expo.verbs.sweep.vector import NORMS, Vector

FACTORS = (0.0, 0.5, 1.5, 2.0)
"""By what a group's α is multiplied."""
DIGITS = 4
"""Significant digits of an α that is multiplied."""
UNIFORM = "one α for all"
"""The first step."""


class Arm(NamedTuple):
    """What takes part in the race of a step."""

    label: str
    vector: Vector


@dataclass(frozen=True)
class Step:
    """A race, and who goes on."""

    name: str
    arms: Mapping[float, Arm]
    """By their numbers in the race: 0 is what the others are measured by. Those of the first step are α themselves."""
    course: Course
    taken: float
    """The number of the arm that goes on."""

    @property
    def vector(self) -> Vector:
        """What goes on."""
        return self.arms[self.taken].vector

    @property
    def asked(self) -> dict[Vector, int]:
        """Vector → how many questions it has answered in this step."""
        return {self.arms[arm].vector: look.questions for look in self.course.looks for arm in look.asked}


class Wanted(NamedTuple):
    """What the search needs to go on."""

    name: str
    """The step's."""
    arms: Mapping[float, Arm]
    vectors: tuple[Vector, ...]
    """Whose answers."""
    questions: int
    """To so many of the race's questions, the first ones in its order."""
    steps: tuple[Step, ...]
    """Those that have ended."""
    looks: tuple[Look, ...]
    """Of this one."""


Answers = Mapping[Vector, Answered]


def search(
    rules: Rules, alphas: Sequence[float], groups: Mapping[str, Sequence[str]], clusters: Whole, *, norms: bool
) -> Generator[Wanted, Answers, tuple[Step, ...]]:
    """Run the search: yields what it needs, is sent the answers, returns its steps.

    Args:
        rules: Of the first race; those of the others confirm nothing, and so have all of their tokens for themselves.
        alphas: The candidates for one α; 0 takes part whether it is among them or not.
        groups: Group → its classes, in the order in which they are visited.
        clusters: (rows,): the number of the question of each row of the race, in order, from 0.
        norms: Whether there are any that move.

    Returns:
        The first step alone if no α is ahead of 0.
    """
    uniform = {alpha: Arm(f"α = {alpha:g}", Vector(alpha)) for alpha in sorted({0.0, *alphas})}
    steps = [(yield from _step(UNIFORM, rules, uniform, clusters, ()))]
    if not steps[0].taken:
        return tuple(steps)
    others = replace(rules, confirmation=0, refine=False)
    for name in [*([NORMS] if norms else []), *groups]:
        arms = dict(enumerate(arms_of(name, steps[-1].vector, groups)))
        if len(arms) > 1:
            numbered = {float(number): arm for number, arm in arms.items()}
            steps.append((yield from _step(name, others, numbered, clusters, tuple(steps))))
    return tuple(steps)


def arms_of(name: str, present: Vector, groups: Mapping[str, Sequence[str]]) -> Iterator[Arm]:
    """What a step compares: the vector as it is, and others, all of them different."""
    yield Arm("as it was", present)
    if name == NORMS:
        yield Arm("copied from DPO", present.having({NORMS: 0.0}))
        return
    seen = {present}
    for factor in FACTORS:
        values = {label: float(f"{factor * present.of(label):.{DIGITS}g}") for label in groups[name]}
        other = present.having(values)
        if other not in seen and max(values.values()) <= MAX_ALPHA:
            seen.add(other)
            yield Arm(f"times {factor:g}", other)


def _step(
    name: str, rules: Rules, arms: Mapping[float, Arm], clusters: Whole, before: tuple[Step, ...]
) -> Generator[Wanted, Answers, Step]:
    """One race, of numbered arms."""
    going = race(rules, arms, clusters, zero_may_win=name != UNIFORM)
    ask = next(going)
    while True:
        vectors = tuple(arms[number].vector for number in ask.alphas)
        answers = yield Wanted(name, arms, vectors, ask.questions, before, ask.looks)
        seen = {number: answers[arms[number].vector] for number in ask.alphas}
        of = clusters[clusters < ask.questions]
        try:
            ask = going.send(seen)
        except StopIteration as ended:
            course: Course = ended.value
            ahead = (one for one in course.ranking if not stops_ending(seen[one].ended, seen[0.0].ended, of))
            return Step(name, arms, course, next(ahead, 0.0))


def most_rows(rules: Rules, alphas: int, groups: Mapping[str, Sequence[str]], *, norms: bool) -> float:
    """How many answers a search asks for at most where all are equally long, one to a prompt, the last test included.

    A race takes half of what its arms would take on all of its prompts, and vectors are asked nothing twice.

    Args:
        rules: Of the first race.
        alphas: How many take part in it, 0 among them.
        groups: Those that are visited.
        norms: Whether there are any that move.
    """
    first = alphas * (rules.questions + rules.confirmation) / 2 - 2 * rules.confirmation
    steps = (2 if norms else 0) + len(groups) * (1 + len(FACTORS))
    return first + steps * rules.questions / 2 + 3 * rules.confirmation
