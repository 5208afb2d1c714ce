"""Whether the α that a race found is better than α = 0, pure: one test, on the questions that the race did not see.

The test is fixed before the race: of one candidate, once, one-sided at 5 %. So what the race saw, and how often it
looked, cannot make it say yes too often. What can is a long lower tail of the differences, of which few questions show
nothing: where a rare answer is very much worse, no test of a mean knows before it has seen one (`benchmarks/race.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from expo.stats.means import Floats, Interval, Whole, cluster_sums
from expo.stats.racing import lead, one_sided_sign_flip_p
from expo.stats.resampling import RESAMPLES, bootstrap_intervals

ERROR = 0.05
"""The probability of finding a candidate better that is not."""
LEVEL = 1 - 2 * ERROR
"""Of the two-sided interval that belongs to a one-sided test at `ERROR`."""


@dataclass(frozen=True)
class Confirmation:
    """What the questions that were set aside say of one α."""

    candidate: float
    questions: int
    """Those with a row that has a reward by the candidate and by α = 0."""
    rows: int
    """Such rows."""
    difference: float
    """The mean paired difference, candidate less α = 0; NaN without rows."""
    interval: Interval | None
    """Of the difference, at `LEVEL`; None for fewer than two questions."""
    p: float
    """One-sided, of "it is no better", by flipping signs; 1 without rows."""
    spread: float
    """The standard deviation of the rows' paired differences."""

    @property
    def standardized(self) -> float:
        """The difference in standard deviations of the paired difference, Cohen's d_z; 0 where rows do not differ."""
        return self.difference / self.spread if self.spread > 0 else 0.0

    @property
    def is_shown(self) -> bool:
        """Whether the candidate is better than α = 0: its interval lies above 0, and p is at most `ERROR`.

        Both are asked for because each is exact for another kind of difference: flipping signs for one that is
        symmetric, whatever the number of questions; the bootstrap allows for skewness.
        """
        return self.interval is not None and self.interval[0] > 0 and self.p <= ERROR


def confirm(
    candidate: float,
    rewards_of_candidate: Floats,
    rewards_of_zero: Floats,
    clusters: Whole,
    *,
    resamples: int = RESAMPLES,
) -> Confirmation:
    """Test a candidate against α = 0.

    Args:
        candidate: Its α.
        rewards_of_candidate: (rows,): NaN for a row without one.
        rewards_of_zero: (rows,): of the same rows.
        clusters: (rows,): the number of the question of each row, from 0.
        resamples: Draws of the interval, and sign vectors.
    """
    ahead = lead(rewards_of_candidate, rewards_of_zero, clusters)
    differences = rewards_of_candidate - rewards_of_zero
    both = np.isfinite(differences)
    if not both.any():
        return Confirmation(candidate, 0, 0, math.nan, None, 1.0, 0.0)
    sums = cluster_sums([(differences[both], clusters[both])], int(clusters.max()) + 1)
    return Confirmation(
        candidate,
        ahead.clusters,
        int(both.sum()),
        ahead.difference,
        bootstrap_intervals(sums, level=LEVEL, resamples=resamples)[0],
        one_sided_sign_flip_p(sums.sums[:, 0], resamples=resamples),
        ahead.spread,
    )
