"""Bytes of files that are far away, fetched before they are read: several connections, in the order of reading.

Threads fetch blocks, runs of neighbouring bytes, into a fixed number of buffers. A block's buffer is free again once
all of it was read, so that memory does not grow with what is read, and no byte is fetched twice. What fetches a block
is given (`ranges.py`); nothing here knows of a network.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from expo.checkpoint.header import TensorInfo
from expo.errors import EnvironmentFailure

BLOCK_BYTES = 16 << 20
"""The most that one request asks for: with less, a fast link waits for answers to begin."""
BLOCKS = 12
"""How many blocks are in memory at once, 192 MiB."""
CONNECTIONS = 8
ARRIVAL_BYTES = 1 << 20
"""Readers are woken each time this much of a block has come."""


class Stopped(Exception):
    """What is being fetched is no longer wanted."""


class Fetch(Protocol):
    """Fetches a part of a file."""

    def __call__(
        self,
        file: Path,
        start: int,
        buffer: memoryview,
        on_bytes: Callable[[int], None],
        pause: Callable[[float], None],
    ) -> None:
        """Fill `buffer` from byte `start` of `file`.

        Args:
            file: The file.
            start: Its first byte that is wanted.
            buffer: Where the bytes go.
            on_bytes: Called with the number of bytes that are there; raises `Stopped` if no more are wanted.
            pause: Waits for some seconds; raises `Stopped` as well.

        Raises:
            ExpoError: They cannot be fetched.
        """


@dataclass(eq=False)
class _Block:
    number: int
    """Counts blocks in their order."""
    file: Path
    start: int
    nbytes: int
    untaken: list[tuple[int, int]] = field(init=False)
    """The parts that no reader has asked for yet, as positions in the file."""
    left: int = field(init=False)
    """Bytes that were not copied yet."""
    arrived: int = 0
    buffer: bytearray | None = None

    def __post_init__(self) -> None:
        self.untaken, self.left = [(self.start, self.start + self.nbytes)], self.nbytes

    def take(self, position: int, length: int) -> int:
        """Take bytes from `position` on; returns how many are this block's to give, at most `length`."""
        for number, (first, last) in enumerate(self.untaken):
            if first <= position < last:
                end = min(last, position + length)
                rest = [(first, position), (end, last)]
                self.untaken[number : number + 1] = [part for part in rest if part[0] < part[1]]
                return end - position
        return 0


