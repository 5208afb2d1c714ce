"""A comparison of several α as the points of a curve, for the picture of a sweep and for the page."""

from __future__ import annotations

from expo.output.charts import Estimate
from expo.output.curves import CurvePoint
from expo.verbs.compare.figures import ModelFigures, Table

UNITS = ("tokens", "characters")


def length_unit(*models: ModelFigures) -> str | None:
    """What the mean lengths of these models are known in."""
    return next((unit for unit in UNITS if all(getattr(model, unit) for model in models)), None)


def curve_points(table: Table) -> list[CurvePoint]:
    """The models of a table whose α and reward are known, in order of α.

    The reward is the baseline's mean plus the paired difference, over the rows that both have: with its interval, what
    one sees is what is tested, also where a model lacks rows.
    """
    base = table.baseline.mean
    if base is None:
        return []
    models = [model for model in table.models if model.alpha is not None]
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
