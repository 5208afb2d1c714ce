"""Quantized checkpoints, by their headers and configs: as the bfloat16 tensors that they stand for, or refused.

Of FP8 and MXFP4 checkpoints, in the layouts that transformers dequantizes, `dequantized` makes a checkpoint whose
tensors have the names, shapes and sizes of the dequantized ones, at the offsets of files that do not exist; what is
read there is in `Shard.views`, and `theta/unpacked.py` reads it. To read another kind, write a function that finds its
tensors in headers, with a line in `KINDS`, and its arithmetic in `theta/dequantize.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from expo.checkpoint.folder import Checkpoint, Packed, Shard, TensorInfo, View, with_dtype
from expo.checkpoint.tied import config_tables
from expo.errors import InputError, listed

QUANTIZED = frozenset(
    (
        *("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv"),
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB"),
    )
)
"""Suffixes of the tensors that GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes store beside the weights;
older checkpoints have them without an entry in config.json."""

CONFIG_KEYS = ("quantization_config", "compression_config")

FP8 = "F8_E4M3"
OTHER_FP8 = frozenset({"F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
FP8_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
"""Types of FP8's scales; a byte of E8M0, or U8, is an exponent."""
FP8_BLOCK = (128, 128)
"""Where the config does not say."""
IDLE = re.compile(r"(^|[._])(activation|input)_scale$")
"""Scales of activations, which dequantized weights do without."""

MXFP4 = re.compile(r"(?P<name>.*(?:^|[._])(?:gate_up|down)_proj)_(?P<part>blocks|scales)", re.DOTALL)
"""gpt-oss' experts."""
MXFP4_BLOCK = 32
"""Values that have one scale; half as many bytes."""


@dataclass
class _Found:
    """What a kind's function finds in the headers."""

    stored_as: str
    """In words."""
    packed: dict[str, tuple[str, tuple[int, ...], Packed]] = field(default_factory=dict)
    """The stored values' name → name and shape of what they stand for, and where it is."""
    idle: set[str] = field(default_factory=set)
    """Names of tensors that are read for others, or not at all."""
    problems: list[str] = field(default_factory=list)
    """All that keeps them from being dequantized."""


Find: TypeAlias = Callable[[Mapping[str, TensorInfo], Mapping[str, Any]], _Found]
"""Finds a kind's tensors, given the table of the config that says so."""


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """A quantized checkpoint as that of its bfloat16 values, with a config that says so; any other as it is.

    Raises:
        InputError: It is quantized in a way that is not read; the message names it, the method, and all mismatches.
    """
    said = _said(checkpoint)
    if said is None and not any(map(_is_quantized, checkpoint.tensors)):
        return checkpoint
    find = KINDS.get(_method(said))
    found = find(checkpoint.tensors, said) if find is not None and isinstance(said, dict) else None
    if found is None or not (found.packed or found.problems):
        raise _refusal(checkpoint, said)
    name = checkpoint.path.name
    if found.problems:
        raise InputError(
            f"{name} cannot be dequantized ({found.stored_as}): {'; '.join(found.problems)}; give the unquantized "
            "checkpoint"
        )
    if checkpoint.open_remote is not None:
        raise InputError(
            f"{name} is quantized ({_method(said)}) and cannot be dequantized while it is fetched from the hub: leave "
            "out --stream-sft, or download it and give its folder"
        )
    shards = tuple(shard for shard in (_unpacked(shard, found) for shard in checkpoint.shards) if shard.tensors)
    return replace(
        checkpoint,
        shards=shards,
        tensors={info.name: info for shard in shards for info in shard.tensors},
        config=_plain_config(checkpoint.config),
        dequantized=found.stored_as,
    )


def _is_quantized(name: str) -> bool:
    return name.split(".")[-1] in QUANTIZED


