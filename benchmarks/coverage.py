"""How often 95 % intervals of a mean paired difference cover it: bootstrap-t, percentile, BCa and Student's.

    python benchmarks/coverage.py [--simulations 2000] [--prompts 30 100]

One line per shape of the differences and number of samples per prompt; the standard error of a coverage near 0.95 is
0.005 with 2,000 simulations. Percentile and BCa intervals are scipy's, and only for one sample per prompt. The last
columns are the intervals of win rates and of differences at equal length.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from expo.stats.means import Floats, Interval, Whole, cluster_sums
from expo.stats.paired import at_zero, win_rate
from expo.stats.resampling import bootstrap_intervals, student_intervals

RESAMPLES = 999
SHAPES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "lognormal": lambda rng, n: rng.lognormal(0, 0.75, size=n) - np.exp(0.75**2 / 2),
    "t, 3 degrees": lambda rng, n: rng.standard_t(3, size=n),
    "wins and ties": lambda rng, n: rng.choice([-1.0, 0.0, 0.0, 1.0], size=n),
}
KINDS = ("bootstrap-t", "percentile", "BCa", "Student", "win rate", "equal length")


def clusters_of(rng: np.random.Generator, prompts: int, samples: str) -> Whole:
    """The prompt of each row."""
    sizes = rng.integers(1, 5, size=prompts) if samples == "1 to 4" else np.full(prompts, int(samples))
    return np.repeat(np.arange(prompts), sizes)


def intervals(rng: np.random.Generator, values: Floats, clusters: Whole, prompts: int) -> dict[str, Interval | None]:
    """The interval of each kind, for something whose true value is 0."""
    sums, seed = cluster_sums([(values, clusters)], prompts), int(rng.integers(1 << 30))
    found = {
        "bootstrap-t": bootstrap_intervals(sums, resamples=RESAMPLES, seed=seed)[0],
        "Student": student_intervals(sums)[0],
    }
    for kind in ("percentile", "BCa") if len(values) == prompts else ():
        made = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method=kind, rng=seed)
        found[kind] = made.confidence_interval
    longer = rng.gamma(2, 50, size=prompts)[clusters] - 80 + rng.normal(0, 20, size=len(clusters))
    line = at_zero(values + 0.01 * longer, longer, clusters)
    found["equal length"] = None if line is None else line.interval
    won = np.where(rng.random(len(clusters)) < rng.choice([0.9, 0.5], size=prompts)[clusters], 1.0, -1.0)
    low, high = win_rate(won, clusters)[1] or (np.nan, np.nan)
    found["win rate"] = (low - 0.7, high - 0.7)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[30, 100])
    asked = parser.parse_args()
    print(f"{'prompts':>7}  {'differences':<14}{'samples':>8}" + "".join(f"{kind:>14}" for kind in KINDS))
    for prompts in asked.prompts:
        for name, draw in SHAPES.items():
            for samples in ("1", "4", "1 to 4"):
                rng = np.random.default_rng(prompts)
                hits = dict.fromkeys(KINDS, 0)
                for _ in range(asked.simulations):
                    clusters = clusters_of(rng, prompts, samples)
                    values = draw(rng, prompts)[clusters]
                    values = values if samples == "1" else values + draw(rng, len(clusters))
                    for kind, interval in intervals(rng, values, clusters, prompts).items():
                        hits[kind] += interval is not None and interval[0] <= 0 <= interval[1]
                shares = (f"{hits[kind] / asked.simulations:.3f}" if hits[kind] else "" for kind in KINDS)
                print(f"{prompts:>7}  {name:<14}{samples:>8}" + "".join(f"{share:>14}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
