"""The settings of a training run's checkpoints, which take the place of a pair's second side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from expo.settings import require, require_alpha


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
