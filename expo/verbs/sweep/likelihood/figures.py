"""What log-probabilities of preference pairs say of α. Arrays in, figures out.

How often the chosen answer is the likelier one, by how much, and up to which α log-probabilities are linear in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from expo.config.sweep import SFT_ALPHA
from expo.files import Row
from expo.stats.means import Floats, Interval, Whole, cluster_sums
from expo.stats.resampling import bootstrap_intervals

LINEAR = 0.9
"""The least share of the changes of log-probabilities that the line through SFT and DPO explains where they count as
linear."""
MEASURES = ("accuracy", "accuracy_per_token", "margin", "margin_per_token")


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities of n pairs under one θ(α), in nats."""

    chosen: Floats
    """(n,): log π(chosen), a sum over the answer's tokens."""
    rejected: Floats
    """(n,)."""
    chosen_tokens: Floats
    """(n,)."""
    rejected_tokens: Floats
    """(n,)."""

    @property
    def margins(self) -> Floats:
        """(n,): log π(chosen) − log π(rejected)."""
        return self.chosen - self.rejected

    @property
    def margins_per_token(self) -> Floats:
        """(n,): log π(chosen)/|chosen| − log π(rejected)/|rejected|, which does not prefer short answers."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens

    @property
    def per_token(self) -> Floats:
        """(2n,): log π(y)/|y| of every answer."""
        return np.concatenate([self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens])

    def measured(self, name: str) -> Floats:
        """(n,): what a measure is the mean of."""
        margins = self.margins_per_token if name.endswith("per_token") else self.margins
        return (np.sign(margins) + 1) / 2 if name.startswith("accuracy") else margins


@dataclass(frozen=True)
class Measured:
    """A mean over pairs."""

    mean: float
    difference: float | None = None
    """From α = 0; None there."""
    interval: Interval | None = None
    """Of the difference, paired, for all α together."""


@dataclass(frozen=True)
class AlphaLikelihoods:
    """What the pairs say of one α."""

    alpha: float
    name: str
    accuracy: Measured
    """The share of pairs of which the chosen answer is likelier, ties counting ½."""
    accuracy_per_token: Measured
    margin: Measured
    """In nats."""
    margin_per_token: Measured
    chosen: float
    """The mean of log π(chosen)/|chosen|."""
    rejected: float
    linear: float | None
    """The share of the changes of log π(y)/|y| since α = 0 that the line through SFT and DPO explains
    (`explained_by_line`); None at 0, −1, or where nothing changes."""

    def describe(self) -> Row:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """What the pairs say."""

    pairs: int
    """How many were read under every α."""
    alphas: tuple[AlphaLikelihoods, ...]
    linear_up_to: float
    """The largest α up to which `linear` is at least `LINEAR` at every α that was measured; 0 where there is none."""

    def highest(self, measure: str) -> float:
        """The α ≥ 0 with the highest mean of a measure; the smallest of several."""
        own = [one for one in self.alphas if one.alpha >= 0]
        return max(own, key=lambda one: (getattr(one, measure).mean, -one.alpha)).alpha


def figures(read: Mapping[float, Likelihoods], names: Mapping[float, str], clusters: Sequence[int]) -> Found:
    """What the pairs say of each α.

    Args:
        read: By α, of the same n pairs; α = 0 and −1 are among them.
        names: By α.
        clusters: The number of each pair's prompt.

    Returns:
        The α in ascending order. Intervals are bootstrap-t by prompt, simultaneous over the α above 0.
    """
    of = np.asarray(clusters, dtype=np.int64)
    alphas = sorted(read)
    measures = {name: _measure(read, name, of) for name in MEASURES}
    linear = {alpha: explained_by_line(read, alpha) for alpha in alphas}
    found = [
        AlphaLikelihoods(
            alpha,
            names[alpha],
            **{name: measures[name][alpha] for name in MEASURES},
            chosen=float((read[alpha].chosen / read[alpha].chosen_tokens).mean()),
            rejected=float((read[alpha].rejected / read[alpha].rejected_tokens).mean()),
            linear=linear[alpha],
        )
        for alpha in alphas
    ]
    return Found(len(of), tuple(found), _linear_up_to(linear))


def _measure(read: Mapping[float, Likelihoods], name: str, clusters: Whole) -> dict[float, Measured]:
    values = {alpha: one.measured(name) for alpha, one in read.items()}
    others = [alpha for alpha in sorted(read) if alpha != 0]
    differences = {alpha: values[alpha] - values[0.0] for alpha in others}
    together = [alpha for alpha in others if alpha > 0]
    intervals: dict[float, Interval | None] = {}
    for group in (together, [alpha for alpha in others if alpha < 0]):
        if group:
            sums = cluster_sums([(differences[alpha], clusters) for alpha in group], int(clusters.max()) + 1)
            intervals |= dict(zip(group, bootstrap_intervals(sums), strict=True))
    found = {0.0: Measured(float(values[0.0].mean()))}
    for alpha in others:
        found[alpha] = Measured(float(values[alpha].mean()), float(differences[alpha].mean()), intervals[alpha])
    return found


def explained_by_line(read: Mapping[float, Likelihoods], alpha: float) -> float | None:
    """How linear log-probabilities are in α: 1 − Σ(x − p)² / Σx² over all answers y.

    x = (log π_α(y) − log π_0(y))/|y| is the change since DPO, and p = α (log π_0(y) − log π_−1(y))/|y| what the line
    through SFT (α = −1) and DPO (α = 0) foretells. 1 is a straight line; below 0 the line foretells less than "no
    change" does. (That log-probabilities of a training run are nearly linear in its steps: arXiv 2601.04537.)
    """
    if alpha in (0.0, SFT_ALPHA):
        return None
    base = read[0.0].per_token
    change = read[alpha].per_token - base
    foretold = alpha * (base - read[SFT_ALPHA].per_token)
    total = float(change @ change)
    return 1 - float(((change - foretold) ** 2).sum()) / total if total else None


def _linear_up_to(linear: Mapping[float, float | None]) -> float:
    reached = 0.0
    for alpha in sorted(alpha for alpha in linear if alpha > 0):
        share = linear[alpha]
        if share is None or share < LINEAR:
            break
        reached = alpha
    return reached
