"""The findings of an inspection: figures per tensor, layer and module, the verdict, and both as text and data.

Nothing here reads a file; `verbs/inspect.py` measures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from expo.checkpoint.places import Place
from expo.errors import listed
from expo.output.frames import frame
from expo.output.trajectory import Trajectory
from expo.stats.changes import cosine_distance, relative_change
from expo.theta.pair_checks import UNRELATED_CHANGE
from expo.theta.plan import Overlap, Segment

if TYPE_CHECKING:
    from pandas import DataFrame

Suits = Literal["likely", "suspect", "identical", "mismatched"]

SFT_TO_DPO = 0.036
"""‖Δ‖/‖θ_sft‖ of zephyr's SFT → DPO, a pair that ExPO suits (Zheng et al. 2025)."""
PRETRAINED_TO_SFT = 0.99
"""The same of its pretrained model → SFT, where ExPO gains nothing or breaks the model."""


@dataclass(frozen=True)
class Figures:
    """How far a group of tensors is apart."""

    tensors: int
    identical: int
    """How many of these have the same values on both sides."""
    delta_squared: float
    """‖θ_dpo − θ_sft‖²."""
    sft_squared: float
    dpo_squared: float

    @classmethod
    def together(cls, parts: Iterable[Figures]) -> Figures:
        """The combined figures of all these tensors, independent of their order."""
        parts = list(parts)
        squares = [
            math.fsum(column)
            for column in (
                [part.delta_squared for part in parts],
                [part.sft_squared for part in parts],
                [part.dpo_squared for part in parts],
            )
        ]
        return cls(sum(part.tensors for part in parts), sum(part.identical for part in parts), *squares)

    @property
    def finite(self) -> bool:
        """Whether no value is NaN, infinite, or too large for its square."""
        return math.isfinite(self.delta_squared + self.sft_squared + self.dpo_squared)

    @property
    def relative(self) -> float | None:
        """‖Δ‖/‖θ_sft‖; None where it is undefined."""
        return relative_change(self.delta_squared, self.sft_squared) if self.finite and self.tensors else None

    @property
    def one_minus_cosine(self) -> float | None:
        """1 − cos of the angle between θ_sft and θ_dpo; None where it is undefined.

        If a tensor was merely scaled, only the norms' rounding errors remain, about 1e-6 in bfloat16.
        """
        return cosine_distance(self.delta_squared, self.sft_squared, self.dpo_squared) if self.finite else None

    def describe(self) -> dict[str, Any]:
        """The figures as plain data."""
        squares = {"delta_norm": self.delta_squared, "sft_norm": self.sft_squared, "dpo_norm": self.dpo_squared}
        distance = self.one_minus_cosine
        return {
            "tensors": self.tensors,
            "identical": self.identical,
            "relative": self.relative,
            "cosine": None if distance is None else 1 - distance,
            "one_minus_cosine": distance,
            **{name: math.sqrt(square) if math.isfinite(square) else None for name, square in squares.items()},
        }


@dataclass(frozen=True)
class Measured:
    """One floating-point tensor of both checkpoints."""

    segment: Segment
    place: Place
    figures: Figures

    @property
    def name(self) -> str:
        """Its name in DPO."""
        return self.segment.dpo.name

    def describe(self) -> dict[str, Any]:
        """The tensor as plain data."""
        figures = self.figures.describe()
        del figures["tensors"]
        return {
            "name": self.name,
            **self.place._asdict(),
            "shape": list(self.segment.dpo.shape),
            "sft_dtype": self.segment.sft.dtype if self.segment.sft else None,
            "dpo_dtype": self.segment.dpo.dtype,
            **figures,
            "identical": self.figures.identical == 1,
        }


@dataclass(frozen=True)
class Module:
    """One module over all its layers."""

    name: str
    figures: Figures
    layers: dict[int, Figures]
    """Empty for a module outside the layers."""

    @property
    def extremes(self) -> tuple[tuple[int, float], ...]:
        """The layers with the smallest and with the largest ‖Δ‖/‖θ_sft‖, each with its value."""
        known = [(layer, one.relative) for layer, one in self.layers.items()]
        numbers = [(layer, value) for layer, value in known if value is not None]
        if not numbers:
            return ()
        return min(numbers, key=lambda one: one[1]), max(numbers, key=lambda one: one[1])

    def describe(self) -> dict[str, Any]:
        """The module as plain data."""
        ends = dict(zip(("min", "max"), self.extremes, strict=False))
        return {
            "module": self.name,
            "layers": len(self.layers),
            **self.figures.describe(),
            **{end: {"layer": at, "relative": value} for end, (at, value) in ends.items()},
        }


