"""A training run's checkpoints, which take the place of a pair's second side: their settings, and steps as α."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from expo.settings import Setting, changes_weights, require, require_alpha

PAIR_RULE, COURSE_RULE = "linear", "relex"
"""The rule where none is given: for a pair, and for several checkpoints."""


@dataclass(frozen=True, kw_only=True)
class CourseConfig:
    """A training run in place of θ_dpo, and the rule."""

    HEADING = "How the pair is combined"

    checkpoint: Annotated[
        tuple[str, ...],
        Setting(
            "A checkpoint of the training run that began with SFT, and its step; repeatable. The last one is θ_dpo.",
            metavar="STEP=MODEL",
        ),
    ] = ()
    rule: Annotated[
        str | None,
        changes_weights(
            "Name of the formula that makes θ(α), or θ of a step. [default: linear; relex for several --checkpoint]",
            metavar="RULE",
            absent=PAIR_RULE,
        ),
    ] = None

    @property
    def course(self) -> tuple[tuple[float, str], ...]:
        """`checkpoint` as steps and models, ascending; empty for a pair."""
        return read_checkpoints(self.checkpoint)

    @property
    def last_step(self) -> float | None:
        """The last step of the course; None for a pair."""
        return self.course[-1][0] if self.course else None

    @property
    def _usual_rule(self) -> str:
        return COURSE_RULE if len(self.checkpoint) > 1 else PAIR_RULE

    @property
    def rule_name(self) -> str:
        """The rule, by default the one that goes with the models."""
        return self.rule or self._usual_rule

    def named_by(self, pattern: str, alpha: float) -> str:
        """A name with {alpha} filled in and, for a training run, {step}."""
        last = self.last_step
        step = {} if last is None else {"{step}": shown_step(step_of(alpha, last))}
        for place, value in {"{alpha}": repr(alpha), **step}.items():
            pattern = pattern.replace(place, value)
        return pattern

    @property
    def derived(self) -> frozenset[str]:
        """The settings that follow from the others, and need not be spelled out."""
        course = ("alpha", "dpo") if self.checkpoint else ()
        return frozenset((*course, *(("rule",) if self.rule == self._usual_rule else ())))

    def _settle_course(self, dpo: str | None) -> None:
        """Take the last of several checkpoints as θ_dpo, and the rule that goes with the models where none is given.

        Raises:
            InputError: A checkpoint is spelled otherwise, `dpo` is another one, or the rule does not go with them.
        """
        course = self.course
        if course:
            last = course[-1][1]
            require(dpo in (None, "", last), f"--dpo is the last --checkpoint, {last}: leave out --dpo {dpo}")
            object.__setattr__(self, "dpo", last)
        object.__setattr__(self, "rule", self.rule_name)

    def _alphas_of_steps(self, alphas: tuple[float, ...], steps: tuple[float, ...]) -> tuple[float, ...]:
        """The α that steps stand for; where no step is given, `alphas`.

        Raises:
            InputError: Steps are given without checkpoints, or an α beside them, or neither beside checkpoints.
        """
        course = self.course
        if not steps:
            require(not course, "--checkpoint needs --target-step, a step to extrapolate to, such as --target-step 500")
            return alphas
        require(bool(course), "--target-step needs the training run's checkpoints: --checkpoint STEP=MODEL")
        last = course[-1][0]
        found = tuple(alpha_of(step, last) for step in steps)
        same = [step_of(alpha, last) for alpha in alphas] == [step_of(alpha, last) for alpha in found]
        require(same or not alphas, "--alpha and --target-step cannot be combined: a step says how far to go")
        return alphas or found


def read_checkpoints(values: Sequence[str]) -> tuple[tuple[float, str], ...]:
    """`STEP=MODEL` as steps and models, in ascending order of steps.

    Raises:
        InputError: One is spelled otherwise, or a step is given twice.
    """
    found = sorted(map(_read, values))
    steps = [step for step, _ in found]
    again = next((step for step in steps if steps.count(step) > 1), None)
    require(again is None, f"--checkpoint {shown_step(again or 0)}=… is given more than once")
    return tuple(found)


def _read(value: str) -> tuple[float, str]:
    text, equals, model = value.partition("=")
    try:
        step = float(text)
    except ValueError:
        step = math.nan
    require(
        bool(equals) and model.strip() != "" and math.isfinite(step) and step > 0,
        f"--checkpoint must be STEP=MODEL, such as 100=runs/step_100, with a step above 0, not {value!r}",
    )
    return step, model


def alpha_of(target: float, last: float) -> float:
    """The α at which the pair of the start and the last step is extrapolated to a step: θ_0 + (1 + α)Δ, 1 + α = T/s.

    Args:
        target: T, in steps.
        last: s, the last step that has a checkpoint.

    Raises:
        InputError: T is no positive number.
    """
    require(math.isfinite(target) and target > 0, f"--target-step must be above 0, not {target}")
    alpha = (target - last) / last
    require_alpha(alpha)
    return alpha


def step_of(alpha: float, last: float) -> float:
    """The step T at which the pair is when it is extrapolated by α; without the rounding errors of `alpha_of`."""
    return plain(float(shown_step(last * (1 + alpha))))


def plain(step: float) -> float:
    """A step as an integer where it is one, for output that people read."""
    return int(step) if step.is_integer() else step


def shown_step(step: float) -> str:
    """A step as people write it: without a fraction where there is none."""
    return f"{step:.12g}"
