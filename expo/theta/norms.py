"""The maths around a rule: tensors in, tensors out. Norms of a pair's pieces, an adapter's product, work space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORM_ROW = 1 << 9
"""Elements whose norm is taken at once; the rows' squares are added up in float32.

Few enough that rows differ by many steps of bfloat16, or all their roundings would go the same way.
"""
FEW_ELEMENTS = 1 << 18
"""Up to here norms are taken in float32 throughout, where row norms rounded to the tensors' type would show."""
SAMPLED_BYTES = 1 << 20
"""From here on `sampled_norms` estimates, which is the size of the stream's full pieces."""
SAMPLING = 17
"""It measures every 17th row then: an odd number, so that all columns of a matrix are met."""
WIDE_BLOCK = 1 << 16
"""Elements converted to a wider type at a time, which stay in the processor's cache."""
MAX_VIEWS = 16
"""Tensors whose rows are remembered."""
OWN_NORMS = frozenset({torch.bfloat16, torch.float32, torch.float64})
"""Types whose differences and row norms neither overflow nor underflow before the values themselves do."""


class Norms(NamedTuple):
    """Squared Frobenius norms."""

    delta: float = 0.0
    """‖θ_dpo − θ_sft‖²."""
    sft: float = 0.0
    """‖θ_sft‖²."""
    dpo: float = 0.0
    """‖θ_dpo‖², where it is asked for."""
    sampled: bool = False
    """Whether they are estimates, which tell nothing of a single element."""


class _Rows(NamedTuple):
    """A tensor seen as rows, with room for their norms."""

    values: Tensor
    whole: Tensor  # [rows, NORM_ROW]
    rest: Tensor
    norms: Tensor  # [rows], of the tensor's type
    wide_norms: Tensor


class _Sample(NamedTuple):
    """Some rows of a tensor, with room for them in a wider type."""

    values: Tensor
    rows: Tensor  # [rows / SAMPLING, NORM_ROW]
    wide: Tensor  # likewise
    flat: Tensor  # the same room as one axis


class Scratch:
    """Work space for pieces of at most `nbytes` a side, reused from piece to piece.

    Memory that is given back and taken anew for every piece costs more than all the arithmetic: the system clears
    it each time. Views are kept too, since pieces are mostly alike and each view costs microseconds.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._delta = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._last_delta = self._delta
        self._rows: dict[int, _Rows] = {}
        self._samples: dict[int, _Sample] = {}
        self._wide: dict[torch.dtype, Tensor] = {}
        self._tile = torch.empty(0, dtype=torch.uint8, device=device)

    def delta(self, like: Tensor) -> Tensor:
        """Room for a tensor like this one."""
        if (self._last_delta.nbytes, self._last_delta.dtype) != (like.nbytes, like.dtype):
            self._last_delta = self._delta[: like.nbytes].view(like.dtype)
        return self._last_delta

    def rows(self, values: Tensor) -> _Rows:
        """A tensor of one axis as rows of NORM_ROW elements, and the elements that are left."""
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
        """Every row that `SAMPLING` says of a tensor of one axis, to be widened to `dtype`."""
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
        """Room for a matrix."""
        nbytes = rows * columns * dtype.itemsize
        if len(self._tile) < nbytes:
            self._tile = torch.empty(nbytes, dtype=torch.uint8, device=self._tile.device)
        return self._tile[:nbytes].view(dtype).view(rows, columns)


def pair_norms(sft: Tensor, dpo: Tensor, scratch: Scratch, *, of_dpo: bool = False) -> Norms:
    """‖d − s‖², ‖s‖² and, if asked, ‖d‖².

    In large pieces a row's norm is rounded to the tensors' own type, up and down alike: over many rows these
    roundings cancel, and of bfloat16 weights four digits stay.

    Args:
        sft: s, one axis, any floating-point dtype.
        dpo: d, same shape.
        scratch: Work space on the same device.
        of_dpo: Whether ‖d‖² is wanted.
    """
    if not _has_own_norms(sft, dpo):
        return _wide_norms(sft, dpo, scratch, of_dpo=of_dpo)
    delta = torch.sub(dpo, sft, out=scratch.delta(dpo))
    dpo_squared = _squared_norm(dpo, scratch) if of_dpo else 0.0
    return Norms(_squared_norm(delta, scratch), _squared_norm(sft, scratch), dpo_squared)


def sampled_norms(sft: Tensor, dpo: Tensor, scratch: Scratch) -> Norms:
    """‖d − s‖² and ‖s‖²; of pieces of SAMPLED_BYTES estimated from every 17th run of NORM_ROW elements.

    Exact norms would cost as much as all the rest of the arithmetic. Where no sampled element differs, all are
    looked at: an estimate of 0 is a true 0.

    Args:
        sft: s, one axis, any floating-point dtype.
        dpo: d, same shape.
        scratch: Work space on the same device.
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


