"""The picture of a sweep, for `sweep.png` and for the page: reward, length and share of ended answers against α."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from expo.config.course import shown_step, step_of
from expo.output.charts import COLOURS, INK, LABEL, MUTED, PAPER, WIDTH, Estimate
from expo.output.course import CROSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARD, LENGTH, ENDED, CONFIRMED = COLOURS[1], COLOURS[5], COLOURS[3], COLOURS[2]
HEIGHTS = {"reward": 2.5, "length": 0.95, "ended": 0.95}
"""Of the panels, in inches."""
MARK_SIZE = 8.5
CHARACTER = 0.075
"""The width of a character of a mark in inches, rather more than it is, since a page has fonts of its own."""
ROOM = WIDTH - 0.75
"""The width of a panel in inches."""
ROW = 0.17
"""The height of a row of marks."""
LONG = 44
"""Characters of a legend's entry from which on it has a row of its own."""
OF_RACE = "race + confirmation prompts"
"""Which prompts the figures of a race's α are of, all that an α shares with α = 0."""
DOT: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": ""}
HOLLOW: dict[str, Any] = {**DOT, "markerfacecolor": PAPER}
DIAMOND: dict[str, Any] = {"marker": "D", "markersize": 4.2, "linestyle": ""}
BESIDE = 0.09
"""How far right of its α the confirmation stands, in inches, so that it hides nothing."""


class CurvePoint(NamedTuple):
    """One α."""

    alpha: float
    reward: Estimate
    """The mean reward of α = 0 plus the difference from it, with the difference's interval."""
    length: float | None
    ended: float | None
    """The share of answers that end."""


class Confirmed(NamedTuple):
    """What the prompts that a race set aside say of the α that it found."""

    alpha: float
    difference: Estimate
    """From α = 0."""
    level: float | None
    """Of its interval."""
    prompts: int | None


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
    dropped: Collection[float] = (),
    confirmed: Confirmed | None = None,
    of: str = "",
    last_step: float | None = None,
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
        dropped: Those that a race dropped: their points are crosses.
        confirmed: What confirms the α that a race found, or does not; it stands on the mean of α = 0.
        of: Which prompts the band is from, where that has to be said.
        last_step: Of a training run's last checkpoint, which is α = 0: steps are named, too.
        title: Over everything.
        reward: What the first panel shows.
    """
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point.alpha)
    panels: dict[str, Callable[[Axes], None]] = {
        "reward": lambda axes: _draw_rewards(axes, points, reward, rejected, dropped)
    }
    if any(point.length is not None for point in points):
        panels["length"] = lambda axes: _draw_lengths(axes, points, unit)
    if any(point.ended is not None for point in points):
        panels["ended"] = lambda axes: _draw_ended(axes, points)
    marks = _marks([point.alpha for point in points], chosen, last_step)
    heights = [HEIGHTS[name] for name in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.75 + (0.3 if title else 0)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, draw in zip(grid, panels.values(), strict=True):
        draw(axes)
        for mark in marks:
            axes.axvline(mark.alpha, color=mark.colour, linewidth=1, linestyle=":", zorder=1)
    if confirmed is not None:
        _draw_confirmation(grid[0], confirmed, points)
    grid[-1].set_xlabel("α" if last_step is None else f"α: step T = {shown_step(last_step)} (1 + α)")
    grid[0].margins(x=0.04)
    _write_marks(grid[0], marks)
    _explain(figure, [*_handles(points, rejected, dropped, of), *_handles_of(confirmed)])
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _draw_rewards(
    axes: Axes, points: Sequence[CurvePoint], label: str, rejected: Collection[float], dropped: Collection[float]
) -> None:
    alphas, values = [point.alpha for point in points], [point.reward.value for point in points]
    ahead = [point for point in points if point.alpha >= 0]
    lows, highs = zip(*(_ends(point.reward) for point in ahead), strict=True) if ahead else ((), ())
    axes.fill_between([point.alpha for point in ahead], lows, highs, color=REWARD, alpha=0.16, linewidth=0)
    for point in points:
        if point.alpha < 0:
            axes.plot([point.alpha] * 2, _ends(point.reward), color=REWARD, linewidth=1.4)
    axes.plot(alphas, values, color=REWARD, linewidth=1.5, zorder=3)
    kinds = [(DOT, set(alphas) - {*rejected, *dropped}), (HOLLOW, set(rejected) - {*dropped}), (CROSS, set(dropped))]
    for shape, some in kinds:
        at = [(point.alpha, point.reward.value) for point in points if point.alpha in some]
        axes.plot(*(zip(*at, strict=True) if at else ((), ())), color=REWARD, zorder=4, **shape)
    axes.set_ylabel(label, parse_math=False)
    axes.margins(y=0.08)


def _draw_confirmation(axes: Axes, confirmed: Confirmed, points: Sequence[CurvePoint]) -> None:
    """A candidate's difference on the prompts that were set aside, on the mean of α = 0 as the band is."""
    from matplotlib.transforms import ScaledTranslation

    for base in (point.reward.value for point in points if point.alpha == 0):
        beside = ScaledTranslation(BESIDE, 0, axes.figure.dpi_scale_trans)
        style: dict[str, Any] = {"color": CONFIRMED, "zorder": 6, "transform": axes.transData + beside}
        axes.plot([confirmed.alpha] * 2, [base + end for end in _ends(confirmed.difference)], linewidth=1.8, **style)
        axes.plot([confirmed.alpha], [base + confirmed.difference.value], **DIAMOND, **style)


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


