"""Quantized checkpoints made by hand: FP8 as DeepSeek and Qwen publish it, MXFP4 as gpt-oss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import write_checkpoint
from torch import Tensor

Tensors = dict[str, Tensor]
Block = tuple[int, int] | None


def fp8_config(block: Block, **further: Any) -> dict[str, Any]:
    size = None if block is None else list(block)
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    return {**further, "torch_dtype": "bfloat16", "quantization_config": said}


def fp8(weights: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """A matrix in float8_e4m3fn, and its scales, one per block or one in all."""
    rows, columns = weights.shape
    height, width = block or (rows, columns)
    down, across = -(-rows // height), -(-columns // width)
    wide = torch.zeros(down * height, across * width)
    wide[:rows, :columns] = weights
    blocks = wide.view(down, height, across, width)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448
    stored = (blocks / scales[:, None, :, None]).view(wide.shape)[:rows, :columns]
    return stored.to(torch.float8_e4m3fn).contiguous(), scales if block else scales.view(())


def in_fp8(tensors: Tensors, block: Block, also: tuple[str, ...] = ("proj.weight",)) -> Tensors:
    """The tensors of a checkpoint in which those whose names end so are quantized."""
    found: Tensors = {}
    for name, values in tensors.items():
        if not name.endswith(also):
            found[name] = values.clone()
            continue
        found[name], found[f"{name}_scale_inv"] = fp8(values.float(), block)
    return found


def right_fp8(stored: Tensor, scales: Tensor, block: Block) -> Tensor:
    """What a matrix stands for, by the definition: in float32 by blocks that count from the first row and column."""
    height, width = block or stored.shape
    grid = scales.float().view(-(-stored.shape[0] // height), -(-stored.shape[1] // width))
    factors = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[: stored.shape[0], : stored.shape[1]]
    return (stored.float() * factors).bfloat16()


def write_fp8(folder: Path, tensors: Tensors, block: Block, shards: int = 1, **further: Any) -> Path:
    config = json.dumps(fp8_config(block, **further))
    return write_checkpoint(folder, tensors, shards=shards, files={"config.json": config})


def in_mxfp4(tensors: Tensors, seed: int = 0) -> Tensors:
    """gpt-oss' tensors with random blocks and scales for its experts."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for name, values in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            found[name] = values.clone()
            continue
        experts, inner, out = values.shape
        blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), generator=generator)
        scales = torch.randint(118, 124, (experts, out, inner // 32), generator=generator)
        found |= {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}
    return found
