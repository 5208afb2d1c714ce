"""Read a safetensors checkpoint's plan: which tensor lies where, from headers alone.

Here: shard headers (parsed and checked by hand, since the byte offsets are what the streaming needs), the
index, config.json, the side files that go along, and fingerprints. Not here: reading tensor data in bulk
(`combine/stream.py`), pickled weights (`pickled.py`), and finding or fetching the folder (`hub.py`).
To add a format of weights, write a reader of its shards and a `WeightFormat`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from expo.errors import InputError
from expo.hub import Location

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
CONFIG_FILE = "config.json"
PARTIAL_FOLDER = ".expo-partial"
"""Where an unfinished output keeps its files; a folder that has one is not a finished checkpoint."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

BIN_TAIL_BYTES = 1 << 20
"""What is hashed of a .bin file: its end, where a zip archive lists its records with their checksums."""

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F4",), 4),
}

FOREIGN_SUFFIXES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.npz"),
    *("*.tfevents.*", "optimizer*", "scheduler*", "trainer_state.json", "README.md", "expo.json"),
)
FOREIGN_FOLDERS = ("checkpoint-*", "original", "runs", "global_step*", "__pycache__", ".*")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is and where its bytes lie."""

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
        row_bytes = self.nbytes // self.shape[0] if self.shape[0] else 0
        shape, start = (last - first, *self.shape[1:]), self.start + first * row_bytes
        return dataclasses.replace(self, shape=shape, start=start, nbytes=(last - first) * row_bytes)


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
    """What an output calls it, where that is not the file's own name."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's plan."""

    path: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    sharded: bool
    """Whether there is an index file."""
    ignored: tuple[str, ...]
    """Names of weight files in the folder that do not belong to the checkpoint."""


@dataclass(frozen=True)
class WeightFormat:
    """How a folder holds weights of one format."""

    name: str
    single: str
    """The file that holds all tensors, where there is no index."""
    index: str
    pattern: str
    """What weight files of this format are called; one that is not read is warned about."""
    read_shard: Callable[[Path], Shard]


def read_shard(file: Path) -> Shard:
    """Parse and check one safetensors header.

    Raises:
        InputError: The file is no whole, well-formed safetensors file; the message says what is wrong.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            _check_prefix(file, prefix, length, size)
            raw = stream.read(length)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged header: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: damaged header: it is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise InputError(f"{file}: damaged header: __metadata__ does not map text to text")
    data_start = 8 + length
    tensors = [_tensor(file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_layout(file, tensors, data_start, size)
    return Shard(file, prefix + raw, metadata, tuple(tensors), size)


def refuse_placeholder(file: Path, prefix: bytes) -> None:
    """Refuse what was saved in the place of weights, by its first 8 bytes.

    Raises:
        InputError: A git-lfs pointer or a web page.
    """
    if prefix.startswith(b"version "):
        raise InputError(f"{file} is a git-lfs pointer, not weights: run `git lfs pull`, or download it again")
    if prefix.lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml")):
        raise InputError(f"{file} is a web page, not weights: download it again")


def _check_prefix(file: Path, prefix: bytes, length: int, size: int) -> None:
    refuse_placeholder(file, prefix)
    if len(prefix) < 8:
        raise InputError(f"{file} is truncated: {size} bytes are no safetensors file")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{file} is no safetensors file: its header claims {length} bytes")
    if 8 + length > size:
        raise InputError(f"{file} is truncated: its header claims {length} bytes, the file has {size}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{file}: damaged header: tensor {name!r}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{where} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not _is_sizes(shape):
        raise InputError(f"{where} has no valid shape")
    if not isinstance(offsets, list) or not _is_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{where} has no valid data_offsets")
    begin, end = offsets
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
        raise InputError(f"{where}: {dtype} {shape} does not fill its {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _check_layout(file: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in tensors:
        if tensor.start != expected:
            kind = "overlaps another tensor" if tensor.start < expected else "leaves a hole before it"
            raise InputError(f"{file}: damaged header: tensor {tensor.name!r} {kind}")
        expected += tensor.nbytes
    if expected > size:
        raise InputError(f"{file} is truncated: {size} bytes of {expected}; download it again")
    if expected < size:
        raise InputError(f"{file} has {size - expected} bytes after its last tensor; download it again")


SAFETENSORS = WeightFormat("safetensors", SINGLE_FILE, INDEX_FILE, "*.safetensors", read_shard)


def read_checkpoint(path: Path, weights: WeightFormat = SAFETENSORS) -> Checkpoint:
    """Read a checkpoint's headers, index and config.

    Args:
        path: The checkpoint's folder.
        weights: Which of its weights to read.

    Raises:
        InputError: No such weights, an unfinished or ambiguous folder, or damaged files.
    """
    if (path / PARTIAL_FOLDER).exists():
        raise InputError(f"{path} is an unfinished output of expo: run the command that makes it again")
    present = sorted(file.name for file in path.glob(weights.pattern))
    index = path / weights.index
    if index.is_file():
        weight_map = _read_weight_map(index, weights)
        names = sorted(set(weight_map.values()))
    else:
        weight_map = None
        names = [weights.single] if weights.single in present else []
    if not names:
        raise InputError(_no_weights(path, present, weights))
    if weight_map is not None and weights.single in present and weights.single not in names:
        raise InputError(
            f"{path} holds {weights.single} beside {weights.index}, which does not name it: "
            "remove the one that is stale"
        )
    shards = tuple(weights.read_shard(path / name) for name in names)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    _check_against_index(index, shards, tensors, weight_map)
    ignored = tuple(name for name in present if name not in names)
    return Checkpoint(path, shards, tensors, read_config(path), weight_map is not None, ignored)


def holds_only_bin(path: Path) -> bool:
    """Whether a folder's weights are pickles (.bin) and not safetensors."""
    safe, pickled = (
        any((path / name).is_file() for name in names)
        for names in ((SINGLE_FILE, INDEX_FILE), (BIN_FILE, BIN_INDEX_FILE))
    )
    return pickled and not safe


def _no_weights(path: Path, present: list[str], weights: WeightFormat) -> str:
    if holds_only_bin(path):
        return (
            f"{path} holds .bin weights only, which are pickles and may carry code: --allow-pickle reads them with "
            "torch's weights_only loader, or convert them to safetensors with `save_pretrained`"
        )
    if present:
        return f"{path} holds {present[0]} but neither {weights.single} nor {weights.index}"
    return f"{path} holds no {weights.name} weights ({weights.single} or {weights.index})"


def _read_weight_map(index: Path, weights: WeightFormat) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not _is_text_map(weight_map):
        raise InputError(f"{index} has no weight_map")
    for name in sorted(set(weight_map.values())):
        if name != os.path.basename(name) or not name.endswith(Path(weights.single).suffix):
            raise InputError(f"{index} names {name!r}, which is not a {weights.name} file in the same folder")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is missing; download it again")
    return weight_map


def _check_against_index(
    index: Path, shards: tuple[Shard, ...], tensors: dict[str, TensorInfo], weight_map: dict[str, str] | None
) -> None:
    if sum(len(shard.tensors) for shard in shards) != len(tensors):
        names = [tensor.name for shard in shards for tensor in shard.tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{index.parent}: tensor {twice!r} is in more than one shard")
    if not tensors:
        raise InputError(f"{index.parent} holds no tensors")
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputError(f"{index} says tensor {name!r} is in {file}, where it is not")
    unnamed = sorted(set(tensors) - set(weight_map or tensors))
    if unnamed:
        raise InputError(f"{index} does not name tensor {unnamed[0]!r} of its own shards")


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json, empty where there is none."""
    return read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}


def config_with_dtype(folder: Path, dtype: str) -> str:
    """A config.json's text with its dtype, under whichever name it has, replaced."""
    config = read_config(folder)
    nested = [value for value in config.values() if isinstance(value, dict)]
    for table in (config, *nested):
        for key in {"dtype", "torch_dtype"} & set(table):
            table[key] = dtype
    if not {"dtype", "torch_dtype"} & set(config):
        config["torch_dtype"] = dtype
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} does not hold a JSON object")
    return content


def side_files(path: Path) -> list[Path]:
    """The files that go along with a checkpoint's weights, relative to its folder, sorted.

    Config, generation config, tokenizer, chat template, remote code, licence; no weights of any format, no
    README, no optimizer states, no `checkpoint-*`, `original/` or hidden folders.
    """
    found = []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = [name for name in subfolders if not _matches(name, FOREIGN_FOLDERS)]
        relative = Path(folder).relative_to(path)
        found += [relative / name for name in files if not _matches(name, (*FOREIGN_SUFFIXES, ".*"))]
    return sorted(found)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def source_fingerprint(location: Location) -> dict[str, Any]:
    """What tells a model's state: its commit on the hub, or its files' headers, sizes and times."""
    if location.hub_id is not None:
        return {"hub_id": location.hub_id, "revision": location.revision}
    return fingerprint(location.path)


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells a model folder's state without reading its weights.

    Every weights file's size and modification time, and one hash over the config, the safetensors headers and the
    ends of .bin files.

    Returns:
        `files` (name → [bytes, mtime in ns]) and `headers_xxh3` (hexadecimal).

    Raises:
        InputError: A file cannot be read, such as a link to nothing.
    """
    hasher = xxhash.xxh3_128()
    files: dict[str, list[int]] = {}
    for file in sorted((*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.json"), *path.glob("*.jinja"))):
        try:
            status, content = file.stat(), _EXTRACTS.get(file.suffix, Path.read_bytes)(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        if file.suffix in _EXTRACTS:
            files[file.name] = [status.st_size, status.st_mtime_ns]
        hasher.update(file.name.encode())
        hasher.update(content)
    return {"headers_xxh3": hasher.hexdigest(), "files": files}


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        return prefix + stream.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))


def _tail(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - BIN_TAIL_BYTES))
        return stream.read()


_EXTRACTS: dict[str, Callable[[Path], bytes]] = {".safetensors": _head, ".bin": _tail}
"""What is hashed of a weights file, by its suffix."""
