"""The one loop that runs a row job, and what is left for it to do.

Rows are recorded as the engine finishes them, each durable before it waits for the next; the final files are written
when all are there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from expo.errors import InputError
from expo.files import Row, json_lines, texts_sha256
from expo.journal import Journal
from expo.progress import rows_progress
from expo.rows.files import Found, State, checksum, require_columns
from expo.rows.job import Done, Figures, Key, RowJob, Rows
from expo.rows.keeper import EngineKeeper, kept_or_own
from expo.settings import require_same

log = logging.getLogger(__name__)


def run_rows(job: RowJob, kept: Rows, keeper: EngineKeeper | None = None) -> Done:
    """Produce every missing row of a job, or of one part of it; as `steps_of_rows`."""
    steps = steps_of_rows(job, kept, keeper)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            done: Done = ended.value
            return done


def steps_of_rows(job: RowJob, kept: Rows, keeper: EngineKeeper | None = None) -> Generator[None, None, Done]:
    """Produce every missing row of a job, or of one part of it, a few with each step.

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
    if rows_to_extend(job, found) is None:
        return Done(job, found.meta, "already complete")
    if job.date is not None and job.date.closed is not None:
        raise InputError(job.date.closed)
    journal = job.files.open_journal(job.fingerprint)
    with job.files.holding(journal):
        if journal.is_empty:  # what another run may have written until it was locked counts, too
            found = job.files.require_own()
            old = rows_to_extend(job, found)
            if old is None:
                return Done(job, found.meta, "already complete")
            if old:
                journal.begin(old)
        left = sort_rows(job, require_columns(journal.rows, job.columns, job.files.journal), journal.kept)
        job, done = left.job, left.done
        extends = bool(kept) or (bool(done or left.beside) and job.files.final.exists())
        done |= kept
        figures = yield from _make(job, keeper, journal, done)
        job.require_sound(done)
        done |= job.impossible(done)
        output, rows = left.output(done)
        meta = output.meta_of(rows, figures, extends=extends)
        if job.part is None:
            job.files.finish(journal, output.render(rows), meta)
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
    """The rows of a finished output that a run with further rows keeps; None where it is complete as it is.

    Raises:
        InputError: The output was made with other settings or from other rows, and `--overwrite` is not given.
    """
    overwrite = job.config.overwrite
    if found.state is State.UNFINISHED and found.fingerprint is not None and not overwrite:
        require_same(job.files.final, found.fingerprint, job.fingerprint)
    if found.state is not State.FINISHED:
        return []
    try:
        there = keys_in(job, found.meta)
    except InputError:
        if not overwrite:
            raise
        return []
    asked, failed = set(job.keys), found.meta["failed"]
    lacks, has_more = not asked.issubset(there), not asked.issuperset(there)
    if not lacks and (has_more or not failed):
        return None
    rows = job.finished_rows(found.meta, there)
    return None if not lacks and failed <= len(job.impossible(job.answered(rows))) else rows


# --- which rows are there -----------------------------------------------------------------------------------------


def keys_in(job: RowJob, meta: Row) -> Sequence[Key]:
    """Which rows a finished output has, in its order: those that its files name, or, of older files, the first ones.

    Raises:
        InputError: The output was made with other settings, or from other rows.
    """
    require_same(job.files.final, meta["fingerprint"], job.fingerprint)
    for keys, of in _candidates(job, meta):
        item_of = dict(zip(of.keys, of.items, strict=True))
        is_known = len(keys) == meta["rows"] and all(key in item_of for key in keys)
        if is_known and texts_sha256(item_of[key] for key in keys) == meta[job.files.items_key]:
            return keys
    raise InputError(f"{job.files.final} was made from different rows; --overwrite replaces it")


