"""The runs in the folder of a sweep: one output file per α, beside sweep.json; and which α a run is of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from expo.compare.run import Run
from expo.errors import InputError
from expo.files import SUFFIXES, read_json, shown
from expo.settings import OWN_ENDINGS

SWEEP = "sweep.json"
NAMED = re.compile(r"(?P<dpo>.+)-ExPO-a(?P<alpha>-?[\d.]+(?:e[+-]?\d+)?)", re.DOTALL)
"""How expo calls θ(α) made from a DPO model."""


def is_sweep(folder: Path) -> bool:
    """Whether a sweep wrote to this folder."""
    return (folder / SWEEP).is_file()


def sweep_files(folder: Path) -> list[str]:
    """The output files of a sweep, that of α = 0 first, then in the order of α.

    Raises:
        InputError: sweep.json is damaged, or the files are not beside it.
    """
    record = read_json(folder / SWEEP)
    listed = record.get("alphas")
    alphas = {float(one["alpha"]) for one in listed if _has_alpha(one)} if isinstance(listed, list) else set()
    if not alphas:
        raise InputError(f"{folder / SWEEP} lists no alphas: {shown(listed)}")
    found = {alpha: file for file in _outputs(folder) if (alpha := _alpha(file.stem)) in alphas}
    if 0.0 not in found or len(found) < 2:
        there = ", ".join(map(repr, sorted(found))) or "none"
        raise InputError(f"{folder} has outputs of too few α of its {SWEEP} (α = 0 and another are needed): {there}")
    return [str(found[alpha]) for alpha in sorted(found, key=lambda alpha: (alpha != 0, alpha))]


def _has_alpha(one: object) -> bool:
    alpha = one.get("alpha") if isinstance(one, dict) else None
    return isinstance(alpha, int | float) and math.isfinite(alpha)


def _outputs(folder: Path) -> list[Path]:
    files = sorted(folder.glob("outputs_*/*"))
    return [file for file in files if file.suffix in SUFFIXES and not file.stem.endswith(OWN_ENDINGS)]


def _alpha(name: str) -> float | None:
    found = NAMED.fullmatch(name)
    try:
        return float(found["alpha"]) if found else None
    except ValueError:
        return None


def with_alphas(runs: Sequence[Run]) -> list[Run]:
    """The runs with the α of their names where their files say none: 0.3 of DPO-ExPO-a0.3, 0 of DPO beside it."""
    beside = {found["dpo"] for run in runs if (found := NAMED.fullmatch(run.name))}
    known = [run.alpha if run.alpha is not None else _alpha(run.name) for run in runs]
    named = [0.0 if alpha is None and run.name in beside else alpha for run, alpha in zip(runs, known, strict=True)]
    return [replace(run, alpha=alpha) for run, alpha in zip(runs, named, strict=True)]
