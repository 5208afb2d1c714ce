"""The picture of a sweep, for `sweep.png` and for the page: reward, length and share of ended answers against α."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from expo.output.charts import COLOURS, INK, LABEL, MUTED, PAPER, WIDTH, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD, LENGTH, ENDED = COLOURS[1], COLOURS[5], COLOURS[3]
HEIGHTS = {"reward": 2.5, "length": 0.95, "ended": 0.95}
"""Of the panels, in inches."""
MARK_SIZE = 8.5
CHARACTER = 0.075
"""The width of a character of a mark in inches, rather more than it is, since a page has fonts of its own."""
ROOM = WIDTH - 0.75
"""The width of a panel in inches."""
ROW = 0.17
"""The height of a row of marks."""


class CurvePoint(NamedTuple):
    """One α."""

    alpha: float
    reward: Estimate
    """The mean reward of α = 0 plus the difference from it, with the difference's interval."""
    length: float | None
    ended: float | None
    """The share of answers that end."""


class Mark(NamedTuple):
    """A word over the panels, at an α."""

    alpha: float
    word: str
    colour: str


def alpha_curve(
    points: Sequence[CurvePoint],
    *,
    unit: str,
    chosen: float | None = None,
    rejected: Collection[float] = (),
    title: str | None = None,
    reward: str = "mean reward",
) -> Figure:
    """Draw the mean reward against α with its band, and below it lengths and shares of ended answers, where known.

    α above 0 and 0 are joined by a band; α below 0, which are compared by themselves, have bars. Places on the axis go
    by value.

    Args:
        points: One per α.
        unit: What lengths are counted in.
        chosen: The α that is chosen, 0 for none of the others; None where nobody chose.
        rejected: Those that score higher than α = 0 and were not accepted: their points are hollow.
        title: Over everything.
        reward: What the first panel shows.
    """
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point.alpha)
    panels: dict[str, Callable[[Axes], None]] = {"reward": lambda axes: _draw_rewards(axes, points, rejected, reward)}
    if any(point.length is not None for point in points):
        panels["length"] = lambda axes: _draw_lengths(axes, points, unit)
    if any(point.ended is not None for point in points):
        panels["ended"] = lambda axes: _draw_ended(axes, points)
    marks = _marks([point.alpha for point in points], chosen)
    heights = [HEIGHTS[name] for name in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.75 + (0.3 if title else 0)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, draw in zip(grid, panels.values(), strict=True):
        draw(axes)
        for mark in marks:
            axes.axvline(mark.alpha, color=mark.colour, linewidth=1, linestyle=":", zorder=1)
    grid[-1].set_xlabel("α")
    grid[0].margins(x=0.04)
    _write_marks(grid[0], marks)
    _explain(figure, points, rejected)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _draw_rewards(axes: Axes, points: Sequence[CurvePoint], rejected: Collection[float], label: str) -> None:
    alphas, values = [point.alpha for point in points], [point.reward.value for point in points]
    ahead = [point for point in points if point.alpha >= 0]
    lows, highs = zip(*(_ends(point.reward) for point in ahead), strict=True) if ahead else ((), ())
    axes.fill_between([point.alpha for point in ahead], lows, highs, color=REWARD, alpha=0.16, linewidth=0)
    for point in points:
        if point.alpha < 0:
            axes.plot([point.alpha] * 2, _ends(point.reward), color=REWARD, linewidth=1.4)
    axes.plot(alphas, values, color=REWARD, linewidth=1.5, zorder=3)
    for hollow in (False, True):
        some = [point for point in points if (point.alpha in rejected) is hollow]
        face = PAPER if hollow else REWARD
        at, means = [point.alpha for point in some], [point.reward.value for point in some]
        axes.plot(at, means, "o", color=REWARD, markerfacecolor=face, markersize=4.5, zorder=4)
    axes.set_ylabel(label, parse_math=False)
    axes.margins(y=0.08)


def _ends(reward: Estimate) -> tuple[float, float]:
    """The interval of a reward, or the reward where it has none."""
    low, high = (reward.value if end is None else end for end in (reward.low, reward.high))
    return low, high


def _draw_lengths(axes: Axes, points: Sequence[CurvePoint], unit: str) -> None:
    known = [(point.alpha, point.length) for point in points if point.length is not None]
    axes.plot(*zip(*known, strict=True), color=LENGTH, marker="o", markersize=3.5)
    axes.set_ylim(0, 1.12 * max(length for _, length in known) or 1)
    axes.set_ylabel(unit)


def _draw_ended(axes: Axes, points: Sequence[CurvePoint]) -> None:
    known = [(point.alpha, point.ended) for point in points if point.ended is not None]
    axes.plot(*zip(*known, strict=True), color=ENDED, marker="o", markersize=3.5)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set_ylabel("ended")


# --- marks ----------------------------------------------------------------------------------------------------------


def _marks(alphas: Collection[float], chosen: float | None) -> list[Mark]:
    """What is marked: SFT, DPO, and the α that is chosen."""
    marks = [Mark(-1.0, "SFT", MUTED)] if -1.0 in alphas else []
    if 0.0 in alphas:
        marks.append(Mark(0.0, "DPO: no α is chosen" if chosen == 0 else "DPO", INK if chosen == 0 else MUTED))
    if chosen:
        marks.append(Mark(chosen, f"α = {chosen:g} is chosen", INK))
    return marks


def _write_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write marks over a panel, each over its α, and in further rows those that would touch one to their left."""
    low, high = axes.get_xlim()
    ends: list[float] = []  # of each row, in inches from the left
    for mark in marks:
        width = CHARACTER * len(mark.word)
        at = (mark.alpha - low) / (high - low) * ROOM
        begin = min(max(at - width / 2, 0.0), max(ROOM - width, 0.0))
        row = next((number for number, end in enumerate(ends) if end <= begin), len(ends))
        ends[row : row + 1] = [begin + width + CHARACTER]
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
        offset = (0, 3 + 72 * ROW * row)
        text: dict[str, Any] = {"fontsize": MARK_SIZE, "color": mark.colour, "parse_math": False, **place}
        axes.annotate(mark.word, ((begin + width / 2) / ROOM, 1.0), offset, **text, bbox=LABEL["bbox"])


def _explain(figure: Figure, points: Sequence[CurvePoint], rejected: Collection[float]) -> None:
    """Say what the band and the hollow points are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if any(point.reward.low is not None for point in points):
        handles.append(Patch(facecolor=REWARD, alpha=0.16, label="95 % band of the difference from DPO"))
    if any(point.alpha in rejected for point in points):
        shape: dict[str, Any] = {"marker": "o", "color": REWARD, "markerfacecolor": PAPER, "linestyle": ""}
        handles.append(Line2D([], [], **shape, markersize=4.5, label="higher, but rejected"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
