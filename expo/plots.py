"""Figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def alpha_curve(
    alphas: Sequence[float], means: Sequence[float], standard_errors: Sequence[float], path: Path, *, title: str = ""
) -> None:
    """Draw the mean reward against α, with one standard error either side, as a PNG.

    Args:
        alphas: α, ascending; 0 (the DPO model) is marked.
        means: Mean reward of each α.
        standard_errors: Standard error of each mean.
        path: The file to write.
        title: The figure's title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.errorbar(alphas, means, yerr=standard_errors, marker="o", capsize=3, color="tab:blue")
    best = max(range(len(means)), key=means.__getitem__)
    axes.annotate(
        f"best: α = {alphas[best]:g}", (alphas[best], means[best]), (0, 10), textcoords="offset points", ha="center"
    )
    if 0 in alphas:
        axes.axhline(means[list(alphas).index(0)], color="gray", linestyle=":", label="α = 0 (DPO)")
        axes.legend(frameon=False)
    axes.margins(y=0.15)
    axes.set(xlabel="α", ylabel="mean reward", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
