"""Joining the parts of a run: all are there and belong together, then one file and one meta file as one run makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from expo.arguments import shown
from expo.checkpoint.folder import read_json
from expo.config import GenerateConfig
from expo.durable import Row
from expo.errors import InputError, listed
from expo.generate.decide import Plan, plan, share
from expo.generate.gather import (
    MadePart,
    NotMade,
    Rows,
    answered,
    is_covered,
    read_part_file,
    remove_parts,
    require_same_cut,
    whole_rows,
)
from expo.generate.loop import Generated
from expo.generate.rows import RunFigures, failed_row, final_text, meta_of, old_rows
from expo.generate.turns import unanswerable
from expo.journal import Journal
from expo.parts import all_parts

PART_FIGURES = ("rows", "failed", "tokens_out", "engine_start_seconds", "generate_seconds", "tokens_per_second")
"""What the joined meta file repeats of each part's."""


def run(config: GenerateConfig) -> Generated:
    """Join the parts of a run.

    Raises:
        InputError: A part is missing, unfinished, damaged or made otherwise; nothing is changed.
        EnvironmentFailure: Writing failed; the parts are there still.
    """
    return join_parts(plan(config), config.join or 1)


def join_parts(whole: Plan, count: int) -> Generated:
    """Write the whole output from `count` parts and from what of it is there already; then remove the parts.

    Raises:
        InputError: A part is missing, unfinished, damaged or made otherwise; nothing is changed.
    """
    kept = whole_rows(whole)
    require_same_cut(whole, count)
    parts = _needed_parts(whole, count, kept)
    journal = whole.files.open(
        whole.fingerprint, whole.items, overwrite=whole.config.overwrite, old_rows=lambda meta: old_rows(whole, meta)
    )
    if journal is None:
        meta, status = read_json(whole.files.meta), "already complete"
    else:
        with whole.files.holding(journal):
            meta, status = _write(whole, journal, parts, kept), "written"
    remove_parts(whole)
    return Generated(whole.files.final, whole.files.meta, status, meta["rows"], meta["failed"])


def _write(whole: Plan, journal: Journal, parts: Sequence[MadePart], kept: Rows) -> Row:
    done: Rows = {}
    for part in parts:
        done |= part.rows
    done |= kept
    answers = answered(done.values())
    done |= {key: failed_row(key, reason) for key, reason in unanswerable(whole, answers).items()}
    rows = [done[key] for key in whole.keys]
    meta = meta_of(whole, rows, _figures(parts), extends=len(parts) > 1 or bool(kept))
    meta["parts"] = [{"part": part.meta["part"], **{key: part.meta[key] for key in PART_FIGURES}} for part in parts]
    whole.files.finish(journal, final_text(whole, rows), meta, {})
    return meta


def _figures(parts: Sequence[MadePart]) -> RunFigures:
    """What the run took: parts are made side by side, so it took as long as its slowest."""
    metas = [part.meta for part in parts]
    working = [meta for meta in metas if meta["rows_this_run"]]
    versions = [{name: text for name, text in meta["versions"].items() if name != "expo"} for meta in metas]

    def longest(key: str) -> float:
        return max((meta[key] for meta in metas), default=0.0)

    return RunFigures(
        rows=sum(meta["rows_this_run"] for meta in metas),
        tokens_out=round(sum(meta["tokens_per_second"] * meta["generate_seconds"] for meta in metas)),
        engine_start_seconds=longest("engine_start_seconds"),
        generate_seconds=longest("generate_seconds"),
        engine_step_seconds=longest("engine_step_seconds"),
        repeatable=bool(working) and all(meta["repeatable"] for meta in working) and _agree(versions),
        versions={name: text for one in reversed(versions) for name, text in one.items()},
    )


def _agree(versions: Sequence[Row]) -> bool:
    """Whether no two parts name different versions; a part that had nothing to generate names none."""
    return all(one == other for one in versions for other in versions if one and other)


def _needed_parts(whole: Plan, count: int, kept: Rows) -> list[MadePart]:
    """The parts that have an answer the output lacks.

    Raises:
        InputError: One of them cannot be joined; the message names those and the command that makes the first.
    """
    made, lacking = [], {}
    for part in all_parts(count):
        work = share(whole, part)
        if not is_covered(work, kept):
            try:
                made.append(read_part_file(work))
            except NotMade as reason:
                lacking[part] = str(reason)
    if lacking:
        first, *_ = lacking
        command = shown("generate", replace(whole.config, join=None, part=str(first)))
        parts = listed("", (f"{part} ({reason})" for part, reason in lacking.items()))[0].removeprefix(": ")
        raise InputError(f"{len(lacking)} of {count} parts cannot be joined yet: {parts}; to make one: {command}")
    return made
