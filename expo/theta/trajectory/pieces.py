"""The arithmetic of a trajectory on pieces: inner products of their changes, and linear combinations of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from expo.theta.trajectory.fit import Floats

Rows: TypeAlias = list[list[float]]
"""A small matrix."""

RUN = 4096
"""Elements of which products are summed in float32: of 2¹⁸, errors of such a sum reach 3e-5, and of these 1e-7."""


class Moved(NamedTuple):
    """A piece of a training run, float32 (float64 where a side is)."""

    start: Tensor  # θ_0 [elements]
    changes: Tensor  # Δ_t = θ_t − θ_0 [steps, elements]
    room: Tensor  # for a sum [elements]


class Changes:
    """Memory for a piece of a training run, reused from piece to piece.

    Args:
        steps: How many checkpoints there are.
        nbytes: Of a piece at one of them, at most.
        device: Where the pieces are.
    """

    def __init__(self, steps: int, nbytes: int, device: torch.device) -> None:
        self._memory = torch.empty((steps + 2) * nbytes if steps else 0, dtype=torch.uint8, device=device)
        self._rows = steps + 2

    def of(self, dtype: torch.dtype, count: int) -> Moved:
        """Room for a piece of so many elements."""
        start, *_, room = rows = self._memory[: self._rows * count * dtype.itemsize].view(dtype).view(-1, count)
        return Moved(start, rows[1:-1], room)


def gram(changes: Tensor) -> Rows:
    """G = ΔΔᵀ of a piece, [steps, steps]: sums of RUN elements in the type of Δ, and their sum in float64.

    Args:
        changes: Δ [steps, elements], float32 or float64.

    Returns:
        Plain numbers: small arrays that are kept until all pieces are there would leave holes in the memory.
    """
    count = changes.shape[1] // RUN * RUN
    runs = changes[:, :count].view(len(changes), -1, RUN).transpose(0, 1)  # [runs, steps, RUN]
    rest = changes[:, count:]
    products = torch.bmm(runs, runs.mT).sum(0, dtype=torch.float64) + (rest @ rest.T)
    rows: Rows = products.tolist()
    return rows


def combine(piece: Moved, weights: Sequence[Sequence[float]], out: Sequence[Tensor]) -> Iterator[Tensor]:
    """θ(T) = θ_0 + Σ_t w_t Δ_t for each target, in the type of Δ, one rounding to the output's.

    Args:
        piece: θ_0 and Δ.
        weights: w_t for each target.
        out: For each target, where θ(T) goes [elements].

    Yields:
        Each of `out`. A target's values do not depend on what the others are.
    """
    start, changes, room = piece
    for own, target in zip(weights, out, strict=True):
        torch.mul(changes[0], own[0], out=room)
        for weight, change in zip(own[1:], changes[1:], strict=True):
            room.add_(change, alpha=weight)
        yield target.copy_(room.add_(start))


def total(pieces: Sequence[Rows]) -> Floats:
    """The sum of several pieces' G, float64."""
    sums: Floats = np.sum(pieces, axis=0, dtype=np.float64)
    return sums