def _candidates(job: RowJob, meta: Row) -> Iterator[tuple[Sequence[Key], RowJob]]:
    """The rows that an output may have, each with a job that has them."""
    named = job.finished_keys(meta)
    if named is not None:
        yield named, job if set(job.keys).issuperset(named) else job.everything()
    yield job.keys[: meta["rows"]], job
    whole = job.everything()
    yield whole.keys[: meta["rows"]], whole


@dataclass(frozen=True)
class Left:
    """What earlier runs have left for a job."""

    job: RowJob
    """The job, with rows that it does not ask for but goes on with, since they were begun."""
    done: Rows
    """Its rows that need not be produced again."""
    beside: Rows
    """Further rows of the output, which stay in it as they are."""

    def output(self, rows: Rows) -> tuple[RowJob, list[Row]]:
        """All rows of the output in its order, of the job and beside it, and the job to write them."""
        job = self.job.covering([*self.beside, *rows])
        outdated = {key for key, row in self.beside.items() if not job.is_current(row)}
        if outdated:
            job = self.job.covering([*(self.beside.keys() - outdated), *rows])
        together = self.beside | rows
        return job, [together[key] for key in job.keys]


def sort_rows(job: RowJob, rows: Sequence[Row], kept: int) -> Left:
    """Tell the rows that an earlier run has left.

    Args:
        job: What to do now.
        rows: Of the journal, or of a finished output.
        kept: How many of them, the first ones, are a finished output's.

    Raises:
        InputError: A row does not belong to this job, and `--overwrite` is not given.
    """
    asked = set(job.keys)
    answered = job.by_key(row for row in rows if job.is_answered(row))
    beside = {key: row for key, row in job.by_key(rows[:kept]).items() if key not in asked}
    if beside:
        known = set(job.everything().keys)
        beside = {key: answered.get(key, row) for key, row in beside.items() if key in known}
    begun = answered.keys() - asked - beside.keys()
    if begun and job.takes_in(begun):
        job = job.covering(begun)
        asked = set(job.keys)
        beside = {key: row for key, row in beside.items() if key not in asked}
    elif begun and not job.config.overwrite:
        raise InputError(
            f"the unfinished {job.files.final} has {len(begun)} rows that this run does not include (a smaller "
            "--limit?): finish it with its original settings, or discard them with --overwrite"
        )
    done = {key: row for key, row in job.answered(rows).items() if key in asked}
    return Left(job, done, beside)


def left_of(job: RowJob) -> Left:
    """What the output has, finished or not.

    Raises:
        InputError: The output was made with other settings or from other rows, and `--overwrite` is not given; or it is
            damaged.
    """
    found = job.files.require_own()
    if found.fingerprint is None:
        return Left(job, {}, {})
    try:
        require_same(job.files.final, found.fingerprint, job.fingerprint)
        there = keys_in(job, found.meta) if found.state is State.FINISHED else None
    except InputError:
        if not job.config.overwrite:
            raise
        return Left(job, {}, {})
    if there is None:
        return sort_rows(job, require_columns(found.journal, job.columns, job.files.journal), found.kept)
    rows = job.finished_rows(found.meta, there)
    return sort_rows(job, rows, len(rows))


def _make(job: RowJob, keeper: EngineKeeper | None, journal: Journal, done: Rows) -> Generator[None, None, Figures]:
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
                if rows:
                    journal.append(rows)
                whole = [row for row in rows if not job.is_interim(row)]
                done |= job.by_key(whole)
                new_tokens = sum(job.tokens(row) for row in whole if job.is_answered(row))
                count, tokens = count + len(whole), tokens + new_tokens
                if whole:
                    progress.update(len(whole), new_tokens)
                yield
        step_seconds = getattr(engine, "step_seconds", 0.0) - before
        return Figures(
            rows=count,
            tokens=tokens,
            engine_start_seconds=started - clock,
            seconds=step_seconds if kept_engine.is_shared else time.perf_counter() - started,
            engine_step_seconds=step_seconds,
            repeatable=getattr(engine, "repeatable", False),
            versions=engine.versions(),
        )
