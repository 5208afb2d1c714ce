"""The maths around a rule: tensors in, tensors out. Norms of a pair's pieces, an adapter's product, scratch space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORM_ROW = 1 << 9
"""Elements per row norm; the rows' squares are summed in float32.

Few enough that rows differ by many steps of bfloat16, as otherwise all rounding errors would have the same sign.
"""
FEW_ELEMENTS = 1 << 18
"""Below this size norms are computed in float32 throughout, as rounding row norms to the tensors' type would show."""
SAMPLED_BYTES = 1 << 20
"""From this size on `sampled_norms` estimates; it is the size of the stream's full pieces."""
SAMPLING = 17
"""It then measures every 17th row: an odd number, so that all columns of a matrix are sampled."""
WIDE_BLOCK = 1 << 16
"""Elements converted to a wider type at a time, few enough for the processor's cache."""
MAX_VIEWS = 16
"""Tensors whose row views are cached."""
OWN_NORMS = frozenset({torch.bfloat16, torch.float32, torch.float64})
"""Types whose differences and row norms neither overflow nor underflow before the values themselves do."""


class Norms(NamedTuple):
    """Squared Frobenius norms."""

    delta: float = 0.0
    """‖θ_dpo − θ_sft‖²."""
    sft: float = 0.0
    """‖θ_sft‖²."""
    dpo: float = 0.0
    """‖θ_dpo‖², if requested."""
    sampled: bool = False
    """Whether these are estimates, which do not bound any single element."""


class _Rows(NamedTuple):
    """A tensor viewed as rows, with buffers for their norms."""

    values: Tensor
    whole: Tensor  # [rows, NORM_ROW]
    rest: Tensor
    norms: Tensor  # [rows], of the tensor's type
    wide_norms: Tensor


class _Sample(NamedTuple):
    """Some rows of a tensor, with a buffer for them in a wider type."""

    values: Tensor
    rows: Tensor  # [rows / SAMPLING, NORM_ROW]
    wide: Tensor  # likewise
    flat: Tensor  # the same buffer as one axis


