"""The best approximation of a matrix by one of low rank, as the two factors of a LoRA: tensors in, tensors out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_SIZE = 1024
"""A matrix with no more rows, or no more columns, is decomposed exactly, in float64."""
OVERSAMPLING = 32
ITERATIONS = 8
"""Of larger ones, a random subspace of 2·rank + OVERSAMPLING dimensions is turned towards the largest singular vectors.

Of matrices of independent normal values, which is the hardest case, the error is then at most 0.02 % above that of the
exact approximation, and of those whose singular values fall 1e-8 (`tests/test_low_rank.py`).
"""
SEED = 0


class Factors(NamedTuple):
    """Δ ≈ B·A, and how close it is."""

    a: Tensor  # [rank, columns]
    b: Tensor  # [rows, rank]
    norm: float
    """‖Δ‖."""
    error: float
    """‖Δ − B·A‖, of the factors in the type that they are stored in."""


def factors(delta: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """The factors of the best approximation; each has the square roots of the singular values.

    Args:
        delta: Δ [rows, columns], finite.
        rank: At most the smaller of its sizes.
        dtype: What the factors are rounded to; the error includes this.
    """
    norm = _norm(delta)
    if norm == 0:
        zeros = (delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank))
        return Factors(zeros[0].to(dtype), zeros[1].to(dtype), 0.0, 0.0)
    left, values, right = _decompose(delta / norm, rank)
    roots = (values * norm).sqrt()
    a, b = (roots[:, None] * right).to(dtype), (left * roots).to(dtype)
    return Factors(a.contiguous(), b.contiguous(), norm, _norm(delta - b.to(delta.dtype) @ a.to(delta.dtype)))


def is_exact(rows: int, columns: int, rank: int) -> bool:
    """Whether a matrix of this size is decomposed exactly."""
    return min(rows, columns) <= max(EXACT_SIZE, 2 * _dimensions(rank))


def wide(rows: int, columns: int, rank: int) -> torch.dtype:
    """The type in which a Δ of this size is approximated."""
    return torch.float64 if is_exact(rows, columns, rank) else torch.float32


def _decompose(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values [rank] and their vectors [rows, rank] and [rank, columns]."""
    if is_exact(delta.shape[0], delta.shape[1], rank):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
        torch.manual_seed(SEED)
        left, values, right = torch.svd_lowrank(delta, q=_dimensions(rank), niter=ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].T


def _dimensions(rank: int) -> int:
    return 2 * rank + OVERSAMPLING


def _norm(delta: Tensor) -> float:
    """‖Δ‖, row by row, so that float32's sums stay short."""
    return float(delta.norm(dim=1).double().norm())
