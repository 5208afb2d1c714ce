"""The plan for a pair of checkpoints, made from headers alone.

It decides everything: which tensors are extrapolated, copied or compared, where their bytes come from and go.
`stream.py` executes it. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expo.checkpoint import DTYPE_BITS, SINGLE_FILE, Checkpoint, Shard, TensorInfo
from expo.errors import InputError

Action = Literal["extrapolate", "copy", "convert", "match"]

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Can be extrapolated."""
EXACT_DTYPES = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
"""Buffers and the like: both sides must hold the same values."""

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class PairRules:
    """How a pair is combined."""

    alphas: tuple[float, ...]
    """One per output."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors copied from DPO."""
    copy_missing: bool = False
    """Copy tensors that SFT lacks instead of refusing."""
    dtype: str = "auto"
    """auto, or the name of the type that floating-point tensors are written in."""
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor."""

    name: str
    action: Action
    dpo: TensorInfo
    sft: TensorInfo | None
    """None where SFT is not read."""
    dtype: str
    """Of the output, as safetensors spells it."""
    start: int
    """Offset of the first output byte in its shard."""
    nbytes: int
    """Output bytes."""

    @property
    def is_raw(self) -> bool:
        """Whether the tensor is handled as bytes."""
        return self.action in ("copy", "match")

    @property
    def units(self) -> int:
        """Elements, or bytes where the tensor is handled as bytes."""
        return self.nbytes if self.is_raw else self.dpo.numel


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    name: str
    header: bytes
    """Written first, as it is."""
    tensors: tuple[TensorPlan, ...]
    nbytes: int


@dataclass(frozen=True)
class PairPlan:
    """Everything that will happen, decided from headers."""

    sft: Checkpoint
    dpo: Checkpoint
    rules: PairRules
    shards: tuple[ShardPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one output's weights."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → shard name."""
        return {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}

    @property
    def dropped(self) -> list[str]:
        """Tensors that only SFT has; the output, laid out as DPO, has no place for them."""
        return sorted(set(self.sft.tensors) - set(self.dpo.tensors))

    def count(self, *actions: Action) -> int:
        """How many tensors have one of these actions."""
        return sum(tensor.action in actions for shard in self.shards for tensor in shard.tensors)


def plan_pair(sft: Checkpoint, dpo: Checkpoint, pair_rules: PairRules) -> PairPlan:
    """Decide what happens to every tensor of DPO.

    Args:
        sft: The SFT checkpoint θ_sft.
        dpo: The DPO checkpoint θ_dpo, whose layout and header metadata the outputs keep.
        pair_rules: How to combine them.

    Returns:
        The plan, for all of the rules' α together.

    Raises:
        InputError: The checkpoints do not fit together; the message lists every kind of mismatch.
    """
    _refuse_quantized(sft, dpo)
    unused = [pattern for pattern in pair_rules.exclude if not any(map(re.compile(pattern).search, dpo.tensors))]
    if unused:
        raise InputError(f"--exclude {unused[0]!r} matches no tensor")
    excluded = {name for name in dpo.tensors if any(re.search(pattern, name) for pattern in pair_rules.exclude)}
    problems = _mismatches(sft, dpo, excluded, pair_rules)
    if problems:
        raise InputError(f"{sft.path.name} and {dpo.path.name} do not fit together: {'; '.join(problems)}")
    shards = tuple(_plan_shard(shard, sft, excluded, pair_rules) for shard in dpo.shards)
    return PairPlan(sft, dpo, pair_rules, shards)


def _refuse_quantized(*checkpoints: Checkpoint) -> None:
    for checkpoint in checkpoints:
        quantization = checkpoint.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise InputError(
                f"{checkpoint.path.name} is quantized ({method}); extrapolate the unquantized checkpoints and "
                "quantize the result"
            )


def _mismatches(sft: Checkpoint, dpo: Checkpoint, excluded: set[str], pair_rules: PairRules) -> list[str]:
    wanted = {name: info for name, info in dpo.tensors.items() if name not in excluded}
    shared = [(sft.tensors[name], info) for name, info in wanted.items() if name in sft.tensors]
    hint = "pass --missing copy-dpo to copy them from DPO"
    problems = []
    if not pair_rules.copy_missing:
        problems += _listed(f"tensors missing in SFT ({hint})", [name for name in wanted if name not in sft.tensors])
        problems += _listed("tensors missing in DPO", [name for name in sft.tensors if name not in dpo.tensors])
    problems += _listed(
        "shapes differ", [f"{d.name} {list(s.shape)} ≠ {list(d.shape)}" for s, d in shared if s.shape != d.shape]
    )
    problems += _listed(
        "dtypes that cannot be combined", [f"{d.name} {s.dtype}, {d.dtype}" for s, d in shared if not _combinable(s, d)]
    )
    return problems


def _combinable(sft: TensorInfo, dpo: TensorInfo) -> bool:
    both_float = sft.dtype in FLOAT_DTYPES and dpo.dtype in FLOAT_DTYPES
    return both_float or (sft.dtype == dpo.dtype and dpo.dtype in EXACT_DTYPES)


def _listed(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{title}: {', '.join(names[:3])}{more}"]


def _plan_shard(shard: Shard, sft: Checkpoint, excluded: set[str], pair_rules: PairRules) -> ShardPlan:
    dtypes = [_output_dtype(tensor.dtype, pair_rules.dtype) for tensor in shard.tensors]
    sizes = [_output_bytes(tensor, dtype) for tensor, dtype in zip(shard.tensors, dtypes, strict=True)]
    changed = not shard.header or dtypes != [tensor.dtype for tensor in shard.tensors]
    header = _header(shard, dtypes, sizes) if changed else shard.header
    tensors, start = [], len(header)
    for info, dtype, nbytes in zip(shard.tensors, dtypes, sizes, strict=True):
        partner = None if info.name in excluded else sft.tensors.get(info.name)
        action = _action(info, partner, dtype)
        tensors.append(TensorPlan(info.name, action, info, partner, dtype, start, nbytes))
        start += nbytes
    return ShardPlan(shard.output_name or shard.file.name, header, tuple(tensors), start)


def _output_dtype(dtype: str, wanted: str) -> str:
    return DTYPE_NAMES[wanted] if wanted != "auto" and dtype in FLOAT_DTYPES else dtype


def _output_bytes(tensor: TensorInfo, dtype: str) -> int:
    return tensor.nbytes if dtype == tensor.dtype else tensor.numel * DTYPE_BITS[dtype] // 8


def _action(dpo: TensorInfo, sft: TensorInfo | None, dtype: str) -> Action:
    if sft is None:
        return "copy" if dtype == dpo.dtype else "convert"
    return "match" if dpo.dtype in EXACT_DTYPES else "extrapolate"


def _header(shard: Shard, dtypes: Sequence[str], sizes: Sequence[int]) -> bytes:
    entries: dict[str, object] = {"__metadata__": shard.metadata} if shard.metadata else {}
    end = 0
    for tensor, dtype, nbytes in zip(shard.tensors, dtypes, sizes, strict=True):
        entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_json(plan: PairPlan) -> str:
    """The text of model.safetensors.index.json."""
    total = sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def is_single_file(plan: PairPlan) -> bool:
    """Whether the output is one model.safetensors without an index."""
    return [shard.name for shard in plan.shards] == [SINGLE_FILE] and not plan.dpo.sharded
