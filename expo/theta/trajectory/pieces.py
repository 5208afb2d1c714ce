"""The arithmetic of a trajectory on pieces: inner products of their changes, and linear combinations of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from expo.theta.trajectory.fit import Floats


class Changes:
    """Δ_t = θ_t − θ_0 of a piece for all steps, float32 (float64 where a side is); reused from piece to piece.

    Args:
        steps: How many there are.
        nbytes: Of one of these, at most.
        device: Where the pieces are.
    """

    def __init__(self, steps: int, nbytes: int, device: torch.device) -> None:
        self._memory = torch.empty((steps + 1) * nbytes, dtype=torch.uint8, device=device)
        self._steps = steps

    def rows(self, dtype: torch.dtype, count: int) -> Tensor:
        """Room for Δ [steps, count]."""
        return self._memory[: self._steps * count * dtype.itemsize].view(dtype).view(-1, count)

    def sum_of(self, changes: Tensor) -> Tensor:
        """Room for a sum of these rows [count]."""
        return self._memory[changes.nbytes :][: changes[0].nbytes].view(changes.dtype)


def gram(changes: Tensor) -> Floats:
    """G = ΔΔᵀ of a piece, [steps, steps], summed in the type of Δ.

    Args:
        changes: Δ [steps, elements], float32 or float64.
    """
    product: Floats = (changes @ changes.T).double().cpu().numpy()
    return product


def combine(
    start: Tensor, changes: Tensor, weights: Sequence[Sequence[float]], out: Sequence[Tensor], room: Tensor
) -> Iterator[Tensor]:
    """θ(T) = θ_0 + Σ_t w_t Δ_t for each target, in the type of Δ, one rounding to the output's.

    Args:
        start: θ_0 [elements], any floating-point type.
        changes: Δ [steps, elements], float32 or float64.
        weights: w_t for each target.
        out: For each target, where θ(T) goes [elements].
        room: For a sum, [elements], of the type of Δ.

    Yields:
        Each of `out`. A target's values do not depend on what the others are.
    """
    for own, target in zip(weights, out, strict=True):
        torch.mul(changes[0], own[0], out=room)
        for weight, change in zip(own[1:], changes[1:], strict=True):
            room.add_(change, alpha=weight)
        yield target.copy_(room.add_(start))


def total(pieces: Sequence[Floats]) -> Floats:
    """The sum of several pieces' G, float64."""
    sums: Floats = np.sum(pieces, axis=0, dtype=np.float64)
    return sums
