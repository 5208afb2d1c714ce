"""`expo report`: plan what is read and written, compare, build the page, write it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expo.config import ReportConfig
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, kind_of, open_file, write_atomic
from expo.output import charts
from expo.output.sweeps import MODULES, SweepRecord, is_sweep, read_sweep
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.pairing import with_rows_of
from expo.verbs.compare.reading import read_runs
from expo.verbs.compare.run import Run
from expo.verbs.report.aligned import align
from expo.verbs.report.figures import Chart, charts_of
from expo.verbs.report.notes import notes, sweep_notes
from expo.verbs.report.page import MARK, build
from expo.verbs.report.sweep import sweep_files, with_alphas
from expo.verbs.report.verdict import verdict

log = logging.getLogger(__name__)

HEAD_BYTES = 4096
"""A file's start, in which the mark of its writer stands."""
PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class ReportPlan:
    """What is on the page, and where it goes."""

    config: ReportConfig
    runs: tuple[Run, ...]
    page: Path
    figures: Path | None
    """The folder for pictures."""
    sweep: SweepRecord | None = None
    """What the sweep says whose runs these are."""

    def describe(self) -> Row:
        """The plan as plain data."""
        return {
            "task": self.runs[0].task,
            "runs": [{"name": run.name, "rows": len(run.rows), "alpha": run.alpha} for run in self.runs],
            "reward_models": list(dict.fromkeys(model for run in self.runs for model in run.rewards)),
            "page": str(self.page),
            "figures": None if self.figures is None else str(self.figures),
        }


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    page: Path
    nbytes: int
    task: str
    runs: tuple[str, ...]
    rows: int
    headline: str
    notes: tuple[str, ...]
    figures: tuple[Path, ...]

    def __fspath__(self) -> str:
        return str(self.page)

    def describe(self) -> Row:
        """The report as plain data."""
        return {
            "page": str(self.page),
            "bytes": self.nbytes,
            "task": self.task,
            "runs": list(self.runs),
            "rows": self.rows,
            "verdict": self.headline,
            "notes": list(self.notes),
            "figures": list(map(str, self.figures)),
        }


def plan(config: ReportConfig) -> ReportPlan:
    """Read the runs, and look at what is where the page goes; nothing is written.

    Raises:
        InputError: A run is missing or damaged, there are fewer than two, or the page would replace something else.
    """
    sweep = read_sweep(Path(config.runs[0])) if len(config.runs) == 1 and is_sweep(Path(config.runs[0])) else None
    words = sweep_files(Path(config.runs[0]), sweep) if sweep else _words(config)
    page, figures = Path(config.output), None if config.figures is None else Path(config.figures)
    if page.is_dir():
        raise InputError(f"--output {page} is a folder; name a file in it, such as {page / 'report.html'}")
    _require_own(page, config.overwrite)
    runs = read_runs(words, task=config.task, output_dir=config.output_dir, dataset=config.dataset)
    return ReportPlan(config, tuple(with_alphas(runs)), page, figures, sweep)


def run(config: ReportConfig) -> Report:
    """Write the page, and the figures where they are wanted.

    Raises:
        InputError: The runs, or what is where the page goes, are at fault.
        EnvironmentFailure: Writing failed.
    """
    job = plan(config)
    runs, references, intersect = job.runs, list[str](), config.intersect
    if job.sweep:  # as it compared them
        runs, intersect = tuple(with_rows_of(job.runs[0], one) for one in job.runs), True
        references = [one.name for one in runs if (one.alpha or 0.0) < 0]
    comparison = compare(runs, intersect=intersect, apart=references)
    scored = [table.key for table in comparison.tables if table.key is not None]
    aligned = align(job.runs, scored, by_pairs=job.sweep is not None)
    drawn, found = charts_of(aligned, comparison, job.sweep), verdict(aligned, comparison, job.sweep)
    missing = tuple(dict.fromkeys([*sweep_notes(job.sweep), *comparison.notes, *notes(aligned)]))
    content = build(aligned, comparison, found, drawn, missing, job.sweep.race if job.sweep else None).encode()
    pictures = _pictures(job, drawn)
    for file, picture in {**pictures, job.page: content}.items():
        _make_folder(file.parent)
        write_atomic(file, picture)
    names = tuple(one.name for one in job.runs)
    says = (job.sweep.verdict if job.sweep else None) or found.headline
    return Report(job.page, len(content), job.runs[0].task, names, len(aligned), says, missing, tuple(pictures))


def _words(config: ReportConfig) -> Sequence[str]:
    """The runs by their files."""
    if len(config.runs) < 2:
        given = f"{config.runs[0]} alone" if config.runs else "none"
        if config.runs and (Path(config.runs[0]) / MODULES).is_file():
            raise InputError(
                f"{config.runs[0]} is of a sweep with --search modules, which report has no page for: its {MODULES} "
                "says what was found; name two or more of its outputs to see them side by side"
            )
        raise InputError(f"report takes two or more runs, or the folder of a sweep with its sweep.json, not {given}")
    return config.runs


def _pictures(job: ReportPlan, drawn: Sequence[Chart]) -> dict[Path, bytes]:
    """File → content of each figure, as PNG and SVG."""
    if job.figures is None:
        return {}
    if job.figures.exists() and not job.figures.is_dir():
        raise InputError(f"--figures {job.figures} is {kind_of(job.figures) or 'a file'}, not a folder")
    found = {}
    for chart in drawn:
        for suffix in PICTURES:
            file = job.figures / f"{chart.name}{suffix}"
            _require_own(file, job.config.overwrite)
            found[file] = charts.as_bytes(chart.figure, suffix, MARK)
    return found


def _require_own(file: Path, overwrite: bool) -> None:
    """Refuse to replace a file that expo report did not write."""
    if not file.exists() or overwrite:
        return
    with open_file(file) as stream:
        own = MARK.encode() in stream.read(HEAD_BYTES)
    if not own:
        raise InputError(f"{file} exists and expo report did not write it; --overwrite replaces it")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(f"cannot make {folder}: {error.strerror}; choose another --output") from error
