"""Figures of changes, pure: numbers in, numbers out."""

from __future__ import annotations

import math


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
