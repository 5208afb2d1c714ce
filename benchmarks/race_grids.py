"""Grids of rewards for the replays of `race.py`: recorded ones, and made ones, with the truth about each α."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from expo.output.sweeps import read_sweep
from expo.stats.means import Floats
from expo.verbs.compare.reading import read_runs
from expo.verbs.report.sweep import sweep_files, with_alphas
from expo.verbs.sweep.order import Asked

SUBSETS = 4


# --- recorded ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The answers of an α to all prompts."""

    rewards: Floats
    """(prompts, samples)"""
    tokens: Floats
    ended: Floats


@dataclass(frozen=True)
class Grid:
    """Rewards that are all there."""

    alphas: tuple[float, ...]
    prompts: tuple[Asked, ...]
    column: Callable[[float], Column]
    truth: Callable[[float], float]
    """The true mean of an α."""
    spread: Callable[[float, float], float]
    """The standard deviation of the paired difference of two α's rows."""

    @property
    def best(self) -> float:
        """The α of the grid whose true mean is the highest."""
        return max(self.alphas, key=self.truth)

    def regret(self, alpha: float) -> float:
        """By how much an α is worse than the best, in standard deviations of the paired difference."""
        best = self.best
        loss = self.truth(best) - self.truth(alpha)
        return loss / self.spread(best, alpha) if alpha != best else 0.0


@dataclass(frozen=True)
class Recorded:
    """A finished grid sweep."""

    alphas: tuple[float, ...]
    prompts: tuple[Asked, ...]
    values: Floats
    """(3, prompts, samples, α): rewards, tokens, whether an answer ended."""


@cache
def recorded(folder: Path) -> Recorded:
    """Read the folder of a finished sweep, without α below 0."""
    record = read_sweep(folder)
    read = with_alphas(read_runs(sweep_files(folder, record)))
    runs = [run for run in read if run.alpha is not None and run.alpha >= 0]
    runs.sort(key=lambda run: run.alpha or 0.0)
    first = runs[0]
    prompts = {row.key.prompt: Asked(row.id, row.key.prompt, row.subset) for row in first.rows}
    places = {name: place for place, name in enumerate(prompts)}
    samples = 1 + max(row.key.sample for row in first.rows)
    values = np.full((3, len(prompts), samples, len(runs)), np.nan)
    for number, run in enumerate(runs):
        for row, reward in zip(run.rows, next(iter(run.rewards.values())), strict=True):
            ended = np.nan if row.finish_reason is None else float(row.finish_reason == "stop")
            tokens = np.nan if row.tokens is None else float(row.tokens)
            at = values[:, places[row.key.prompt], row.key.sample, number]
            at[:] = np.nan if reward is None else reward, tokens, ended
    return Recorded(tuple(run.alpha or 0.0 for run in runs), tuple(prompts.values()), values)


def replayed(of: Recorded, samples: int | None, seed: int, *, permuted: bool = False) -> Grid:
    """A recorded grid with all samples, or some that are drawn for each prompt; with α permuted for each prompt."""
    rng = np.random.default_rng(seed)
    rewards = of.values[0]
    values = of.values
    if samples is not None:
        chosen = rng.permuted(np.tile(np.arange(values.shape[2]), (values.shape[1], 1)), axis=1)[:, :samples]
        values = np.take_along_axis(values, chosen[None, :, :, None], axis=2)
    if permuted:
        order = rng.permuted(np.tile(np.arange(values.shape[3]), (values.shape[1], 1)), axis=1)
        values = np.take_along_axis(values, order[None, :, None, :], axis=3)
    means = np.nanmean(rewards, axis=(0, 1))
    place = {alpha: number for number, alpha in enumerate(of.alphas)}
    return Grid(
        of.alphas,
        of.prompts,
        lambda alpha: Column(*values[..., place[alpha]]),
        lambda alpha: 0.0 if permuted else float(means[place[alpha]]),
        lambda one, other: float(np.nanstd(rewards[..., place[one]] - rewards[..., place[other]], ddof=1)),
    )


# --- made -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of made grid: functions of x = α over the largest α of the grid, 0 ≤ x, and of a prompt's subset."""

    mean: Callable[[float], float]
    noise: Callable[[float], float] = lambda _: 1.0
    """The standard deviation of a sample's reward."""
    of_prompt: float = 0.5
    """The standard deviation of what a prompt adds for one α."""
    slope: float = 0.0
    """The standard deviation, among prompts, of a reward's slope in x: near α's then have much in common."""
    skew: Callable[[float], float] = lambda _: 0.0
    """The σ of lognormal noise, negative for a long lower tail; 0 for normal noise."""
    length: Callable[[float], float] = lambda _: 100.0
    """Tokens of an answer."""
    ending: Callable[[float], float] = lambda _: 1.0
    """The share of answers that end."""
    of_subset: Callable[[float, int], float] = lambda _x, _subset: 0.0
    """What a subset adds to the mean; the subsets' mean is 0."""
    is_curve: bool = True


def hill(x: float) -> float:
    """Highest at 0.6."""
    return 0.4 - 0.4 * ((x - 0.6) / 0.6) ** 2