def _has_own_norms(sft: Tensor, dpo: Tensor) -> bool:
    return sft.dtype == dpo.dtype and sft.dtype in OWN_NORMS and len(sft) >= FEW_ELEMENTS


def _squared_norm(values: Tensor, scratch: Scratch) -> float:
    rows = scratch.rows(values)
    total = _squared(rows.whole, rows)
    return total + float(torch.linalg.vector_norm(rows.rest)) ** 2 if len(rows.rest) else total


def _squared(values: Tensor, room: _Rows) -> float:
    """‖values‖² of a matrix [rows, NORM_ROW]; the rows' norms go into the room."""
    wide = room.wide_norms.copy_(torch.linalg.vector_norm(values, dim=1, out=room.norms))
    return _sum_of_squares(wide)


def _sum_of_squares(values: Tensor) -> float:
    """‖values‖² of one axis, float32 or float64."""
    if values.is_cuda:  # where a dot product loads cuBLAS, which keeps tens of MB for each stream
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
    """The type that two sides of different types are combined in: float32, or float64 where one of them is."""
    return torch.promote_types(torch.promote_types(sft.dtype, dpo.dtype), torch.float32)


def stays_finite(bound: Callable[[Norms, float], float] | None, norms: Norms, alpha: float, dtype: torch.dtype) -> bool:
    """Whether no element of θ(α) can be NaN or infinite, told from the norms alone.

    Args:
        bound: The rule's; half of the type's range is left for every rounding.
        norms: Of the piece.
        alpha: α.
        dtype: Of the output.

    Returns:
        False where the norms cannot tell; then look at the elements.
    """
    return bound is not None and not norms.sampled and bound(norms, alpha) < torch.finfo(dtype).max / 2


def low_rank_delta(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """ΔW = scale · L · R, or consecutive rows of it.

    An element's last bit depends on the shape of the product that it is computed in.

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
    """Δ += d − s, for a tensor that was replaced and has a ΔW as well.

    Args:
        delta: Δ, one axis, float32 or float64.
        sft: s, any floating-point dtype, same shape.
        dpo: d, likewise.
        scratch: Work space on the same device.
    """
    for change, s, d in zip(*(torch.split(side, WIDE_BLOCK) for side in (delta, sft, dpo)), strict=True):
        wide_s, wide_d, _ = scratch.wide(delta.dtype, len(change))
        change.add_(wide_d.copy_(d).sub_(wide_s.copy_(s)))


def delta_norms(sft: Tensor, delta: Tensor, scratch: Scratch, *, of_dpo: bool = False) -> Norms:
    """‖Δ‖², ‖s‖² and, if asked, ‖s + Δ‖².

    Args:
        sft: s, one axis, any floating-point dtype.
        delta: Δ, same shape, float32 or float64.
        scratch: Work space on the same device.
        of_dpo: Whether ‖s + Δ‖² is wanted.
    """
    dpo_squared = 0.0
    if of_dpo:
        dpo_squared = _squared_norm(scratch.delta(delta).copy_(sft).add_(delta), scratch)
    if sft.dtype not in OWN_NORMS or len(sft) < FEW_ELEMENTS:
        sft = scratch.delta(delta).copy_(sft)
    return Norms(_squared_norm(delta, scratch), _squared_norm(sft, scratch), dpo_squared)


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum hands on a NaN or an infinity and is much faster than `isfinite`; one that is not finite itself proves
    nothing, since it may have overflowed, and the extremes decide.

    Args:
        values: Any floating-point dtype and shape, at least one element.
    """
    return math.isfinite(values.sum()) or all(bool(bound.isfinite()) for bound in values.aminmax())
