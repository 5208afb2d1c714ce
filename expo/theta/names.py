"""How θ(α), and whatever is made with it, is called where nobody names it: <DPO name>-ExPO-a<α>.

Answers that two models give together in logit space are <DPO name>-ExPO-a<α>-logits.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from expo.config.course import shown_step, step_of
from expo.config.logit_space import LOGITS, Space

NAMED = re.compile(r"(?P<dpo>.+)-ExPO-a(?P<alpha>-?[\d.]+(?:e[+-]?\d+)?)(?P<logits>-logits)?", re.DOTALL)
OF_MODULES = "-for"
"""Behind the name of θ(α) where some modules have an α of their own, before these are named."""


class Named(NamedTuple):
    """What a name says."""

    dpo: str
    """The DPO model's name."""
    alpha: float
    space: Space


def theta_name(dpo: str, alpha: float, last_step: float | None = None, space: Space = "weights") -> str:
    """The name of θ(α) made from a DPO model of this name.

    Args:
        dpo: The DPO model's name.
        alpha: The α.
        last_step: Of a training run's last checkpoint, where θ(α) is called by the step that α stands for.
        space: Where α acts.
    """
    if last_step is not None:
        return f"{dpo}-ExPO-t{shown_step(step_of(alpha, last_step))}"
    return f"{dpo}-ExPO-a{alpha!r}" + (f"-{LOGITS}" if space == LOGITS else "")


def named_alpha(name: str) -> Named | None:
    """The DPO model's name, the α and its space in a name of θ(α); None for another name."""
    found = NAMED.fullmatch(name)
    try:
        return Named(found["dpo"], float(found["alpha"]), LOGITS if found["logits"] else "weights") if found else None
    except ValueError:
        return None


def is_of_modules(name: str) -> bool:
    """Whether a name is of a θ whose modules have several α, so that no single one says what it is."""
    return re.fullmatch(f"{NAMED.pattern}{OF_MODULES}-.+", name, re.DOTALL) is not None
