"""A journal: rows that are durable as soon as they are appended, with one writer at a time.

Unfinished work is in a journal, under a hidden name, so that a rerun finds it and nobody mistakes it for a result.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from expo.durable import Row, json_lines, sync
from expo.errors import EnvironmentFailure, InputError
from expo.lock import RunLock

LOCK_SUFFIX = ".lock"
"""Of the link beside a journal that names the process writing it."""


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
        is_empty: Whether there are no rows, old or new.

    Raises:
        InputError: Another process is writing this output.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, header: Row, *, sync_every_s: float = 0.0) -> None:
        self._path = path
        self._sync_every_s = sync_every_s
        self._synced_at = -math.inf
        self._stream = path.open("a", encoding="utf-8")
        try:
            self._lock = RunLock(path.with_name(path.name + LOCK_SUFFIX), alone_here=_alone_here(self._stream, path))
        except BaseException:
            self._stream.close()
            raise
        try:
            self._start(header)
        except BaseException:
            self._stream.close()
            self._lock.release()
            raise

    def _start(self, header: Row) -> None:
        lines = read_journal(self._path)
        kept = lines if lines and lines[0].get("fingerprint") == header.get("fingerprint") else []
        self._stream.truncate(len(json_lines(kept).encode()))
        self.rows = kept[1:]
        self.is_empty = not self.rows
        if not kept:
            self.append([header])
            self.is_empty = True

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
            self._stream.write(json_lines(rows))
            self._stream.flush()
            self._lock.beat()
            if time.monotonic() - self._synced_at >= self._sync_every_s:
                sync(self._stream)
                self._synced_at = time.monotonic()
        except OSError as error:
            raise EnvironmentFailure(f"writing {self._path} failed: {error.strerror}") from error


def _alone_here(stream: IO[str], path: Path) -> bool:
    """Whether `flock` shows that no other process on this machine holds the file; False where it does not work."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another run is writing {path.parent}; wait for it, or choose another output") from error
    except OSError:
        return False
    return True


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
        raise InputError(f"{path} is damaged: remove it to start anew")
    return fingerprint
