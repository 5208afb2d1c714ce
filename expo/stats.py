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
