"""The picture of a choice: reward with its band against α, and below it lengths and how many answers end."""

from __future__ import annotations

from expo.compare.curve import curve_points, length_unit
from expo.output import charts
from expo.output.curves import alpha_curve
from expo.sweep.figures import Choice

MARK = "made by expo sweep"
"""In the picture's metadata."""


def picture(choice: Choice) -> bytes:
    """Draw a choice as a PNG, by the first reward model; the same bytes for the same choice."""
    table = choice.comparison.tables[0]
    with charts.style():
        figure = alpha_curve(
            curve_points(table),
            unit=length_unit(*table.models) or "characters",
            chosen=choice.best_alpha,
            rejected={one.alpha for one in choice.alphas if one.rejections and one.gains},
            title=f"Reward of θ(α) on {choice.comparison.task}, {choice.comparison.n:,} rows",
            reward=f"mean reward by\n{charts.short(table.reward_model, 28)}" if table.reward_model else "mean reward",
        )
        return charts.as_bytes(figure, ".png", MARK)
