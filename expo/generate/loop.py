"""Running a plan: the engine yields rows as they finish, each durable before the next is waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expo.backends import Generator, load_generator
from expo.checkpoint import read_json
from expo.config import GenerateConfig
from expo.generate.decide import Plan, plan
from expo.generate.rows import RunFigures, failed_row, final_text, journal_rows, meta_of, old_rows
from expo.progress import answers_progress
from expo.store import Journal, Row

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
    work = plan(config)
    journal = work.files.open(
        work.fingerprint,
        work.items,
        overwrite=config.overwrite,
        old_rows=lambda meta: old_rows(work, meta),
        hopeless=len(work.too_long),
    )
    if journal is None:
        meta = read_json(work.files.meta)
        return Generated(work.files.final, work.files.meta, "already complete", meta["rows"], meta["failed"])
    with work.files.holding(journal):
        done = {(row["id"], row["sample"]): row for row in journal.rows if row["finish_reason"] != "error"}
        extends = bool(done) and work.files.final.exists()
        run_figures = _generate(work, journal, done)
        done |= {key: failed_row(key, reason) for key, reason in work.too_long.items()}
        rows = [done[key] for key in work.keys]
        meta = meta_of(work, rows, run_figures, extends=extends)
        work.files.finish(journal, final_text(work, rows), meta, {})
    return Generated(work.files.final, work.files.meta, "written", len(rows), meta["failed"])


def _generate(work: Plan, journal: Journal, done: dict[tuple[str, int], Row]) -> RunFigures:
    """Run the engine over the rows that are not in `done`, adding them to it and to the journal."""
    missing = [request for request in work.requests if request.key not in done]
    if not missing:
        return RunFigures()
    log.info("%s: %d of %d rows to generate with %s", work.name, len(missing), len(work.keys), work.engine)
    clock = time.perf_counter()
    engine = load_generator(work.engine)(work.setup)
    started = time.perf_counter()
    tokens_out = 0
    for rows in _finished_rows(work, engine, done):
        journal.append(rows)
        done |= {(row["id"], row["sample"]): row for row in rows}
        tokens_out += sum(row["length"] for row in rows)
    return RunFigures(
        rows=len(missing),
        tokens_out=tokens_out,
        engine_start_seconds=started - clock,
        generate_seconds=time.perf_counter() - started,
        engine_step_seconds=engine.step_seconds,
        repeatable=engine.repeatable,
        versions=engine.versions(),
    )


def _finished_rows(work: Plan, engine: Generator, done: dict[tuple[str, int], Row]) -> Iterator[list[Row]]:
    progress = answers_progress(len(work.requests), initial=len(done))
    try:
        for completions in engine.generate(work.requests, set(done)):
            yield journal_rows(work, completions)
            progress.update(len(completions), sum(len(one.token_ids) for one in completions))
    finally:
        progress.close()
