"""The picture of a sweep of likelihoods: accuracy, margin, and how linear log-probabilities are, against α."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from expo.output.charts import COLOURS, INK, MUTED, WIDTH, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUMS, PER_TOKEN, LINE = COLOURS[0], COLOURS[1], COLOURS[3]
HEIGHTS = (2.2, 1.3, 1.3)
"""Of the panels, in inches."""


class LikelihoodPoint(NamedTuple):
    """One α."""

    alpha: float
    accuracy: float
    accuracy_per_token: Estimate
    """With the interval of its difference from α = 0, where it has one."""
    margin_per_token: float
    linear: float | None


def likelihood_curve(
    points: Sequence[LikelihoodPoint], *, linear: float, linear_up_to: float, title: str | None = None
) -> Figure:
    """Draw accuracies, margins per token and the share that a line explains against α.

    Args:
        points: One per α, ascending.
        linear: The least share that counts as linear.
        linear_up_to: The largest α up to which it is that; 0 for none.
        title: Over everything.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(HEIGHTS) + 1.0), layout="constrained")
    accuracy, margin, line = figure.subplots(3, 1, sharex=True, height_ratios=HEIGHTS)
    alphas = [point.alpha for point in points]
    _draw_accuracy(accuracy, points)
    margin.plot(alphas, [point.margin_per_token for point in points], color=PER_TOKEN, marker="o", markersize=3.5)
    margin.axhline(0, color=MUTED, linewidth=0.8)
    margin.set_ylabel("margin\nper token")
    known = [(point.alpha, point.linear) for point in points if point.linear is not None]
    if known:
        line.plot(*zip(*known, strict=True), color=LINE, marker="o", markersize=3.5)
    line.axhline(linear, color=MUTED, linewidth=0.8, linestyle=":")
    line.set_ylim(min(0.0, max(-1.0, *(share for _, share in known))) if known else 0.0, 1.05)
    line.set_ylabel("linear")
    line.set_xlabel("α")
    if linear_up_to:
        for axes in (accuracy, margin, line):
            axes.axvline(linear_up_to, color=INK, linewidth=1, linestyle=":", zorder=1)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8, handles=_handles(linear_up_to))
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _draw_accuracy(axes: Axes, points: Sequence[LikelihoodPoint]) -> None:
    alphas = [point.alpha for point in points]
    ahead = [point for point in points if point.alpha >= 0]
    lows, highs = zip(*(_ends(point.accuracy_per_token) for point in ahead), strict=True)
    axes.fill_between([point.alpha for point in ahead], lows, highs, color=PER_TOKEN, alpha=0.16, linewidth=0)
    style: dict[str, Any] = {"marker": "o", "markersize": 4}
    axes.plot(alphas, [point.accuracy_per_token.value for point in points], color=PER_TOKEN, **style)
    axes.plot(alphas, [point.accuracy for point in points], color=SUMS, **style)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_ylabel("chosen is likelier")


def _ends(estimate: Estimate) -> tuple[float, float]:
    low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
    return low, high


def _handles(linear_up_to: float) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=PER_TOKEN, marker="o", markersize=4, label="per token; band: 95 % of the change from DPO"),
        Line2D([], [], color=SUMS, marker="o", markersize=4, label="sums over the answer"),
    ]
    if linear_up_to:
        handles.append(Line2D([], [], color=INK, linestyle=":", label=f"linear up to α = {linear_up_to:g}"))
    return handles