def mismatches(both: Overlap) -> dict[str, tuple[str, ...]]:
    """The mismatches visible in headers, as kind → tensors; empty kinds are left out."""
    kinds = {
        "only in SFT": both.only_sft,
        "only in DPO": both.only_dpo,
        "shapes differ": tuple(f"{d.name} {list(s.shape)} ≠ {list(d.shape)}" for s, d in both.shapes),
        "dtypes that cannot be combined": tuple(f"{d.name} {s.dtype}, {d.dtype}" for s, d in both.dtypes),
    }
    return {kind: names for kind, names in kinds.items() if names}


@dataclass(frozen=True)
class Inspection:
    """All findings."""

    sft: str
    dpo: str
    overlap: Overlap
    tensors: tuple[Measured, ...]
    unequal: tuple[str, ...]
    """Integer and boolean tensors that differ."""
    untied: tuple[str, ...]
    """Heads stored on one side only that are not their embedding."""
    moved: tuple[str, ...] = ()
    """Tokens that both tokenizers have with different ids: 'token' SFT's ≠ DPO's."""
    picture: Path | None = None
    trajectory: Trajectory | None = None
    """Of a training run with several checkpoints, the last of which is θ_dpo."""

    @property
    def _finite(self) -> list[Measured]:
        return [one for one in self.tensors if one.figures.finite]

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Tensors with NaN, infinity, or values too large to square; excluded from all sums."""
        return tuple(one.name for one in self.tensors if not one.figures.finite)

    @property
    def total(self) -> Figures:
        """All tensors together."""
        return Figures.together(one.figures for one in self._finite)

    @property
    def layers(self) -> dict[int, Figures]:
        """Each layer's tensors together, in order."""
        return dict(
            sorted(_sums((m.place.layer, m.figures) for m in self._finite if m.place.layer is not None).items())
        )

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules of the layers, then those outside them, each in the order of their names."""
        cells: dict[tuple[bool, str], dict[int, Figures]] = {}
        for place, figures in _sums((one.place, one.figures) for one in self._finite).items():
            outside = place.layer is None
            cells.setdefault((outside, place.module), {})[-1 if place.layer is None else place.layer] = figures
        return tuple(
            Module(name, Figures.together(by_layer.values()), {} if outside else dict(sorted(by_layer.items())))
            for (outside, name), by_layer in sorted(cells.items())
        )

    @property
    def mismatches(self) -> dict[str, tuple[str, ...]]:
        """All mismatches, as kind → tensors or tokens; empty kinds are left out."""
        kinds = {
            "tokens with different ids": self.moved,
            "integers that differ": self.unequal,
            "heads stored on one side only that differ from the embedding the other ties them to": self.untied,
        }
        return {**mismatches(self.overlap), **{kind: names for kind, names in kinds.items() if names}}

    @property
    def suits(self) -> Suits:
        """Whether ExPO suits the pair, as far as norms can tell: they can raise suspicion, not prove anything."""
        relative = self.total.relative
        if self.mismatches or not self.tensors:
            return "mismatched"
        if self.nonfinite or relative is None or relative > UNRELATED_CHANGE:
            return "suspect"
        return "identical" if self.total.delta_squared == 0 else "likely"

    @property
    def verdict(self) -> str:
        """The same as a sentence."""
        return VERDICTS[self.suits](self)

    def describe(self) -> dict[str, Any]:
        """Everything as plain data."""
        both = self.overlap
        return {
            "sft": self.sft,
            "dpo": self.dpo,
            "suits": self.suits,
            "verdict": self.verdict,
            "total": self.total.describe(),
            "modules": [module.describe() for module in self.modules],
            "layers": [{"layer": layer, **figures.describe()} for layer, figures in self.layers.items()],
            "cells": [
                {"layer": layer, "module": module.name, **figures.describe()}
                for module in self.modules
                for layer, figures in module.layers.items()
            ],
            "tensors": [one.describe() for one in self.tensors],
            "only_in_sft": list(both.only_sft),
            "only_in_dpo": list(both.only_dpo),
            "shapes": [{"name": d.name, "sft": list(s.shape), "dpo": list(d.shape)} for s, d in both.shapes],
            "dtypes": [{"name": d.name, "sft": s.dtype, "dpo": d.dtype} for s, d in both.dtypes],
            "integers": [{"name": p.dpo.name, "equal": p.dpo.name not in self.unequal} for p in both.exact],
            "tied_heads": [{"name": p.dpo.name, "equal": p.dpo.name not in self.untied} for p in both.heads],
            "nonfinite": list(self.nonfinite),
            "moved_tokens": list(self.moved),
            "vocabulary": both.vocabulary
            and {**dataclasses.asdict(both.vocabulary), "compared": both.vocabulary.common},
            "picture": None if self.picture is None else str(self.picture),
            **({} if self.trajectory is None else {"trajectory": self.trajectory.describe()}),
        }

    def to_pandas(self) -> DataFrame:
        """A row per tensor: `name`, `layer`, `module`, `shape`, dtypes, `relative` = ‖Δ‖/‖θ_sft‖, `cosine`, norms."""
        return frame(one.describe() for one in self.tensors)

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """A table with a row per module, the mismatches, and the verdict."""
        rows = [HEADINGS, *(_row(module) for module in (*self.modules, Module("total", self.total, self.layers)))]
        kinds = {**self.mismatches, "NaN, infinity or too large to be squared": self.nonfinite}
        notes = [note for kind, names in kinds.items() for note in listed(f"{kind} ({len(names)})", names)]
        if self.overlap.renamed:
            notes.append(f"{self.overlap.renamed} tensors have other names in SFT, or are fused on one side only")
        if (sizes := self.overlap.vocabulary) is not None:
            notes.append(
                f"vocabularies of {sizes.sft} and {sizes.dpo} rows: only the {sizes.common} in both are compared "
                "(`expo extrapolate` needs --vocab common for this pair)"
            )
        run = self.trajectory
        course = [] if run is None else [*_aligned(run.rows()), "", f"trajectory: {run.verdict}"]
        return "\n".join([*_aligned(rows), "", *course, *notes, f"{self.suits}: {self.verdict}"])


# --- the verdict --------------------------------------------------------------------------------------------------


def _likely(found: Inspection) -> str:
    return (
        f"‖Δ‖ is {_number(found.total.relative)} of ‖θ_sft‖ (zephyr's SFT → DPO: {SFT_TO_DPO}, its pretrained → SFT: "
        f"{PRETRAINED_TO_SFT}), consistent with a θ_dpo trained from this θ_sft, though no norm can prove it"
    )


def _suspect(found: Inspection) -> str:
    relative = found.total.relative
    if found.nonfinite:
        return f"{listed('NaN, infinity or values too large to be squared', found.nonfinite)[0]}; check these first"
    if relative is None:
        return "θ_sft is all zeros"
    return (
        f"‖Δ‖ is {_number(relative)} of ‖θ_sft‖, {relative / SFT_TO_DPO:.0f} times zephyr's step from SFT to DPO: "
        "perhaps θ_dpo was not trained from this θ_sft, or θ_sft is a pretrained model (zephyr's, to its SFT: "
        f"{PRETRAINED_TO_SFT})"
    )


def _mismatched(found: Inspection) -> str:
    tokens, relative = len(found.moved), found.total.relative
    counts = {"tensor": sum(map(len, found.mismatches.values())) - tokens, "token": tokens}
    problems = [f"{n} {what}{'s do' if n > 1 else ' does'} not match" for what, n in counts.items() if n]
    problem = " and ".join(problems) or "nothing can be compared"
    others = f"; ‖Δ‖ of the others is {_number(relative)} of ‖θ_sft‖ (zephyr's SFT → DPO: {SFT_TO_DPO})"
    return f"{problem}, and `expo extrapolate` refuses the pair as it is{'' if relative is None else others}"


VERDICTS: dict[Suits, Callable[[Inspection], str]] = {
    "likely": _likely,
    "suspect": _suspect,
    "identical": lambda _: "θ_dpo equals θ_sft, and so does θ(α) for every α",
    "mismatched": _mismatched,
}


# --- text ---------------------------------------------------------------------------------------------------------

HEADINGS = ("module", "‖Δ‖/‖θ_sft‖", "min (layer)", "max (layer)", "1 − cos", "tensors", "identical")


def _row(module: Module) -> tuple[str, ...]:
    figures = module.figures
    least, most = [f"{_number(value)} {f'({at})':>5}" for at, value in module.extremes] or ("", "")
    numbers = (_number(figures.relative), least, most, _number(figures.one_minus_cosine))
    return (module.name, *numbers, str(figures.tensors), str(figures.identical))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:#.3g}" if value else "0"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]


Key = TypeVar("Key")


def _sums(figures: Iterable[tuple[Key, Figures]]) -> dict[Key, Figures]:
    groups: dict[Key, list[Figures]] = {}
    for key, one in figures:
        groups.setdefault(key, []).append(one)
    return {key: Figures.together(group) for key, group in groups.items()}
