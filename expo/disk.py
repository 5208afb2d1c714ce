"""Disk access beyond plain reads and writes: preallocation, read-ahead, and work in the background."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType

MOST_PENDING = 8
"""The maximum number of waiting tasks; each may hold a file open."""

MOST_AHEAD_BYTES = 4 << 30
"""For one `reading_ahead`: about what a disk reads in the seconds that importing torch takes."""
AHEAD_STEP_BYTES = 32 << 20

NO_SUCH_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def preallocate(descriptor: int, nbytes: int) -> None:
    """Allocate a file's blocks before it is written, where the file system can do that cheaply.

    A full disk is noticed at once, and writing to allocated blocks is faster. `os.posix_fallocate` is not used, since
    on a file system without that call the C library writes to every block instead.

    Raises:
        OSError: The disk is full.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is None or nbytes == 0:
        return
    if call(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0 and ctypes.get_errno() not in NO_SUCH_CALL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def reading_ahead(files: Iterable[Path]) -> Iterator[None]:
    """Have the system read files into its cache, in order, while the body does something else; not on macOS."""
    if not hasattr(os, "posix_fadvise"):
        yield
        return
    ended = Event()
    reader = Thread(target=_read_ahead, args=(files, ended), name="read ahead", daemon=True)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join()


def _read_ahead(files: Iterable[Path], ended: Event) -> None:
    left = MOST_AHEAD_BYTES
    for file in files:
        with suppress(OSError), file.open("rb") as stream:  # the code that needs the file reports what is wrong
            size = os.fstat(stream.fileno()).st_size
            for offset in range(0, min(size, left), AHEAD_STEP_BYTES):
                if ended.is_set():
                    return
                os.posix_fadvise(stream.fileno(), offset, AHEAD_STEP_BYTES, os.POSIX_FADV_WILLNEED)
            left -= min(size, left)


class Background:
    """Disk work that runs in a background thread, in order; a context manager that waits for it at the end.

    An error in it is raised by the next `submit`, or at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[object]] = deque()
        self._lock = Lock()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)
        for task in self._pending if kind is None else ():
            task.result()

    def submit(self, action: Callable[..., object], *arguments: object) -> None:
        """Queue a task; blocks while `MOST_PENDING` are waiting."""
        with self._lock:
            while self._pending and (self._pending[0].done() or len(self._pending) >= MOST_PENDING):
                self._pending.popleft().result()
            self._pending.append(self._pool.submit(action, *arguments))

    def offer(self, action: Callable[..., object], *arguments: object) -> None:
        """Queue a task only if none is pending."""
        if all(task.done() for task in tuple(self._pending)):
            self.submit(action, *arguments)
