"""A safetensors file's header, parsed and checked by hand, because streaming needs the byte offsets.

Refuses what the safetensors library refuses, and what it accepts although no writer intends it: duplicate keys, unknown
fields, names that are paths out of a folder. No more memory is allocated than the file is long.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard

from expo.checkpoint.dtypes import DTYPES
from expo.errors import InputError
from expo.files import HEAD_BYTES, is_utf8, name_problem, open_file, shown, stand_in, unique_keys, unreadable

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_SIZE = 2**64 - 1
"""The largest size, offset or number of elements that the format can represent."""

FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is and where its bytes are."""

    name: str
    dtype: str
    """As the safetensors header spells it, such as BF16."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of the first byte in `file`."""
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def rows(self, first: int, last: int) -> TensorInfo:
        """The rows from `first` up to `last`, which are consecutive bytes too."""
        return self.part(first * math.prod(self.shape[1:]), (last - first, *self.shape[1:]))

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Consecutive elements, from `first` on, in another shape."""
        element = self.nbytes // self.numel if self.numel else 0
        return replace(self, shape=shape, start=self.start + first * element, nbytes=math.prod(shape) * element)


@dataclass(frozen=True)
class Packed:
    """A quantized tensor: where its values and their scales are stored."""

    kind: Literal["fp8", "mxfp4"]
    values: TensorInfo
    """fp8: F8_E4M3 [..., rows, columns]; mxfp4: U8 [experts, out, in/32, 16], two values a byte."""
    scales: TensorInfo
    """One per block; in whichever file of the checkpoint."""
    block: tuple[int, int]
    """Rows and columns that have one scale; the last ones may be fewer."""


@dataclass(frozen=True)
class View:
    """What a tensor is made from, of a file that is read as if nothing in it was quantized."""

    start: int
    """Offset of the tensor's first byte in that file."""
    stored: TensorInfo | Packed
    """Where it is in the real one."""


@dataclass(frozen=True)
class Shard:
    """One file of weights."""

    file: Path
    header: bytes
    """The raw safetensors header: 8 bytes of length, then the JSON; empty where the file has none."""
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    """In the order of their bytes."""
    nbytes: int
    """The whole file's size."""
    output_name: str | None = None
    """Its name in an output, if different from the file's own."""
    views: tuple[View, ...] = ()
    """Of a file with quantized tensors (`quantized.py`): what is read at the offsets of `tensors`, in their order."""


def read_shard(file: Path) -> Shard:
    """Parse and check one safetensors header.

    Raises:
        InputError: The file is incomplete or malformed; the message says what is wrong.
    """
    return parse_shard(file, *_read_header(file))


def parse_shard(file: Path, raw: bytes, size: int) -> Shard:
    """Parse and check a safetensors header that was read.

    Args:
        file: Where it is from.
        raw: The header with its 8 bytes of length.
        size: The whole file's size.

    Raises:
        InputError: The file is incomplete or malformed; the message says what is wrong.
    """
    header = _parse(file, raw[8:])
    metadata = _metadata(file, header.pop("__metadata__", None))
    tensors = [_tensor(file, name, entry, len(raw)) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_layout(file, tensors, len(raw), size)
    return Shard(file, raw, metadata, tuple(tensors), size)


def _read_header(file: Path) -> tuple[bytes, int]:
    """The header with its 8 bytes of length, and the file's size."""
    with open_file(file) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(HEAD_BYTES)
            length = header_length(file, head, size)
            stream.seek(0)
            raw = stream.read(8 + length)
        except OSError as error:
            raise unreadable(file, error) from error
    if len(raw) < 8 + length:
        raise InputError(f"{file} became shorter while it was read")
    return raw, size


def header_length(file: Path, head: bytes, size: int) -> int:
    """The length of a safetensors header, without the 8 bytes that say it.

    Args:
        file: Where it is.
        head: The file's first `HEAD_BYTES`.
        size: The whole file's size.

    Raises:
        InputError: It is not a safetensors file, or too short for its header.
    """
    length = int.from_bytes(head[:8], "little")
    if found := stand_in(head):
        raise InputError(f"{file} is not weights but {found}")
    if len(head) < 8:
        raise InputError(f"{file} is truncated: {size} bytes are too few for a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{file} begins with {shown(head[:8])}: not a safetensors file, or one with a header of {length} bytes"
        )
    if 8 + length > size:
        raise InputError(f"{file} is truncated: its header claims {length} bytes, the file has {size}")
    return length


def _damaged(file: Path, what: object) -> InputError:
    return InputError(f"{file}: damaged header: {what}")


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_size,
            parse_float=_no_size,
            parse_constant=_no_size,
        )
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if not isinstance(header, dict):
        raise _damaged(file, "it is not a JSON object")
    return header


def _size(digits: str) -> int:
    # The length is checked first: Python would turn any number of digits into an integer, in quadratic time.
    if digits.startswith("-") or len(digits) > len(str(MAX_SIZE)) or int(digits) > MAX_SIZE:
        _no_size(digits)
    return int(digits)


def _no_size(text: str) -> NoReturn:
    raise ValueError(f"{shown(text)} is not a valid size or offset")


def _metadata(file: Path, value: object) -> dict[str, str]:
    content = {} if value is None else value
    if not is_text_map(content):
        raise _damaged(file, "__metadata__ does not map text to text")
    return content


def is_text_map(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a JSON value is an object that maps text to text, all encodable as UTF-8."""
    return isinstance(value, dict) and all(
        isinstance(item, str) and is_utf8(item) and is_utf8(key) for key, item in value.items()
    )


def _tensor(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"tensor {shown(name)}"
    if problem := name_problem(name):
        raise _damaged(file, f"the name {shown(name)} {problem}")
    if not isinstance(entry, dict):
        raise _damaged(file, f"{where} is not an object")
    if unknown := [key for key in entry if key not in FIELDS]:
        raise _damaged(file, f"{where} has the unknown field {shown(unknown[0])}")
    dtype, shape, offsets = (entry.get(key) for key in FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(file, f"{where} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not _is_sizes(shape):
        raise _damaged(file, f"{where} has no valid shape")
    if not isinstance(offsets, list) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, f"{where} has no valid data_offsets")
    begin, end = offsets
    if _elements(shape) * DTYPES[dtype].bits != 8 * (end - begin):
        raise _damaged(file, f"{where}: {dtype} {shown(shape)} does not fill its {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _is_sizes(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)  # in Python true is an int


def _elements(shape: list[int]) -> float:
    """The number of elements; infinity as soon as it exceeds what the format can represent."""
    count = 1
    for size in shape:
        count *= size
        if count > MAX_SIZE:
            return math.inf
    return count


def _check_layout(file: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in tensors:
        if tensor.start != expected:
            kind = "overlaps another tensor" if tensor.start < expected else "leaves a hole before it"
            raise _damaged(file, f"tensor {shown(tensor.name)} {kind}")
        expected += tensor.nbytes
    if expected > size:
        raise InputError(f"{file} is truncated: {size} bytes of {expected}; download it again")
    if expected < size:
        raise InputError(f"{file} has {size - expected} bytes after its last tensor; download it again")
