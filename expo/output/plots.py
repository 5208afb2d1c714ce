"""Figures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

NO_CHANGE = "0.85"
"""A light grey: on a logarithmic scale zero has no colour of its own."""
MAX_LABELLED_LAYERS = 8
"""Up to this many layers, values are written into the cells."""
MAX_TICKS = 32
MARK_KEYS = {".png": "Comment", ".svg": "Description", ".pdf": "Keywords"}
"""The metadata key for the mark in each format."""
NO_DATES: dict[str, dict[str, str | None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Omits the date, so that the same figures give the same file."""


def change_map(
    modules: Mapping[str, Mapping[int, float | None]],
    outside: Mapping[str, float | None],
    *,
    title: str,
    suffix: str,
    mark: str,
) -> bytes:
    """Draw ‖Δ‖/‖θ_sft‖ of every layer (across) and module (down), on a logarithmic colour scale.

    Args:
        modules: Module → layer → value; None where it is undefined.
        outside: The same for modules outside the layers, such as embeddings, drawn across the whole width.
        title: The figure's title.
        suffix: .png, .svg or .pdf.
        mark: A line of ASCII text stored uncompressed in the file's metadata.

    Returns:
        The file's content.
    """
    from matplotlib.figure import Figure

    layers = sorted({layer for row in modules.values() for layer in row})
    grid = [[row.get(layer) for layer in layers] for row in modules.values()]
    grid += [[value] * max(len(layers), 1) for value in outside.values()]
    names = [*modules, *outside]
    width = min(max(0.2 * len(layers), 4.5), 12) + 0.08 * max(map(len, names), default=0) + 1.5
    width = max(width, 0.09 * max(map(len, title.splitlines())))
    figure = Figure(figsize=(width, min(0.3 * len(names), 60) + 1.8), layout="constrained")
    figure.suptitle(title, parse_math=False)
    if names:
        _draw_cells(figure.add_subplot(), names, grid, layers, len(modules))
    return saved(figure, suffix, mark)


def saved(figure: Figure, suffix: str, mark: str) -> bytes:
    """A figure as a file, the same for the same figure.

    Args:
        figure: What was drawn.
        suffix: .png, .svg or .pdf.
        mark: A line of ASCII text stored uncompressed in the file's metadata.
    """
    from matplotlib import rc_context

    metadata, content = {MARK_KEYS[suffix]: mark, **NO_DATES[suffix]}, io.BytesIO()
    with rc_context({"svg.hashsalt": mark}):
        figure.savefig(content, format=suffix[1:], dpi=150, metadata=metadata)
    return content.getvalue()


def _draw_cells(
    axes: Axes, names: Sequence[str], grid: Sequence[Sequence[float | None]], layers: Sequence[int], layered: int
) -> None:
    """Draw rows of cells; from row `layered` on, each is a single cell across the whole width."""
    import numpy as np
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    values = np.array([[math.nan if value is None else value for value in row] for row in grid])
    changed, unchanged = np.where(values > 0, values, math.nan), np.where(values == 0, 0, math.nan)
    edges = [np.arange(count + 1) - 0.5 for count in reversed(values.shape)]
    axes.pcolormesh(*edges, unchanged, cmap=ListedColormap([NO_CHANGE]))
    mesh = axes.pcolormesh(*edges, changed, norm=LogNorm(*_log_limits(grid)), cmap="viridis")
    for row in range(layered, len(grid)):
        axes.axhline(row - 0.5, color="white", linewidth=4 if row == layered else 1)
    axes.invert_yaxis()
    axes.set_yticks(range(len(names)), names, parse_math=False)
    step = next(step for step in (1, 2, 5, 10, 20, 50, len(layers)) if len(layers) <= step * MAX_TICKS)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer" if layers else "")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _write_values(axes, mesh, values, layered)
    if not np.isnan(changed).all():
        ticks = _log_ticks(*mesh.get_clim())
        bar = axes.figure.colorbar(mesh, ax=axes, label="‖Δ‖ / ‖θ_sft‖", ticks=ticks, format="%.3g")
        bar.outline.set_visible(False)
        bar.minorticks_off()
    if not np.isnan(unchanged).all():
        grey = Patch(color=NO_CHANGE, label="no change")
        axes.figure.legend(handles=[grey], loc="outside lower right", frameon=False)


def _log_limits(grid: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """The ends of a logarithmic scale for these values, never the same."""
    values = [value for row in grid for value in row if value]
    lowest, highest = min(values, default=1.0), max(values, default=1.0)
    return (lowest, highest) if highest > 1.1 * lowest else (lowest / 1.1, highest * 1.1)


def _log_ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers in a range, or three others where there are not as many."""
    exponents = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    steps = (1, 2, 5) if highest / lowest < 1e3 else (1,)
    ticks = [tick for exponent in exponents for step in steps if lowest <= (tick := step * 10.0**exponent) <= highest]
    return ticks if len(ticks) >= 3 else [lowest, math.sqrt(lowest * highest), highest]


def _write_values(axes: Axes, mesh: ScalarMappable, values: Any, layered: int) -> None:  # noqa: ANN401
    """Write numbers where they fit: for modules outside the layers, and if there are few layers."""
    columns = values.shape[1]
    for row, numbers in enumerate(values):
        wide = row >= layered
        places = (
            {(columns - 1) / 2: numbers[0]}
            if wide
            else dict(enumerate(numbers))
            if columns <= MAX_LABELLED_LAYERS
            else {}
        )
        for column, value in places.items():
            if not math.isnan(value):
                red, green, blue, _ = mesh.to_rgba(value) if value > 0 else (1, 1, 1, 1)
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                axes.text(column, row, f"{value:.2g}", color=ink, ha="center", va="center", fontsize=8)
