"""θ_dpo − θ_sft of whole tensors, one in memory at a time: its norm, and the factors of its approximation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expo.checkpoint.folder import TensorInfo
from expo.errors import InputError
from expo.theta.buffers import TORCH_DTYPES
from expo.theta.decide_ranked import Module, Part
from expo.theta.low_rank import Factors, factors, wide
from expo.theta.sources import SourceFiles

PIECE = 1 << 20
"""Elements of a tensor without factors that are read at a time."""


class Differences:
    """Reads both sides of tensors.

    Args:
        sources: Their open files.
        device: Where the arithmetic runs.
        on_bytes: Called with the bytes of SFT's that were read since.
    """

    def __init__(self, sources: SourceFiles, device: torch.device, on_bytes: Callable[[int], object]) -> None:
        self._sources = sources
        self._device = device
        self._on_bytes = on_bytes
        self.delta_squared = 0.0
        """‖θ_dpo − θ_sft‖² of all tensors so far."""
        self.sft_squared = 0.0
        """‖θ_sft‖² of the same."""

    def factors(self, module: Module) -> Factors:
        """The factors of a module's Δ, in the layout [out, in].

        Raises:
            InputError: A value is not finite, also where it is one of the factors.
            EnvironmentFailure: Reading failed.
        """
        info, dtype = module.sft, TORCH_DTYPES[module.dtype]
        delta = torch.empty(info.numel, dtype=wide(*_shape(info), module.rank), device=self._device)
        for dpo, sft in module.parts:
            first = (sft.start - info.start) * info.numel // info.nbytes
            self._subtract(dpo, sft, delta[first : first + sft.numel])
        matrix = delta.view(info.shape)
        found = factors(matrix.T if module.transposed else matrix, module.rank, dtype)
        if not math.isfinite(found.error):
            raise InputError(f"LoRA factors of {module.name} are too large for {module.dtype}: give --dtype float32")
        self.delta_squared += found.norm**2
        return found

    def norm(self, parts: Sequence[Part]) -> float:
        """‖Δ‖ of a tensor that gets no factors.

        Raises:
            InputError: A value is not finite.
            EnvironmentFailure: Reading failed.
        """
        squares = []
        for dpo, sft in parts:
            for first in range(0, sft.numel, PIECE):
                count = min(PIECE, sft.numel - first)
                delta = torch.empty(count, dtype=torch.float64, device=self._device)
                self._subtract(dpo.part(first, (count,)), sft.part(first, (count,)), delta)
                squares.append(float(delta.square().sum()))
        self.delta_squared += math.fsum(squares)
        return math.sqrt(math.fsum(squares))

    def _subtract(self, dpo: TensorInfo, sft: TensorInfo, out: Tensor) -> None:
        """Δ of as many consecutive elements."""
        theirs, ours = (self._read(info).to(self._device) for info in (dpo, sft))
        out.copy_(theirs).sub_(ours)
        if not bool(out.isfinite().all()):
            out.masked_fill_(theirs.to(out.dtype) == ours.to(out.dtype), 0)  # an infinity that both have
            if not bool(out.isfinite().all()):
                raise InputError(f"θ_dpo − θ_sft of {sft.name} contains NaN or infinity, and has no approximation")
        self.sft_squared += float(ours.to(out.dtype).square_().sum())
        self._on_bytes(sft.nbytes)

    def _read(self, info: TensorInfo) -> Tensor:
        buffer = torch.empty(info.numel, dtype=TORCH_DTYPES[info.dtype])
        self._sources.read(info.file, info.start, buffer.view(torch.uint8).numpy().data)
        return buffer


def _shape(info: TensorInfo) -> tuple[int, int]:
    rows, columns = info.shape
    return rows, columns
