"""The rules by which θ_sft and θ_dpo are combined to θ(α): what a rule is, and the table of all.

To add one, write a module here with a `Rule`, of which `combine` is the only function that is needed, and add a line
to `RULES`. Everything else follows: adapters, several α in one pass, engines that make θ(α) while they load, the model
card, the fingerprint, `--rule`. A program that imports expo may put a `Rule` of its own into `RULES`. Nothing here
imports torch, since the command line lists the names.
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
    """How θ(α) is made of θ_sft and θ_dpo, element by element.

    A rule never sees a whole tensor, only pieces of about 1 MiB, whose bounds depend on dtypes, device and the number
    of α. So no element of the result may depend on other elements, such as on a tensor's mean. Where d = s, θ(α) must
    be d. At α = 0 no rule is asked: DPO is copied.
    """

    formula: str
    """For people to read, on the model card: θ(α) = …, of θ_sft, θ_dpo and α."""
    combine: Combine
    """Computes θ(α) of a piece, (s, d, α, out, scratch) → out.

    s, d and out have one axis, equal lengths, and floating-point types that may all differ: compute in
    `norms.wider(s, d)` and round once, which `out.copy_` does. s and d must not be changed. `scratch` is the thread's
    own work space; several threads combine at once.
    """
    from_delta: Combine | None = None
    """The same where Δ = θ_dpo − θ_sft is known by itself, as an adapter's is: (s, Δ, α, out, scratch) → out, also at
    α = 0. Δ is float32, or float64 where s is. Without it θ_dpo = s + Δ is computed, in Δ's type, for `combine`."""
    bound: Callable[[Norms, float], float] | None = None
    """From norms of s, d − s and α, what no |θ(α)| exceeds. Without it every result is searched for NaN and infinity,
    which costs a little more."""


RULES: dict[str, Rule | str] = {
    "linear": "expo.theta.rules.linear:LINEAR",
}
"""Name → the rule, or where it is: `module:attribute`, imported when it is used."""

DEFAULT_RULE = "linear"


def require_rule(name: str) -> None:
    """Refuse a name that no rule has.

    Raises:
        InputError: It is so; the message lists the names.
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
