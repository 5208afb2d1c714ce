"""Intervals and p of mean paired differences, by resampling prompts: for one model, or simultaneously for several.

A prompt with its samples is what is drawn again, or changes its sign, as a whole (a cluster). All models are given the
same draws, so that what their rewards have in common counts once. Work is done in blocks, so that memory does not grow
with the number of draws. Draws are a pure function of `SEED`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from expo.stats.means import Floats, Interval, Sums

LEVEL = 0.95
RESAMPLES = 9_999
"""With the sample itself a round number, so that p is a multiple of 0.0001."""
SEED = 20_240_425
"""Of every draw: the same rows give the same figures."""
BLOCK_VALUES = 1 << 21
"""Draws times clusters that are in memory at once, 16 MiB in float64."""
MIN_CLUSTERS = 10
"""With fewer clusters too many draws repeat one cluster, and have no spread to be measured by."""
MAX_CLUSTERS = 4096
"""More clusters are dealt at random into so many groups, whose sums are drawn: the time no longer grows with them, and
with sums of thousands the difference is far below the noise of the draws."""
NO_SPREAD = 1e-12
"""The share of a variance below which only rounding is left of it."""
TIE = 1e-9
"""Relative difference of statistics that are equal but for rounding."""


# --- bootstrap ------------------------------------------------------------------------------------------------------


def bootstrap_intervals(
    sums: Sums, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Interval | None]:
    """Intervals for means over rows that cover all of them at once with probability `level`, by bootstrap-t.

    Clusters are drawn with replacement, as many as there are, and t* = (m* − m)/se* with the cluster-robust standard
    error of each draw (`Sums.standard_errors`). The interval of model j is [m_j − q_hi se_j, m_j − q_lo se_j], where
    q_hi is the (1+level)/2 quantile of max_j t*_j and q_lo the (1−level)/2 quantile of min_j t*_j. For one model these
    are the bootstrap-t quantiles (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 12); for several it
    is the single-step max-T method (Westfall and Young, 1993). Neither quantile is taken nearer to 0 than Student's for
    one model, which heavy tails need. Percentile and BCa intervals cover less where prompts are few or differences
    skewed (`benchmarks/coverage.py`).

    Where clusters are fewer than `MIN_CLUSTERS`, or so many draws have no spread that a quantile is infinite, the
    interval is Student's with C − 1 degrees of freedom, at 1 − (1−level)/models.

    Args:
        sums: Sums of clusters, a column per model.
        level: The coverage.
        resamples: How many draws.
        seed: Of the draws.

    Returns:
        An interval per model; None where a model has fewer than two clusters.
    """
    means, errors = sums.means(), sums.standard_errors()
    measured = np.flatnonzero(np.nan_to_num(errors) > NO_SPREAD * _scale(sums))
    quantiles = None
    if measured.size and len(sums.sums) >= MIN_CLUSTERS:
        some = _dealt(Sums(sums.sums[:, measured], sums.counts[:, measured]), seed)
        quantiles = _quantiles(some, means[measured], level, resamples, seed)
    intervals: list[Interval | None] = []
    for mean, error, clusters in zip(means, errors, sums.clusters, strict=True):
        if clusters < 2:
            intervals.append(None)
            continue
        low, high = _student(clusters - 1, level if quantiles else 1 - (1 - level) / max(measured.size, 1))
        if quantiles:
            low, high = min(low, quantiles[0]), max(high, quantiles[1])
        intervals.append(_around(float(mean), float(error), (low, high)))
    return intervals


def student_intervals(sums: Sums, *, level: float = LEVEL) -> list[Interval | None]:
    """For each model alone, Student's interval for the mean over rows: m ± t_{C−1} se, se cluster-robust.

    Args:
        sums: Sums of clusters, a column per model.
        level: The coverage.

    Returns:
        An interval per model; None where a model has fewer than two clusters.
    """
    each = zip(sums.means(), sums.standard_errors(), sums.clusters, strict=True)
    return [None if c < 2 else _around(float(m), float(se), _student(c - 1, level)) for m, se, c in each]


def _around(mean: float, error: float, quantiles: Interval) -> Interval:
    return mean - quantiles[1] * error, mean - quantiles[0] * error


def _scale(sums: Sums) -> Floats:
    """(models,): how large a mean may be, as a measure of its rounding."""
    return np.asarray(np.abs(sums.sums).sum(axis=0) / np.maximum(sums.counts.sum(axis=0), 1))


def _dealt(sums: Sums, seed: int) -> Sums:
    """At most `MAX_CLUSTERS` clusters, sums of others where there were more."""
    count = len(sums.sums)
    if count <= MAX_CLUSTERS:
        return sums
    order = np.random.default_rng(seed).permutation(count)
    begins = np.linspace(0, count, MAX_CLUSTERS, endpoint=False).astype(np.int64)
    return Sums(np.add.reduceat(sums.sums[order], begins), np.add.reduceat(sums.counts[order], begins))


def _student(freedom: float, level: float) -> Interval:
    from scipy.special import stdtrit

    high = float(stdtrit(freedom, (1 + level) / 2))
    return -high, high


def _quantiles(sums: Sums, means: Floats, level: float, resamples: int, seed: int) -> Interval | None:
    """The quantiles of the smallest and the largest t* of each draw; None where one is infinite."""
    residuals, counts = sums.sums - means * sums.counts, sums.counts
    of_sum = [residuals, residuals**2, residuals * counts, counts, counts**2]
    columns = np.hstack(of_sum)
    lowest, highest = [], []
    for weights in _draws(len(columns), resamples, seed):
        total, squares, cross, size, size_squares = np.split(weights @ columns, 5, axis=1)
        shift = np.divide(total, size, out=np.zeros_like(total), where=size > 0)
        spread = squares - 2 * shift * cross + shift**2 * size_squares
        spread *= (sums.clusters / (sums.clusters - 1))[None, :]
        seen = spread > NO_SPREAD * squares.mean(axis=0)
        infinite = np.where(shift == 0, 0.0, np.copysign(np.inf, shift))
        t = np.divide(total, np.sqrt(np.maximum(spread, 0)), out=infinite, where=seen)
        lowest.append(t.min(axis=1))
        highest.append(t.max(axis=1))
    beyond = max(round((resamples + 1) * (1 - level) / 2), 1)  # draws on either side, counted alike
    low = float(np.sort(np.concatenate(lowest))[beyond - 1])
    high = float(np.sort(np.concatenate(highest))[-beyond])
    return (low, high) if np.isfinite([low, high]).all() else None


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks of (draws, clusters): how often each cluster is drawn."""
    rng = np.random.default_rng(seed)
    for rows in _blocks(clusters, resamples):
        drawn = rng.integers(0, clusters, size=(rows, clusters), dtype=np.int32).astype(np.int64)
        drawn += np.arange(rows)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)


