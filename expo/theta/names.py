"""How θ(α), and whatever is made with it, is called where nobody names it: <DPO name>-ExPO-a<α>."""

from __future__ import annotations

import re

from expo.config.course import shown_step, step_of

NAMED = re.compile(r"(?P<dpo>.+)-ExPO-a(?P<alpha>-?[\d.]+(?:e[+-]?\d+)?)", re.DOTALL)


def theta_name(dpo: str, alpha: float, last_step: float | None = None) -> str:
    """The name of θ(α) made from a DPO model of this name.

    Args:
        dpo: The DPO model's name.
        alpha: The α.
        last_step: Of a training run's last checkpoint, where θ(α) is called by the step that α stands for.
    """
    return f"{dpo}-ExPO-a{alpha!r}" if last_step is None else f"{dpo}-ExPO-t{shown_step(step_of(alpha, last_step))}"


def named_alpha(name: str) -> tuple[str, float] | None:
    """The DPO model's name and the α in a name of θ(α); None for another name."""
    found = NAMED.fullmatch(name)
    try:
        return (found["dpo"], float(found["alpha"])) if found else None
    except ValueError:
        return None
