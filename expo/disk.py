"""What a disk is asked for beside plain reads and writes: room and bytes in advance, and work in the background."""

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
"""Tasks that may wait; each may hold a file open."""

MOST_AHEAD_BYTES = 4 << 30
"""Of one `reading_ahead`; what a disk gives in the seconds that torch takes to load."""
AHEAD_STEP_BYTES = 32 << 20

NO_SUCH_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def preallocate(descriptor: int, nbytes: int) -> None:
    """Take a file's room on the disk before it is written, where the file system can do that cheaply.

    A full disk shows at once, and writing into room that is there is faster. `os.posix_fallocate` is not used, since
    where the file system has no such call the C library writes to every block instead.

    Raises:
        OSError: There is no room.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is None or nbytes == 0:
        return
    if call(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0 and ctypes.get_errno() not in NO_SUCH_CALL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def reading_ahead(files: Iterable[Path]) -> Iterator[None]:
    """Let the system read files into its cache, in order, while the body does something else; macOS cannot."""
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
        with suppress(OSError), file.open("rb") as stream:  # whoever reads them in earnest says what is wrong
            size = os.fstat(stream.fileno()).st_size
            for offset in range(0, min(size, left), AHEAD_STEP_BYTES):
                if ended.is_set():
                    return
                os.posix_fadvise(stream.fileno(), offset, AHEAD_STEP_BYTES, os.POSIX_FADV_WILLNEED)
            left -= min(size, left)


class Background:
    """Work for the disk that goes on beside the rest, in order; a context manager that ends when it is done.

    What goes wrong in it is raised by the next `submit`, or at the end.
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
        """Do this next; waits while much is pending."""
        with self._lock:
            while self._pending and (self._pending[0].done() or len(self._pending) >= MOST_PENDING):
                self._pending.popleft().result()
            self._pending.append(self._pool.submit(action, *arguments))

    def offer(self, action: Callable[..., object], *arguments: object) -> None:
        """Do this if nothing else is pending."""
        if all(task.done() for task in tuple(self._pending)):
            self.submit(action, *arguments)
