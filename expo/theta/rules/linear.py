"""The paper's rule: a step from θ_dpo in the direction away from θ_sft."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expo.theta.norms import WIDE_BLOCK, Norms, Scratch, wider
from expo.theta.rules import Rule


def combine(sft: Tensor, dpo: Tensor, alpha: float, out: Tensor, scratch: Scratch | None = None) -> Tensor:
    """θ = d + α(d − s), float32 inside, one rounding to the output's dtype (Zheng et al. 2025, eq. 2).

    `torch.lerp(d, s, -α)` is that formula: for a weight below 0.5 it evaluates d + (−α)(s − d), in float32 for
    16-bit types, and α enters with its full float32 precision. (`lerp(s, d, 1 + α)` would round 1 + α first and
    misses about seven times as many weights.) For |α| ≥ 0.5 it evaluates s + (1 + α)(d − s), exactly s at −1.

    Args:
        sft: s, any floating-point dtype and shape; one axis where `scratch` is given.
        dpo: d, same shape.
        alpha: α.
        out: Where θ goes; same shape, any floating-point dtype.
        scratch: Scratch space for sides of different types; without it they are widened whole.

    Returns:
        `out`.
    """
    if sft.dtype == dpo.dtype == out.dtype:
        return torch.lerp(dpo, sft, -alpha, out=out)
    wide = wider(sft, dpo)
    if scratch is None:
        return out.copy_(torch.lerp(dpo.to(wide), sft.to(wide), -alpha))
    for s, d, o in zip(*(torch.split(side, WIDE_BLOCK) for side in (sft, dpo, out)), strict=True):
        wide_s, wide_d, result = scratch.wide(wide, len(s))
        o.copy_(torch.lerp(wide_d.copy_(d), wide_s.copy_(s), -alpha, out=result))
    return out


def from_delta(sft: Tensor, delta: Tensor, alpha: float, out: Tensor, scratch: Scratch) -> Tensor:
    """θ = s + (1 + α)Δ, in Δ's dtype, one rounding to the output's.

    Args:
        sft: s, one axis, any floating-point dtype.
        delta: Δ = θ_dpo − θ_sft, same shape, float32 (float64 if s is).
        alpha: α. At 0 the result is θ_dpo, computed; at −1 s is copied, not computed.
        out: Where θ goes; same shape, any floating-point dtype.
        scratch: Scratch space on the same device.

    Returns:
        `out`.
    """
    if alpha == -1:
        return out.copy_(sft)
    if sft.dtype == delta.dtype == out.dtype:
        return torch.add(sft, delta, alpha=1 + alpha, out=out)
    return out.copy_(scratch.delta(delta).copy_(sft).add_(delta, alpha=1 + alpha))


def bound(norms: Norms, alpha: float) -> float:
    """|θ| ≤ |s| + |1 + α||d − s| ≤ ‖s‖ + |1 + α|‖d − s‖."""
    return math.sqrt(norms.sft) + abs(1 + alpha) * math.sqrt(norms.delta)


LINEAR = Rule("θ(α) = θ_dpo + α (θ_dpo − θ_sft)", combine, from_delta, bound)
