"""The line a tensor moves along over the steps of a training run, found from inner products of its changes alone.

Let Δ_t = θ_t − θ_0 for the steps t that have checkpoints, and G = ΔΔᵀ their Gram matrix, [steps, steps]. A rule chooses
a direction v = Σ_t d_t Δ_t of length 1. The coefficients c_t = ⟨Δ_t, v⟩ = (G d)_t are fitted by a line a·t + b, and at
step T the tensor is θ(T) = θ_0 + (a·T + b) v, a linear combination of the Δ_t with the weights (a·T + b) d_t: so
nothing but G has to be known before the weights are combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from expo.files import Row

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A tensor's line. All norms are Frobenius norms."""

    steps: tuple[float, ...]
    """t, ascending."""
    direction: tuple[float, ...]
    """d_t: v = Σ d_t Δ_t. All 0 where no Δ_t differs from 0."""
    coefficients: tuple[float, ...]
    """c_t = ⟨Δ_t, v⟩."""
    slope: float
    """a, per step."""
    intercept: float
    """b."""
    squares: tuple[float, ...]
    """‖Δ_t‖²."""

    def weights(self, target: float) -> tuple[float, ...]:
        """The weights w_t of θ(T) = θ_0 + Σ_t w_t Δ_t.

        Args:
            target: T, in steps.
        """
        place = self.slope * target + self.intercept
        return tuple(place * d for d in self.direction)

    @property
    def energy(self) -> float:
        """Σ_t ‖Δ_t‖²."""
        return math.fsum(self.squares)

    @property
    def in_direction(self) -> float:
        """Σ_t c_t², the part of `energy` in the direction v; at most all of it, whatever the rounding."""
        return min(math.fsum(c * c for c in self.coefficients), self.energy)

    @property
    def residual(self) -> float:
        """Σ_t (c_t − (a·t + b))²."""
        return math.fsum(
            (c - self.slope * t - self.intercept) ** 2 for t, c in zip(self.steps, self.coefficients, strict=True)
        )

    @property
    def spread(self) -> float:
        """Σ_t (c_t − c̄)²."""
        mean = math.fsum(self.coefficients) / len(self.coefficients)
        return math.fsum((c - mean) ** 2 for c in self.coefficients)


@dataclass(frozen=True)
class Quality:
    """How well lines describe one tensor or several together."""

    explained: float | None
    """Explained variance, Σ c_t² / Σ ‖Δ_t‖²: the share of the changes that lies along the lines; None where nothing
    changes."""
    r2: float | None
    """R² of the coefficients as linear in t; None where they do not vary."""

    def describe(self) -> Row:
        """As plain data."""
        return {"explained_variance": self.explained, "r2": self.r2}


def read_fits(rows: Mapping[str, Row]) -> dict[str, Fit]:
    """Fits from their rows, by tensor: `dataclasses.asdict`, as it is after JSON."""
    return {name: Fit(**{key: _plain(value) for key, value in row.items()}) for name, row in rows.items()}


def _plain(value: Any) -> Any:  # noqa: ANN401 - from JSON
    return tuple(value) if isinstance(value, list) else value


def describe(fits: Mapping[str, Fit]) -> Row:
    """How well the tensors' lines describe them, in all and each: as plain data."""
    tensors = {
        name: {
            **quality([one]).describe(),
            "coefficients": one.coefficients,
            "slope": one.slope,
            "intercept": one.intercept,
        }
        for name, one in sorted(fits.items())
    }
    return {**quality(fits.values()).describe(), "tensors": tensors}


def quality(fits: Iterable[Fit]) -> Quality:
    """Of several tensors, each counted by its size of change."""
    each = list(fits)
    energy, explained, residual, spread = (
        math.fsum(getattr(fit, name) for fit in each) for name in ("energy", "in_direction", "residual", "spread")
    )
    return Quality(explained / energy if energy else None, 1 - residual / spread if spread else None)


Direction: TypeAlias = Callable[[Floats, Floats], Floats]
"""(G [steps, steps], t [steps]) → d [steps], of length 1 as Σ d_t Δ_t; zeros where there is no direction."""


def leading(gram: Floats, steps: Floats) -> Floats:
    """RELEX's direction (arXiv 2605.21468): the leading right singular vector of the matrix whose rows are Δ_t.

    With u the leading eigenvector of G and σ² its eigenvalue, v = Δᵀu/σ; of both signs, the one that grows with t.
    """
    values, vectors = np.linalg.eigh(gram)
    square, u = float(values[-1]), vectors[:, -1]
    if square <= 0:
        return np.zeros_like(steps)
    grows = float(np.dot(steps - steps.mean(), u)) or float(u.sum())
    return (u if grows >= 0 else -u) / math.sqrt(square)


def through_start(gram: Floats, steps: Floats) -> Floats:
    """The direction of the least squares line Δ_t ≈ t·g through θ_0: g = Σ_t t Δ_t / Σ t²."""
    square = float(steps @ gram @ steps)
    return steps / math.sqrt(square) if square > 0 else np.zeros_like(steps)


@dataclass(frozen=True)
class LineRule:
    """How a tensor's line is found."""

    formula: str
    direction: Direction
    through_zero: bool
    """Whether the line goes through θ_0 at t = 0, so that b = 0."""


LINE_RULES = {
    "relex": LineRule("θ(T) = θ_0 + (a·T + b) v, v the leading direction of the Δ_t", leading, False),
    "linear": LineRule("θ(T) = θ_0 + T · Σ_t t Δ_t / Σ_t t²", through_start, True),
}
"""Name → rule."""


def fit(rule: LineRule, gram: Floats, steps: Sequence[float]) -> Fit:
    """A tensor's line.

    Args:
        rule: How it is found.
        gram: G [steps, steps], float64, symmetric; G_st = ⟨Δ_s, Δ_t⟩.
        steps: t, ascending and distinct.
    """
    t = np.asarray(steps, np.float64)
    d = rule.direction(gram, t)
    c = gram @ d
    if rule.through_zero:
        slope, intercept = float(t @ c) / float(t @ t), 0.0
    else:
        centred = t - t.mean()
        slope = float(centred @ c) / float(centred @ centred)
        intercept = float(c.mean() - slope * t.mean())
    return Fit(
        steps=tuple(map(float, steps)),
        direction=tuple(map(float, d)),
        coefficients=tuple(map(float, c)),
        slope=slope,
        intercept=intercept,
        squares=tuple(map(float, np.diag(gram))),
    )
