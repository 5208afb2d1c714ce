"""The picture of a race: how far each α is ahead of α = 0 at each look, and where it was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from expo.output.charts import INK, MUTED, PAPER, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 3.0
"""In inches, without the legend."""
LEGEND_ROW = 0.19
COLUMNS = 4
BELOW = 1.0
"""How far the axis goes below the α that are left, in the span of these: what is lower is drawn at its foot."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
"""Of the α that have one colour."""
CROSS: dict[str, Any] = {"marker": "X", "markersize": 7, "markerfacecolor": PAPER, "linestyle": ""}
"""Of an α that was dropped, here and on the curve."""


class Track(NamedTuple):
    """An α's way through a race."""

    alpha: float
    colour: str
    prompts: Sequence[int]
    """Of each look that it was in."""
    differences: Sequence[float]
    """Its mean reward less that of α = 0 at these looks."""
    dropped: bool = False
    """Whether it was dropped at the last of them."""
    emphasised: bool = False
    """Whether it is the one that the race found."""


def race_course(tracks: Sequence[Track]) -> Figure:
    """Draw each α's difference in mean reward from α = 0 against the prompts of the race.

    Args:
        tracks: One per α above 0, each with a look or more.
    """
    from matplotlib.figure import Figure

    rows = -(-(len(tracks) + any(track.dropped for track in tracks)) // COLUMNS)
    figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_ROW * rows), layout="constrained")
    axes = figure.subplots()
    foot = _foot(tracks)
    axes.axhline(0, color=MUTED, linewidth=1)
    colours: list[str] = []
    for track in sorted(tracks, key=lambda one: one.alpha):
        _draw(axes, track, DASHES[colours.count(track.colour) % len(DASHES)], foot)
        colours.append(track.colour)
    axes.set_xlim(0, 1.06 * max(track.prompts[-1] for track in tracks))
    axes.margins(y=0.08)
    axes.set_xlabel("prompts of the race")
    axes.set_ylabel("mean reward minus that of α = 0")
    _explain(figure, axes, dropped=any(track.dropped for track in tracks))
    return figure


def _foot(tracks: Sequence[Track]) -> float:
    """Where the axis ends below: a cliff would flatten those that the race is about."""
    left = [value for track in tracks if not track.dropped for value in track.differences] or [
        value for track in tracks for value in track.differences
    ]
    low, high = min(0.0, *left), max(0.0, *left)
    return low - BELOW * (high - low)


def _draw(axes: Axes, track: Track, dashes: object, foot: float) -> None:
    style: dict[str, Any] = {"color": track.colour, "zorder": 4 if track.emphasised else 3}
    heights = [max(value, foot) for value in track.differences]
    width = 2.8 if track.emphasised else 1.2
    axes.plot(
        track.prompts,
        heights,
        linestyle=dashes,
        linewidth=width,
        marker="o",
        markersize=5 if track.emphasised else 2.6,
        label=f"α = {track.alpha:g}",
        **style,
    )
    if track.dropped:
        axes.plot(track.prompts[-1:], heights[-1:], **CROSS, **style | {"zorder": 5})
    below = [(at, value) for at, value in zip(track.prompts, track.differences, strict=True) if value < foot]
    if below:
        at, value = below[-1]
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "center", "parse_math": False}
        axes.annotate(f"α = {track.alpha:g}: {value:+.2g}", (at, foot), (8, 0), fontsize=8, color=track.colour, **place)


def _explain(figure: Figure, axes: Axes, *, dropped: bool) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if dropped:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], **CROSS, color=INK, label="dropped"))
    figure.legend(handles=handles, loc="outside lower center", ncols=COLUMNS, fontsize=8.5)
