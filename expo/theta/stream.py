"""The stream of θ(α) pieces that executes a pair's plan.

Used by the checkpoint writer and anything else that needs θ(α): worker threads take pieces of about 1 MiB, which fit
the processor's cache, read them, combine them, and pass each to the sinks. So memory does not grow with the
model, nor with its largest tensor. On a GPU each worker has its own stream and pinned buffers, and the reads,
copies, arithmetic and writes of different workers overlap.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._C import set_num_threads  # vLLM's CPU worker replaces torch's own by a warning

from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.checkpoint.read_ahead import ReadAhead
from expo.cpus import usable_cpus
from expo.errors import EnvironmentFailure, InputError
from expo.theta.adapter.tensors import Adapter, LowRank
from expo.theta.buffers import PAGE, TORCH_DTYPES, HostBuffer, Lane, Outputs
from expo.theta.merge import CPU_TILE, CUDA_TILE, Deltas, tile_rows
from expo.theta.norms import (
    Norms,
    Scratch,
    add_difference,
    delta_norms,
    equal_infinities,
    is_finite,
    keep_equal,
    pair_norms,
    sampled_norms,
    stays_finite,
    wider,
)
from expo.theta.plan import PairSettings, Segment
from expo.theta.rules import find_rule

CPU_PIECE_BYTES = 1 << 20
CUDA_PIECE_BYTES = 4 << 20
MAX_OUTPUT_BYTES = 64 << 20
"""Limit for all output buffers together; with very many α the pieces become smaller."""
PROGRESS_S = 0.1
MAX_DEFAULT_WORKERS = 4


def default_workers() -> int:
    """The default of `--workers`: the number of CPUs available to this process, at most four."""
    return min(MAX_DEFAULT_WORKERS, usable_cpus())


class Sink(Protocol):
    """Takes one output."""

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Take piece `number`, whose first byte belongs at `offset`; call `done` when `data` is no longer needed.

        Called from several threads, in any order; the numbers count from 0 without gaps, in order of offsets.
        """


MakeTheta: TypeAlias = Callable[[float, Tensor], Tensor]
"""Computes θ(α) of a piece: (α, out) → out."""


class Piece(NamedTuple):
    """Some consecutive elements of one segment of a tensor."""

    segment: Segment
    first: int
    length: int
    """Elements, or bytes if the segment is handled as bytes."""
    offset: int
    """Of its first output byte, as the sinks count."""


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
        sides += ["F32"] if segment.low_rank else []  # ΔW
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


