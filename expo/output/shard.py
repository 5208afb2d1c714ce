"""One output file while it is written: pieces come in any order, and are written and hashed in sequence."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import xxhash

from expo.disk import Background, preallocate
from expo.errors import EnvironmentFailure
from expo.files import sync

FLUSH_BYTES = 256 << 20
"""A file is flushed to disk each time this much of it is written, so that little is left at its end."""


class StagedShard:
    """One output file being written; pieces arrive in any order and are written and hashed in sequence.

    Args:
        path: The staged file.
        header: Its first bytes.
        nbytes: Its final size; the disk space is allocated at once.
        fsync: Whether `finish` flushes it to disk.
        disk: Flushes what is written so far from time to time, in the background.

    Raises:
        EnvironmentFailure: The disk is full, or writing failed.
    """

    def __init__(
        self, path: Path, header: bytes, nbytes: int, *, fsync: bool = True, disk: Background | None = None
    ) -> None:
        self._path = path
        self._fsync = fsync
        self._disk = disk if fsync else None
        self._flushed = 0
        self._hash = xxhash.xxh3_128()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[int, memoryview, Callable[[], None]]] = {}
        self._turn = 0
        self._busy = False
        with self._explained(), ExitStack() as opening:
            self._stream: IO[bytes] = opening.enter_context(path.open("wb", buffering=0))
            preallocate(self._stream.fileno(), nbytes)
            self._append(0, memoryview(header))
            opening.pop_all()

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Take piece `number`, which belongs at `offset` in the file; `done` is called when `data` is free again.

        Called from several threads. The caller with the next piece writes it and all that wait behind it.

        Raises:
            EnvironmentFailure: The disk is full, or writing failed.
        """
        with self._lock:
            self._waiting[number] = (offset, data, done)
        while (piece := self._next()) is not None:
            offset, data, done = piece
            with self._explained():
                self._append(offset, data)
            done()
            with self._lock:
                self._turn += 1
                self._busy = False

    def _next(self) -> tuple[int, memoryview, Callable[[], None]] | None:
        with self._lock:
            if self._busy or self._turn not in self._waiting:
                return None
            self._busy = True
            return self._waiting.pop(self._turn)

    def _append(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._stream.fileno(), data[done:], offset + done)
        self._hash.update(data)
        if self._disk is not None and offset + done >= self._flushed + FLUSH_BYTES:
            self._flushed = offset + done
            self._disk.offer(sync, self._stream)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"writing {self._path} failed: {error.strerror}; rerun the same command to continue"
            raise EnvironmentFailure(message) from error

    def finish(self) -> str:
        """Make the file durable, close it, and return its checksum."""
        with self._explained():
            if self._fsync:
                sync(self._stream)
            self._stream.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._stream.close()