class ReadAhead:
    """Reads files through `fetch`, in the order that `expect` was told; used by several threads.

    Args:
        fetch: Fetches a part of a file.
        connections: How many threads fetch.
        blocks: How many blocks are in memory at once.
        block_bytes: The size of a block.
    """

    def __init__(
        self, fetch: Fetch, connections: int = CONNECTIONS, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self._fetch = fetch
        self._block_bytes = block_bytes
        self._connections = connections
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._arrived, self._freed = threading.Condition(self._lock), threading.Condition(self._lock)
        """What readers wait for, and what fetching waits for: all are not woken for each other."""
        self._unread: list[_Block] = []
        """In the order in which they are read."""
        self._todo: deque[_Block] = deque()
        self._expected = 0
        self._unused = blocks
        self._free: list[bytearray] = []
        self._error: Exception | None = None
        self._ended = threading.Event()

    def expect(self, parts: Iterable[TensorInfo]) -> None:
        """Say what will be read next, each byte once, and in which order; fetching begins."""
        with self._lock:
            ranges = _cut(parts, self._block_bytes)
            blocks = [_Block(number, *cut) for number, cut in enumerate(ranges, self._expected)]
            self._expected += len(blocks)
            self._unread += blocks
            self._todo.extend(blocks)
            self._freed.notify_all()
        while blocks and len(self._threads) < self._connections:
            thread = threading.Thread(target=self._work, name=f"fetch {len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def read(self, file: Path, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `position` of the file; waits for bytes that have not come.

        Raises:
            ExpoError: They cannot be fetched.
        """
        for block, at, length in self._take(file, position, len(buffer)):
            first = at - block.start
            with self._lock:
                self._arrived.wait_for(lambda: self._error or block.arrived >= first + length)  # noqa: B023 - at once
                self._require_sound()
                assert block.buffer is not None
                content = memoryview(block.buffer)
            buffer[at - position : at - position + length] = content[first : first + length]
            self._finish(block, length)

    def _take(self, file: Path, position: int, length: int) -> list[tuple[_Block, int, int]]:
        """The blocks, in their order, that give these bytes: block, position of the first byte, how many.

        Where a tensor is read for two others, its bytes are in two blocks, each of which gives every byte once, to
        whoever comes first. So all are taken at once: else two readers might each wait for a block that is not fetched
        before the other one goes on.
        """
        taken, at = [], position
        with self._lock:
            self._require_sound()
            while at < position + length:
                block, given = self._first(file, at, position + length - at)
                taken.append((block, at, given))
                at += given
        return sorted(taken, key=lambda part: part[0].number)

    def _first(self, file: Path, position: int, length: int) -> tuple[_Block, int]:
        for block in self._unread:
            if block.file == file and (given := block.take(position, length)):
                return block, given
        raise RuntimeError(f"byte {position} of {file} is read and was not expected")

    def _finish(self, block: _Block, length: int) -> None:
        with self._lock:
            block.left -= length
            if block.left == 0 and block.buffer is not None:
                self._unread.remove(block)
                self._free.append(block.buffer)
                block.buffer = None
                self._freed.notify()

    def _require_sound(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the threads that fetch ---

    def _work(self) -> None:
        while (block := self._next()) is not None:
            try:
                self._fill(block)
            except Stopped:
                return
            except Exception as error:  # a reader raises it
                self._fail(error)
                return

    def _next(self) -> _Block | None:
        """The next block, with a buffer; None at the end."""
        with self._lock:
            self._freed.wait_for(lambda: self._ended.is_set() or (self._todo and (self._free or self._unused)))
            if self._ended.is_set():
                return None
            block = self._todo.popleft()
            if not self._free:
                self._unused -= 1
                self._free.append(bytearray(self._block_bytes))
            block.buffer = self._free.pop()
            return block

    def _fill(self, block: _Block) -> None:
        def on_bytes(number: int) -> None:
            if self._ended.is_set():
                raise Stopped
            if number - block.arrived >= ARRIVAL_BYTES or number == block.nbytes:
                with self._lock:
                    block.arrived = number
                    self._arrived.notify_all()

        assert block.buffer is not None
        content = memoryview(block.buffer)[: block.nbytes]
        self._fetch(block.file, block.start, content, on_bytes, self._pause)

    def _pause(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            raise Stopped

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            self._ended.set()
            self._arrived.notify_all()
            self._freed.notify_all()

    def stop(self) -> None:
        """Fetch nothing more; whoever waits for bytes gets an error."""
        self._fail(EnvironmentFailure("reading was stopped"))

    def close(self) -> None:
        """Stop. A thread that waits for a server ends when it has answered or its time is up."""
        self.stop()


def _cut(parts: Iterable[TensorInfo], block_bytes: int) -> Iterator[tuple[Path, int, int]]:
    """Neighbours joined, and cut to blocks: file, the first byte and how many."""
    for file, first, last in _joined(parts):
        for start in range(first, last, block_bytes):
            yield file, start, min(block_bytes, last - start)


def _joined(parts: Iterable[TensorInfo]) -> Iterator[tuple[Path, int, int]]:
    """Runs of neighbouring bytes: file, the first and the one after the last."""
    run: tuple[Path, int, int] | None = None
    for part in parts:
        if run is not None and run[0] == part.file and run[2] == part.start:
            run = (*run[:2], part.start + part.nbytes)
            continue
        if run is not None:
            yield run
        run = part.file, part.start, part.start + part.nbytes
    if run is not None:
        yield run
