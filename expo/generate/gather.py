"""What is there of a run in parts: rows of the whole output, of finished parts and of parts that are being made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expo.durable import Row, texts_sha256
from expo.engines import Key
from expo.errors import InputError
from expo.fingerprint import require_same
from expo.generate.decide import Plan
from expo.generate.rows import old_rows, row_key, sound
from expo.generate.turns import turns_of
from expo.journal import LOCK_SUFFIX, header_fingerprint, read_journal
from expo.lock import RunLock
from expo.parts import FILE_NAME, counts_in, folder_name
from expo.rows.files import RowFiles

Rows = dict[Key, Row]
"""Row key → row."""


@dataclass(frozen=True)
class MadePart:
    """A part that is finished."""

    work: Plan
    meta: Row
    rows: Rows


def by_key(rows: Iterable[Row]) -> Rows:
    """Rows under their keys."""
    return {row_key(row): row for row in rows}


def answered(rows: Iterable[Row]) -> Rows:
    """The rows that did not fail."""
    return by_key(row for row in rows if row["finish_reason"] != "error")


def whole_rows(whole: Plan) -> Rows:
    """The answers that the whole output has, finished or not; a part does not make them again.

    Raises:
        InputError: The output is there, was made with other settings, and `--overwrite` is not given.
    """
    meta = whole.files.finished()
    journal = read_journal(whole.files.journal) if meta is None else []
    if meta is None and len(journal) < 2:
        return {}
    fingerprint = header_fingerprint(whole.files.journal, journal) if meta is None else meta["fingerprint"]
    if fingerprint != whole.fingerprint:
        if not whole.config.overwrite:
            require_same(whole.files.final, fingerprint, whole.fingerprint)
        return {}
    return answered(old_rows(whole, meta) if meta else sound(journal[1:], whole.files.journal))


def is_covered(work: Plan, rows: Rows) -> bool:
    """Whether all that a part can answer is among the rows."""
    return all(request.key in rows for turn in turns_of(work, rows) for request in turn.requests)


def parts_folder(whole: Plan) -> Path:
    """Where the parts of a run lie until they are joined."""
    return whole.files.final.parent / folder_name(whole.name)


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def require_same_cut(whole: Plan, count: int | None) -> None:
    """Refuse to go on with a run that was begun in another number of parts.

    Args:
        whole: The run.
        count: N; None for a run in one piece, which an output that is whole already does not hinder.

    Raises:
        InputError: There are parts of another number.
    """
    folder = parts_folder(whole)
    others = counts_in(_names_in(folder)) - {count}
    if not others or whole.config.overwrite:
        return
    meta = whole.files.finished()
    if count is None and meta is not None and meta["rows"] >= len(whole.keys):
        return
    there = min(others)
    now = f", not of {count}" if count else ""
    raise InputError(
        f"{folder} holds parts of {there}{now}: go on with --part i/{there} or --data-parallel {there} and --join "
        f"{there}, or start anew with --overwrite"
    )


class NotMade(Exception):
    """A part is not finished, or not as it was when it was; the text says in a few words what is the matter."""


def read_part_file(work: Plan) -> MadePart:
    """A finished part, checked.

    Raises:
        NotMade: It is not there, not finished, or damaged.
        InputError: It was made with other settings or from other prompts.
    """
    _require_ended(work.files)
    meta, text = _meta(work.files), _text(work.files)
    require_same(work.files.final, meta["fingerprint"], work.fingerprint, advice="--part with --overwrite replaces it")
    if sha256(text).hexdigest() != meta.get("rows_sha256"):
        raise NotMade(f"damaged, remove {work.files.final}")
    expected, there = len(work.keys), meta["rows"]
    if there > expected:
        raise InputError(f"{work.files.final} has {there} rows, made with a larger --limit; join with that one")
    if texts_sha256(work.items[:there]) != meta[work.files.items_key]:
        raise InputError(f"{work.files.final} was made from other prompts; --part with --overwrite replaces it")
    if there < expected:
        raise NotMade(f"unfinished, {there} of {expected} rows")
    return MadePart(work, meta, by_key(map(json.loads, text.splitlines())))


def _require_ended(files: RowFiles) -> None:
    if files.journal.exists():
        if is_held(files):
            raise NotMade("still running")
        raise NotMade(f"unfinished, {max(0, len(read_journal(files.journal)) - 1)} rows")


def _meta(files: RowFiles) -> Row:
    if not files.meta.exists():
        raise NotMade(f"without its meta file, remove {files.final}" if files.final.exists() else "not begun")
    try:
        meta = json.loads(files.meta.read_bytes())
    except ValueError:
        meta = None
    if not files.is_meta(meta):
        raise NotMade(f"damaged, remove {files.meta} and {files.final.name}")
    return dict(meta)


def _text(files: RowFiles) -> bytes:
    try:
        return files.final.read_bytes()
    except FileNotFoundError:
        raise NotMade("without its file") from None


def is_held(files: RowFiles) -> bool:
    """Whether a run is writing these rows now, or may be."""
    lock = _lock(files)
    if lock is not None:
        lock.release()
    return lock is None


def _lock(files: RowFiles) -> RunLock | None:
    try:
        return RunLock(files.journal.with_name(files.journal.name + LOCK_SUFFIX), alone_here=False)
    except InputError:
        return None


def remove_parts(whole: Plan) -> None:
    """Remove the parts whose answers are all in the finished output, and the folder when it is empty.

    A part that is being made, or has an answer that the output has not, stays; with `--overwrite` one that was made
    with other settings goes.
    """
    folder = parts_folder(whole)
    stems = {found[1] for found in map(FILE_NAME.fullmatch, _names_in(folder)) if found}
    rows = whole_rows(whole) if stems else {}
    for stem in sorted(stems):
        files = RowFiles(folder / f"{stem}.jsonl", stem, whole.files.items_key)
        lock = _lock(files)
        if lock is not None:
            try:
                _remove_part(whole, files, rows)
            finally:
                lock.release()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_part(whole: Plan, files: RowFiles, rows: Rows) -> None:
    header, *begun = read_journal(files.journal) or [{}]
    there = [*read_journal(files.final), *begun]
    keys = {row_key(row) for row in there if row.get("finish_reason") != "error"}
    if keys <= rows.keys() or (whole.config.overwrite and _fingerprint(files, header) != whole.fingerprint):
        for path in (files.journal, files.final, files.meta):
            path.unlink(missing_ok=True)


def _fingerprint(files: RowFiles, journal_header: Row) -> object:
    if journal_header:
        return journal_header["fingerprint"]
    with contextlib.suppress(NotMade):
        return _meta(files)["fingerprint"]
    return None
