"""The one loop that runs a row job, and what is left for it to do.

Rows are recorded as the engine finishes them, each durable before it waits for the next; the final files are written
when all are there.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing

from expo.errors import InputError
from expo.files import Row, json_lines, texts_sha256
from expo.journal import Journal
from expo.progress import rows_progress
from expo.rows.files import Found, State, checksum, require_columns
from expo.rows.job import Done, Figures, RowJob, Rows
from expo.rows.keeper import EngineKeeper, kept_or_own
from expo.settings import require_same

log = logging.getLogger(__name__)


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
