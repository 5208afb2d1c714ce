"""What a row job is, and the one loop that runs it.

`expo generate` and `expo score` are row jobs: each one's plan is a subclass of `RowJob`, which is all that the loop,
the parts and the workers know of it. The loop records rows as the engine finishes them, each durable before it waits
for the next, and writes the final files when all are there. To add a job, write a subclass; there is no table to edit.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from expo.config import RowsConfig
from expo.errors import InputError
from expo.files import Row, json_lines, texts_sha256
from expo.journal import Journal
from expo.parts import Part
from expo.progress import rows_progress
from expo.rows.dates import TemplateDate
from expo.rows.files import Columns, Found, RowFiles, State, checksum, require_columns
from expo.settings import require_same

log = logging.getLogger(__name__)

Key = tuple[Any, ...]
"""Identifies a row within its output."""
Rows = dict[Key, Row]
"""Row key → row, as recorded in the journal."""

TRANSIENT = ("overwrite", "dry_run", "output_dir", "part", "join", "data_parallel")
"""Settings of how a run is executed, not of what it produces."""


class Setup(Protocol):
    """What an engine is started with; see `expo.engines`."""

    def takes_over(self, started: Any) -> bool:  # noqa: ANN401 - a setup of the same kind
        """Whether an engine started with another setup can switch to this one."""


@dataclass(frozen=True)
class Figures:
    """The cost of one run of the engine."""

    rows: int = 0
    tokens: int = 0
    engine_start_seconds: float = 0.0
    seconds: float = 0.0
    engine_step_seconds: float = 0.0
    repeatable: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """The engine's speed, excluding its start."""
        return round(self.tokens / self.seconds, 1) if self.seconds else 0.0


@dataclass(frozen=True)
class Done:
    """A job after its run."""

    job: RowJob
    meta: Row
    status: str
    """"written" or "already complete"."""

    @property
    def reason(self) -> str | None:
        """Why the first of the failed rows failed; None where none did, or it is not recorded."""
        errors = self.meta.get("errors")
        of_part = f" of part {self.job.part}" if self.job.part else ""
        return f"row {errors[0]['row']}{of_part}: {errors[0]['reason']}" if errors else None

    @property
    def can_retry(self) -> bool:
        """Whether the same command tries failed rows again, which may help."""
        runs_rows = self.status == "written" and self.job.config.join is None
        return runs_rows and any(not error.get("lasting") for error in self.meta.get("errors", ()))


