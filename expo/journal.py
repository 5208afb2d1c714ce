"""A journal: rows that are durable as they are appended, for one writer at a time.

What is in progress is in a journal, under a hidden name, so that a rerun finds it and nobody takes it for a result.
Beside it is the lock of its writer, also where `flock` has no effect, as on some network file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, json_lines, sync, sync_folder
from expo.locks import RunLock, alone_here, lock_of

KEPT = "kept"
"""The header's entry that says how many of the first rows a finished output has, too."""


class Journal:
    """Rows appended as they are finished; a context manager that one process at a time can hold.

    The first line is the header (with a fingerprint), each further line is one row. A line that a crash left incomplete
    is removed when the journal is next opened.

    Args:
        path: The journal's file.
        header: Written first into a new journal.
        sync_every_s: Rows are flushed to disk at most this often, and always when the journal is closed.

    Attributes:
        rows: Those of an earlier run with the same fingerprint; rows with another one are dropped.
        kept: How many of them, the first ones, are a finished output's, with which it was begun.
        is_empty: Whether there are no rows, old or new.

    Raises:
        InputError: Another process is writing this output.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, header: Row, *, sync_every_s: float = 0.0) -> None:
        self._path = path
        self._sync_every_s = sync_every_s
        self._synced_at = -math.inf
        self._header = header
        while not self._take():
            pass
        try:
            self._start()
        except BaseException:
            self._stream.close()
            self._lock.release()
            raise

    def _take(self) -> bool:
        """Open the file and lock it; False where its name was given to another file, or to none, before that."""
        self._stream = self._path.open("a", encoding="utf-8")
        try:
            self._lock = RunLock(lock_of(self._path), alone_here=alone_here(self._stream, self._path))
        except BaseException:
            self._stream.close()
            raise
        if _is_at(self._path, self._stream):
            return True
        self._stream.close()
        self._lock.release()
        return False

    def _start(self) -> None:
        lines = read_journal(self._path)
        usable = lines if lines and lines[0].get("fingerprint") == self._header.get("fingerprint") else []
        self._stream.truncate(len(json_lines(usable).encode()))
        self.rows = usable[1:]
        self.kept = kept_rows(usable)
        self.is_empty = not self.rows
        if not usable:
            self.append([self._header])
            self.is_empty = True

    def begin(self, rows: Sequence[Row]) -> None:
        """Start anew with a finished output's rows: whenever the process is killed, all of them are here, or none.

        Raises:
            EnvironmentFailure: Writing failed; the journal is as it was, or has the rows.
        """
        temporary = self._path.with_name(f"{self._path.name}.partial")
        try:
            with contextlib.ExitStack() as at_fault:
                stream = at_fault.enter_context(temporary.open("w", encoding="utf-8"))
                with contextlib.suppress(OSError):  # where it does not work, the link alone is the lock
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stream.write(json_lines([{**self._header, KEPT: len(rows)}, *rows]))
                sync(stream)
                os.replace(temporary, self._path)
                sync_folder(self._path.parent)
                at_fault.pop_all()
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise EnvironmentFailure(f"writing {self._path} failed: {error.strerror}") from error
        self._stream.close()
        self._stream, self.rows, self.kept, self.is_empty = stream, list(rows), len(rows), not rows

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush the rows to disk and release the journal for the next process."""
        if self._stream.closed:
            return
        try:
            sync(self._stream)
        finally:
            self._stream.close()
            self._lock.release()

    def append(self, rows: Sequence[Row]) -> None:
        """Add finished rows; a killed process loses none, a crashed machine those of the last `sync_every_s`.

        Raises:
            EnvironmentFailure: Writing failed; earlier rows are kept.
        """
        self.is_empty = False
        try:
            is_due = time.monotonic() - self._synced_at >= self._sync_every_s
            if is_due:
                self._lock.require_held()
            self._stream.write(json_lines(rows))
            self._stream.flush()
            self._lock.beat()
            if is_due:
                sync(self._stream)
                self._synced_at = time.monotonic()
        except OSError as error:
            raise EnvironmentFailure(f"writing {self._path} failed: {error.strerror}") from error


def _is_at(path: Path, stream: IO[str]) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def kept_rows(lines: Sequence[Row]) -> int:
    """How many of a journal's first rows a finished output has, too; its lines are given with the header."""
    count = lines[0].get(KEPT) if lines else None
    return min(count, len(lines) - 1) if isinstance(count, int) else 0


def read_journal(path: Path) -> list[Row]:
    """A journal's complete lines, header first; empty where there is no journal."""
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


def header_fingerprint(path: Path, lines: Sequence[Row]) -> Row:
    """The fingerprint of the settings and inputs that a journal's rows were made with.

    Args:
        path: The journal's file.
        lines: Its lines, the header first.

    Raises:
        InputError: The header has none.
    """
    fingerprint = lines[0].get("fingerprint")
    if not isinstance(fingerprint, dict):
        raise InputError(f"{path} is damaged: remove it to start over")
    return fingerprint
