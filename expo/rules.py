"""The maths of combining two tensors, pure: tensors in, tensors out.

To add a rule, write one function with the signature of `extrapolate` and choose it in `combine.py`.
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


def squared_norms(sft: Tensor, dpo: Tensor) -> tuple[float, float]:
    """‖d − s‖² and ‖s‖², for tensors of about a million elements.

    Args:
        sft: s, any floating-point dtype and shape.
        dpo: d, same shape.

    Returns:
        Both squared Frobenius norms, of differences taken in float32.
    """
    wide = torch.promote_types(torch.promote_types(sft.dtype, dpo.dtype), torch.float32)
    delta, size = dpo.to(wide) - sft, sft.to(wide)
    # `sum` adds pairwise; `vector_norm` does not and is off by 5e-5 for a million elements.
    return float(delta.square_().sum()), float(size.square().sum())


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    The sum is the cheap test (it is not finite if any element is not); a hit is confirmed element by element,
    since a sum of finite values may overflow too.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    cheap = values.sum(dtype=wide).isfinite()
    return bool(cheap) or bool(values.isfinite().all())
