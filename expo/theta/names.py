"""How θ(α), and whatever is made with it, is called where nobody names it: <DPO name>-ExPO-a<α>."""

from __future__ import annotations

import re

NAMED = re.compile(r"(?P<dpo>.+)-ExPO-a(?P<alpha>-?[\d.]+(?:e[+-]?\d+)?)", re.DOTALL)


def theta_name(dpo: str, alpha: float) -> str:
    """The name of θ(α) made from a DPO model of this name."""
    return f"{dpo}-ExPO-a{alpha!r}"


def named_alpha(name: str) -> tuple[str, float] | None:
    """The DPO model's name and the α in a name of θ(α); None for another name."""
    found = NAMED.fullmatch(name)
    try:
        return (found["dpo"], float(found["alpha"])) if found else None
    except ValueError:
        return None