KINDS: dict[str, Kind] = {
    "flat": Kind(lambda _: 0.0),
    "hill": Kind(hill),
    "far out": Kind(lambda x: 0.4 * x),
    "best at 0": Kind(lambda x: -0.4 * x),
    "cliff": Kind(lambda x: 0.5 * x if x < 0.7 else -1.5),
    "sets in": Kind(lambda x: 0.0 if x < 0.7 else 0.4, is_curve=False),
    "one noisy": Kind(lambda x: hill(x) - 0.2 * (x > 0.95), noise=lambda x: 4.0 if x > 0.95 else 1.0),
    "skewed": Kind(hill, skew=lambda x: 0.9 if x < 0.5 else -0.9),
    "rambling": Kind(hill, length=lambda x: 100 * (1 + 6 * x), ending=lambda x: 0.98 - 0.5 * max(0.0, x - 0.7)),
    "correlated": Kind(lambda x: 0.25 * x, slope=1.0, of_prompt=0.2, noise=lambda _: 0.5),
    "subsets": Kind(hill, of_subset=lambda x, subset: (0.6, 0.2, -0.2, -0.6)[subset] * x),
}
NULLS: dict[str, Kind] = {
    "all equal": Kind(lambda _: 0.0),
    "others worse": Kind(lambda x: 0.0 if x < 0.5 else -0.5),
    "all worse": Kind(lambda x: -0.1 * (x > 0)),
    "unequal noise": Kind(lambda _: 0.0, noise=lambda x: 0.3 + 4 * x),
    "others worse, unequal noise": Kind(lambda x: 0.0 if x < 0.5 else -0.5, noise=lambda x: 0.3 + 4 * x),
    "skewed up": Kind(lambda _: 0.0, skew=lambda x: 0.9 * (x > 0), of_prompt=0.1),
    "skewed down": Kind(lambda _: 0.0, skew=lambda x: -0.9 * (x > 0), of_prompt=0.1),
    "subsets": Kind(lambda _: 0.0, of_subset=lambda x, subset: (0.6, 0.2, -0.2, -0.6)[subset] * x),
}
BEYOND = {
    "very skewed down": Kind(
        lambda _: 0.0, skew=lambda x: -1.2 * (x > 0), noise=lambda x: 1.0 if x else 0.2, of_prompt=0.0
    )
}
"""Nulls for which 5 % is not promised: the noise has a skewness of −11, and nothing on the other side."""
ALPHAS: dict[int, tuple[float, ...]] = {
    2: (0.0, 0.5),
    3: (0.0, 2.5, 8.0),
    4: (0.0, 0.3, 0.6, 1.0),
    6: (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    8: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
    13: tuple(number / 10 for number in range(13)),
}


def made(kind: Kind, alphas: tuple[float, ...], prompts: int, samples: int, seed: int, *, permuted: bool) -> Grid:
    """Draw a grid; a column depends on the seed and its α alone."""
    largest = max(alphas)
    subsets = np.arange(prompts) % SUBSETS
    shared, slopes = np.random.default_rng(seed).normal(size=(2, prompts, 1))

    def drawn(alpha: float) -> Column:
        rng = np.random.default_rng([seed, zlib.crc32(str(alpha).encode())])
        x, shape = alpha / largest, (prompts, samples)
        mean = kind.mean(x) + np.array([kind.of_subset(x, one) for one in range(SUBSETS)])[subsets][:, None]
        own = kind.of_prompt * rng.normal(size=(prompts, 1)) + kind.slope * x * slopes
        rewards = shared + mean + own + kind.noise(x) * _standard(rng, kind.skew(x), shape)
        tokens = kind.length(x) * rng.gamma(4, 0.25, size=shape)
        return Column(rewards, tokens, (rng.random(shape) < kind.ending(x)).astype(np.float64))

    columns = {alpha: drawn(alpha) for alpha in alphas}
    if permuted:
        order = np.random.default_rng([seed, 1]).permuted(np.tile(np.arange(len(alphas)), (prompts, 1)), axis=1)
        stacked = [np.stack(values, axis=-1) for values in zip(*map(values_of, columns.values()), strict=True)]
        mixed = [np.take_along_axis(one, order[:, None, :], axis=2) for one in stacked]
        columns = {alpha: Column(*(one[..., place] for one in mixed)) for place, alpha in enumerate(alphas)}

    def spread(one: float, other: float) -> float:
        x, y = one / largest, other / largest
        within = [kind.of_subset(x, subset) - kind.of_subset(y, subset) for subset in range(SUBSETS)]
        own = 2 * kind.of_prompt**2 + (kind.slope * (x - y)) ** 2
        return float(np.sqrt(own + kind.noise(x) ** 2 + kind.noise(y) ** 2 + np.var(within)))

    return Grid(
        alphas,
        tuple(Asked(str(number), number, f"part {subsets[number]}") for number in range(prompts)),
        lambda alpha: columns[alpha] if alpha in columns else drawn(alpha),
        lambda alpha: 0.0 if permuted else kind.mean(alpha / largest),
        spread,
    )


def values_of(column: Column) -> tuple[Floats, Floats, Floats]:
    """Its rewards, tokens and endings."""
    return column.rewards, column.tokens, column.ended


def _standard(rng: np.random.Generator, sigma: float, shape: tuple[int, int]) -> Floats:
    """Draws of mean 0 and standard deviation 1, normal or lognormal."""
    normal = rng.normal(size=shape)
    if not sigma:
        return normal
    size = abs(sigma)
    values = np.exp(size * normal) - np.exp(size**2 / 2)
    return np.sign(sigma) * values / np.sqrt((np.exp(size**2) - 1) * np.exp(size**2))