def _marks(alphas: Collection[float], chosen: float | None, last_step: float | None) -> list[Mark]:
    """What is marked: SFT, DPO, and the α that is chosen."""
    marks = [Mark(-1.0, "SFT", MUTED)] if -1.0 in alphas else []
    if 0.0 in alphas:
        marks.append(Mark(0.0, "DPO: no α is chosen" if chosen == 0 else "DPO", INK if chosen == 0 else MUTED))
    if chosen:
        which = f"α = {chosen:g}" if last_step is None else f"step {shown_step(step_of(chosen, last_step))}"
        marks.append(Mark(chosen, f"{which} is chosen", INK))
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


def _handles(
    points: Sequence[CurvePoint], rejected: Collection[float], dropped: Collection[float], of: str
) -> list[Any]:
    """What the band and the shapes of points are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if any(point.reward.low is not None for point in points):
        band = "95 % band of the difference from DPO" + (f", {of}" if of else "")
        handles.append(Patch(facecolor=REWARD, alpha=0.16, label=band))
    alphas = {point.alpha for point in points}
    if alphas & (set(rejected) - set(dropped)):
        handles.append(Line2D([], [], **HOLLOW, color=REWARD, label="higher, but rejected"))
    if alphas & set(dropped):
        handles.append(Line2D([], [], **CROSS, color=REWARD, label="dropped in the race"))
    return handles


def _handles_of(confirmed: Confirmed | None) -> list[Any]:
    from matplotlib.lines import Line2D

    if confirmed is None:
        return []
    sure = confirmed.level if confirmed.difference.low is not None else None
    level = "" if sure is None else f", {sure:.0%} interval".replace("%", " %")
    on = "" if confirmed.prompts is None else f", {confirmed.prompts:,} prompts"
    label = f"α = {confirmed.alpha:g} on the confirmation{on}{level}"
    return [Line2D([], [], **DIAMOND | {"linestyle": "-", "linewidth": 2}, color=CONFIRMED, label=label)]


def _explain(figure: Figure, handles: Sequence[Any]) -> None:
    """Say what the band and the shapes are."""
    if handles:
        long = any(len(handle.get_label()) > LONG for handle in handles)
        figure.legend(handles=handles, loc="outside lower center", ncols=1 if long else 2, fontsize=8)