class Scratch:
    """Scratch space for pieces of at most `nbytes` per side, reused from piece to piece.

    Freeing and allocating memory for every piece costs more than all the arithmetic, as the system clears it each
    time. Views are cached too, because pieces are mostly alike and each view costs microseconds.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._delta = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._last_delta = self._delta
        self._rows: dict[int, _Rows] = {}
        self._samples: dict[int, _Sample] = {}
        self._wide: dict[torch.dtype, Tensor] = {}
        self._tile = torch.empty(0, dtype=torch.uint8, device=device)

    def delta(self, like: Tensor) -> Tensor:
        """A buffer for a tensor like this one."""
        if (self._last_delta.nbytes, self._last_delta.dtype) != (like.nbytes, like.dtype):
            self._last_delta = self._delta[: like.nbytes].view(like.dtype)
        return self._last_delta

    def rows(self, values: Tensor) -> _Rows:
        """A tensor of one axis as rows of NORM_ROW elements, and the remaining elements."""
        known = self._rows.get(id(values))
        if known is None or known.values is not values:
            if len(self._rows) >= MAX_VIEWS:
                self._rows.clear()
            count, rest = divmod(len(values), NORM_ROW)
            norms = values.new_empty(count)
            whole = values[: len(values) - rest].view(count, NORM_ROW)
            wide = norms.to(torch.promote_types(values.dtype, torch.float32))
            rests = values[len(values) - rest :]
            known = self._rows[id(values)] = _Rows(values, whole, rests, norms, wide)
        return known

    def sample(self, values: Tensor, dtype: torch.dtype) -> _Sample:
        """Every `SAMPLING`-th row of a tensor of one axis, to be widened to `dtype`."""
        known = self._samples.get(id(values))
        if known is None or known.values is not values or known.wide.dtype != dtype:
            if len(self._samples) >= MAX_VIEWS:
                self._samples.clear()
            rows = values[: len(values) // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)[::SAMPLING]
            wide = torch.empty(rows.shape, dtype=dtype, device=values.device)
            known = self._samples[id(values)] = _Sample(values, rows, wide, wide.view(-1))
        return known

    def wide(self, dtype: torch.dtype, elements: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three tensors of a wider type, of at most WIDE_BLOCK elements each."""
        if dtype not in self._wide:
            self._wide[dtype] = torch.empty(3, WIDE_BLOCK, dtype=dtype, device=self._delta.device)
        first, second, third = self._wide[dtype]
        return first[:elements], second[:elements], third[:elements]

    def tile(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """A buffer for a matrix."""
        nbytes = rows * columns * dtype.itemsize
        if len(self._tile) < nbytes:
            self._tile = torch.empty(nbytes, dtype=torch.uint8, device=self._tile.device)
        return self._tile[:nbytes].view(dtype).view(rows, columns)


def pair_norms(sft: Tensor, dpo: Tensor, scratch: Scratch, *, of_dpo: bool = False) -> Norms:
    """‖d − s‖², ‖s‖² and, if requested, ‖d‖².

    In large pieces a row's norm is rounded to the tensors' own type, up or down: over many rows these errors
    cancel, which leaves four digits for bfloat16 weights.

    Args:
        sft: s, one axis, any floating-point dtype.
        dpo: d, same shape.
        scratch: Scratch space on the same device.
        of_dpo: Whether to compute ‖d‖².
    """
    if not _has_own_norms(sft, dpo):
        return _wide_norms(sft, dpo, scratch, of_dpo=of_dpo)
    delta = torch.sub(dpo, sft, out=scratch.delta(dpo))
    dpo_squared = _squared_norm(dpo, scratch) if of_dpo else 0.0
    return Norms(_squared_norm(delta, scratch), _squared_norm(sft, scratch), dpo_squared)


def sampled_norms(sft: Tensor, dpo: Tensor, scratch: Scratch) -> Norms:
    """‖d − s‖² and ‖s‖²; for pieces of SAMPLED_BYTES, estimated from every 17th run of NORM_ROW elements.

    Exact norms would cost as much as all other arithmetic. If no sampled element differs, all are compared: an
    estimate of 0 is a true 0.

    Args:
        sft: s, one axis, any floating-point dtype.
        dpo: d, same shape.
        scratch: Scratch space on the same device.
    """
    if max(sft.nbytes, dpo.nbytes) < SAMPLED_BYTES:
        return pair_norms(sft, dpo, scratch)
    dtype = wider(sft, dpo)
    s, d = scratch.sample(sft, dtype), scratch.sample(dpo, dtype)
    d.wide.copy_(d.rows).sub_(s.wide.copy_(s.rows))
    delta = _sum_of_squares(d.flat)
    if delta == 0:
        return pair_norms(sft, dpo, scratch)
    scale = len(sft) / len(s.flat)
    return Norms(scale * delta, scale * _sum_of_squares(s.flat), sampled=True)


def sampled_square(values: Tensor) -> float:
    """‖values‖², of large pieces estimated from every 17th run of NORM_ROW elements.

    Args:
        values: One axis, float32 or float64.
    """
    runs = values[: len(values) // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)[::SAMPLING]
    if len(runs) <= SAMPLING:
        return _sum_of_squares(values)
    return _sum_of_squares(runs.flatten()) * len(values) / runs.numel()


def _has_own_norms(sft: Tensor, dpo: Tensor) -> bool:
    return sft.dtype == dpo.dtype and sft.dtype in OWN_NORMS and len(sft) >= FEW_ELEMENTS


def _squared_norm(values: Tensor, scratch: Scratch) -> float:
    rows = scratch.rows(values)
    total = _squared(rows.whole, rows)
    return total + float(torch.linalg.vector_norm(rows.rest)) ** 2 if len(rows.rest) else total


def _squared(values: Tensor, room: _Rows) -> float:
    """‖values‖² of a matrix [rows, NORM_ROW]; the row norms are written to the buffers of `room`."""
    wide = room.wide_norms.copy_(torch.linalg.vector_norm(values, dim=1, out=room.norms))
    return _sum_of_squares(wide)


def _sum_of_squares(values: Tensor) -> float:
    """‖values‖² of one axis, float32 or float64."""
    if values.is_cuda:  # there a dot product loads cuBLAS, which keeps tens of MB per stream
        return float(torch.linalg.vector_norm(values)) ** 2
    return float(values.dot(values))


def _wide_norms(sft: Tensor, dpo: Tensor, scratch: Scratch, *, of_dpo: bool) -> Norms:
    wide, total = wider(sft, dpo), Norms()
    for s, d in zip(torch.split(sft, WIDE_BLOCK), torch.split(dpo, WIDE_BLOCK), strict=True):
        size, other, delta = scratch.wide(wide, len(s))
        torch.sub(other.copy_(d), size.copy_(s), out=delta)
        squares = [_sum_of_squares(side) for side in ((delta, size, other) if of_dpo else (delta, size))]
        delta_squared, sft_squared, dpo_squared = [*squares, 0.0][:3]
        total = Norms(total.delta + delta_squared, total.sft + sft_squared, total.dpo + dpo_squared)
    return total


def wider(sft: Tensor, dpo: Tensor) -> torch.dtype:
    """The type in which two sides of different types are combined: float32, or float64 if one of them is."""
    return torch.promote_types(torch.promote_types(sft.dtype, dpo.dtype), torch.float32)


def stays_finite(bound: Callable[[Norms, float], float] | None, norms: Norms, alpha: float, dtype: torch.dtype) -> bool:
    """Whether the norms alone prove that no element of θ(α) is NaN or infinite.

    Args:
        bound: The rule's; half of the type's range is left for rounding.
        norms: Of the piece.
        alpha: α.
        dtype: Of the output.

    Returns:
        False if the norms do not prove it; then check the elements.
    """
    return bound is not None and not norms.sampled and bound(norms, alpha) < torch.finfo(dtype).max / 2


def low_rank_delta(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """ΔW = scale · L · R, or consecutive rows of it.

    The last bit of an element depends on the shape of the product in which it is computed.

    Args:
        left: L [rows, rank], float32 or float64.
        right: R [rank, columns], same dtype.
        scale: A LoRA's scaling, alpha/rank or alpha/√rank.
        out: Where ΔW [rows, columns] goes; same dtype.

    Returns:
        `out`.
    """
    return torch.mm(left * scale, right, out=out)


def add_difference(delta: Tensor, sft: Tensor, dpo: Tensor, scratch: Scratch) -> None:
    """Δ += d − s, for a tensor that was replaced and also has a ΔW.

    Args:
        delta: Δ, one axis, float32 or float64.
        sft: s, any floating-point dtype, same shape.
        dpo: d, likewise.
        scratch: Scratch space on the same device.
    """
    for change, s, d in zip(*(torch.split(side, WIDE_BLOCK) for side in (delta, sft, dpo)), strict=True):
        wide_s, wide_d, _ = scratch.wide(delta.dtype, len(change))
        change.add_(wide_d.copy_(d).sub_(wide_s.copy_(s)))


def delta_norms(sft: Tensor, delta: Tensor, scratch: Scratch, *, of_dpo: bool = False) -> Norms:
    """‖Δ‖², ‖s‖² and, if requested, ‖s + Δ‖².

    Args:
        sft: s, one axis, any floating-point dtype.
        delta: Δ, same shape, float32 or float64.
        scratch: Scratch space on the same device.
        of_dpo: Whether to compute ‖s + Δ‖².
    """
    dpo_squared = 0.0
    if of_dpo:
        dpo_squared = _squared_norm(scratch.delta(delta).copy_(sft).add_(delta), scratch)
    if sft.dtype not in OWN_NORMS or len(sft) < FEW_ELEMENTS:
        sft = scratch.delta(delta).copy_(sft)
    return Norms(_squared_norm(delta, scratch), _squared_norm(sft, scratch), dpo_squared)


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum propagates NaN and infinity and is much faster than `isfinite`; a sum that is not finite proves nothing, as
    it may have overflowed, and then the extremes decide.

    Args:
        values: Any floating-point dtype and shape, at least one element.
    """
    return math.isfinite(values.sum()) or all(bool(bound.isfinite()) for bound in values.aminmax())


def equal_infinities(sft: Tensor, dpo: Tensor) -> Tensor:
    """Where both sides have the same infinity, as causal masks of old checkpoints do.

    Args:
        sft: s, any floating-point dtype.
        dpo: d, same shape.

    Returns:
        Booleans of that shape.
    """
    return dpo.isinf() & (sft == dpo)


def keep_equal(values: Tensor, sft: Tensor, dpo: Tensor) -> bool:
    """Set θ to d where s = d is infinite, of which a rule makes NaN.

    Args:
        values: θ, any floating-point dtype.
        sft: s, same shape.
        dpo: d, same shape.

    Returns:
        Whether all other elements are finite.
    """
    both = equal_infinities(sft, dpo)
    values.copy_(dpo.to(values.dtype).where(both, values))
    return bool((values.isfinite() | both).all())
