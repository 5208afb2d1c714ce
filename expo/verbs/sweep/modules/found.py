"""What a search over modules found: a frozen tree, from which modules.json and the text are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from expo.files import Row
from expo.verbs.sweep.confirm import LEVEL, Confirmation
from expo.verbs.sweep.modules.search import Arm, Step
from expo.verbs.sweep.race import ALIKE, HALF, NO_ROWS, NONE_LEFT, ONE_LEFT, USED_UP, Look
from expo.verbs.sweep.vector import Vector

ENDS = {
    ONE_LEFT: "one α above 0 is left",
    NONE_LEFT: "no other arm is left",
    ALIKE: ALIKE,
    USED_UP: USED_UP,
    HALF: "half of its arms' tokens are spent",
    NO_ROWS: "no row has a reward for every arm",
}
"""Why a race ends, of arms that are no α."""


@dataclass(frozen=True)
class Found:
    """A search as it went, and what the prompts that were set aside say of its end."""

    steps: tuple[Step, ...]
    tested: Confirmation | None = None
    """The last vector against the first step's α, once; None where they are the same."""
    over_dpo: Mapping[Vector, Confirmation] | None = None
    """Each of the two against α = 0, of which only the difference is reported; None where no α is ahead of 0."""

    @property
    def uniform(self) -> Vector:
        """The α that the first race found; 0 where none was ahead."""
        return self.steps[0].vector

    @property
    def final(self) -> Vector:
        """What the last step left."""
        return self.steps[-1].vector

    @property
    def is_shown(self) -> bool:
        """Whether the last vector is better than one α for all."""
        return self.tested is not None and self.tested.is_shown

    @property
    def asked(self) -> dict[Vector, int]:
        """Vector → how many of the races' questions it has answered."""
        most: dict[Vector, int] = {}
        for step in self.steps:
            for vector, questions in step.asked.items():
                most[vector] = max(questions, most.get(vector, 0))
        return most


def describe_step(step: Step) -> Row:
    """A step as plain data."""
    return {
        "step": step.name,
        "arms": {arm.label: arm.vector.describe() for arm in step.arms.values()},
        "looks": [describe_look(look, step.arms) for look in step.course.looks],
        "taken": step.arms[step.taken].label,
    }


def describe_look(look: Look, arms: Mapping[float, Arm]) -> Row:
    """A look as plain data, arms by their labels."""
    return {
        "look": look.number,
        "prompts": look.questions,
        "n": look.rows,
        "leader": arms[look.leader].label,
        "means": {arms[one].label: mean for one, mean in look.means.items()},
        "error": look.error,
        "dropped": [
            {
                "arm": arms[one.alpha].label,
                "behind": arms[one.behind].label,
                "difference": -one.lead.difference,
                "standardized_by_differences": -one.lead.standardized,
                "p": one.p,
            }
            for one in look.dropped
        ],
        "unscored": [arms[one].label for one in look.unscored],
        "expected_loss": look.expected_loss if math.isfinite(look.expected_loss) else None,
        "ends": None if look.ends is None else ENDS[look.ends],
    }


def describe_steps(steps: Iterable[Step], looks: Sequence[Look] = (), arms: Mapping[float, Arm] | None = None) -> Row:
    """Steps that have ended, and the looks of one that has not."""
    going = {} if arms is None else {"looks_of_next_step": [describe_look(look, arms) for look in looks]}
    return {"steps": [describe_step(step) for step in steps], **going}


def describe_test(found: Confirmation | None, *, claims: bool) -> Row | None:
    """A comparison on the prompts that were set aside, as plain data.

    Args:
        found: The comparison.
        claims: Whether it is the test; of others no p is reported.
    """
    if found is None:
        return None
    return {
        "prompts": found.questions,
        "n": found.rows,
        "difference": found.difference if found.rows else None,
        "interval": found.interval,
        "level": LEVEL,
        "standardized_difference": found.standardized,
        **({"p": found.p, "shown": found.is_shown} if claims else {}),
    }