@dataclass(frozen=True, kw_only=True)
class RowJob(ABC):
    """Everything a verb will do: what its rows are, how to produce them and how to write them."""

    verb: ClassVar[str]
    """The command's name."""
    columns: ClassVar[Columns]
    """The columns of every row in the journal."""
    seconds_key: ClassVar[str]
    """The meta file's key for the seconds that the engine worked."""

    config: RowsConfig
    engine: str
    """The resolved engine."""
    name: str
    """The output's name."""
    files: RowFiles
    fingerprint: Row
    """Every setting and source that changes the rows."""
    setup: Setup
    """What the engine is started with."""
    date: TemplateDate | None = None
    """The date that the chat template writes into prompts; None where it writes none."""
    part: Part | None = None
    """Which part of a job this is; None is the whole."""
    whole: Self | None = None
    """Of a part: the job it is a part of."""

    # --- its rows

    @property
    @abstractmethod
    def keys(self) -> Sequence[Key]:
        """All rows, in output order."""

    @property
    @abstractmethod
    def items(self) -> Sequence[object]:
        """What the rows are made from, in output order."""

    def items_beyond(self) -> Sequence[object] | None:
        """The items without `--limit`; None where equal fingerprints imply that they are the same."""
        return None

    @abstractmethod
    def share(self, part: Part) -> Self:
        """The same job restricted to one part's rows and files."""

    @abstractmethod
    def key_of(self, row: Row) -> Key:
        """The key of a row of the journal."""

    @abstractmethod
    def is_answered(self, row: Row) -> bool:
        """Whether a row of the journal is a result, not a failure."""

    def is_interim(self, row: Row) -> bool:  # noqa: ARG002 - for jobs whose rows take several steps
        """Whether a row of the journal is only a step towards one: kept for a rerun, and counted as no row."""
        return False

    def is_current(self, row: Row) -> bool:  # noqa: ARG002 - for jobs whose rows can be outdated
        """Whether a row of the journal was made from the current input."""
        return True

    @abstractmethod
    def pending(self, done: Mapping[Key, Row]) -> bool:
        """Whether any row that can be produced is not done."""

    def require_sound(self, done: Rows) -> None:  # noqa: B027 - for jobs whose rows can show it
        """Refuse rows that show, together, that the engine did not work; they stay in the journal.

        Args:
            done: All rows, from this run and before.

        Raises:
            InputError: They do.
        """

    @abstractmethod
    def impossible(self, done: Mapping[Key, Row]) -> Rows:
        """The rows that cannot be produced, marked as failed, once all others are done."""

    # --- producing them

    def worker_options(self) -> dict[str, Any]:
        """What the verb's `run` is given besides the settings, in a process that does this job or a part of it."""
        return {} if self.date is None else {"moment": self.date.moment}

    @abstractmethod
    def open_engine(self) -> Any:  # noqa: ANN401 - of the verb's kind
        """Start the engine."""

    @abstractmethod
    def execute(self, engine: Any, done: Rows) -> Iterator[list[Row]]:  # noqa: ANN401
        """Produce the rows that are not done, in the journal's form, and yield them as they finish.

        Args:
            engine: The engine, with this job's setup.
            done: The rows that are done; the caller adds those that are yielded.
        """

    @abstractmethod
    def tokens(self, row: Row) -> int:
        """The tokens of a row that count towards tokens per second."""

    @abstractmethod
    def worker_environments(self, count: int) -> list[dict[str, str]]:
        """The environment of each of several processes that share the job: its GPUs, or its share of CPU threads.

        Raises:
            InputError: There are too few GPUs, or the engine does not run here.
        """

    # --- writing them

    @abstractmethod
    def finished_rows(self, meta: Row) -> list[Row]:
        """The rows of the finished output, in the journal's form.

        Raises:
            InputError: It is damaged.
        """

    @abstractmethod
    def render(self, rows: Sequence[Row]) -> dict[Path, str]:
        """The final files and their contents, from all rows in output order."""

    @abstractmethod
    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:
        """The content of the meta file, including `rows`, `failed`, `errors`, `fingerprint` and the hash of the items.

        Each of the `errors` has the number of a `row`, a `reason`, and `lasting` where trying again does not help.

        Args:
            rows: All rows in output order.
            figures: The cost of this run.
            extends: Whether some of the rows are from a previously finished output.
        """

    # --- derived

    def by_key(self, rows: Iterable[Row]) -> Rows:
        """Rows under their keys."""
        return {self.key_of(row): row for row in rows}

    def answered(self, rows: Iterable[Row]) -> Rows:
        """The rows that need not be produced again."""
        return self.by_key(row for row in rows if self.is_answered(row) and self.is_current(row))

    def describe_parts(self) -> Row:
        """The plan's entries about parts."""
        config = self.config
        return {
            **({"part": str(self.part)} if self.part else {}),
            **({"workers": config.data_parallel} if config.data_parallel > 1 else {}),
            **({"parts_to_join": config.join} if config.join else {}),
        }

    def describe_date(self) -> Row:
        """The plan's entry about the date in prompts."""
        return {} if self.date is None else {"template_date": self.date.moment}

    def recorded_config(self) -> Row:
        """The settings as recorded in the meta file."""
        values = dataclasses.asdict(self.config)
        return {name: value for name, value in values.items() if name not in TRANSIENT}

    def figures_in(self, meta: Row) -> Figures:
        """The cost of a run, from its meta file."""
        seconds = meta[self.seconds_key]
        return Figures(
            rows=meta["rows_this_run"],
            tokens=round(meta["tokens_per_second"] * seconds),
            engine_start_seconds=meta["engine_start_seconds"],
            seconds=seconds,
            engine_step_seconds=meta.get("engine_step_seconds", 0.0),
            repeatable=meta.get("repeatable", False),
            versions={name: text for name, text in meta["versions"].items() if name != "expo"},
        )


