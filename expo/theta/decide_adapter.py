"""Decide from headers alone what happens to every tensor where DPO is a LoRA adapter over SFT: `plan_adapter`.

The output has the base's layout, with a head of its own where merging unties it. A tensor that the adapter does not
change is the base's, byte for byte.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.checkpoint.quantized import dequantized
from expo.errors import InputError
from expo.theta.adapter.tensors import Adapter, LowRank, read_adapter
from expo.theta.decide import action_for, match_patterns, output_dtype
from expo.theta.partners import unwrapped
from expo.theta.plan import (
    Action,
    Match,
    Overlap,
    PairPlan,
    PairSettings,
    Segment,
    TensorPlan,
    Vocabulary,
    lay_out,
)

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
        InputError: The adapter is not a plain LoRA or does not match the base, or the base is quantized in a way that
            is not read.
    """
    base = unwrapped(dequantized(base))
    adapter = read_adapter(folder, base)
    matches = match_patterns(adapter.layout, settings)
    _warn_of_idle(matches, adapter)
    own = {name: match for match in matches for name in match.names}
    _require_vocabulary(adapter, own, settings)
    tensors = {
        name: _plan_tensor(info, adapter, own.get(name), settings) for name, info in adapter.layout.tensors.items()
    }
    return PairPlan(
        base,
        adapter.layout,
        settings,
        lay_out(adapter.layout, tensors, settings),
        matches=matches,
        vocabulary=Vocabulary(*next(iter(adapter.resized.values()))) if adapter.resized else None,
        adapter=adapter,
    )


def _require_vocabulary(adapter: Adapter, own: dict[str, Match], settings: PairSettings) -> None:
    """Refuse a vocabulary of another size, unless it is allowed or its tensors are all excluded."""
    included = [name for name in adapter.resized if name not in own or own[name].flag != "--exclude"]
    if not included or settings.common_vocabulary:
        return
    shown = ", ".join(
        f"{name} has {adapter.resized[name][1]} rows, not {adapter.resized[name][0]}" for name in included
    )
    raise InputError(
        f"the vocabulary of the adapter {adapter.path.name} differs in size from its base's ({shown}): pass --vocab "
        "common to extrapolate the rows both have and copy the adapter's rest"
    )


def overlap_adapter(base: Checkpoint, folder: Path) -> Overlap:
    """A base and its adapter compared as a pair: every tensor, including those that the adapter does not change.

    Raises:
        InputError: The adapter is not a plain LoRA or does not match the base, or the base is quantized in a way that
            is not read.
    """
    plan = plan_adapter(base, folder, PairSettings(alphas=(), common_vocabulary=True))
    segments = [_with_partner(tensor.segments[0]) for shard in plan.shards for tensor in shard.tensors]
    return Overlap(
        segments=tuple(segment for segment in segments if not segment.is_raw),
        exact=tuple(segment for segment in segments if segment.is_raw),
        heads=(),
        only_sft=(),
        only_dpo=(),
        shapes=(),
        dtypes=(),
        vocabulary=plan.vocabulary,
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
            log.warning("%s '%s' matches only tensors that %s does not change", match.flag, match.pattern, folder)


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor that are processed alike."""

    dpo: TensorInfo
    sft: TensorInfo | None
    low_rank: LowRank | None
    alphas: tuple[float, ...]

    def cut(self, common: int) -> list[_Part]:
        """The rows that both sides have, and those that only the adapter has, which are θ_dpo's own."""
        rows, delta = self.dpo.shape[0], self.low_rank
        further = (0.0,) * len(self.alphas)
        return [
            _Part(
                self.dpo.rows(0, common),
                self.sft.rows(0, common) if self.sft else None,
                delta.rows(0, common) if delta else None,
                self.alphas,
            ),
            _Part(self.dpo.rows(common, rows), None, delta.rows(common, rows) if delta else None, further),
        ]


def _plan_tensor(info: TensorInfo, adapter: Adapter, own: Match | None, settings: PairSettings) -> TensorPlan:
    name, dtype = info.name, output_dtype(info, settings)
    low_rank = adapter.low_rank.get(name)
    dpo = dataclasses.replace(adapter.saved[name], name=name) if name in adapter.saved else info
    untouched = low_rank is None and dpo is info
    sft = None if untouched or (own and own.flag == "--exclude") else info
    alphas = settings.alphas if own is None else (own.alpha,) * len(settings.alphas)
    parts = [_Part(dpo, sft, low_rank, alphas)]
    if name in adapter.resized:
        parts = parts[0].cut(min(adapter.resized[name]))
    segments: list[Segment] = []
    offset = 0
    for part in parts:
        nbytes = part.dpo.numel * DTYPES[dtype].bits // 8
        action: Action = "merge" if part.low_rank else action_for(part.dpo, part.sft, dtype)
        if nbytes or not segments:
            segment = Segment(action, part.dpo, part.sft, part.alphas, dtype, offset, nbytes, part.low_rank)
            segments.append(segment)
        offset += nbytes
    return TensorPlan(name, dtype, dpo.shape, offset, tuple(segments))
