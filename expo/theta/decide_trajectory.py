"""Decide from headers alone what happens to every tensor of a training run: `plan_trajectory`.

The plan is that of the pair of the start and the last step; each of its segments that moves is given its partners at
the steps between, found as θ_sft's are; where these are cut otherwise, as fused weights are, it is cut into smaller
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from expo.checkpoint.dtypes import DTYPES
from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.errors import InputError, listed
from expo.theta.decide import action_for, plan_pair
from expo.theta.decide_adapter import plan_adapter
from expo.theta.plan import PairPlan, PairSettings, Segment, ShardPlan, Step, TensorPlan


def plan_trajectory(start: Checkpoint, steps: Sequence[Checkpoint], settings: PairSettings) -> PairPlan:
    """Decide what happens to every tensor of the last step.

    Args:
        start: θ_0, which training began with.
        steps: The checkpoints, in the order of `settings.course.steps`.
        settings: How to combine them.

    Raises:
        InputError: The checkpoints do not match; the message lists every kind of mismatch.
    """
    *between, last = steps
    plan = plan_pair(start, last, settings)
    others = [plan_pair(one, last, replace(settings, course=None)) for one in between]
    return replace(plan, shards=_with_steps(plan, others), earlier=tuple(one.sft for one in others))


def plan_adapters(base: Checkpoint, folders: Sequence[Path], settings: PairSettings) -> PairPlan:
    """The same of a run that trained an adapter.

    Args:
        base: θ_0, the model it was trained on.
        folders: The adapter's folder at each step, in the order of `settings.course.steps`.
        settings: How to combine them.

    Raises:
        InputError: An adapter is not a plain LoRA or does not match the base, or they change different tensors.
    """
    *between, last = (plan_adapter(base, folder, settings) for folder in folders)
    adapters = [plan.adapter for plan in between if plan.adapter is not None]
    _require_same_tensors(last, between)
    return replace(last, shards=_with_steps(last, between), earlier=tuple(adapters))


def _require_same_tensors(last: PairPlan, between: Iterable[PairPlan]) -> None:
    def changed(plan: PairPlan) -> set[str]:
        adapter = plan.adapter
        return set() if adapter is None else {*adapter.low_rank, *adapter.saved}

    for plan in between:
        if problems := listed("tensors that only one of them changes", sorted(changed(plan) ^ changed(last))):
            one, other = (_folder(side).name for side in (plan, last))
            raise InputError(f"the adapters {one} and {other} are not of one training run: {problems[0]}")


def _folder(plan: PairPlan) -> Path:
    return plan.dpo.path if plan.adapter is None else plan.adapter.path


def _with_steps(plan: PairPlan, between: Sequence[PairPlan]) -> tuple[ShardPlan, ...]:
    """The plan's shards with every step's tensors; all of these plans have the same tensors in the same order."""

    def tensors(number: int) -> Iterator[TensorPlan]:
        for own, *others in zip(*(one.shards[number].tensors for one in (plan, *between)), strict=True):
            yield _with_earlier(own, others, adapters=plan.adapter is not None)

    return tuple(replace(shard, tensors=tuple(tensors(number))) for number, shard in enumerate(plan.shards))


def _with_earlier(tensor: TensorPlan, between: Sequence[TensorPlan], *, adapters: bool) -> TensorPlan:
    """A tensor with its partners at the earlier steps, cut wherever one of them is."""
    if not tensor.nbytes or all(segment.sft is None or segment.is_raw for segment in tensor.segments):
        return tensor
    edges = {edge for one in (tensor, *between) for segment in one.segments for edge in _edges(segment)}
    segments = []
    for first, last in pairwise(sorted(edges)):
        whole, *others = (_part(one, first, last) for one in (tensor, *between))
        segments.append(_joined(whole, [_step(one, of_adapter=adapters) for one in others]))
    return replace(tensor, segments=tuple(segments))


def _edges(segment: Segment) -> tuple[int, int]:
    return segment.offset, segment.offset + segment.nbytes


def _part(tensor: TensorPlan, first: int, last: int) -> Segment:
    """What has the output bytes from `first` up to `last`, which lie within one segment."""
    segment = next(one for one in tensor.segments if one.offset <= first < one.offset + one.nbytes)
    if (segment.offset, segment.nbytes) == (first, last - first):
        return segment
    if segment.low_rank is not None:
        raise InputError(f"the adapters of one run have vocabularies of different sizes, as {tensor.name} has")
    bits = DTYPES[segment.dtype].bits
    start, count = (first - segment.offset) * 8 // bits, (last - first) * 8 // bits

    def cut(info: TensorInfo) -> TensorInfo:
        return info.part(start, (count,))

    sft = None if segment.sft is None else cut(segment.sft)
    return replace(segment, dpo=cut(segment.dpo), sft=sft, offset=first, nbytes=last - first)


def _step(segment: Segment, *, of_adapter: bool) -> Step | None:
    """What a step has: an adapter's is the segment's θ_dpo; else it is θ_sft of the pair with the last step, if any."""
    if of_adapter:
        return Step(segment.dpo, segment.low_rank)
    return None if segment.sft is None else Step(segment.sft)


def _joined(last: Segment, between: Sequence[Step | None]) -> Segment:
    """The segment of the start and the last step, with the steps between; copied where one of them lacks it."""
    if last.sft is None or last.is_raw:
        return last
    known = tuple(step for step in between if step is not None)
    if len(known) < len(between):
        return replace(last, action=action_for(last.dpo, None, last.dtype), sft=None)
    return replace(last, earlier=known)