# --- the loop ------------------------------------------------------------------------------------------------------


class EngineKeeper:
    """An engine that outlives a job: opened when it is first needed, and given the next job's settings and weights.

    Close it at the end (`contextlib.closing`).
    """

    def __init__(self) -> None:
        self.opened = False
        """Whether the engine was opened for the job it is at, and did not go on from another."""
        self._engine: Any = None
        self._of: RowJob | None = None  # the job that it was opened for

    def engine_for(self, job: RowJob) -> Any:  # noqa: ANN401 - of the verb's kind
        """The live engine where it can do this job, else a new one."""
        if self._engine is not None and self._of is not None and self._goes_on(self._of, job):
            try:
                self._engine.load(job.setup)
                self.opened = False
            except BaseException:
                self.close()  # what its weights are now is not known
                raise
        else:
            self.close()
            self._engine, self._of = job.open_engine(), job
            self.opened = True
        return self._engine

    @staticmethod
    def _goes_on(before: RowJob, job: RowJob) -> bool:
        same = before.engine == job.engine and type(before.setup) is type(job.setup)
        return same and job.setup.takes_over(before.setup)

    def close(self) -> None:
        """Close the engine, where there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


@contextmanager
def kept_or_own(keeper: EngineKeeper | None) -> Iterator[EngineKeeper]:
    """The keeper; where there is none, one that is closed at the end."""
    if keeper is not None:
        yield keeper
        return
    with closing(EngineKeeper()) as own:
        yield own


def run_rows(job: RowJob, kept: Rows, keeper: EngineKeeper | None = None) -> Done:
    """Produce every missing row of a job, or of one part of it.

    Args:
        job: What to do.
        kept: For a part: its rows that the whole output already has.
        keeper: Keeps the engine open after this job; without one, the engine is closed at the end.

    Raises:
        InputError: The inputs are at fault, or an output with other settings exists.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    if job.whole is not None and job.whole.files.look().state is State.FINISHED and not job.pending(kept):
        return Done(job.whole, {"rows": len(job.keys), "failed": len(job.keys) - len(kept)}, "already complete")
    found = job.files.require_own()
    old = rows_to_extend(job, found)
    if old is None:
        return Done(job, found.meta, "already complete")
    if job.date is not None and job.date.closed is not None:
        raise InputError(job.date.closed)
    journal = job.files.open_journal(job.fingerprint)
    with job.files.holding(journal):
        if old:
            journal.append(old)
            journal.rows = old
        done = _rows_of(job, journal)
        extends = bool(kept) or (bool(done) and job.files.final.exists())
        done |= kept
        figures = _make(job, keeper, journal, done)
        job.require_sound(done)
        done |= job.impossible(done)
        rows = [done[key] for key in job.keys]
        meta = job.meta_of(rows, figures, extends=extends)
        if job.part is None:
            job.files.finish(journal, job.render(rows), meta)
        else:
            text = json_lines(rows)
            meta |= {"part": str(job.part), "rows_sha256": checksum(text.encode())}
            job.files.finish(journal, {job.files.final: text}, meta)
    return Done(job, meta, "written")


def is_complete(job: RowJob) -> bool:
    """Whether nothing is left to do; no weights are read.

    Raises:
        InputError: The output is damaged, or was made with other settings, and `--overwrite` is not given.
    """
    return rows_to_extend(job, job.files.require_own()) is None


