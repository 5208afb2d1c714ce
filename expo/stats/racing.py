"""Which of several models that answer the same prompts are still in the race, pure: numbers in, numbers out.

A prompt with its samples is a cluster, and has one sign for all of them, as in `resampling.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expo.stats.means import Floats, Whole, cluster_sums
from expo.stats.resampling import NO_SPREAD, RESAMPLES, SEED, TIE, share_reached, sign_vectors


def pairwise_sign_flip_p(sums: Floats, *, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """P of "these two models do alike", for each pair of models, simultaneous over all pairs, by flipping signs.

    For a pair (i, j) the statistic is T_ij = |Σ_c (S_ci − S_cj)| / √(Σ_c (S_ci − S_cj)²), a function of Student's t
    that grows with it. Every vector of signs ε_c = ±1, one per cluster, gives T*_ij for all pairs at once, and p_ij is
    the share of vectors whose largest T* of any pair is at least T_ij (Westfall and Young, Resampling-Based Multiple
    Testing, 1993, single step). So with probability 1 − δ no pair that does alike has p ≤ δ, whichever pair is looked
    at, such as the best model and another: exactly where the differences are symmetric about 0 together, and for many
    clusters where only their means are 0.

    Args:
        sums: (clusters, models): the sum of each cluster's values, over the rows that all of the models have.
        resamples: How many sign vectors are drawn, where there are more.
        seed: Of the draws.

    Returns:
        (models, models), symmetric; 1 on the diagonal, and where two models' sums are equal.
    """
    count = sums.shape[1]
    first, second = np.triu_indices(count, k=1)
    differences = sums[:, first] - sums[:, second]
    norms = np.sqrt((differences**2).sum(axis=0))
    moving = np.flatnonzero(norms > 0)
    p = np.ones((count, count))
    if not moving.size:
        return p
    first, second, norms = first[moving], second[moving], norms[moving]
    observed = np.abs(differences[:, moving].sum(axis=0)) / norms * (1 - TIE) - TIE
    some = sums[np.any(differences != 0, axis=1)]
    reached = np.zeros(moving.size)
    for signs in sign_vectors(len(some), resamples, seed):
        flipped = signs @ some  # (vectors, models): a pair's flipped sum is a difference of two columns
        largest = np.abs((flipped[:, first] - flipped[:, second]) / norms).max(axis=1)
        reached += len(largest) - np.searchsorted(np.sort(largest), observed, side="left")
    for pair in range(moving.size):
        i, j = first[pair], second[pair]
        p[i, j] = p[j, i] = share_reached(float(reached[pair]), len(some), resamples)
    return p


def one_sided_sign_flip_p(sums: Floats, *, resamples: int = RESAMPLES, seed: int = SEED) -> float:
    """P of "the model does no better than the baseline", by flipping signs, against "it does better".

    The share of sign vectors ε_c = ±1, one per cluster, with Σ_c ε_c S_c ≥ Σ_c S_c: the one-sided paired permutation
    test of a mean (Fisher, The Design of Experiments, 1935, §21; scipy's `permutation_test` of samples, "greater"). It
    is exact where the sums are symmetric about 0, and for large C where they only have mean 0. All sign vectors are
    taken where they are no more than the draws; else p = (1+k)/(1+draws) (Phipson and Smyth, 2010).

    Args:
        sums: (clusters,): the sum of each cluster's differences, model less baseline.
        resamples: How many sign vectors are drawn, where there are more.
        seed: Of the draws.

    Returns:
        1 where no sum differs from 0.
    """
    some = sums[sums != 0]
    if not len(some):
        return 1.0
    observed = float(some.sum()) - TIE * float(np.abs(some).sum())
    reached = sum(int((signs @ some >= observed).sum()) for signs in sign_vectors(len(some), resamples, seed))
    return share_reached(reached, len(some), resamples)


@dataclass(frozen=True)
class Lead:
    """How far one model is ahead of another, over the rows that both have."""

    difference: float
    """The mean paired difference."""
    standard_error: float
    """Cluster-robust; NaN for fewer than two clusters."""
    spread: float
    """The standard deviation of the rows' paired differences."""
    clusters: int

    @property
    def standardized(self) -> float:
        """The difference in standard deviations of the paired difference, Cohen's d_z; 0 where rows do not differ."""
        return self.difference / self.spread if self.spread > 0 else 0.0

    @property
    def expected_loss(self) -> float:
        """What is expected to be lost by taking the first model, in standard deviations of the paired difference.

        E[max(0, −δ)] where the true difference δ is distributed as Student's t with C − 1 degrees of freedom around
        the observed one d, with scale se: se · ((ν + s²)/(ν − 1) · f_ν(s) − s · F_ν(−s)), s = d/se, with the density f
        and the distribution function F (the linear loss of Chick and Inoue, Operations Research 49, 2001, by which
        Branke, Chick and Schmidt, Management Science 53, 2007, stop). Infinite for fewer than three clusters.
        """
        from scipy.special import gammaln, stdtr

        freedom = self.clusters - 1
        if freedom < 2:
            return math.inf
        if self.spread <= 0:
            return 0.0 if self.difference >= 0 else math.inf
        if self.standard_error <= NO_SPREAD * self.spread:
            return max(0.0, -self.difference) / self.spread
        s = self.difference / self.standard_error
        log_density = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - 0.5 * math.log(freedom * math.pi)
        density = math.exp(log_density - (freedom + 1) / 2 * math.log1p(s * s / freedom))
        loss = (freedom + s * s) / (freedom - 1) * density - s * float(stdtr(freedom, -s))
        return self.standard_error / self.spread * loss


def lead(ahead: Floats, behind: Floats, clusters: Whole) -> Lead:
    """How far one model is ahead of another.

    Args:
        ahead: (n,): its rewards, NaN for a row without one.
        behind: (n,): those of the other.
        clusters: (n,): the cluster of each row, whole numbers from 0.
    """
    differences = ahead - behind
    both = np.isfinite(differences)
    differences = differences[both]
    if not len(differences):
        return Lead(0.0, math.nan, 0.0, 0)
    sums = cluster_sums([(differences, clusters[both])], int(clusters.max()) + 1)
    mean, error, count = float(differences.mean()), float(sums.standard_errors()[0]), int(sums.clusters[0])
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    size = float(np.abs(differences).max())
    return Lead(mean, error, spread if spread > NO_SPREAD * size else 0.0, count)


def shared_sums(columns: Sequence[Floats], clusters: Whole) -> tuple[Floats, int]:
    """The cluster sums of several models over the rows that all of them have.

    Args:
        columns: For each model (n,), NaN for a row without a value.
        clusters: (n,): the cluster of each row.

    Returns:
        (clusters, models), without clusters of which no row is shared; and the number of shared rows.
    """
    values = np.stack(columns, axis=1)
    shared = np.isfinite(values).all(axis=1)
    if not shared.any():
        return np.zeros((0, len(columns))), 0
    _, of = np.unique(clusters[shared], return_inverse=True)
    whole = of.astype(np.int64)
    sums = cluster_sums([(column, whole) for column in values[shared].T], int(whole.max()) + 1).sums
    return sums, int(shared.sum())
