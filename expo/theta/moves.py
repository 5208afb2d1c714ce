"""Which kinds of a model's tensors move with α, found by reading a little of each.

A kind is a tensor's name without the numbers of its layer and expert: `model.layers.*.mlp.experts.*.w1.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from expo.checkpoint.folder import TensorInfo
from expo.theta.adapter.tensors import LowRank
from expo.theta.buffers import TORCH_DTYPES
from expo.theta.plan import PairPlan, Segment
from expo.theta.stream import SourceFiles

NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

SAMPLES, SAMPLE_UNITS = 16, 2048
"""Places in a tensor, and elements that are compared at each; smaller tensors are compared whole."""


def kind_of(name: str) -> str:
    """A tensor's name without numbers."""
    return NUMBER.sub("*", name)


def moved_kinds(plan: PairPlan) -> frozenset[str]:
    """The kinds of which a tensor differs between two θ(α) of a pair that are 1 or more apart.

    A tensor whose two sides differ nowhere that is looked at counts as one that does not move.

    Args:
        plan: The pair's, at any α.

    Raises:
        EnvironmentFailure: A file cannot be read.
    """
    fixed = {name for match in plan.matches for name in match.names}  # of an α of their own, or DPO's
    moved: set[str] = set()
    with SourceFiles(*plan.sources) as sources:
        for tensor in (tensor for shard in plan.shards for tensor in shard.tensors if tensor.name not in fixed):
            kind = kind_of(tensor.name)
            if kind not in moved and any(_differs(segment, sources) for segment in tensor.segments):
                moved.add(kind)
    return frozenset(moved)


def _differs(segment: Segment, sources: SourceFiles) -> bool:
    if segment.is_raw:  # DPO's bytes
        return False
    if segment.low_rank is not None and _acts(segment.low_rank, sources):
        return True
    if segment.sft is None or segment.sft == segment.dpo:
        return False
    sides = segment.sft, segment.dpo
    for span in _spans(segment.dpo.numel):
        sft, dpo = (_read(sources, side, *span).double() for side in sides)
        if not torch.equal(sft, dpo):
            return True
    return False


def _acts(pair: LowRank, sources: SourceFiles) -> bool:
    """Whether ΔW is not zero, as that of a module that was never trained is."""
    sides = (pair.left, pair.right)
    return pair.scale != 0 and all(
        any(bool(_read(sources, side, *span).any()) for span in _spans(side.numel)) for side in sides
    )


def _spans(count: int) -> Iterator[tuple[int, int]]:
    """First elements and lengths of the places that are looked at, evenly over a tensor."""
    if count <= SAMPLES * SAMPLE_UNITS:
        yield from [(0, count)] if count else []
        return
    last = count - SAMPLE_UNITS
    yield from ((last * place // (SAMPLES - 1), SAMPLE_UNITS) for place in range(SAMPLES))


def _read(sources: SourceFiles, info: TensorInfo, first: int, count: int) -> Tensor:
    dtype = TORCH_DTYPES[info.dtype]
    buffer = bytearray(count * dtype.itemsize)
    sources.read(info.file, info.start + first * dtype.itemsize, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=dtype)