def missing_rows(job: RowJob) -> int:
    """How many rows are left to do; no weights are read.

    Raises:
        InputError: As `is_complete`.
    """
    found = job.files.require_own()
    rows = rows_to_extend(job, found)
    if rows is None:
        return 0
    if found.state is State.UNFINISHED and job.fingerprint == found.fingerprint:
        rows = [row for row in found.journal if not job.is_interim(row)]
    there = job.answered(require_columns(rows, job.columns, job.files.journal))
    return sum(key not in there for key in job.keys)


def rows_to_extend(job: RowJob, found: Found) -> list[Row] | None:
    """The rows of a finished output that a longer run keeps; None where it is complete as it is.

    Raises:
        InputError: The output was made with other settings or from other rows, and `--overwrite` is not given.
    """
    overwrite = job.config.overwrite
    if found.state is State.UNFINISHED and found.fingerprint is not None and not overwrite:
        require_same(job.files.final, found.fingerprint, job.fingerprint)
    if found.state is not State.FINISHED:
        return []
    problem = _difference(job, found.meta)
    if problem is not None:
        if not overwrite:
            raise problem
        return []
    more, failed = found.meta["rows"] - len(job.keys), found.meta["failed"]
    if more > 0 or (more == 0 and not failed):
        return None
    rows = job.finished_rows(found.meta)
    return None if more == 0 and failed <= len(job.impossible(job.answered(rows))) else rows


def _difference(job: RowJob, meta: Row) -> InputError | None:
    try:
        require_same(job.files.final, meta["fingerprint"], job.fingerprint)
    except InputError as error:
        return error
    count, items = meta["rows"], job.items
    if len(items) < count:
        beyond = job.items_beyond()
        if beyond is None:
            return None
        items = beyond
    if texts_sha256(items[:count]) != meta[job.files.items_key]:
        return InputError(f"{job.files.final} was made from different rows; --overwrite replaces it")
    return None


def _rows_of(job: RowJob, journal: Journal) -> Rows:
    """The usable rows of an earlier run.

    Raises:
        InputError: A row does not belong to this job, and `--overwrite` is not given.
    """
    rows = require_columns(journal.rows, job.columns, job.files.journal)
    there = job.by_key(row for row in rows if job.is_answered(row))
    dropped = len(there.keys() - set(job.keys))
    if dropped and not job.config.overwrite:
        raise InputError(
            f"the unfinished {job.files.final} has {dropped} rows that this run does not include (a smaller --limit?): "
            "finish it with its original settings, or discard them with --overwrite"
        )
    return job.answered(rows)


def _make(job: RowJob, keeper: EngineKeeper | None, journal: Journal, done: Rows) -> Figures:
    """Run the engine over the rows that are not done, adding them to `done` and to the journal."""
    if not job.pending(done):
        return Figures()
    total, there = len(job.keys), sum(key in done for key in job.keys)
    log.info("%s: %d of %d rows to %s with %s", job.name, total - there, total, job.verb, job.engine)
    clock = time.perf_counter()
    with kept_or_own(keeper) as kept_engine:
        engine = kept_engine.engine_for(job)
        started, before, count, tokens = time.perf_counter(), getattr(engine, "step_seconds", 0.0), 0, 0
        with closing(rows_progress(job.verb, total, there)) as progress:
            for rows in job.execute(engine, done):
                journal.append(rows)
                whole = [row for row in rows if not job.is_interim(row)]
                done |= job.by_key(whole)
                new_tokens = sum(job.tokens(row) for row in whole if job.is_answered(row))
                count, tokens = count + len(whole), tokens + new_tokens
                if whole:
                    progress.update(len(whole), new_tokens)
        return Figures(
            rows=count,
            tokens=tokens,
            engine_start_seconds=started - clock,
            seconds=time.perf_counter() - started,
            engine_step_seconds=getattr(engine, "step_seconds", 0.0) - before,
            repeatable=getattr(engine, "repeatable", False),
            versions=engine.versions(),
        )
