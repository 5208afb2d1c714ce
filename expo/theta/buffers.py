"""The memory that pieces pass through: page-aligned host buffers, a worker's lane, and the outputs in flight."""

from __future__ import annotations

import contextlib
import threading
from queue import SimpleQueue

import torch
from torch import Tensor

from expo.checkpoint.dtypes import FROM_TORCH
from expo.theta.norms import Scratch
from expo.theta.trajectory.pieces import Changes

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, of_torch) for of_torch, name in FROM_TORCH.items()}
"""By the name in safetensors headers, without 4-bit and 6-bit types, which torch does not have."""
PAGE = 4096
LINE = 64


class HostBuffer:
    """Memory for a piece, at the same place within a page as in its file.

    The kernel copies between a file's pages and a buffer four times slower if the target is a few bytes above
    the source within a page, as buffers from the allocator do (`benchmarks/page_offset.py`). So a place to read into
    is rounded down to a cache line, and one to write from is rounded up.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        memory = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8, pin_memory=pinned)
        self._memory = memory[-memory.data_ptr() % PAGE :]
        self._view = self._memory.numpy().data
        self._last: tuple[tuple[int, int, torch.dtype], tuple[Tensor, memoryview]] | None = None

    def to_read_into(self, position: int, nbytes: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """The place for bytes that lie at `position` of their file."""
        return self._at(position % PAGE // LINE * LINE, nbytes, dtype)

    def to_write_from(self, position: int, nbytes: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """The place for bytes that go to `position` of their file."""
        return self._at(-(-(position % PAGE) // LINE) * LINE, nbytes, dtype)

    def _at(self, place: int, nbytes: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        # Pieces of one tensor have the same offset, so the last views can mostly be reused.
        key = place, nbytes, dtype
        if self._last is None or self._last[0] != key:
            self._last = key, (self._memory[place : place + nbytes].view(dtype), self._view[place : place + nbytes])
        return self._last[1]


class Lane:
    """A worker's own buffers and, on a GPU, its own stream.

    Args:
        piece_bytes: Of a piece of one side, at most.
        device: Where the arithmetic runs.
        steps: Of a training run, of which it needs all changes at once; 0 for a pair.
    """

    def __init__(self, piece_bytes: int, device: torch.device, steps: int = 0) -> None:
        on_gpu = device.type == "cuda"
        self.sft, self.dpo = (HostBuffer(piece_bytes, pinned=on_gpu) for _ in range(2))
        self.scratch = Scratch(piece_bytes, device)
        self.changes = Changes(steps, piece_bytes, device)
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._on_device = [torch.empty(piece_bytes, dtype=torch.uint8, device=device) for _ in range(3 * on_gpu)]

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Makes the lane's stream the current one."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def load(self, host: Tensor, slot: int) -> Tensor:
        """A side's values on the device."""
        return host if self._stream is None else self._like(host, slot).copy_(host, non_blocking=True)

    def uses(self, tensor: Tensor) -> None:
        """Keep shared memory from being reused until this lane has finished with it."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def target(self, host: Tensor) -> Tensor:
        """Where on the device a result for `host` is computed."""
        return host if self._stream is None else self._like(host, 2)

    def store(self, values: Tensor, host: Tensor) -> None:
        """Copy a result to `host`."""
        if self._stream is not None:
            host.copy_(values, non_blocking=True)

    def _like(self, host: Tensor, slot: int) -> Tensor:
        return self._on_device[slot][: host.nbytes].view(host.dtype)

    def finish(self) -> None:
        """Wait until all stores are complete."""
        if self._stream is not None:
            self._stream.synchronize()


class Outputs:
    """One buffer per α for a piece in flight; back in the queue when every sink is done with its own."""

    def __init__(self, piece_bytes: int, alphas: int, *, pinned: bool) -> None:
        self.buffers = [HostBuffer(piece_bytes, pinned=pinned) for _ in range(alphas)]
        self._lock = threading.Lock()
        self._users = 0
        self._home: SimpleQueue[Outputs | None]

    def lend(self, home: SimpleQueue[Outputs | None], sinks: int) -> None:
        """Each of so many sinks is about to be given its buffer; `home` is the queue to come back to."""
        self._home = home
        self._users = sinks
        if not sinks:
            home.put(self)

    def done(self) -> None:
        """One sink is done."""
        with self._lock:
            self._users -= 1
            free = self._users == 0
        if free:
            self._home.put(self)
