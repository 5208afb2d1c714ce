"""Which kinds of a model's tensors move with α, found by reading each until it is seen to.

A kind is a tensor's name without the numbers of its layer and expert: `model.layers.*.mlp.experts.*.w1.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import product

import torch
from torch import Tensor

from expo.checkpoint.folder import TensorInfo
from expo.checkpoint.tied import TIED_HEADS, ties_head
from expo.theta.adapter.tensors import LowRank
from expo.theta.buffers import TORCH_DTYPES
from expo.theta.plan import PairPlan, Segment
from expo.theta.sources import SourceFiles
from expo.theta.tensors import Theta

NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

PIECE = 1 << 18
"""Elements that are compared at a time."""


def kind_of(name: str) -> str:
    """A tensor's name without numbers."""
    return NUMBER.sub("*", name)


def moved_kinds(plan: PairPlan, identical: Collection[str] = ()) -> frozenset[str]:
    """The kinds of which a tensor may differ between two θ(α) of a pair: all whose sides differ in any value.

    A tensor is read until its sides differ, so only those that do not move are read whole.

    Args:
        plan: The pair's, at any α.
        identical: DPO's tensors that are known to have the same values in SFT, and are not read.

    Raises:
        EnvironmentFailure: A file cannot be read.
    """
    fixed = {name for match in plan.matches for name in match.names}  # of an α of their own, or DPO's
    moved: set[str] = set()
    with SourceFiles(*plan.sources) as sources:
        for tensor in (tensor for shard in plan.shards for tensor in shard.tensors):
            kind = kind_of(tensor.name)
            if kind in moved or tensor.name in fixed or tensor.name in identical:
                continue
            if any(_differs(segment, sources) for segment in tensor.segments):
                moved.add(kind)
    return frozenset(moved)


def seen_kinds(one: PairPlan, other: PairPlan, kinds: Collection[str], dtype: torch.dtype) -> frozenset[str]:
    """Of these kinds, those of which a tensor differs between two θ(α) when it is rounded to a type.

    Args:
        one: The pair's plan at one α.
        other: The same at another.
        kinds: The kinds to look at.
        dtype: What an engine holds them in.

    Raises:
        InputError: A value is not finite.
        EnvironmentFailure: A file cannot be read.
    """
    seen: set[str] = set()
    with Theta(one) as left, Theta(other) as right:
        for name in left.names:
            kind = kind_of(name)
            if kind in seen or kind not in kinds:
                continue
            if not torch.equal(left.tensor(name).to(dtype), right.tensor(name).to(dtype)):
                seen.add(kind)
    return frozenset(seen)


def stored_heads(plan: PairPlan) -> dict[str, dict[str, bool]]:
    """The heads that are stored although a model may tie them: name → side → whether it is the side's embedding, too.

    Raises:
        EnvironmentFailure: A file cannot be read.
    """
    sides = {"sft": plan.sft} if plan.adapter else {"sft": plan.sft, "dpo": plan.dpo}
    tied = {side: checkpoint.tensors for side, checkpoint in sides.items() if ties_head(checkpoint.config) is not False}
    found: dict[str, dict[str, bool]] = {}
    with SourceFiles(*plan.sources) as sources:
        for (head, embedding), (side, tensors) in product(TIED_HEADS, tied.items()):
            if head in tensors and embedding in tensors:
                found.setdefault(head, {})[side] = _is_same(tensors[head], tensors[embedding], sources)
    return found


def _differs(segment: Segment, sources: SourceFiles) -> bool:
    """Whether θ_dpo, or any step of a training run, differs from θ_sft."""
    if segment.is_raw:  # DPO's bytes
        return False
    if any(step.low_rank is not None and _acts(step.low_rank, sources) for step in segment.steps):
        return True
    sft = segment.sft
    return sft is not None and any(
        step.tensor != sft and not _is_same(sft, step.tensor, sources) for step in segment.steps
    )


def _is_same(one: TensorInfo, other: TensorInfo, sources: SourceFiles) -> bool:
    """Whether two tensors have the same values, whatever their types; NaN is none."""
    if one.numel != other.numel:
        return False
    for span in _spans(one.numel):
        left, right = _read(sources, one, *span), _read(sources, other, *span)
        if left.dtype != right.dtype:
            left, right = left.double(), right.double()
        if not torch.equal(left, right):
            return False
    return True


def _acts(pair: LowRank, sources: SourceFiles) -> bool:
    """Whether ΔW is not zero, as that of a module that was never trained is."""
    sides = (pair.left, pair.right)
    return pair.scale != 0 and all(
        any(bool(_read(sources, side, *span).any()) for span in _spans(side.numel)) for side in sides
    )


def _spans(count: int) -> Iterator[tuple[int, int]]:
    """First elements and lengths of a tensor's pieces."""
    yield from ((first, min(PIECE, count - first)) for first in range(0, count, PIECE))


def _read(sources: SourceFiles, info: TensorInfo, first: int, count: int) -> Tensor:
    dtype = TORCH_DTYPES[info.dtype]
    buffer = bytearray(count * dtype.itemsize)
    sources.read(info.file, info.start + first * dtype.itemsize, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=dtype)
