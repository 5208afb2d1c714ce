"""The values of quantized weights, as transformers computes them: bytes and scales in, bfloat16 out.

FP8: w = q · s in float32, rounded once, where q is a float8_e4m3fn and s its block's scale. MXFP4: w = q · 2^(e − 127),
which bfloat16 represents, where q is one of sixteen numbers. Which bytes these are is known in `unpacked.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of four bits, E2M1."""
EXPONENT_BIAS = 127
HALVES = 2.0**8
"""A float8_e4m3fn is this times the float16 that has its bits: the sign, and seven places higher all others."""


class Grid(NamedTuple):
    """How a matrix, or several of one shape, are divided into blocks."""

    rows: int
    """Of one matrix."""
    columns: int
    block: tuple[int, int]
    """Rows and columns of a block; the last ones may be fewer."""


class Scratch:
    """Memory for what is computed on the way, which is used again.

    Args:
        size: Elements at a time, at most.
    """

    def __init__(self, size: int) -> None:
        self.stored = torch.empty(size, dtype=torch.uint8)
        self.half = torch.empty(size, dtype=torch.int16)
        self.wide = torch.empty(size)


def dequantize_fp8(stored: Tensor, first: int, grid: Grid, scales: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """Consecutive elements of a tensor in FP8: w = (q / 256) · (256 s), which rounds as q · s.

    Args:
        stored: Their bytes, uint8, one axis.
        first: The first one's number within the tensor.
        grid: The tensor's.
        scales: 256 s of a block in each place, float32 [rows of blocks, columns of blocks], of all matrices in turn.
        out: Where they go, bfloat16, one axis, as many.
        scratch: With room for them.

    Returns:
        `out`; NaN where FP8 has NaN.
    """
    values = _decoded(stored, scratch)
    (height, width), columns = grid.block, grid.columns
    for top, bottom, left, right in rectangles(first, len(out), columns):
        taken = values[top * columns + left - first : (bottom - 1) * columns + right - first]
        row = torch.arange(top, bottom)
        factors = scales[row // grid.rows * -(-grid.rows // height) + row % grid.rows // height]
        if right - left < columns:  # a part of one row
            taken.mul_(factors[0].repeat_interleave(width)[left:right])
            continue
        matrix, blocks = taken.view(-1, columns), columns // width
        if blocks:
            matrix[:, : blocks * width].view(-1, blocks, width).mul_(factors[:, :blocks, None])
        if blocks * width < columns:
            matrix[:, blocks * width :].mul_(factors[:, blocks:])
    return out.copy_(values)


def _decoded(stored: Tensor, scratch: Scratch) -> Tensor:
    """Q / 256 in float32, exactly; torch converts from float8 several times slower on a CPU with AVX2."""
    half, wide = scratch.half[: len(stored)], scratch.wide[: len(stored)]
    half.copy_(stored.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign was extended
    wide.copy_(half.view(torch.float16))
    magnitude = stored & 0x7F
    if int(magnitude.amax()) == 0x7F:
        wide.masked_fill_(magnitude == 0x7F, torch.nan)
    return wide


def rectangles(first: int, count: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Consecutive elements of a matrix: top, bottom, left and right of parts of a row, and of whole rows."""
    end = first + count
    while first < end:
        row, left = divmod(first, columns)
        if left or end - first < columns:
            right = min(columns, left + end - first)
            yield row, row + 1, left, right
            first += right - left
        else:
            bottom = end // columns
            yield row, bottom, 0, columns
            first = bottom * columns


def fp8_scales(stored: Tensor) -> Tensor:
    """256 s in float32; of a byte without a type s is 2^(byte − 127), as of E8M0.

    Args:
        stored: Any floating-point dtype, or uint8.
    """
    scales = (stored.float() - EXPONENT_BIAS).exp2() if stored.dtype == torch.uint8 else stored.float()
    return scales * HALVES


PAIRS = torch.tensor([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)]).bfloat16().view(torch.int32).view(-1)
"""The two numbers of each byte, [256], as one element."""
POWERS = torch.tensor([2.0 ** (byte - EXPONENT_BIAS) for byte in range(255)] + [torch.nan]).bfloat16()
"""The scale of each byte, [256]. The last one is E8M0's NaN, which transformers takes for 2^128."""


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Some columns of an expert's matrix in MXFP4, transposed.

    Args:
        blocks: uint8 [out, blocks, 16].
        scales: uint8 [out, blocks].

    Returns:
        bfloat16 [32 · blocks, out], contiguous.
    """
    out, count, _ = blocks.shape
    pairs = PAIRS.index_select(0, blocks.reshape(-1).int())
    values = pairs.view(torch.bfloat16).view(out, count, -1)
    factors = POWERS.index_select(0, scales.reshape(-1).int()).view(out, count, 1)
    return values.mul_(factors).view(out, -1).T.contiguous()
