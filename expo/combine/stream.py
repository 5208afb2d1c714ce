"""The stream of θ(α) pieces that executes a pair's plan.

Used alike by the checkpoint writer and by anything else that wants θ(α): a loop over pieces of about 1 MiB, which
stay in the processor's cache, so memory does not grow with the model nor with its largest tensor.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from expo import rules
from expo.checkpoint import Checkpoint, TensorInfo
from expo.combine.plan import PairRules, ShardPlan, TensorPlan
from expo.errors import EnvironmentFailure, InputError

CPU_PIECE_BYTES = 1 << 20
CUDA_PIECE_BYTES = 16 << 20
NORM_BLOCK = 1 << 17
"""Elements whose norms are taken at a time on a CPU; on a GPU a whole piece of 16-bit values."""

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The torch device for a `--device` value; auto is the CPU, which keeps up with the disk.

    Raises:
        EnvironmentFailure: CUDA is asked for and cannot be used.
    """
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFailure(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return device


class Norms(NamedTuple):
    """Squared Frobenius norms, summed over extrapolated tensors."""

    delta: float = 0.0
    """‖θ_dpo − θ_sft‖²."""
    sft: float = 0.0
    """‖θ_sft‖²."""


class Piece(NamedTuple):
    """Some consecutive elements of one tensor."""

    tensor: TensorPlan
    first: int
    length: int
    """Elements, or bytes where the tensor is handled as bytes."""


class Block(NamedTuple):
    """A finished piece."""

    piece: Piece
    outputs: tuple[memoryview, ...]
    """Its bytes, one per α; valid until the next block is asked for."""
    norms: Norms


Write = Callable[[int, int, memoryview], None]
"""Takes the number of the output, the offset in the shard, and the bytes."""


def unit_dtype(tensor: TensorPlan, dtype: str) -> torch.dtype:
    """The type one unit of a side with this dtype is read as."""
    return torch.uint8 if tensor.is_raw else TORCH_DTYPES[dtype]


def pieces(shard: ShardPlan, piece_bytes: int) -> Iterator[Piece]:
    """Cut a shard's tensors, in the order of their bytes, into pieces of at most `piece_bytes` on any side."""
    for tensor in shard.tensors:
        sides = [tensor.dtype, tensor.dpo.dtype, *([tensor.sft.dtype] if tensor.sft else [])]
        step = piece_bytes // max(unit_dtype(tensor, dtype).itemsize for dtype in sides)
        for first in range(0, tensor.units, step):
            yield Piece(tensor, first, min(step, tensor.units - first))


class SourceFiles:
    """Open weight files, read at offsets; a context manager."""

    def __init__(self, *checkpoints: Checkpoint) -> None:
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._descriptors: dict[Path, int] = {}
            for file in [shard.file for checkpoint in checkpoints for shard in checkpoint.shards]:
                descriptor = os.open(file, os.O_RDONLY)
                opening.callback(os.close, descriptor)
                self._descriptors[file] = descriptor
            self._stack = opening.pop_all()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the tensor.

        Raises:
            EnvironmentFailure: The file cannot be read, or became shorter than its header said.
        """
        position, done = info.start + offset, 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptors[info.file], [buffer[done:]], position + done)
            except OSError as error:
                raise EnvironmentFailure(f"reading {info.file} failed: {error.strerror}") from error
            if count == 0:
                raise EnvironmentFailure(f"{info.file} became shorter while it was read")
            done += count


class _Scratch:
    """The buffers of one piece in flight, reused from piece to piece."""

    def __init__(self, piece_bytes: int, outputs: int, device: torch.device) -> None:
        self.sft = bytearray(piece_bytes)
        self.dpo = bytearray(piece_bytes)
        self.outputs = [bytearray(piece_bytes) for _ in range(outputs)]
        self.wide = torch.empty(2, NORM_BLOCK if device.type == "cpu" else piece_bytes // 2, device=device)


class Combiner:
    """Turns pieces into θ(α) bytes.

    Args:
        sources: The open files of both checkpoints.
        pair_rules: The rules the plan was made with.
        device: Where the arithmetic runs.
        workers: Threads; each has pieces of its own.
    """

    def __init__(self, sources: SourceFiles, pair_rules: PairRules, device: torch.device, workers: int) -> None:
        self._sources = sources
        self._rules = pair_rules
        self._device = device
        self._workers = workers
        self._piece_bytes = CPU_PIECE_BYTES if device.type == "cpu" else CUDA_PIECE_BYTES
        in_flight = 2 * workers
        self._free = deque(_Scratch(self._piece_bytes, len(pair_rules.alphas), device) for _ in range(in_flight))

    def stream(self, shard: ShardPlan, write: Write) -> Iterator[Block]:
        """Combine a shard, writing pieces as they are ready and yielding them in the order of their bytes.

        Raises:
            InputError: A value is not finite, or tensors that must be equal are not.
            EnvironmentFailure: Reading failed.
        """
        todo, threads = pieces(shard, self._piece_bytes), torch.get_num_threads()
        pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))
        flying: deque[tuple[Future[Block], _Scratch]] = deque()
        try:
            while True:
                while self._free and (piece := next(todo, None)) is not None:
                    scratch = self._free.popleft()
                    flying.append((pool.submit(self._run, piece, scratch, write), scratch))
                if not flying:
                    return
                future, scratch = flying.popleft()
                yield future.result()
                self._free.append(scratch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # a worker's setting reaches the whole process in part
            self._free.extend(scratch for _, scratch in flying)

    def _run(self, piece: Piece, scratch: _Scratch, write: Write) -> Block:
        tensor = piece.tensor
        dpo = self._read(tensor, tensor.dpo, piece, scratch.dpo)
        sft = None if tensor.sft is None else self._read(tensor, tensor.sft, piece, scratch.sft)
        out_dtype = unit_dtype(tensor, tensor.dtype)
        outputs = [torch.frombuffer(buffer, dtype=out_dtype, count=piece.length) for buffer in scratch.outputs]
        norms = self.combine(tensor, sft, dpo, outputs, scratch.wide)
        offset, nbytes = tensor.start + piece.first * out_dtype.itemsize, piece.length * out_dtype.itemsize
        views = tuple(memoryview(buffer)[:nbytes] for buffer in scratch.outputs)
        for number, view in enumerate(views):
            write(number, offset, view)
        return Block(piece, views, norms)

    def _read(self, tensor: TensorPlan, info: TensorInfo, piece: Piece, buffer: bytearray) -> Tensor:
        dtype = unit_dtype(tensor, info.dtype)
        view = memoryview(buffer)[: piece.length * dtype.itemsize]
        self._sources.read(info, piece.first * dtype.itemsize, view)
        return torch.frombuffer(buffer, dtype=dtype, count=piece.length).to(self._device)

    def combine(
        self, tensor: TensorPlan, sft: Tensor | None, dpo: Tensor, outputs: Sequence[Tensor], wide: Tensor
    ) -> Norms:
        """Do what the plan says with one piece.

        Args:
            tensor: The plan of the tensor the piece is from.
            sft: Its SFT values on the device, or None.
            dpo: Its DPO values on the device.
            outputs: Where the results go, in host memory, one per α.
            wide: Work space on the device, float32 [2, any size].

        Raises:
            InputError: A value is not finite, or sides that must be equal are not.
        """
        if sft is not None and not tensor.is_raw:
            return self._extrapolate(tensor, sft, dpo, outputs, wide)
        if sft is not None and not torch.equal(sft, dpo):
            raise InputError(
                f"the {tensor.dpo.dtype} tensor {tensor.name} differs between SFT and DPO and cannot be "
                f"extrapolated; --exclude '^{re.escape(tensor.name)}$' copies it from DPO"
            )
        for out in outputs:
            self._checked(tensor, out.copy_(dpo))
        return Norms()

    def _extrapolate(
        self, tensor: TensorPlan, sft: Tensor, dpo: Tensor, outputs: Sequence[Tensor], wide: Tensor
    ) -> Norms:
        for alpha, out in zip(self._rules.alphas, outputs, strict=True):
            target = out if dpo.is_cpu else torch.empty_like(dpo, dtype=out.dtype)
            out.copy_(self._checked(tensor, rules.extrapolate(sft, dpo, alpha, target)))
        return Norms(*rules.squared_norms(sft, dpo, wide))

    def _checked(self, tensor: TensorPlan, values: Tensor) -> Tensor:
        finite = self._rules.allow_nonfinite or not values.is_floating_point() or rules.is_finite(values)
        if not finite:
            raise InputError(
                f"the result for tensor {tensor.name} holds NaN or infinity (from the inputs, or too large for "
                f"{tensor.dtype}); --allow-nonfinite writes it all the same"
            )
        return values
