"""Charts of rewards, for a page (SVG that takes the page's colours) and as files (PNG, SVG). Numbers in, a figure out.

Each chart is as wide as a phone's screen and bins what it shows, so that 805 rows and 5,000 take the same room. To add
one, write a function that returns a `Figure`, inside `style()`.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1f2328", "#59636f", "#d1d9e1", "#ffffff"
COLOURS = ("#6e7782", "#0072b2", "#d55e00", "#009e73", "#b5578f", "#b07d00", "#3a9bd9", "#7a5195")
"""Of the baseline (grey) and of the others, which colour-blind people can tell apart; more runs begin again at 1."""
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    **{colour: f"--m{number}" for number, colour in enumerate(COLOURS)},
}
"""Colour → the page's variable that takes its place."""
FINISH_COLOURS = {"stop": COLOURS[1], "length": COLOURS[2], "error": INK}
WIDTH = 4.6
"""In inches; at 72 points an inch the text is as large as the page's on a phone."""
BINS = 40
MAX_LABEL = 44
LABEL: dict[str, Any] = {"parse_math": False, "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 1}}
"""Of a name inside a chart: lines end behind it."""


class Estimate(NamedTuple):
    """A figure with an interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


class Change(NamedTuple):
    """A model's difference from the baseline."""

    name: str
    colour: str
    all: Estimate
    at_equal_length: Estimate | None = None


class Series(NamedTuple):
    """A model's values."""

    name: str
    colour: str
    values: Sequence[float]
    """A reward per row."""
    lengths: Sequence[float] = ()
    """The length of the same rows."""


def colour_of(number: int) -> str:
    """The colour of a run by its place; the baseline's is 0."""
    return COLOURS[0] if number == 0 else COLOURS[1 + (number - 1) % (len(COLOURS) - 1)]


def style() -> AbstractContextManager[None]:
    """What every chart is drawn and saved with."""
    from matplotlib import rc_context

    return rc_context(
        {
            "font.size": 9.5,
            "svg.fonttype": "none",
            "text.color": INK,
            "axes.labelcolor": MUTED,
            "axes.edgecolor": LINE,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.unicode_minus": True,
            "grid.color": LINE,
            "grid.linewidth": 0.6,
            "xtick.color": LINE,
            "ytick.color": LINE,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "svg.hashsalt": "expo",
        }
    )


def _figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def short(name: str, limit: int = MAX_LABEL) -> str:
    """A name that fits: its middle is left out, since α stands at the end."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"


def _no_lines_across(axes: Axes) -> None:
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def differences(changes: Sequence[Change], baseline: str) -> Figure:
    """Draw each model's difference from the baseline with its interval: of all rows, and at equal length (hollow)."""
    figure, (axes,) = _figure(0.75 + 0.52 * len(changes))
    for place, change in enumerate(changes):
        pairs = [(change.all, 0.0, change.colour), (change.at_equal_length, 0.2, PAPER)]
        for estimate, below, face in pairs:
            if estimate is None:
                continue
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [place + below] * 2, color=change.colour, linewidth=2)
            axes.plot(
                [estimate.value],
                [place + below],
                "o",
                markersize=6,
                color=change.colour,
                markerfacecolor=face,
                zorder=3,
            )
        axes.text(0, place - 0.22, short(change.name), transform=axes.get_yaxis_transform(), fontsize=9, **LABEL)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_ylim(len(changes) - 0.55, -0.6)
    axes.set_yticks([])
    axes.margins(x=0.08)
    _no_lines_across(axes)
    axes.set_xlabel(f"reward minus that of {short(baseline, 32)}", parse_math=False)
    _mark_legend(axes, hollow=any(change.at_equal_length for change in changes))
    return figure


def _mark_legend(axes: Axes, *, hollow: bool) -> None:
    from matplotlib.lines import Line2D

    if not hollow:
        return
    shape: dict[str, Any] = {"marker": "o", "color": MUTED, "markersize": 5, "linewidth": 1.5}
    handles = [Line2D([], [], **shape, label="all rows")]
    handles.append(Line2D([], [], **shape, markerfacecolor=PAPER, label="at equal length"))
    axes.figure.legend(handles=handles, loc="outside upper right", ncols=2)


def distributions(series: Sequence[Series]) -> Figure:
    """Draw a histogram of rewards per model, one below the other; the first one's outline is repeated in each."""
    import numpy as np

    figure, (axes,) = _figure(0.7 + 0.62 * len(series))
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(one.values, float) for one in series]), BINS)
    shares = [np.histogram(one.values, edges)[0] / max(len(one.values), 1) for one in series]
    highest = max(float(share.max()) for share in shares) or 1.0
    for place, (one, share) in enumerate(zip(series, shares, strict=True)):
        foot = -float(place)
        axes.stairs(foot + 0.85 * share / highest, edges, baseline=foot, fill=True, color=one.colour, alpha=0.55)
        axes.stairs(foot + 0.85 * shares[0] / highest, edges, baseline=foot, color=COLOURS[0], linewidth=1)
        mean = float(np.mean(one.values))
        axes.plot([mean, mean], [foot, foot + 0.85], color=one.colour, linewidth=1.6)
        text = axes.text(
            0, foot + 0.62, short(one.name, 26), transform=axes.get_yaxis_transform(), fontsize=8.5, **LABEL
        )
        text.set_zorder(5)
    axes.set_yticks([])
    axes.set_ylim(-len(series) + 0.95, 1)
    _no_lines_across(axes)
    axes.set_xlabel("reward (vertical line: mean)")
    return figure