def _said(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - whatever config.json has there
    """What a checkpoint's config says of its quantization; None if nothing."""
    tables = config_tables(checkpoint.config)
    return next((table[key] for table in tables for key in CONFIG_KEYS if table.get(key)), None)


def _method(said: object) -> str:
    return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else "unknown"


def _refusal(checkpoint: Checkpoint, said: object) -> InputError:
    known = next((f"it contains {name}" for name in checkpoint.tensors if _is_quantized(name)), "unknown")
    return InputError(
        f"{checkpoint.path.name} is quantized ({known if said is None else _method(said)}); extrapolate the "
        "unquantized checkpoints and quantize the result (for dequantized weights, remove the quantization from "
        "config.json)"
    )


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    plain = with_dtype(config, "bfloat16")
    for table in config_tables(plain):
        for key in CONFIG_KEYS:
            table.pop(key, None)
    return plain


def _unpacked(shard: Shard, found: _Found) -> Shard:
    """A file as it would be with its tensors dequantized, in their order; as it is, if none of them is quantized."""
    if not any(info.name in found.packed or info.name in found.idle for info in shard.tensors):
        return shard
    tensors: list[TensorInfo] = []
    views: list[View] = []
    end = 0
    for info in shard.tensors:
        if info.name in found.idle:
            continue
        own, stored = replace(info, start=end), info
        if info.name in found.packed:
            name, shape, packed = found.packed[info.name]
            own = TensorInfo(name, "BF16", shape, info.file, end, 2 * math.prod(shape))
            views.append(View(end, packed))
        else:
            views.append(View(end, stored))
        tensors.append(own)
        end += own.nbytes
    return replace(shard, header=b"", tensors=tuple(tensors), nbytes=end, views=tuple(views))


# --- FP8 ----------------------------------------------------------------------------------------------------------


def _find_fp8(tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]) -> _Found:
    """FP8 as transformers calls it: `weight` in F8_E4M3 with `weight_scale_inv`, one per block or one in all."""
    block = said.get("weight_block_size", FP8_BLOCK)
    if block is not None and not _is_block(block):
        return _Found("FP8", problems=[f"weight_block_size is {block!r}"])
    found = _Found("FP8, a scale per tensor" if block is None else f"FP8 in blocks of {block[0]}×{block[1]}")
    lacking, shapes, dtypes = [], [], []
    for name, info in tensors.items():
        scales = next((tensors[one] for one in _scale_names(name) if one in tensors), None)
        if info.dtype in OTHER_FP8 or (info.dtype == "I8" and scales is not None):
            dtypes.append(f"{name} {info.dtype}")
        elif info.dtype == FP8 and scales is None:
            lacking.append(name)
        elif info.dtype == FP8 and scales is not None:
            own = _block(info, scales, block)
            if scales.dtype not in FP8_SCALES:
                dtypes.append(f"{scales.name} {scales.dtype}")
            elif own is None:
                shapes.append(f"{scales.name} {list(scales.shape)} for {list(info.shape)}")
            else:
                found.packed[name] = name, info.shape, Packed("fp8", info, scales, own)
            found.idle.add(scales.name)
    alone = [name for name in tensors if name.endswith("_scale_inv") and name not in found.idle]
    found.idle |= {name for name in tensors if IDLE.search(name)}
    found.problems += [
        *listed("FP8 tensors without weight_scale_inv", lacking),
        *listed("scales without an FP8 tensor", alone),
        *listed("scales that do not fit their tensors", shapes),
        *listed("types that are not known there", dtypes),
    ]
    return found


def _is_block(block: object) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)


def _scale_names(name: str) -> Iterator[str]:
    """What the scales of a tensor may be called."""
    yield f"{name}_scale_inv"
    if name.endswith(".weight"):
        yield f"{name.removesuffix('.weight')}.scale"


def _block(info: TensorInfo, scales: TensorInfo, block: Iterable[int] | None) -> tuple[int, int] | None:
    """The rows and columns that have one scale; None if the scales' shape fits no such block."""
    if len(info.shape) < 2 or not info.numel:
        return None
    *outer, rows, columns = info.shape
    if block is not None and len(scales.shape) > 1:
        height, width = block
        fits = scales.shape == (*outer, -(-rows // height), -(-columns // width))
        return (height, width) if fits else None
    if scales.numel == 1:
        return (rows, columns) if math.prod(outer) == 1 else None
    if len(scales.shape) != len(info.shape) or scales.shape[:-2] != (*outer,):
        return None
    count = scales.shape[-2:]
    divides = all(number and size % number == 0 for size, number in zip((rows, columns), count, strict=True))
    return (rows // count[0], columns // count[1]) if divides else None


# --- MXFP4 --------------------------------------------------------------------------------------------------------


def _find_mxfp4(tensors: Mapping[str, TensorInfo], _said: Mapping[str, Any]) -> _Found:
    """MXFP4 as gpt-oss has it: of all experts, `*_blocks` [experts, out, in/32, 16] and `*_scales` without the last."""
    found = _Found("MXFP4")
    alone, shapes = [], []
    for stored, info in tensors.items():
        named = MXFP4.fullmatch(stored)
        if named is None:
            continue
        name, is_blocks = named["name"], named["part"] == "blocks"
        other = tensors.get(f"{name}_{'scales' if is_blocks else 'blocks'}")
        if other is None or name in tensors:
            alone.append(stored if other is None else f"{stored} beside {name}")
        elif is_blocks:
            fits = len(info.shape) == 4 and info.shape[3] == MXFP4_BLOCK // 2 and other.shape == info.shape[:3]
            if fits and info.dtype == other.dtype == "U8" and info.numel:
                experts, rows, blocks, _ = info.shape
                packed = Packed("mxfp4", info, other, (1, MXFP4_BLOCK))
                found.packed[stored] = name, (experts, MXFP4_BLOCK * blocks, rows), packed
            else:
                said = ((one.name, one.dtype, list(one.shape)) for one in (info, other))
                shapes.append(" and ".join(f"{name} {dtype} {shape}" for name, dtype, shape in said))
            found.idle.add(other.name)
    found.problems += [
        *listed("blocks without scales, or scales without blocks", alone),
        *listed("blocks and scales that do not fit each other", shapes),
    ]
    return found


KINDS: dict[str, Find] = {"fp8": _find_fp8, "mxfp4": _find_mxfp4}
"""By the `quant_method` of the config."""
