"""The files of an output: DPO's own, or as many as a size limit asks for, with their headers and the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from expo.checkpoint.folder import SINGLE_FILE, Checkpoint, Shard
from expo.theta.plan import PairPlan, PairSettings, ShardPlan, TensorPlan


def lay_out(dpo: Checkpoint, tensors: dict[str, TensorPlan], settings: PairSettings) -> tuple[ShardPlan, ...]:
    """The output's files, in DPO's order of tensors."""
    if settings.max_shard_bytes is None:
        return keep_layout(dpo.shards, tensors)
    return reshard(dpo.shards, tensors, settings.max_shard_bytes)


def keep_layout(shards: Iterable[Shard], tensors: dict[str, TensorPlan]) -> tuple[ShardPlan, ...]:
    """DPO's files; a header is DPO's, byte for byte, unless it has none or a dtype in it changes."""
    plans = []
    for shard in shards:
        planned = [tensors[info.name] for info in shard.tensors]
        changed = not shard.header or [tensor.dtype for tensor in planned] != [info.dtype for info in shard.tensors]
        header = make_header(planned, shard.metadata) if changed else shard.header
        plans.append(_shard(shard.output_name or shard.file.name, header, planned))
    return tuple(plans)


def reshard(shards: Sequence[Shard], tensors: dict[str, TensorPlan], max_bytes: int) -> tuple[ShardPlan, ...]:
    """DPO's tensors in their order, in files of at most `max_bytes` (one tensor may be larger)."""
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in (tensors[info.name] for shard in shards for info in shard.tensors):
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    metadata = {name: text for shard in shards for name, text in shard.metadata.items()}
    return tuple(
        _shard(_shard_name(number, len(groups)), make_header(group, metadata), group)
        for number, group in enumerate(groups, start=1)
    )


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(name: str, header: bytes, tensors: Sequence[TensorPlan]) -> ShardPlan:
    placed, start = [], len(header)
    for tensor in tensors:
        placed.append(replace(tensor, start=start))
        start += tensor.nbytes
    return ShardPlan(name, header, tuple(placed), start)


def make_header(tensors: Iterable[TensorPlan], metadata: dict[str, str]) -> bytes:
    """A safetensors header, padded to eight bytes, for tensors that lie one after the other."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_json(plan: PairPlan) -> str:
    """The text of model.safetensors.index.json."""
    total = sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"