class SourceFiles:
    """Open weight files, read at offsets; a context manager.

    Of files that stay on the hub, only what `expect` was told can be read, and it is fetched in that order.
    """

    def __init__(self, *checkpoints: Checkpoint | Adapter) -> None:
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._descriptors: dict[Path, int] = {}
            self._remote: dict[Path, ReadAhead] = {}
            for checkpoint in checkpoints:
                files = [shard.file for shard in checkpoint.shards]
                if isinstance(checkpoint, Checkpoint) and checkpoint.open_remote is not None:
                    self._remote |= dict.fromkeys(files, opening.enter_context(closing(checkpoint.open_remote())))
                    continue
                for file in files:
                    descriptor = os.open(file, os.O_RDONLY)
                    opening.callback(os.close, descriptor)
                    self._descriptors[file] = descriptor
            self._stack = opening.pop_all()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expect(self, segments: Sequence[Segment]) -> None:
        """Say what will be read next, and in which order."""
        for remote in set(self._remote.values()):
            infos = (segment.sft for segment in segments if segment.sft is not None)
            remote.expect(info for info in infos if self._remote.get(info.file) is remote)

    def stop(self) -> None:
        """Whoever waits for bytes of a file on the hub gets an error."""
        for remote in self._remote.values():
            remote.stop()

    def read(self, file: Path, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `position` of the file.

        Raises:
            EnvironmentFailure: The file cannot be read, or was truncated.
        """
        if remote := self._remote.get(file):
            remote.read(file, position, buffer)
            return
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptors[file], [buffer[done:]], position + done)
            except OSError as error:
                raise EnvironmentFailure(f"reading {file} failed: {error.strerror}") from error
            if got == 0:
                raise EnvironmentFailure(f"{file} became shorter while it was read")
            done += got


class _Job:
    """One run of the combiner, shared by its workers."""

    def __init__(self, todo: Iterator[Piece], sinks: Sequence[Sink], free: SimpleQueue[Outputs | None]) -> None:
        self.sinks = sinks
        self.norms: list[tuple[int, Segment, Norms]] = []
        self.handled = 0
        self._todo = zip(count(), todo, strict=False)
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
        outputs.lend(self._free)
        return number, piece, outputs

    def note(self, number: int, piece: Piece, norms: Norms, nbytes: int) -> None:
        """A piece is combined."""
        with self._lock:
            self.norms.append((number, piece.segment, norms))
            self.handled += nbytes

    def stop(self, workers: int) -> None:
        """Stop handing out pieces."""
        self._stopped = True
        for _ in range(workers):
            self._free.put(None)


class Combiner:
    """Turns segments of a plan into θ(α).

    Args:
        sources: The open files of the plan's sources.
        settings: Those the plan was made with; one α per output.
        device: Where the arithmetic runs.
        workers: The number of threads; each processes its own pieces.
        exact_norms: Whether to compute all norms exactly, including ‖θ_dpo‖². Otherwise they are a cheap check,
            `norms.sampled_norms`.
    """

    def __init__(
        self,
        sources: SourceFiles,
        settings: PairSettings,
        device: torch.device,
        workers: int,
        *,
        exact_norms: bool = False,
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._rule = find_rule(settings.rule)
        self._exact_norms = exact_norms
        self._workers = workers
        outputs, sets = len(settings.alphas), 2 * workers
        wanted = CPU_PIECE_BYTES if device.type == "cpu" else CUDA_PIECE_BYTES
        self._piece_bytes = min(wanted, max(MAX_OUTPUT_BYTES // max(outputs * sets, 1) // PAGE, 1) * PAGE)
        self._tile = CPU_TILE if device.type == "cpu" else CUDA_TILE
        self._deltas = Deltas(sources.read, device, self._tile)
        self._lanes = [Lane(self._piece_bytes, device) for _ in range(workers)]
        pinned = device.type == "cuda"
        self._outputs = [Outputs(self._piece_bytes, outputs, pinned=pinned) for _ in range(sets)]

    def run(
        self,
        segments: Iterable[tuple[Segment, int]],
        sinks: Sequence[Sink],
        on_bytes: Callable[[int], object] | None = None,
    ) -> list[tuple[Segment, Norms]]:
        """Combine segments and pass the outputs' bytes to the sinks.

        Args:
            segments: Each with the offset of its first output byte, in ascending order.
            sinks: One per α.
            on_bytes: Called from time to time, from this thread, with the number of new output bytes (without sinks,
                those that one sink would have received).

        Returns:
            The norms of each extrapolated piece, in order.

        Raises:
            InputError: A value is not finite, or sides that must be equal are not.
            EnvironmentFailure: Reading failed, or a sink.
        """
        segments = list(segments)
        self._sources.expect([segment for segment, _ in segments])
        free: SimpleQueue[Outputs | None] = SimpleQueue()
        job = _Job(pieces(segments, self._piece_bytes, self._tile), sinks, free)
        for outputs in self._outputs:
            free.put(outputs)
        threads, reported = torch.get_num_threads(), 0
        pool = ThreadPoolExecutor(self._workers, initializer=set_num_threads, initargs=(1,))
        try:
            running = {pool.submit(self._work, job, lane) for lane in self._lanes}
            while running:
                ended, running = wait(running, PROGRESS_S, FIRST_EXCEPTION)
                for worker in ended:
                    worker.result()
                if on_bytes is not None and job.handled > reported:
                    on_bytes(job.handled - reported)
                    reported = job.handled
        except BaseException:
            self._sources.stop()  # else a worker may wait for bytes whose turn never comes
            raise
        finally:
            job.stop(self._workers)
            pool.shutdown(wait=True, cancel_futures=True)
            set_num_threads(threads)  # a worker's setting partly affects the whole process
        return [(segment, norms) for _, segment, norms in sorted(job.norms, key=lambda entry: entry[0])]

    def _work(self, job: _Job, lane: Lane) -> None:
        with lane.running():
            while (task := job.take()) is not None:
                number, piece, outputs = task
                dtype = unit_dtype(piece.segment, piece.segment.dtype)
                nbytes = piece.length * dtype.itemsize
                places = [buffer.to_write_from(piece.offset, nbytes, dtype) for buffer in outputs.buffers]
                norms = self._combine(piece, lane, [tensor for tensor, _ in places])
                job.note(number, piece, norms, nbytes * max(len(places), 1))
                for sink, (_, data) in zip(job.sinks, places, strict=True):
                    sink.put(number, piece.offset, data, outputs.done)

    def _combine(self, piece: Piece, lane: Lane, outputs: Sequence[Tensor]) -> Norms:
        segment, norms = piece.segment, Norms()
        dpo = lane.load(self._read(piece, segment.dpo, lane.dpo), 0)
        if segment.low_rank is not None:
            norms = self._merge(piece, segment.low_rank, dpo, outputs, lane)
        elif segment.sft is None:
            self._copy(segment, dpo, outputs, lane)
        else:
            sft = lane.load(self._read(piece, segment.sft, lane.sft), 1)
            if segment.is_raw:
                _require_equal(segment, sft, dpo)
                self._copy(segment, dpo, outputs, lane)
            else:
                norms = self._measure(sft, dpo, lane.scratch)
                self._extrapolate(segment, self._of_pair(sft, dpo, lane), norms, outputs, lane, (sft, dpo))
        lane.finish()
        return norms

    def _merge(self, piece: Piece, pair: LowRank, dpo: Tensor, outputs: Sequence[Tensor], lane: Lane) -> Norms:
        """θ_dpo is `dpo` and ΔW; `dpo` is SFT's own tensor unless the adapter replaces it."""
        segment, sft = piece.segment, dpo
        if segment.sft not in (None, segment.dpo):
            sft = lane.load(self._read(piece, segment.sft, lane.sft), 1)
        delta = self._deltas.delta(pair, piece.first, piece.length, wider(sft, dpo), lane)
        if sft is not dpo:
            add_difference(delta, sft, dpo, lane.scratch)
        norms = delta_norms(sft, delta, lane.scratch, of_dpo=self._exact_norms)
        self._extrapolate(segment, self._of_delta(sft, delta, lane), norms, outputs, lane)
        return norms if segment.sft is not None else Norms()

    def _of_pair(self, sft: Tensor, dpo: Tensor, lane: Lane) -> MakeTheta:
        combine, scratch = self._rule.combine, lane.scratch
        return lambda alpha, out: combine(sft, dpo, alpha, out, scratch) if alpha else out.copy_(dpo)

    def _of_delta(self, sft: Tensor, delta: Tensor, lane: Lane) -> MakeTheta:
        """As `_of_pair`; Δ may become θ_dpo."""
        from_delta, scratch = self._rule.from_delta, lane.scratch
        if from_delta is None:
            return self._of_pair(sft, delta.add_(sft), lane)
        return lambda alpha, out: from_delta(sft, delta, alpha, out, scratch)

    def _measure(self, sft: Tensor, dpo: Tensor, scratch: Scratch) -> Norms:
        norms = pair_norms(sft, dpo, scratch, of_dpo=True) if self._exact_norms else sampled_norms(sft, dpo, scratch)
        if not math.isfinite(norms.delta) and bool((both := equal_infinities(sft, dpo)).any()):
            sides = sft.masked_fill(both, 0), dpo.masked_fill(both, 0)
            norms = pair_norms(*sides, scratch, of_dpo=self._exact_norms)._replace(sampled=True)
        return norms

    def _read(self, piece: Piece, info: TensorInfo, buffer: HostBuffer) -> Tensor:
        dtype = unit_dtype(piece.segment, info.dtype)
        position = info.start + piece.first * dtype.itemsize
        tensor, view = buffer.to_read_into(position, piece.length * dtype.itemsize, dtype)
        self._sources.read(info.file, position, view)
        return tensor

    def _extrapolate(
        self,
        segment: Segment,
        theta: MakeTheta,
        norms: Norms,
        outputs: Sequence[Tensor],
        lane: Lane,
        sides: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        for alpha, out in zip(segment.alphas, outputs, strict=True):
            values = theta(alpha, lane.target(out))
            if not (stays_finite(self._rule.bound, norms, alpha, out.dtype) or is_finite(values)):
                kept = False if sides is None else keep_equal(values, *sides)
                if not (kept or self._settings.allow_nonfinite):
                    _refuse_nonfinite(segment)
            lane.store(values, out)

    def _copy(self, segment: Segment, dpo: Tensor, outputs: Sequence[Tensor], lane: Lane) -> None:
        for out in outputs:
            values = lane.target(out).copy_(dpo)
            if segment.action == "convert" and not (self._settings.allow_nonfinite or is_finite(values)):
                _refuse_nonfinite(segment)
            lane.store(values, out)


def _refuse_nonfinite(segment: Segment) -> None:
    raise InputError(
        f"the result for tensor {segment.dpo.name} contains NaN or infinity (from the inputs, or too large for "
        f"{segment.dtype}); --allow-nonfinite writes it anyway"
    )


def _require_equal(segment: Segment, sft: Tensor, dpo: Tensor) -> None:
    if torch.equal(sft, dpo):
        return
    if segment.sft is not None and segment.sft.name != segment.dpo.name:
        raise InputError(
            f"the head {segment.dpo.name} is stored on one side only, where it differs from the embedding "
            f"{segment.sft.name} that config.json ties it to: if it was trained by itself, set tie_word_embeddings "
            f"to false there; --exclude '^{re.escape(segment.dpo.name)}$' takes DPO's"
        )
    raise InputError(
        f"the {segment.dpo.dtype} tensor {segment.dpo.name} differs between SFT and DPO and cannot be "
        f"extrapolated; --exclude '^{re.escape(segment.dpo.name)}$' copies it from DPO"
    )


def total_norms(norms: Iterable[Norms]) -> Norms:
    """The sum, independent of the order."""
    pieces = list(norms)
    delta, sft, dpo = (math.fsum(piece[which] for piece in pieces) for which in range(3))
    return Norms(delta, sft, dpo, sampled=any(piece.sampled for piece in pieces))
