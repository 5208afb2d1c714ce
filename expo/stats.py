"""Statistics of rewards, pure: numbers in, numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_standard_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and its standard error s/√n.

    Args:
        values: The sample; no NaN.

    Returns:
        None for the mean of no values, and for the standard error of fewer than two.
    """
    if not values:
        return None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values, mean) / math.sqrt(len(values))


def relative_change(delta_squared: float, size_squared: float) -> float | None:
    """‖Δ‖/‖θ‖ from squared norms; 0 where nothing changed, None where zeros became something."""
    if delta_squared == 0:
        return 0.0
    return math.sqrt(delta_squared / size_squared) if size_squared else None


def cosine_distance(delta_squared: float, first_squared: float, second_squared: float) -> float | None:
    """1 − cos of the angle between two vectors, in [0, 2]; None where one of them is zero.

    From ‖a − b‖² = (‖a‖ − ‖b‖)² + 2‖a‖‖b‖(1 − cos): for vectors that hardly differ a dot product would leave nothing
    but rounding.

    Args:
        delta_squared: ‖a − b‖².
        first_squared: ‖a‖².
        second_squared: ‖b‖².
    """
    first, second = math.sqrt(first_squared), math.sqrt(second_squared)
    if first * second == 0:
        return None
    return min(max((delta_squared - (first - second) ** 2) / (2 * first * second), 0.0), 2.0)
