"""Files that are whole or absent: atomic writes, durable journals, and fingerprints to compare.

A final name only ever appears by `os.replace` of a file that is complete and on the disk. What is in progress
lives under a hidden or `.partial` name, so that a rerun finds it and nobody else loads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from expo.errors import EnvironmentFailure, InputError

Row = dict[str, Any]


def write_atomic(path: Path, text: str, *, fsync: bool = True) -> None:
    """Write a text file so that `path` holds the old content or the new one, never a part.

    Raises:
        EnvironmentFailure: Writing failed; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            if fsync:
                sync(stream)
        os.replace(temporary, path)
        if fsync:
            sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFailure(f"writing {path} failed: {error.strerror}") from error


def sync(stream: IO[Any]) -> None:
    """Force a file's content to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(row: object) -> str:
    """One JSON value on one line, text as it is (not escaped)."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def json_lines(rows: Iterable[object]) -> str:
    """One JSON value a line."""
    return "".join(map(json_line, rows))


class Journal:
    """Rows appended as they are finished; a context manager that only one process at a time can hold.

    The first line is the header (with a fingerprint), each further line one row. A line torn by a crash is cut
    off when the journal is opened again.

    Args:
        path: The journal's file.
        header: Written first into a new journal.

    Attributes:
        rows: What an earlier run under the same fingerprint left; rows under another one are dropped.

    Raises:
        InputError: Another process is writing this output.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, header: Row) -> None:
        self._path = path
        self._stream = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise InputError(f"another run is writing {path.parent}; wait for it, or choose another output") from error
        lines = read_journal(path)
        kept = lines if lines and lines[0].get("fingerprint") == header.get("fingerprint") else []
        self._stream.truncate(len(json_lines(kept).encode()))
        self.rows = kept[1:]
        if not kept:
            self.append([header])

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing is lost, every row is on the disk."""
        self._stream.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Add finished rows and force them to the disk.

        Raises:
            EnvironmentFailure: Writing failed; the rows before are kept.
        """
        try:
            self._stream.write(json_lines(rows))
            sync(self._stream)
        except OSError as error:
            raise EnvironmentFailure(f"writing {self._path} failed: {error.strerror}") from error


def read_journal(path: Path) -> list[Row]:
    """A journal's whole lines, header first; empty where there is no journal."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def require_same(what: Path, old: Row, new: Row, *, advice: str = "--overwrite replaces it") -> None:
    """Refuse an output made with other settings.

    Raises:
        InputError: The fingerprints differ; the message names the first setting that does.
    """
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if before != now:
            shown = "" if isinstance(now, dict) or isinstance(before, dict) else f" ({before!r} then, {now!r} now)"
            raise InputError(f"{what} was made with another {key.replace('_', '-')}{shown}; {advice}")


def texts_sha256(texts: Iterable[object]) -> str:
    """SHA-256 over JSON values, one a line; equal for equal prompts wherever they came from."""
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(json_line(text).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()
