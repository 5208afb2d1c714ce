"""A comparison of several α as the points of a curve for each space, for the picture of a sweep and for the page."""

from __future__ import annotations

from typing import get_args

from expo.config.logit_space import Space
from expo.config.sweep import SFT_ALPHA
from expo.output.charts import Estimate
from expo.output.curves import CurvePoint
from expo.verbs.compare.figures import ModelFigures, Table

UNITS = ("tokens", "characters")


def length_unit(*models: ModelFigures) -> str | None:
    """What the mean lengths of these models are known in."""
    return next((unit for unit in UNITS if all(getattr(model, unit) for model in models)), None)


ENDS = (SFT_ALPHA, 0.0)
"""The α at which one model answers, the same in both spaces."""


def spaces_of(table: Table) -> tuple[Space, ...]:
    """The spaces that a table has an α of which is not one model's; weights where there is none."""
    found = {model.space for model in table.models if model.alpha is not None and model.alpha not in ENDS}
    return tuple(space for space in get_args(Space) if space in found) or ("weights",)


def on_curve(table: Table, space: Space) -> list[ModelFigures]:
    """The models of a space whose α is known; DPO and SFT are of both, and come from the other where it lacks them."""
    known = [model for model in table.models if model.alpha is not None]
    own = [model for model in known if model.space == space]
    there = {model.alpha for model in own}
    return own + [one for one in known if one.space != space and one.alpha in ENDS and one.alpha not in there]


def curve_points(table: Table, space: Space = "weights") -> list[CurvePoint]:
    """The models of a space whose α and reward are known, in order of α.

    The reward is the baseline's mean plus the paired difference, over the rows that both have: with its interval, what
    one sees is what is tested, also where a model lacks rows.
    """
    base = table.baseline.mean
    if base is None:
        return []
    models = on_curve(table, space)
    unit = length_unit(*models) or UNITS[-1]
    found = []
    for model in models:
        reward = Estimate(base) if model is table.baseline else _reward(base, model)
        if reward is not None:
            found.append(CurvePoint(model.alpha or 0.0, reward, getattr(model, unit), model.ended))
    return sorted(found, key=lambda point: point.alpha)


def _reward(base: float, model: ModelFigures) -> Estimate | None:
    paired = model.paired
    if paired is None or paired.difference is None:
        return None
    return Estimate(base + paired.difference, *(base + end for end in paired.interval or ()))