def _blocks(clusters: int, rows: int) -> Iterator[int]:
    size = max(BLOCK_VALUES // max(clusters, 1), 1)
    for begin in range(0, rows, size):
        yield min(size, rows - begin)


# --- sign flips -----------------------------------------------------------------------------------------------------


def sign_flip_p(sums: Sums, *, resamples: int = RESAMPLES, seed: int = SEED) -> list[float | None]:
    """P of "no model differs from the baseline", for each model, simultaneous over the models, by flipping signs.

    If a model does as the baseline, each cluster's sum of differences S_c could as well have the other sign. With signs
    ε_c = ±1 the statistic is |Σ_c ε_c S_c| / √(Σ_c S_c²), and p_j the share of sign vectors whose largest statistic of
    all models is at least that of model j (Westfall and Young, Resampling-Based Multiple Testing, 1993, single step;
    for one model the paired permutation test of a mean, as scipy's `permutation_test`, which has no test of several).
    All sign vectors are taken where they are no more than the draws, which makes p exact; else p = (1+k)/(1+draws),
    which is never 0 (Phipson and Smyth, 2010).

    Args:
        sums: Sums of clusters' differences, a column per model.
        resamples: How many sign vectors are drawn.
        seed: Of the draws.

    Returns:
        A p per model; None where a model has no differences at all, 1 where all of them are 0.
    """
    p: list[float | None] = [1.0 if one > 0 else None for one in sums.clusters]
    sums = _dealt(sums, seed)
    norms = np.sqrt((sums.sums**2).sum(axis=0))
    moving = np.flatnonzero(norms > 0)
    if not moving.size:
        return p
    scores = sums.sums[:, moving] / norms[moving]  # (clusters, models), unit columns
    scores = scores[np.any(scores != 0, axis=1)]
    observed = np.abs(scores.sum(axis=0)) * (1 - TIE) - TIE
    reached = np.zeros(moving.size)
    for block in sign_vectors(len(scores), resamples, seed):
        largest = np.abs(block @ scores).max(axis=1)
        reached += (largest[:, None] >= observed).sum(axis=0)
    for model, count in zip(moving, reached, strict=True):
        p[int(model)] = share_reached(float(count), len(scores), resamples)
    return p


def sign_vectors(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks of (vectors, clusters), ±1: all sign vectors where they are no more than the draws, else drawn ones."""
    return _all_signs(clusters) if _is_exact(clusters, resamples) else _drawn_signs(clusters, resamples, seed)


def share_reached(count: float, clusters: int, resamples: int) -> float:
    """P from how many sign vectors reach what was observed: k / 2^C, or (1+k)/(1+draws)."""
    return count / 2**clusters if _is_exact(clusters, resamples) else (1 + count) / (1 + resamples)


def _is_exact(clusters: int, resamples: int) -> bool:
    return clusters < 63 and 2**clusters <= resamples + 1


def _all_signs(clusters: int) -> Iterator[Floats]:
    numbers = np.arange(2**clusters)
    yield (1 - 2 * (numbers[:, None] >> np.arange(clusters) & 1)).astype(np.float64)


def _drawn_signs(clusters: int, rows: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for size in _blocks(clusters, rows):
        count = size * clusters
        bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), dtype=np.uint8), count=count)
        yield 1 - 2 * bits.reshape(size, clusters).astype(np.float64)
