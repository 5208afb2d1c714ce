"""An adapter's ΔW, multiplied tile by tile from its factors.

The factors are read once for consecutive pieces of their tensor: R whole, and from L, which may be as long as a
vocabulary, the rows around the piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from expo.checkpoint.folder import TensorInfo
from expo.theta.adapter.tensors import LowRank
from expo.theta.buffers import TORCH_DTYPES, Lane
from expo.theta.norms import low_rank_delta

CPU_TILE = 1 << 18
"""Elements of ΔW that are multiplied at once: many, because R is traversed for every tile, but few enough for the
processor's cache."""
CUDA_TILE = 1 << 20
KEPT = 4
"""Factors in memory: those of a tensor and of the next one, because workers are at different pieces."""

Read = Callable[[Path, int, memoryview], None]
"""Fills a buffer from a byte of a file."""


def tile_rows(pair: LowRank, tile: int) -> int:
    """The rows of ΔW, counted from its first, that are always multiplied together, in whatever pieces they are used.

    So the last bits of the product do not depend on the number of workers or of α, which affect the piece size.

    Args:
        pair: The factors.
        tile: Elements that a tile, and the part of L in it, should not exceed; one row may.
    """
    return max(1, tile // max(pair.shape[1], *pair.ranks))


class Deltas:
    """Makes ΔW for pieces of tensors; used by several threads.

    Args:
        read: Reads the adapter's file.
        device: Where the arithmetic runs.
        tile: Elements that are multiplied at once.
    """

    def __init__(self, read: Read, device: torch.device, tile: int) -> None:
        self._read = read
        self._device = device
        self._tile = tile
        self._lock = threading.Lock()
        self._kept: dict[tuple[TensorInfo, int, int, torch.dtype], Tensor] = {}

    def delta(self, pair: LowRank, first: int, length: int, dtype: torch.dtype, lane: Lane) -> Tensor:
        """ΔW [length] from element `first` on, all in one tile; in the lane's work space, until its next piece."""
        rows, columns = tile_rows(pair, self._tile), pair.shape[1]
        top = first // columns // rows * rows
        bottom = min(top + rows, pair.shape[0])
        left, right = self._left(pair, top, bottom, dtype), self._right(pair, dtype)
        lane.uses(left)
        lane.uses(right)
        tile = low_rank_delta(left, right, pair.scale, lane.scratch.tile(dtype, bottom - top, columns))
        return tile.view(-1)[first - top * columns :][:length]

    def _right(self, pair: LowRank, dtype: torch.dtype) -> Tensor:
        stored = self._factor(pair.right, 0, pair.right.shape[0], dtype, by_column=False)
        return stored.T if pair.transposed else stored  # [rank, columns]

    def _left(self, pair: LowRank, top: int, bottom: int, dtype: torch.dtype) -> Tensor:
        rows = tile_rows(pair, self._tile)
        rows *= max(1, self._tile // pair.ranks[0] // rows)  # of several tiles
        first = top // rows * rows
        last = min(first + rows, pair.shape[0])
        stored = self._factor(
            pair.left, pair.first_row + first, pair.first_row + last, dtype, by_column=pair.transposed
        )
        left = stored.T if pair.transposed else stored
        return left[top - first : bottom - first]  # [bottom - top, rank]

    def _factor(self, info: TensorInfo, first: int, last: int, dtype: torch.dtype, *, by_column: bool) -> Tensor:
        """The rows, or columns, of a stored factor from `first` up to `last`."""
        key = info, first, last, dtype
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                while len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                host = self._columns(info, first, last) if by_column else self._rows(info, first, last)
                found = host.to(self._device, dtype)
            self._kept[key] = found  # the last one is the one used last
            return found

    def _rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        part = info.rows(first, last)
        values = torch.empty(part.shape, dtype=TORCH_DTYPES[info.dtype])
        self._read(part.file, part.start, _bytes(values))
        return values

    def _columns(self, info: TensorInfo, first: int, last: int) -> Tensor:
        values = torch.empty((info.shape[0], last - first), dtype=TORCH_DTYPES[info.dtype])
        for number, row in enumerate(values):
            start = info.rows(number, number + 1).start + first * values.itemsize
            self._read(info.file, start, _bytes(row))
        return values


def _bytes(values: Tensor) -> memoryview:
    return values.view(-1).view(torch.uint8).numpy().data