def reward_by_length(series: Sequence[Series], unit: str) -> Figure:
    """Draw the mean reward of each model's answers of like length, tenths of them, with the standard error."""
    import numpy as np

    figure, (axes,) = _figure(3.1)
    for one in series:
        order = np.argsort(one.lengths, kind="stable")
        tenths = [part for part in np.array_split(order, min(10, len(order))) if len(part)]
        lengths, values = np.asarray(one.lengths, float), np.asarray(one.values, float)
        at = [float(lengths[part].mean()) for part in tenths]
        means = [float(values[part].mean()) for part in tenths]
        errors = [float(values[part].std(ddof=1) / np.sqrt(len(part))) if len(part) > 1 else 0.0 for part in tenths]
        axes.errorbar(
            at,
            means,
            yerr=errors,
            color=one.colour,
            marker="o",
            markersize=3,
            linewidth=1.3,
            label=short(one.name, 36),
        )
    axes.set_xlabel(f"{unit} in the answer")
    axes.set_ylabel("mean reward")
    _legend_above(figure)
    return figure


def _legend_above(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=1 if max(map(len, labels)) > 22 else 2)
    for text in legend.get_texts():
        text.set_parse_math(False)


def finish_reasons(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Draw the share of each finish reason, a bar per model.

    Args:
        counts: Model → finish reason → rows.
    """
    figure, (axes,) = _figure(0.85 + 0.5 * len(counts))
    reasons = list(dict.fromkeys(reason for found in counts.values() for reason in found))
    others = iter(COLOURS[3:] * len(reasons))
    colours = {reason: FINISH_COLOURS.get(reason) or next(others) for reason in reasons}
    for place, (name, found) in enumerate(counts.items()):
        total, left = sum(found.values()), 0.0
        for reason in reasons:
            share = found.get(reason, 0) / total if total else 0.0
            label = reason if place == 0 else None
            axes.barh(place, share, 0.36, left=left, color=colours[reason], label=label)
            left += share
        axes.text(0, place - 0.26, short(name), fontsize=9, parse_math=False)
    axes.set_yticks([])
    axes.set_ylim(len(counts) - 0.65, -0.65)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    _no_lines_across(axes)
    _legend_above(figure)
    return figure


def subset_differences(subsets: Mapping[str, Sequence[Change]]) -> Figure:
    """Draw each model's difference from the baseline within each subset.

    Args:
        subsets: Subset → a change per model.
    """
    models = max((len(changes) for changes in subsets.values()), default=1)
    step = 0.5 / max(models, 1)
    figure, (axes,) = _figure(0.9 + (0.3 + 0.09 * models) * len(subsets) + 0.14 * models)
    for place, (subset, changes) in enumerate(subsets.items()):
        for number, change in enumerate(changes):
            height = place + step * number
            estimate, label = change.all, short(change.name, 36) if place == 0 else None
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [height] * 2, color=change.colour, linewidth=1.6)
            axes.plot([estimate.value], [height], "o", markersize=4.5, color=change.colour, label=label)
        axes.text(0, place - 0.2, short(subset), transform=axes.get_yaxis_transform(), fontsize=8.5, parse_math=False)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks([])
    axes.set_ylim(len(subsets) - 0.4, -0.6)
    axes.margins(x=0.08)
    _no_lines_across(axes)
    axes.set_xlabel("difference in reward from the baseline")
    if models > 1:
        _legend_above(figure)
    return figure


# --- files ----------------------------------------------------------------------------------------------------------


def as_bytes(figure: Figure, suffix: str, mark: str = "") -> bytes:
    """A figure as a .png or .svg file on white paper, the same for the same figure; `mark` goes into its metadata."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    key = {".png": "Comment", ".svg": "Description"}[suffix]
    metadata = {**({"Date": None} if suffix == ".svg" else {}), **({key: mark} if mark else {})}
    content = io.BytesIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font", category=UserWarning)
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # each drawing would move what is there a little; done once
        figure.savefig(content, format=suffix[1:], dpi=200, metadata=metadata, facecolor=PAPER)
    return content.getvalue()


def for_page(figure: Figure, title: str, prefix: str) -> str:
    """A figure as an `<svg>` element in the page's own colours and fonts.

    Args:
        figure: The figure.
        title: What is said of it to those who cannot see it; HTML, escaped already.
        prefix: Made part of its ids, which a page has once each.
    """
    text = as_bytes(figure, ".svg").decode()
    box = re.search(r'viewBox="([^"]*)"', text)
    inside = text[text.index(">", text.index("<svg")) + 1 :]
    inside = re.sub(r"<(metadata|style)\b.*?</\1>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'<g id="patch_1">.*?</g>', "", inside, count=1, flags=re.DOTALL)  # the paper
    inside = re.sub(r"<[^>]*>", lambda tag: _tag_for_page(tag[0], prefix), inside)  # labels stay as they are
    opening = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{title}">'
    return opening + re.sub(r"\s*\n\s*", " ", inside)


def _tag_for_page(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid="|"#|url\(#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", tag)
    return re.sub(r"(\.\d\d)\d+", r"\1", tag)  # a hundredth of a point is enough
