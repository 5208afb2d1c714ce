"""Decide from headers alone what happens to every tensor where DPO is a LoRA adapter over SFT: `plan_adapter`.

The output has the base's layout. A tensor that the adapter does not change is the base's, byte for byte.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from expo.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.theta.adapter.tensors import Adapter, read_adapter
from expo.theta.decide import action_for, match_patterns, output_dtype, refuse_quantized
from expo.theta.plan import Action, Match, Overlap, PairPlan, PairSettings, Segment, TensorPlan, lay_out

log = logging.getLogger(__name__)


def plan_adapter(base: Checkpoint, folder: Path, settings: PairSettings) -> PairPlan:
    """Decide what happens to every tensor of the base.

    Args:
        base: The checkpoint the adapter was trained on, θ_sft; θ_dpo is this one with the adapter merged.
        folder: The adapter's folder.
        settings: How to combine them; its patterns apply to the base's tensor names.

    Returns:
        The plan, for all α together.

    Raises:
        InputError: The adapter is not a plain LoRA or does not match the base, or the base is quantized.
    """
    refuse_quantized(base)
    adapter = read_adapter(folder, base)
    matches = match_patterns(base, settings)
    _warn_of_idle(matches, adapter)
    own = {name: match for match in matches for name in match.names}
    tensors = {name: _plan_tensor(info, adapter, own.get(name), settings) for name, info in base.tensors.items()}
    return PairPlan(base, base, settings, lay_out(base, tensors, settings), matches=matches, adapter=adapter)


def overlap_adapter(base: Checkpoint, folder: Path) -> Overlap:
    """A base and its adapter compared as a pair: every tensor, including those that the adapter does not change.

    Raises:
        InputError: The adapter is not a plain LoRA or does not match the base, or the base is quantized.
    """
    plan = plan_adapter(base, folder, PairSettings(alphas=()))
    segments = [_with_partner(segment) for shard in plan.shards for segment, _ in shard.segments()]
    return Overlap(
        segments=tuple(segment for segment in segments if not segment.is_raw),
        exact=tuple(segment for segment in segments if segment.is_raw),
        heads=(),
        only_sft=(),
        only_dpo=(),
        shapes=(),
        dtypes=(),
        vocabulary=None,
        sources=plan.sources,
    )


def _with_partner(segment: Segment) -> Segment:
    """An unchanged tensor is its own partner."""
    if segment.sft is not None:
        return segment
    action: Action = "extrapolate" if segment.dpo.dtype in FLOAT_DTYPES else "match"
    return dataclasses.replace(segment, action=action, sft=segment.dpo)


def _warn_of_idle(matches: tuple[Match, ...], adapter: Adapter) -> None:
    changed, folder = {*adapter.low_rank, *adapter.saved}, adapter.path.name
    for match in matches:
        if changed.isdisjoint(match.names):
            log.warning("%s '%s' matches only tensors that %s leaves alone", match.flag, match.pattern, folder)


def _plan_tensor(info: TensorInfo, adapter: Adapter, own: Match | None, settings: PairSettings) -> TensorPlan:
    name, dtype = info.name, output_dtype(info, settings)
    low_rank = adapter.low_rank.get(name)
    dpo = dataclasses.replace(adapter.saved[name], name=name) if name in adapter.saved else info
    untouched = low_rank is None and dpo is info
    sft = None if untouched or (own and own.flag == "--exclude") else info
    action = "merge" if low_rank else action_for(dpo, sft, dtype)
    alphas = settings.alphas if own is None else (own.alpha,) * len(settings.alphas)
    nbytes = info.numel * DTYPES[dtype].bits // 8
    return TensorPlan(name, dtype, info.shape, nbytes, (Segment(action, dpo, sft, alphas, dtype, 0, nbytes, low_rank),))
