"""A combine rule from outside the package, as CONTRIBUTING.md says: one function, of which everything else follows."""

from __future__ import annotations

from torch import Tensor

from expo.theta.norms import Scratch, wider
from expo.theta.rules import Rule

LIMIT = 2.0**-11


def clip(sft: Tensor, dpo: Tensor, alpha: float, out: Tensor, scratch: Scratch) -> Tensor:
    """No weight goes further than α·LIMIT beyond DPO's."""
    wide = wider(sft, dpo)
    s, d = sft.to(wide), dpo.to(wide)
    return out.copy_(d + alpha * (d - s).clamp(-LIMIT, LIMIT))


CLIPPED = Rule(f"θ(α) = θ_dpo + α clip(θ_dpo − θ_sft, ±{LIMIT})", clip)
