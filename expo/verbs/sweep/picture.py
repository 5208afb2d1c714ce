"""The picture of a choice: reward with its band against α, and below it lengths and how many answers end."""

from __future__ import annotations

from expo.config.logit_space import LOGITS
from expo.output import charts
from expo.output.charts import Estimate
from expo.output.curves import OF_RACE, Confirmed, alpha_curve
from expo.verbs.compare.curve import curve_points, length_unit, spaces_of
from expo.verbs.sweep.confirm import LEVEL, Confirmation
from expo.verbs.sweep.figures import Choice

MARK = "made by expo sweep"
"""In the picture's metadata."""


def picture(choice: Choice) -> bytes:
    """Draw a choice as a PNG, by the first reward model; the same bytes for the same choice."""
    table, raced = choice.comparison.tables[0], choice.raced
    dropped = set(raced.course.dropped) if raced else set[float]()
    space = spaces_of(table)[0]
    what = "α in logit space" if space == LOGITS else "θ(α)"
    with charts.style():
        figure = alpha_curve(
            curve_points(table, space),
            unit=length_unit(*table.models) or "characters",
            chosen=choice.best_alpha,
            rejected={one.alpha for one in choice.alphas if one.rejections and one.gains},
            dropped=dropped,
            confirmed=_confirmed(raced.confirmation) if raced else None,
            of=OF_RACE if raced else "",
            last_step=choice.last_step,
            title=f"Reward of {what} on {choice.comparison.task}, {choice.comparison.n:,} rows",
            reward=f"mean reward by\n{charts.short(table.reward_model, 28)}" if table.reward_model else "mean reward",
        )
        return charts.as_bytes(figure, ".png", MARK)


def _confirmed(found: Confirmation | None) -> Confirmed | None:
    if found is None or not found.rows:
        return None
    return Confirmed(found.candidate, Estimate(found.difference, *(found.interval or ())), LEVEL, found.questions)
