"""A pair of checkpoints: the plan, made from headers alone, and the stream of θ(α) pieces that executes it.

Used alike by the checkpoint writer and by anything else that wants θ(α). The plan decides everything: which
tensors are extrapolated, copied or compared, where their bytes come from and go. The stream is a loop over
pieces of about 1 MiB (they stay in the processor's cache), so memory does not grow with the model nor with
its largest tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from expo import rules
from expo.checkpoint import SINGLE_FILE, Checkpoint, Shard, TensorInfo
from expo.errors import EnvironmentFailure, InputError

Action = Literal["extrapolate", "copy", "convert", "match"]

CPU_PIECE_BYTES = 1 << 20
CUDA_PIECE_BYTES = 32 << 20
NORM_BLOCK = 1 << 17
"""Elements whose norms are taken at a time on a CPU; on a GPU a whole piece of 16-bit values."""

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXACT_DTYPES = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
"""Buffers and the like: both sides must hold the same values."""

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class PairRules:
    """How a pair is combined."""

    alphas: tuple[float, ...]
    """One per output."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors copied from DPO."""
    copy_missing: bool = False
    """Copy tensors that SFT lacks instead of refusing."""
    dtype: str = "auto"
    """auto, or the name of the type that floating-point tensors are written in."""
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor."""

    name: str
    action: Action
    dpo: TensorInfo
    sft: TensorInfo | None
    """None where SFT is not read."""
    dtype: str
    """Of the output, as safetensors spells it."""
    start: int
    """Offset of the first output byte in its shard."""
    nbytes: int
    """Output bytes."""

    @property
    def is_raw(self) -> bool:
        """Whether the tensor is handled as bytes."""
        return self.action in ("copy", "match")

    @property
    def units(self) -> int:
        """Elements, or bytes where the tensor is handled as bytes."""
        return self.nbytes if self.is_raw else self.dpo.numel

    def torch_dtype(self, dtype: str) -> torch.dtype:
        """The type one unit of a side with this dtype is read as."""
        return torch.uint8 if self.is_raw else FLOAT_DTYPES[dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    name: str
    header: bytes
    """Written first, as it is."""
    tensors: tuple[TensorPlan, ...]
    nbytes: int


@dataclass(frozen=True)
class PairPlan:
    """Everything that will happen, decided from headers."""

    sft: Checkpoint
    dpo: Checkpoint
    rules: PairRules
    shards: tuple[ShardPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one output's weights."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → shard name."""
        return {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}

    def count(self, *actions: Action) -> int:
        """How many tensors have one of these actions."""
        return sum(tensor.action in actions for shard in self.shards for tensor in shard.tensors)


def plan_pair(sft: Checkpoint, dpo: Checkpoint, pair_rules: PairRules) -> PairPlan:
    """Decide what happens to every tensor of DPO.

    Args:
        sft: The SFT checkpoint θ_sft.
        dpo: The DPO checkpoint θ_dpo, whose layout and header metadata the outputs keep.
        pair_rules: How to combine them.

    Returns:
        The plan, for all of the rules' α together.

    Raises:
        InputError: The checkpoints do not fit together; the message lists every kind of mismatch.
    """
    _refuse_quantized(sft, dpo)
    unused = [pattern for pattern in pair_rules.exclude if not any(map(re.compile(pattern).search, dpo.tensors))]
    if unused:
        raise InputError(f"--exclude {unused[0]!r} matches no tensor")
    excluded = {name for name in dpo.tensors if any(re.search(pattern, name) for pattern in pair_rules.exclude)}
    problems = _mismatches(sft, dpo, excluded, pair_rules)
    if problems:
        raise InputError(f"{sft.path.name} and {dpo.path.name} do not fit together: {'; '.join(problems)}")
    shards = tuple(_plan_shard(shard, sft, excluded, pair_rules) for shard in dpo.shards)
    return PairPlan(sft, dpo, pair_rules, shards)


def _refuse_quantized(*checkpoints: Checkpoint) -> None:
    for checkpoint in checkpoints:
        quantization = checkpoint.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise InputError(
                f"{checkpoint.path.name} is quantized ({method}); extrapolate the unquantized checkpoints and "
                "quantize the result"
            )


def _mismatches(sft: Checkpoint, dpo: Checkpoint, excluded: set[str], pair_rules: PairRules) -> list[str]:
    wanted = {name: info for name, info in dpo.tensors.items() if name not in excluded}
    shared = [(sft.tensors[name], info) for name, info in wanted.items() if name in sft.tensors]
    hint = "pass --missing copy-dpo to copy them from DPO"
    problems = []
    if not pair_rules.copy_missing:
        problems += _listed(f"tensors missing in SFT ({hint})", [name for name in wanted if name not in sft.tensors])
        problems += _listed("tensors missing in DPO", [name for name in sft.tensors if name not in dpo.tensors])
    problems += _listed(
        "shapes differ", [f"{d.name} {list(s.shape)} ≠ {list(d.shape)}" for s, d in shared if s.shape != d.shape]
    )
    problems += _listed(
        "dtypes that cannot be combined", [f"{d.name} {s.dtype}, {d.dtype}" for s, d in shared if not _combinable(s, d)]
    )
    return problems


