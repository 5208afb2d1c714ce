"""Worker threads that take pieces of tensors, do something with each, and pass what they make of it to the sinks.

What is done with a piece is the caller's (`stream.py`); here is how pieces are cut, handed out, and kept in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._C import set_num_threads  # vLLM's CPU worker replaces torch's own by a warning

from expo.theta.buffers import TORCH_DTYPES, Lane, Outputs
from expo.theta.merge import CPU_TILE, tile_rows
from expo.theta.plan import Segment

PROGRESS_S = 0.1

T = TypeVar("T")


class Sink(Protocol):
    """Takes one output."""

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Take piece `number`, whose first byte belongs at `offset`; call `done` when `data` is no longer needed.

        Called from several threads, in any order; the numbers count from 0 without gaps, in order of offsets.
        """


class Piece(NamedTuple):
    """Some consecutive elements of one segment of a tensor."""

    segment: Segment
    first: int
    length: int
    """Elements, or bytes if the segment is handled as bytes."""
    offset: int
    """Of its first output byte, as the sinks count."""


Action: TypeAlias = Callable[[Piece, Lane, Sequence[Tensor]], T]
"""What is done with a piece, given where its outputs go."""


def unit_dtype(segment: Segment, dtype: str) -> torch.dtype:
    """The type one unit of a side with this dtype is read as."""
    return torch.uint8 if segment.is_raw else TORCH_DTYPES[dtype]


def pieces(segments: Iterable[tuple[Segment, int]], piece_bytes: int, tile: int = CPU_TILE) -> Iterator[Piece]:
    """Cut segments, each with the offset of its first output byte, into pieces.

    Args:
        segments: The segments to cut.
        piece_bytes: The maximum bytes of a piece on one side.
        tile: Elements of an adapter's ΔW that are multiplied at once; a piece is within one tile.
    """
    for segment, start in segments:
        sides = [segment.dtype, segment.dpo.dtype, *([segment.sft.dtype] if segment.sft else [])]
        sides += [step.tensor.dtype for step in segment.earlier]
        sides += ["F32"] if segment.low_rank or segment.earlier else []  # Δ
        step = piece_bytes // max(unit_dtype(segment, dtype).itemsize for dtype in sides)
        out_bytes = unit_dtype(segment, segment.dtype).itemsize
        for begin, end in _spans(segment, tile):
            for first in range(begin, end, step):
                yield Piece(segment, first, min(step, end - first), start + first * out_bytes)


def _spans(segment: Segment, tile: int) -> Iterator[tuple[int, int]]:
    if segment.low_rank is None:
        yield 0, segment.units
        return
    size = tile_rows(segment.low_rank, tile) * segment.low_rank.shape[1]
    yield from ((first, min(first + size, segment.units)) for first in range(0, segment.units, size))


class Workers:
    """Threads, each with buffers of its own.

    Args:
        lanes: Each worker's buffers.
        outputs: Sets of buffers for a piece's outputs; more than workers, so that writing goes on beside.
        stop: Called when one of them fails, so that none waits for bytes whose turn never comes.
    """

    def __init__(self, lanes: Sequence[Lane], outputs: Sequence[Outputs], stop: Callable[[], None]) -> None:
        self._lanes = lanes
        self._outputs = outputs
        self._stop = stop

    def each(
        self,
        action: Action[T],
        todo: Iterator[tuple[int, Piece]],
        sinks: Sequence[Sink],
        on_bytes: Callable[[int], object] | None = None,
    ) -> list[tuple[Segment, T]]:
        """Do something with each piece; what was found, in their order.

        Args:
            action: What is done.
            todo: The pieces with their numbers, in ascending order.
            sinks: Where each of a piece's outputs goes.
            on_bytes: Called from time to time, from this thread, with the number of new output bytes.
        """
        free: SimpleQueue[Outputs | None] = SimpleQueue()
        job = _Job(action, todo, sinks, free)
        for outputs in self._outputs:
            free.put(outputs)
        threads, reported = torch.get_num_threads(), 0
        pool = ThreadPoolExecutor(len(self._lanes), initializer=set_num_threads, initargs=(1,))
        try:
            running = {pool.submit(_work, job, lane) for lane in self._lanes}
            while running:
                ended, running = wait(running, PROGRESS_S, FIRST_EXCEPTION)
                for worker in ended:
                    worker.result()
                if on_bytes is not None and job.handled > reported:
                    on_bytes(job.handled - reported)
                    reported = job.handled
        except BaseException:
            self._stop()
            raise
        finally:
            job.stop(len(self._lanes))
            pool.shutdown(wait=True, cancel_futures=True)
            set_num_threads(threads)  # a worker's setting partly affects the whole process
        return [(segment, found) for _, segment, found in sorted(job.found, key=lambda entry: entry[0])]


class _Job(Generic[T]):
    """One pass over segments, shared by the workers."""

    def __init__(
        self,
        action: Action[T],
        todo: Iterator[tuple[int, Piece]],
        sinks: Sequence[Sink],
        free: SimpleQueue[Outputs | None],
    ) -> None:
        self.action = action
        self.sinks = sinks
        self.found: list[tuple[int, Segment, T]] = []
        self.handled = 0
        self._todo = todo
        self._free = free
        self._lock = threading.Lock()
        self._stopped = False

    def take(self) -> tuple[int, Piece, Outputs] | None:
        """The next piece with buffers for it; None if there is none, or the run was stopped."""
        # Buffers first: the worker with the lowest unfinished number can then always proceed.
        outputs = self._free.get()
        if outputs is None:
            return None
        with self._lock:
            number, piece = (None, None) if self._stopped else next(self._todo, (None, None))
        if number is None or piece is None:
            self._free.put(outputs)
            return None
        outputs.lend(self._free, len(self.sinks))
        return number, piece, outputs

    def note(self, number: int, piece: Piece, found: T, nbytes: int) -> None:
        """A piece is done."""
        with self._lock:
            self.found.append((number, piece.segment, found))
            self.handled += nbytes

    def stop(self, workers: int) -> None:
        """Stop handing out pieces."""
        self._stopped = True
        for _ in range(workers):
            self._free.put(None)


def _work(job: _Job[T], lane: Lane) -> None:
    with lane.running():
        while (task := job.take()) is not None:
            number, piece, outputs = task
            dtype = unit_dtype(piece.segment, piece.segment.dtype)
            nbytes = piece.length * dtype.itemsize
            buffers = outputs.buffers[: len(job.sinks)]
            places = [buffer.to_write_from(piece.offset, nbytes, dtype) for buffer in buffers]
            found = job.action(piece, lane, [tensor for tensor, _ in places])
            job.note(number, piece, found, nbytes * max(len(places), 1))
            for sink, (_, data) in zip(job.sinks, places, strict=True):
                sink.put(number, piece.offset, data, outputs.done)
