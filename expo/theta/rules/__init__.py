"""The rules that combine θ_sft and θ_dpo into θ(α): what a rule is, and the table of all.

To add one, write a module here with a `Rule`, of which only the function `combine` is required, and add a line to
`RULES`. Everything else follows: adapters, several α in one pass, engines that compute θ(α) while they load, the model
card, the fingerprint, `--rule`. A program that imports expo may add its own `Rule` to `RULES`. Nothing here imports
torch, because the command line lists the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from expo.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from expo.theta.norms import Norms, Scratch

Combine: TypeAlias = "Callable[[Tensor, Tensor, float, Tensor, Scratch], Tensor]"
"""(θ_sft, θ_dpo or Δ, α, out, scratch) → out."""


@dataclass(frozen=True)
class Rule:
    """How θ(α) is computed from θ_sft and θ_dpo, element by element.

    A rule never sees a whole tensor, only pieces of about 1 MiB, whose bounds depend on dtypes, device and the number
    of α. So no element of the result may depend on other elements, such as a tensor's mean. Where d = s, θ(α) must
    be d. At α = 0 no rule is called: DPO is copied.
    """

    formula: str
    """Shown on the model card: θ(α) = …, in terms of θ_sft, θ_dpo and α."""
    combine: Combine
    """Computes θ(α) of a piece, (s, d, α, out, scratch) → out.

    s, d and out have one axis, equal lengths, and floating-point types that may all differ: compute in
    `norms.wider(s, d)` and round once, which `out.copy_` does. s and d must not be changed. `scratch` is the thread's
    own scratch space; several threads combine at once.
    """
    from_delta: Combine | None = None
    """The same if Δ = θ_dpo − θ_sft is known by itself, as with an adapter: (s, Δ, α, out, scratch) → out, also at
    α = 0. Δ is float32, or float64 if s is. Without it θ_dpo = s + Δ is computed, in Δ's type, for `combine`."""
    bound: Callable[[Norms, float], float] | None = None
    """From the norms of s and d − s and from α, an upper bound of |θ(α)|. Without it every result is checked for NaN
    and infinity, at a small cost."""


RULES: dict[str, Rule | str] = {
    "linear": "expo.theta.rules.linear:LINEAR",
}
"""Name → the rule, or its location `module:attribute`, imported when used."""

DEFAULT_RULE = "linear"


def require_rule(name: str) -> None:
    """Refuse an unknown rule.

    Raises:
        InputError: No rule has that name; the message lists the names.
    """
    if name not in RULES:
        raise InputError(f"--rule must be one of {', '.join(RULES)}, not {name!r}")


def find_rule(name: str) -> Rule:
    """The rule of that name."""
    found = RULES[name]
    if isinstance(found, str):
        module, attribute = found.split(":")
        rule: Rule = getattr(import_module(module), attribute)
        return rule
    return found
