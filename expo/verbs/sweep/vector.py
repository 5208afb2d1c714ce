"""A θ whose classes of tensors may have an α of their own: what it is made with, and what its outputs are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from expo.files import Row
from expo.theta.names import OF_MODULES

NORMS = "norms"
"""The class that `--exclude` leaves as DPO has it, since for norms that is asked for by this flag."""

SHORT = {"attention": "attn", "embeddings": "embed", ".first": "1", ".middle": "2", ".last": "3"}
"""Words of classes → how files' names have them, which may be no longer than 255 bytes."""


@dataclass(frozen=True)
class Vector:
    """An α, and those classes of tensors that have another one."""

    alpha: float
    """Of all tensors that are in none of `own`."""
    own: tuple[tuple[str, float], ...] = ()
    """Class → its α, sorted; only where it is not `alpha`."""

    def of(self, label: str) -> float:
        """The α of a class."""
        return dict(self.own).get(label, self.alpha)

    def having(self, values: Mapping[str, float]) -> Vector:
        """The same with these classes at these α."""
        own = {**dict(self.own), **values}
        return Vector(self.alpha, tuple(sorted((label, value) for label, value in own.items() if value != self.alpha)))

    @property
    def suffix(self) -> str:
        """What its outputs are called behind the name of θ(α): equal for no two vectors of an α."""
        return "".join([OF_MODULES, *(f"-{_short(label)}-{value!r}" for label, value in self.own)]) if self.own else ""

    def settings(self, patterns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """The `alpha_for` and `exclude` that make it, for a θ that has none.

        Args:
            patterns: Class → a pattern that its tensors' names match, and no other's.
        """
        copied = [label for label, value in self.own if (label, value) == (NORMS, 0.0)]
        others = [(label, value) for label, value in self.own if label not in copied]
        return {
            "alpha_for": tuple(f"{patterns[label]}={value!r}" for label, value in others),
            "exclude": tuple(patterns[label] for label in copied),
        }

    def describe(self) -> Row:
        """As plain data."""
        return {"alpha": self.alpha, "own": dict(self.own)}

    def __str__(self) -> str:
        said = [f"{label} {value:.4g}" for label, value in self.own]
        return f"α = {self.alpha:g}" + (f" but {', '.join(said)}" if said else "")


def _short(label: str) -> str:
    for word, short in SHORT.items():
        label = label.replace(word, short)
    return label


Which = TypeVar("Which", float, Vector)
"""What tells the θ of a sweep apart: an α, or a vector."""
