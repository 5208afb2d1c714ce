"""Trajectories: a training run's checkpoints, and where each tensor goes beyond the last of them.

`fit.py` finds the line that a tensor moves along, from inner products alone; `pieces.py` is the arithmetic on pieces.
Nothing here imports numpy or torch, because the command line lists the names.
"""

from expo.errors import InputError
from expo.theta.rules import RULES

LINES = ("relex", "linear")
"""The rules by which a tensor's line is found (`fit.LINE_RULES`); the first one is the default."""


def rule_names() -> tuple[str, ...]:
    """Those of a pair's rules and of a training run's."""
    return tuple(dict.fromkeys((*RULES, *LINES)))


def require_line(name: str | None, checkpoints: int) -> None:
    """Refuse a rule that is none for this many checkpoints.

    Raises:
        InputError: It is not; the message lists the names.
    """
    if name is not None and name not in LINES:
        raise InputError(f"--rule must be one of {', '.join(LINES)} for a training run, not {name!r}")
    if name == "relex" and checkpoints < 2:
        raise InputError(
            "--rule relex needs two or more --checkpoint: with one, a step is reached along its own change"
        )
