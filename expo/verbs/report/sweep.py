"""The runs in the folder of a sweep, one output file per α beside sweep.json, and which α a run is of."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path

from expo.errors import InputError
from expo.files import SUFFIXES
from expo.output.sweeps import RECORD, SweepRecord
from expo.settings import OWN_ENDINGS
from expo.theta.names import named_alpha
from expo.verbs.compare.run import Run


def sweep_files(folder: Path, record: SweepRecord) -> list[str]:
    """The output files of a sweep, that of α = 0 first, then in the order of α.

    Raises:
        InputError: They are not beside sweep.json.
    """
    by_name = {name: alpha for alpha, name in record.names.items()}
    unnamed = set(record.alphas) - set(record.names)
    found = {
        alpha: file
        for file in _outputs(folder, record.task)
        if (alpha := by_name.get(file.stem, _alpha(file.stem))) in unnamed or file.stem in by_name
    }
    if not found and record.content.get("n") == 0:
        raise InputError(f"{folder} has nothing to show: {record.verdict}")
    if 0.0 not in found or len(found) < 2:
        there = ", ".join(map(repr, sorted(alpha for alpha in found if alpha is not None))) or "none"
        raise InputError(f"{folder} has outputs of too few α of its {RECORD} (α = 0 and another are needed): {there}")
    if record.best_alpha is not None and record.best_alpha not in found:
        raise InputError(f"{folder} has no outputs of α = {record.best_alpha!r}, which its {RECORD} chose")
    return [str(found[alpha]) for alpha in sorted(found, key=lambda alpha: (alpha != 0, alpha))]


def _outputs(folder: Path, task: str | None) -> list[Path]:
    files = sorted(folder.glob("outputs_*/*" if task is None else f"{escape(f'outputs_{task}')}/*"))
    return [file for file in files if file.suffix in SUFFIXES and not file.stem.endswith(OWN_ENDINGS)]


def _alpha(name: str) -> float | None:
    found = named_alpha(name)
    return None if found is None else found.alpha


def with_alphas(runs: Sequence[Run]) -> list[Run]:
    """The runs with the α of their names where their files say none: 0.3 of DPO-ExPO-a0.3, 0 of DPO beside it."""
    beside = {found.dpo for run in runs if (found := named_alpha(run.name))}
    return [_with_alpha(run, beside) for run in runs]


def _with_alpha(run: Run, beside: Container[str]) -> Run:
    if run.alpha is not None:
        return run
    if (found := named_alpha(run.name)) is not None:
        return replace(run, alpha=found.alpha, space=found.space)
    return replace(run, alpha=0.0) if run.name in beside else run
