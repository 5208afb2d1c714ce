"""Running a plan: the engine yields rows as they finish, each durable before the next is waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.folder import read_json
from expo.config import GenerateConfig
from expo.durable import Row
from expo.engines import Generator, Key, load_generator
from expo.generate.decide import Plan, plan
from expo.generate.gather import Rows, answered, by_key, is_covered, require_same_cut, whole_rows
from expo.generate.rows import (
    RunFigures,
    failed_row,
    final_text,
    journal_rows,
    meta_of,
    old_rows,
    part_meta,
    part_text,
    sound,
)
from expo.generate.turns import Turn, turn_of, unanswerable
from expo.journal import Journal
from expo.progress import answers_progress
from expo.rows.files import refuse_dropping

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """What a run made."""

    output: Path
    meta: Path
    status: str
    """"written" or "already complete"."""
    rows: int
    failed: int


def run(config: GenerateConfig) -> Generated:
    """Generate every row that is not there yet.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call goes on with the rest.
    """
    return run_plan(plan(config))


def run_plan(work: Plan) -> Generated:
    """Generate every row of a plan, or of one part of it, that is not there yet."""
    kept = _kept_of_the_whole(work)
    if work.whole is not None and work.whole.files.finished() and is_covered(work, kept):
        whole = work.whole.files
        return Generated(whole.final, whole.meta, "already complete", len(work.keys), len(work.keys) - len(kept))
    journal = work.files.open(
        work.fingerprint,
        work.items,
        overwrite=work.config.overwrite,
        old_rows=lambda meta: old_rows(work, meta),
        hopeless=lambda meta: len(unanswerable(work, by_key(old_rows(work, meta)))),
    )
    if journal is None:
        meta = read_json(work.files.meta)
        return Generated(work.files.final, work.files.meta, "already complete", meta["rows"], meta["failed"])
    with work.files.holding(journal):
        done = answered(sound(journal.rows, work.files.journal))
        refuse_dropping(work.files.final, len(done.keys() - set(work.keys)), overwrite=work.config.overwrite)
        extends = bool(kept) or (bool(done) and work.files.final.exists())
        done |= kept
        run_figures, too_long = _generate(work, journal, done)
        done |= {key: failed_row(key, reason) for key, reason in too_long.items()}
        rows = [done[key] for key in work.keys]
        meta = meta_of(work, rows, run_figures, extends=extends)
        text = final_text(work, rows) if work.part is None else part_text(rows)
        work.files.finish(journal, text, meta if work.part is None else part_meta(work, meta, text), {})
    return Generated(work.files.final, work.files.meta, "written", len(rows), meta["failed"])


def _kept_of_the_whole(work: Plan) -> Rows:
    """The answers to a part's prompts that the whole output has already; refuses a run that is cut otherwise."""
    if work.whole is None or work.part is None:
        require_same_cut(work, None)
        return {}
    rows = whole_rows(work.whole)
    require_same_cut(work.whole, work.part.count)
    return {key: rows[key] for key in work.keys if key in rows}


def _generate(work: Plan, journal: Journal, done: Rows) -> tuple[RunFigures, dict[Key, str]]:
    """Run the engine over the rows that are not in `done`, turn by turn, adding them to it and to the journal.

    Returns:
        What it took, and which rows cannot be answered, and why.
    """
    before = set(done)
    too_long: dict[Key, str] = {}
    engine, clock, started = None, 0.0, 0.0
    for number in range(work.turns):
        turn = turn_of(work, number, done)
        too_long |= turn.too_long
        if all(request.key in done for request in turn.requests):
            continue
        if engine is None:
            _log_start(work, done)
            clock = time.perf_counter()
            engine = load_generator(work.engine)(work.setup)
            started = time.perf_counter()
        for rows in _finished_rows(turn, engine, work, done):
            journal.append(rows)
            done |= by_key(rows)
    if engine is None:
        return RunFigures(), too_long
    new = [row for key, row in done.items() if key not in before]
    figures = RunFigures(
        rows=len(new),
        tokens_out=sum(row["length"] for row in new),
        engine_start_seconds=started - clock,
        generate_seconds=time.perf_counter() - started,
        engine_step_seconds=engine.step_seconds,
        repeatable=engine.repeatable,
        versions=engine.versions(),
    )
    return figures, too_long


def _log_start(work: Plan, done: Rows) -> None:
    missing = [key for key in work.keys if key not in done and key not in work.first.too_long]
    log.info("%s: %d of %d rows to generate with %s", work.name, len(missing), len(work.keys), work.engine)


def _finished_rows(turn: Turn, engine: Generator, work: Plan, done: Rows) -> Iterator[list[Row]]:
    finished = set(done)
    progress = answers_progress(len(turn.requests), initial=sum(one.key in finished for one in turn.requests))
    try:
        for completions in engine.generate(turn.requests, finished):
            rows = journal_rows(work, completions)
            yield rows
            progress.update(len(rows), sum(row["length"] for row in rows))
    finally:
        progress.close()
