"""The maths of combining two tensors, pure: tensors in, tensors out.

To add a rule, write one function with the signature of `extrapolate` and choose it in `combine/stream.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extrapolate(sft: Tensor, dpo: Tensor, alpha: float, out: Tensor) -> Tensor:
    """θ = d + α(d − s), float32 inside, one rounding to the output's dtype (Zheng et al. 2025, eq. 2).

    `torch.lerp(d, s, -α)` is that formula: for a weight below 0.5 it evaluates d + (−α)(s − d), in float32 for
    16-bit types, and α enters with its full float32 precision. (`lerp(s, d, 1 + α)` would round 1 + α first and
    misses about seven times as many weights.) For |α| ≥ 0.5 it evaluates s + (1 + α)(d − s), exactly s at −1.

    Args:
        sft: s, any floating-point dtype and shape.
        dpo: d, same shape.
        alpha: α. At 0 d is copied, not computed (−0.0 and payloads of NaN survive).
        out: Where θ goes; same shape, any floating-point dtype.

    Returns:
        `out`.
    """
    if alpha == 0:
        return out.copy_(dpo)
    if sft.dtype == dpo.dtype == out.dtype:
        return torch.lerp(dpo, sft, -alpha, out=out)
    wide = torch.promote_types(torch.promote_types(sft.dtype, dpo.dtype), torch.float32)
    return out.copy_(torch.lerp(dpo.to(wide), sft.to(wide), -alpha))


def squared_norms(sft: Tensor, dpo: Tensor, scratch: Tensor) -> tuple[float, float]:
    """‖d − s‖² and ‖s‖².

    Args:
        sft: s, one axis, any floating-point dtype.
        dpo: d, same shape.
        scratch: Work space, float32 [2, any size above 0], used block by block. Memory that is given back and
            taken anew for every piece costs more than all the arithmetic: the system clears it each time.

    Returns:
        Both squared Frobenius norms, of differences taken in float32.
    """
    delta_squared = size_squared = 0.0
    block = scratch.shape[1]
    for s, d in zip(torch.split(sft, block), torch.split(dpo, block), strict=True):
        size, delta = scratch[0, : len(s)].copy_(s), scratch[1, : len(d)].copy_(d)
        delta -= size
        delta_squared += float(delta.dot(delta))
        size_squared += float(size.dot(size))
    return delta_squared, size_squared


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; `aminmax` hands on a NaN, and is much faster than `isfinite`.

    Args:
        values: Any floating-point dtype and shape, at least one element.
    """
    return all(bool(bound.isfinite()) for bound in values.aminmax())
