"""Means over rows that are independent, and over rows that come in clusters (several samples of a prompt)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Interval = tuple[float, float]


def mean_and_standard_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and its standard error s/√n.

    Args:
        values: The sample; no NaN.

    Returns:
        None for the mean of no values, and for the standard error of fewer than two.
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values, mean) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class Sums:
    """What is left of rows where only the sums of clusters count: S_c and n_c, a column per model."""

    sums: Floats
    """(clusters, models): the sum of each cluster's values."""
    counts: Floats
    """(clusters, models): how many values they are; 0 where a model has none."""

    @property
    def clusters(self) -> Floats:
        """(models,): how many clusters have values."""
        return np.asarray(np.count_nonzero(self.counts, axis=0), dtype=np.float64)

    def means(self) -> Floats:
        """(models,): the mean over rows, Σ S_c / Σ n_c; NaN where a model has no values."""
        total = self.counts.sum(axis=0)
        return np.asarray(np.divide(self.sums.sum(axis=0), total, out=np.full(total.shape, np.nan), where=total > 0))

    def standard_errors(self) -> Floats:
        """(models,): the cluster-robust standard error of the mean over rows; NaN for fewer than two clusters.

        √(C/(C−1) · Σ_c (S_c − m n_c)²) / Σ_c n_c: the linearised variance of a ratio of means (Cochran, Sampling
        Techniques, 1977, ch. 9A), and what statsmodels gives for OLS on a constant with `cov_type="cluster"`. With one
        row per cluster it is s/√n.
        """
        residuals = self.sums - np.nan_to_num(self.means()) * self.counts
        clusters, total = self.clusters, self.counts.sum(axis=0)
        enough = clusters > 1
        factor = np.divide(clusters, clusters - 1, out=np.full(clusters.shape, np.nan), where=enough)
        size = np.where(enough, total, np.nan)
        return np.asarray(np.sqrt(factor * (residuals**2).sum(axis=0)) / size)


def cluster_sums(columns: Sequence[tuple[Floats, Whole]], clusters: int) -> Sums:
    """The sums of clusters.

    Args:
        columns: For each model its values (n,) without NaN, and the cluster of each (n,), 0 ≤ cluster < `clusters`.
        clusters: How many clusters there are, in whatever model.
    """
    sums, counts = np.zeros((2, clusters, len(columns)))
    for model, (values, of) in enumerate(columns):
        sums[:, model] = np.bincount(of, weights=values, minlength=clusters)
        counts[:, model] = np.bincount(of, minlength=clusters)
    return Sums(sums, counts)


def clustered_mean_and_standard_error(values: Floats, clusters: Whole) -> tuple[float | None, float | None]:
    """The mean over rows, and its standard error where rows come in clusters (`Sums.standard_errors`).

    Args:
        values: (n,), no NaN.
        clusters: (n,): the cluster of each, whole numbers from 0.

    Returns:
        None for the mean of no values, and for the standard error of fewer than two clusters.
    """
    if not len(values):
        return None, None
    sums = cluster_sums([(values, clusters)], int(clusters.max()) + 1)
    error = float(sums.standard_errors()[0])
    return float(sums.means()[0]), None if math.isnan(error) else error
