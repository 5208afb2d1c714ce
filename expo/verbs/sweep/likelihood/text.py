"""What the pairs say of α, as a table of text and in words."""

from __future__ import annotations

import textwrap

from expo.stats.resampling import LEVEL
from expo.verbs.compare.text import NOTHING, WIDTH, Grid, aligned, number, printable, signed
from expo.verbs.sweep.likelihood.figures import LINEAR, AlphaLikelihoods, Found, Measured
from expo.verbs.sweep.text import REFERENCES

HEAD = ("α", "accuracy", "per token", "difference", "margin", "per token", "chosen", "rejected", "linear", "")
EXPLORATORY = (
    "Exploratory, and no α is chosen by it: likelihoods are of answers that others wrote, and may go on rising where "
    "the rewards of θ(α)'s own answers fall; `expo sweep` with a reward model measures these."
)


def as_text(found: Found, pairs: str) -> str:
    """The table, the verdict, and how to read it."""
    grid = Grid(f"{pairs}: {found.pairs} preference pairs, nothing generated", HEAD, tuple(map(_row, found.alphas)))
    words = [verdict(found), f"{EXPLORATORY} {_how()}"]
    return "\n\n".join(["\n".join(aligned(grid)), *(textwrap.fill(printable(line), WIDTH) for line in words)])


def verdict(found: Found) -> str:
    """What the pairs speak for, in a sentence or two."""
    best = found.highest("accuracy_per_token")
    if best:
        measured = next(one.accuracy_per_token for one in found.alphas if one.alpha == best)
        said = (
            f"The chosen answer is the likelier one per token most often at α = {best:g}: {_share(measured.mean)} of "
            f"the pairs, {_points(measured)} against α = 0."
        )
    else:
        said = "At no α is the chosen answer the likelier one per token more often than at α = 0."
    up_to = found.linear_up_to
    linear = f"up to α = {up_to:g}" if up_to else "at none of these α"
    return f"{said} Log-probabilities are linear in α {linear}."


def _row(one: AlphaLikelihoods) -> tuple[str, ...]:
    return (
        f"{one.alpha:g}",
        _share(one.accuracy.mean),
        _share(one.accuracy_per_token.mean),
        NOTHING if one.accuracy_per_token.difference is None else _points(one.accuracy_per_token),
        signed(one.margin.mean, 2),
        signed(one.margin_per_token.mean, 4),
        number(one.chosen, 3),
        number(one.rejected, 3),
        NOTHING if one.linear is None else f"{one.linear:.3f}",
        REFERENCES.get(one.alpha, ""),
    )


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(measured: Measured) -> str:
    """A difference of shares in percentage points, with its interval."""
    low_high = "" if measured.interval is None else f" [{', '.join(f'{100 * end:+.1f}' for end in measured.interval)}]"
    return f"{100 * (measured.difference or 0):+.1f}{low_high}"


def _how() -> str:
    level = f"{LEVEL:.0%}".replace("%", " %")
    return (
        "Accuracy: how often log π(chosen) > log π(rejected), as sums and per token; differences of the latter from "
        f"α = 0 in percentage points, {level} intervals by prompt, simultaneous over the α above 0. Margins and mean "
        "log π per token in nats. Linear: the share of the changes that the line through SFT and DPO explains, "
        f"{LINEAR:g} or more."
    )
