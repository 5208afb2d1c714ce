"""Whether two reward models see the same difference between two models' answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expo.stats.means import Floats


@dataclass(frozen=True)
class Gain:
    """One reward model's mean difference, cut into what the other sees too and what it alone sees."""

    difference: float
    """Σ d_i / n."""
    seen_by_both: float
    """What rows contribute to it on which both prefer the same answer: Σ_{sign d_i = sign d'_i} d_i / n."""
    only_here: float
    """What the other rows contribute, on which the other reward model prefers the other answer, or neither."""
    share_only_here: float | None
    """only_here / difference: 0 where the other confirms every row, ½ where it tosses a coin on rows of one size, 1
    where what both see adds up to nothing; None for no difference."""


@dataclass(frozen=True)
class Agreement:
    """What two reward models say of the same pairs of answers."""

    n: int
    correlation: float | None
    """Pearson's, of the paired differences; None where one of them is constant."""
    same_sign: float | None
    """The share of rows on which both prefer the same answer, or both neither."""
    gains: tuple[Gain, Gain] | None


def agreement(first: Floats, second: Floats) -> Agreement:
    """Compare two reward models' paired differences of the same rows.

    Args:
        first: (n,): d, by one reward model.
        second: (n,): d', by the other, in the same order.
    """
    if not len(first):
        return Agreement(0, None, None, None)
    same = np.sign(first) == np.sign(second)
    return Agreement(
        len(first), correlation(first, second), float(same.mean()), (_gain(first, same), _gain(second, same))
    )


def _gain(differences: Floats, same: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Gain:
    whole, both = float(differences.mean()), float(np.where(same, differences, 0.0).mean())
    alone = float(np.where(same, 0.0, differences).mean())
    size = float(np.abs(differences).mean())
    return Gain(whole, both, alone, alone / whole if abs(whole) > 1e-12 * size else None)


def correlation(first: Floats, second: Floats) -> float | None:
    """Pearson's correlation, Σ (x − x̄)(y − ȳ) / √(Σ (x − x̄)² Σ (y − ȳ)²); None where one is constant."""
    centred = [values - values.mean() for values in (first, second)]
    sizes = [float(np.linalg.norm(values)) for values in centred]
    constant = any(
        size <= 1e-12 * float(np.linalg.norm(values)) for size, values in zip(sizes, (first, second), strict=True)
    )
    return None if constant else float(np.clip(centred[0] @ centred[1] / (sizes[0] * sizes[1]), -1, 1))