def _combinable(sft: TensorInfo, dpo: TensorInfo) -> bool:
    both_float = sft.dtype in FLOAT_DTYPES and dpo.dtype in FLOAT_DTYPES
    return both_float or (sft.dtype == dpo.dtype and dpo.dtype in EXACT_DTYPES)


def _listed(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{title}: {', '.join(names[:3])}{more}"]


def _plan_shard(shard: Shard, sft: Checkpoint, excluded: set[str], pair_rules: PairRules) -> ShardPlan:
    dtypes = [_output_dtype(tensor.dtype, pair_rules.dtype) for tensor in shard.tensors]
    sizes = [_output_bytes(tensor, dtype) for tensor, dtype in zip(shard.tensors, dtypes, strict=True)]
    changed = dtypes != [tensor.dtype for tensor in shard.tensors]
    header = _header(shard, dtypes, sizes) if changed else shard.header
    tensors, start = [], len(header)
    for info, dtype, nbytes in zip(shard.tensors, dtypes, sizes, strict=True):
        partner = None if info.name in excluded else sft.tensors.get(info.name)
        action = _action(info, partner, dtype)
        tensors.append(TensorPlan(info.name, action, info, partner, dtype, start, nbytes))
        start += nbytes
    return ShardPlan(shard.file.name, header, tuple(tensors), start)


def _output_dtype(dtype: str, wanted: str) -> str:
    return DTYPE_NAMES[wanted] if wanted != "auto" and dtype in FLOAT_DTYPES else dtype


def _output_bytes(tensor: TensorInfo, dtype: str) -> int:
    return tensor.nbytes if dtype == tensor.dtype else tensor.numel * FLOAT_DTYPES[dtype].itemsize


def _action(dpo: TensorInfo, sft: TensorInfo | None, dtype: str) -> Action:
    if sft is None:
        return "copy" if dtype == dpo.dtype else "convert"
    return "match" if dpo.dtype in EXACT_DTYPES else "extrapolate"


def _header(shard: Shard, dtypes: Sequence[str], sizes: Sequence[int]) -> bytes:
    entries: dict[str, object] = {"__metadata__": shard.metadata} if shard.metadata else {}
    end = 0
    for tensor, dtype, nbytes in zip(shard.tensors, dtypes, sizes, strict=True):
        entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Norms(NamedTuple):
    """Squared Frobenius norms, summed over extrapolated tensors."""

    delta: float = 0.0
    """‖θ_dpo − θ_sft‖²."""
    sft: float = 0.0
    """‖θ_sft‖²."""

    def plus(self, other: Norms) -> Norms:
        """The norms of both parts together."""
        return Norms(self.delta + other.delta, self.sft + other.sft)


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


def pieces(shard: ShardPlan, piece_bytes: int) -> Iterator[Piece]:
    """Cut a shard's tensors, in the order of their bytes, into pieces of at most `piece_bytes` on any side."""
    for tensor in shard.tensors:
        sides = [tensor.dtype, tensor.dpo.dtype, *([tensor.sft.dtype] if tensor.sft else [])]
        step = piece_bytes // max(tensor.torch_dtype(dtype).itemsize for dtype in sides)
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
        todo = pieces(shard, self._piece_bytes)
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
            self._free.extend(scratch for _, scratch in flying)

    def _run(self, piece: Piece, scratch: _Scratch, write: Write) -> Block:
        tensor = piece.tensor
        dpo = self._read(tensor, tensor.dpo, piece, scratch.dpo)
        sft = None if tensor.sft is None else self._read(tensor, tensor.sft, piece, scratch.sft)
        out_dtype = tensor.torch_dtype(tensor.dtype)
        outputs = [torch.frombuffer(buffer, dtype=out_dtype, count=piece.length) for buffer in scratch.outputs]
        norms = self.combine(tensor, sft, dpo, outputs, scratch.wide)
        offset, nbytes = tensor.start + piece.first * out_dtype.itemsize, piece.length * out_dtype.itemsize
        views = tuple(memoryview(buffer)[:nbytes] for buffer in scratch.outputs)
        for number, view in enumerate(views):
            write(number, offset, view)
        return Block(piece, views, norms)

    def _read(self, tensor: TensorPlan, info: TensorInfo, piece: Piece, buffer: bytearray) -> Tensor:
        dtype = tensor.torch_dtype(info.dtype)
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
        if sft is None or tensor.action == "match":
            if sft is not None and not torch.equal(sft, dpo):
                raise InputError(
                    f"the {tensor.dpo.dtype} tensor {tensor.name} differs between SFT and DPO and cannot be "
                    f"extrapolated; --exclude '^{re.escape(tensor.name)}$' copies it from DPO"
                )
            for out in outputs:
                self._checked(tensor, out.copy_(dpo))
            return Norms()
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


def index_json(plan: PairPlan) -> str:
    """The text of model.safetensors.index.json."""
    total = sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def is_single_file(plan: PairPlan) -> bool:
    """Whether the output is one model.safetensors without an index."""
    return [shard.name for shard in plan.shards] == [SINGLE_FILE] and not plan.dpo.sharded
