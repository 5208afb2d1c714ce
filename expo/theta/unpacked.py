"""Files with quantized tensors, read as if they held what these stand for.

A file's `Shard.views` say which bytes of it are which tensor's; the arithmetic is in `dequantize.py`. Memory does not
grow with a tensor: of FP8 some elements are in memory and a tensor's scales, of MXFP4 one expert's bytes, for each
thread that reads at the same time and each checkpoint that it reads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from expo.checkpoint.folder import Packed, TensorInfo, View
from expo.theta.buffers import TORCH_DTYPES
from expo.theta.dequantize import Grid, Scratch, dequantize_fp8, dequantize_mxfp4, fp8_scales

CHUNK = 1 << 19
"""Elements that are dequantized at once: those of a piece in bfloat16."""

Read = Callable[[Path, int, memoryview], None]
"""Fills a buffer from a byte of a file."""


class _Room:
    """What one read uses, and what is kept for the next one."""

    def __init__(self) -> None:
        self.scratch = Scratch(CHUNK)
        self._kept: dict[Hashable, tuple[Tensor, ...]] = {}

    def kept(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]], limit: int) -> tuple[Tensor, ...]:
        """What was made under a key, or is made now; the one not used for longest makes room for it."""
        found = self._kept.pop(key, None)
        if found is None:
            while len(self._kept) >= limit:
                del self._kept[next(iter(self._kept))]
            found = make()
        self._kept[key] = found
        return found


class Rooms:
    """Rooms for as many reads as there are at once; used by several threads.

    Args:
        read: Reads the files as they are.
        checkpoints: How many checkpoints are read in turn, each of which keeps something.
    """

    def __init__(self, read: Read, checkpoints: int) -> None:
        self.read = read
        self.checkpoints = checkpoints
        self._free: list[_Room] = []

    @contextmanager
    def lent(self) -> Iterator[_Room]:
        """A room that no other thread uses."""
        try:
            room = self._free.pop()
        except IndexError:
            room = _Room()
        try:
            yield room
        finally:
            self._free.append(room)


class Unpacked:
    """One file, read at the offsets of the tensors that it stands for.

    Args:
        views: The file's.
        rooms: Shared by all files.
    """

    def __init__(self, views: Sequence[View], rooms: Rooms) -> None:
        self._views = views
        self._starts = [view.start for view in views]
        self._rooms = rooms

    def read(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `position`, within one tensor; of one in bfloat16, with whole elements.

        Raises:
            EnvironmentFailure: The file cannot be read, or was truncated.
        """
        if not len(buffer):
            return
        view = self._views[bisect_right(self._starts, position) - 1]
        first, stored = position - view.start, view.stored
        if isinstance(stored, TensorInfo):
            self._rooms.read(stored.file, stored.start + first, buffer)
            return
        assert first % 2 == 0
        out = torch.frombuffer(buffer, dtype=torch.bfloat16)
        with self._rooms.lent() as room:
            (self._fp8 if stored.kind == "fp8" else self._mxfp4)(stored, first // 2, out, room)

    def _fp8(self, packed: Packed, first: int, out: Tensor, room: _Room) -> None:
        values = packed.values
        grid = Grid(values.shape[-2], values.shape[-1], packed.block)
        (scales,) = room.kept(packed.scales, lambda: (self._scales(packed, grid),), self._rooms.checkpoints)
        for done in range(0, len(out), CHUNK):
            target = out[done : done + CHUNK]
            stored = room.scratch.stored[: len(target)]
            self._rooms.read(values.file, values.start + first + done, stored.numpy().data)
            dequantize_fp8(stored, first + done, grid, scales, target, room.scratch)

    def _scales(self, packed: Packed, grid: Grid) -> Tensor:
        """All scales of a tensor, as `dequantize_fp8` takes them."""
        info = packed.scales
        stored = torch.empty(info.numel, dtype=TORCH_DTYPES[info.dtype])
        self._rooms.read(info.file, info.start, stored.view(torch.uint8).numpy().data)
        return fp8_scales(stored).view(-1, -(-grid.columns // packed.block[1]))

    def _mxfp4(self, packed: Packed, first: int, out: Tensor, room: _Room) -> None:
        _, rows, count, half = packed.values.shape
        step = max(1, CHUNK // (2 * half * rows))  # blocks of all rows
        done = 0
        while done < len(out):
            expert, at = divmod(first + done, rows * count * 2 * half)
            key = packed.values, expert
            blocks, scales = room.kept(key, lambda e=expert: self._expert(packed, e), self._rooms.checkpoints)  # type: ignore[misc]
            block = at // (rows * 2 * half)
            found = dequantize_mxfp4(blocks[:, block : block + step], scales[:, block : block + step]).view(-1)
            taken = found[at - block * rows * 2 * half :][: len(out) - done]
            out[done : done + len(taken)] = taken
            done += len(taken)

    def _expert(self, packed: Packed, expert: int) -> tuple[Tensor, Tensor]:
        """Blocks [out, in/32, 16] and scales [out, in/32] of one expert."""
        blocks, scales = (self._part(info, expert) for info in (packed.values, packed.scales))
        return blocks, scales

    def _part(self, info: TensorInfo, number: int) -> Tensor:
        shape = info.shape[1:]
        values = torch.empty(shape, dtype=torch.uint8)
        self._rooms.read(info.file, info.start + number * math.prod(shape), values.view(-1).numpy().data)
        return values
