"""Whether the answers of an α go on ending, beside those of α = 0: pure."""

from __future__ import annotations

import numpy as np

from expo.stats.means import Floats, Whole, cluster_sums
from expo.stats.resampling import student_intervals

ENDING_LOSS = 0.05
"""By how much the share of answers that end may fall below that of α = 0: an interval wholly beyond 5 answers in 100 is
a loss that is there and that matters."""
ENDS_AT_LEAST = 0.5
"""The share of α = 0's own answers that must end for others to be judged by theirs: where most are cut at --max-tokens,
whether an answer would have ended is not seen."""


def stops_ending(ended: Floats, base: Floats, clusters: Whole) -> bool:
    """Whether fewer answers end than with α = 0, by as much as matters, where most of its answers do.

    Args:
        ended: (n,): 1 for an answer that ended, 0 for one that was cut, NaN where it is not known.
        base: (n,): the same of α = 0.
        clusters: (n,): the prompt of each row, whole numbers from 0.
    """
    known, differences = np.isfinite(base), ended - base
    both = np.isfinite(differences)
    if not both.any() or float(base[known].mean()) < ENDS_AT_LEAST:
        return False
    (interval,) = student_intervals(cluster_sums([(differences[both], clusters[both])], int(clusters.max()) + 1))
    return interval is not None and interval[1] < -ENDING_LOSS
