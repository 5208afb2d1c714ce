"""What an adapter of a given rank has of θ_dpo − θ_sft: figures of its file, in expo.json, on the card, and said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from expo.checkpoint.places import places
from expo.files import Row

Figures = Mapping[str, Row]
"""Tensor of SFT → its ‖Δ‖ as `norm`; with factors also their `rank`, and ‖Δ − B·A‖ as `error`."""


def approximation(figures: Figures) -> Row:
    """The content of `approximation` in expo.json: the whole, each module, and what has no factors, pooled by place.

    Shares are those of ‖Δ‖², which add up to 1.
    """
    modules = {name: row for name, row in figures.items() if "error" in row}
    rest = {name: row for name, row in figures.items() if name not in modules}
    total = _squares(row["norm"] for row in figures.values())
    lost, left = _squares(row["error"] for row in modules.values()), _squares(row["norm"] for row in rest.values())
    return {
        "norm": math.sqrt(total),
        "relative_error": _ratio(math.sqrt(lost + left), math.sqrt(total)),
        "shares": {
            "in_adapter": 1 - _ratio(lost + left, total),
            "lost_to_rank": _ratio(lost, total),
            "without_factors": _ratio(left, total),
        },
        "modules": {
            name: {**row, "relative_error": _ratio(row["error"], row["norm"])} for name, row in modules.items()
        },
        "without_factors": {name: math.sqrt(square) for name, square in _pooled(rest).items()},
    }


def said(found: Row) -> str:
    """The same as a sentence.

    Args:
        found: `approximation`.
    """
    shares = {name: _percent(share) for name, share in found["shares"].items()}
    largest = sorted(found["without_factors"].items(), key=lambda item: -item[1])
    where = ", ".join(name for name, norm in largest[:3] if norm)
    return (
        f"the adapter has {shares['in_adapter']} of the change ‖θ_dpo − θ_sft‖²: {shares['lost_to_rank']} is lost to "
        f"the rank, and {shares['without_factors']} is in tensors that get no factors"
        + (f" ({where})" if where else "")
        + f"; the error is {found['relative_error']:.3g} of ‖θ_dpo − θ_sft‖"
    )


def card_figures(found: Row) -> Row:
    """The figures on the model card.

    Args:
        found: `approximation`.
    """
    shares = found["shares"]
    return {
        "modules with LoRA factors": len(found["modules"]),
        "‖θ_dpo − θ_sft‖² in the adapter": _percent(shares["in_adapter"]),
        "of it lost to the rank": _percent(shares["lost_to_rank"]),
        "of it in tensors without factors": _percent(shares["without_factors"]),
        "error, as a share of ‖θ_dpo − θ_sft‖": f"{found['relative_error']:.3g}",
    }


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _pooled(rest: Figures) -> dict[str, float]:
    """Module, over all layers → the sum of ‖Δ‖²."""
    pooled: dict[str, list[float]] = {}
    for name, place in places(rest).items():
        pooled.setdefault(place.module, []).append(rest[name]["norm"])
    return {name: _squares(norms) for name, norms in sorted(pooled.items())}


def _squares(values: Iterable[float]) -> float:
    return math.fsum(value**2 for value in values)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
