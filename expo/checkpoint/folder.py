"""Read the layout of a safetensors checkpoint: where each tensor is, from headers alone.

Here: the folder with its index, config.json and model card, the side files, and fingerprints. Not here:
one file's header (`header.py`), pickled weights (`pickled.py`), reading tensor data in bulk
(`theta/stream.py`), and finding or fetching the folder (`hub.py`).
To add a format of weights, write a reader of its shards and a `WeightFormat`.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from expo.checkpoint.header import Shard as Shard, TensorInfo as TensorInfo, is_text_map, read_shard as read_shard
from expo.errors import InputError
from expo.files import (
    HEAD_BYTES,
    LFS_POINTER,
    MAX_TEXT_BYTES,
    hash_file,
    is_utf8,
    kind_of,
    name_problem,
    open_file,
    read_json as read_json,
    repeated,
    shown,
    unreadable,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
CONFIG_FILE = "config.json"
PARTIAL_FOLDER = ".expo-partial"
"""Where an unfinished output keeps its files; a folder with it is not a finished checkpoint."""

FOREIGN_SUFFIXES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.npz"),
    *("*.tfevents.*", "optimizer*", "scheduler*", "trainer_state.json", "README.md", "expo.json"),
    *("adapter_config.json", "adapter_model.*"),
)
FOREIGN_FOLDERS = ("checkpoint-*", "original", "runs", "global_step*", "__pycache__", ".*")

FINGERPRINTED = (".safetensors", ".bin", ".json", ".jinja")
MAX_CARD_BYTES = 1_000_000
BIN_TAIL_BYTES = 1 << 20
"""How much of a .bin file's end is hashed, where a zip archive lists its records with their checksums."""

log = logging.getLogger(__name__)


ADAPTER_CONFIG = "adapter_config.json"
"""Identifies a PEFT adapter."""


@dataclass(frozen=True)
class Location:
    """A model on the local disk."""

    path: Path
    """The directory."""
    name: str
    """The model's short name: the last part of its hub id or path."""
    hub_id: str | None = None
    revision: str | None = None
    """The commit on the hub that is in `path`."""

    @property
    def label(self) -> str:
        """The model's display name: its hub id, or the directory's name."""
        return self.hub_id or self.name


def refuse_inside(output: Path, *inputs: Location, flag: str = "--output") -> None:
    """Refuse an output that is an input or lies inside one, also through links.

    Raises:
        InputError: It does.
    """
    resolved = output.resolve()
    for location in inputs:
        source = location.path.resolve()
        if source == resolved or source in resolved.parents:
            raise InputError(f"the output {output} is or lies inside the input {location.path}; choose another {flag}")


def find_folder(model: str) -> Location | None:
    """A model in a local directory; None if there is no such directory."""
    path = expand_user(model)
    return Location(path=path, name=path.resolve().name) if model.strip() and path.is_dir() else None


def expand_user(model: str) -> Path:
    """A path with ~ expanded, if that user exists."""
    try:
        return Path(model).expanduser()
    except RuntimeError:  # ~name without such a user
        return Path(model)


def is_adapter(path: Path) -> bool:
    """Whether a model's folder contains a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's layout."""

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
    """The files of one weight format."""

    name: str
    single: str
    """The file with all tensors, if there is no index."""
    index: str
    pattern: str
    """Glob of this format's weight files; one that is not read gets a warning."""
    read_shard: Callable[[Path], Shard]


SAFETENSORS = WeightFormat("safetensors", SINGLE_FILE, INDEX_FILE, "*.safetensors", read_shard)


def read_checkpoint(path: Path, weights: WeightFormat = SAFETENSORS) -> Checkpoint:
    """Read a checkpoint's headers, index and config.

    Args:
        path: The checkpoint's folder.
        weights: The format to read.

    Raises:
        InputError: No such weights, an unfinished or ambiguous folder, or damaged files.
    """
    entries, index_file = _names(path), path / weights.index
    if PARTIAL_FOLDER in entries:
        raise InputError(f"{path} is an unfinished output of expo: rerun the command that writes it")
    present = fnmatch.filter(entries, weights.pattern)
    index = read_json(index_file, unique=True) if weights.index in entries else None
    weight_map = {} if index is None else _weight_map(index_file, index, weights)
    names = sorted(set(weight_map.values())) or [weights.single]
    if index is None and weights.single not in present:
        raise InputError(_no_weights(path, present, weights))
    if weights.single in present and weights.single not in names:
        raise InputError(
            f"{path} has both {weights.single} and {weights.index}, which does not list it: remove the stale one"
        )
    shards = tuple(weights.read_shard(path / name) for name in names)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    _check_tensors(path, shards, tensors)
    if index is not None:
        _check_against_index(index_file, tensors, weight_map)
        _compare_total_size(index_file, index.get("metadata"), sum(tensor.nbytes for tensor in tensors.values()))
    ignored = tuple(name for name in present if name not in names)
    return Checkpoint(path, shards, tensors, read_config(path), index is not None, ignored)


def holds_only_bin(path: Path) -> bool:
    """Whether a folder's weights are pickles (.bin) and not safetensors."""
    entries = set(_names(path))
    return bool(entries & {BIN_FILE, BIN_INDEX_FILE}) and not entries & {SINGLE_FILE, INDEX_FILE}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _no_weights(path: Path, present: list[str], weights: WeightFormat) -> str:
    if holds_only_bin(path):
        return (
            f"{path} has only .bin weights, which are pickles and may contain code: --allow-pickle reads them with "
            "torch's weights_only loader, or convert them to safetensors with `save_pretrained`"
        )
    if present:
        return f"{path} contains {shown(present[0])} but neither {weights.single} nor {weights.index}"
    return f"{path} contains no {weights.name} weights ({weights.single} or {weights.index})"


def _weight_map(index: Path, content: dict[str, Any], weights: WeightFormat) -> dict[str, str]:
    weight_map = content.get("weight_map")
    if not weight_map or not is_text_map(weight_map):
        raise InputError(f"{index} has no weight_map")
    for name in sorted(set(weight_map.values())):
        if name_problem(name) or name != os.path.basename(name) or not name.endswith(Path(weights.single).suffix):
            raise InputError(f"{index} names {shown(name)}, which is not a {weights.name} file in the same folder")
        if not os.path.lexists(index.parent / name):
            raise InputError(f"{index} names {name}, which is missing; download it again")
    return weight_map


def _check_tensors(path: Path, shards: tuple[Shard, ...], tensors: dict[str, TensorInfo]) -> None:
    if twice := repeated(tensor.name for shard in shards for tensor in shard.tensors):
        raise InputError(f"{path}: tensor {shown(twice)} is in more than one shard")
    if not tensors:
        raise InputError(f"{path} contains no tensors")


def _check_against_index(index: Path, tensors: dict[str, TensorInfo], weight_map: dict[str, str]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputError(f"{index} says tensor {shown(name)} is in {file}, but it is not")
    unnamed = sorted(set(tensors) - set(weight_map))
    if unnamed:
        raise InputError(f"{index} does not list tensor {shown(unnamed[0])} of its own shards")


def _compare_total_size(index: Path, metadata: object, nbytes: int) -> None:
    # Only a warning: all tensors are complete, and tools disagree on what total_size counts (tied tensors).
    said = metadata.get("total_size", nbytes) if isinstance(metadata, dict) else nbytes
    if said != nbytes:
        log.warning("%s says total_size %s, but its tensors (all complete) have %d bytes", index, shown(said), nbytes)


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json, empty where there is none."""
    return read_json(path / CONFIG_FILE) if os.path.lexists(path / CONFIG_FILE) else {}


def read_card(path: Path) -> dict[str, Any]:
    """The metadata of a model folder's card (README.md); empty if missing or unreadable."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = path / "README.md"
    try:
        readable = card.is_file() and card.stat().st_size <= MAX_CARD_BYTES
        metadata = metadata_load(card) if readable else None
    except (OSError, ValueError, RecursionError, YAMLError):
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def config_text(config: dict[str, Any], dtype: str = "auto") -> str:
    """The text of config.json, unless `dtype` is auto with this dtype, under whichever key it has."""
    if dtype != "auto":
        config = copy.deepcopy(config)
        nested = [value for value in config.values() if isinstance(value, dict)]
        for table in (config, *nested):
            for key in {"dtype", "torch_dtype"} & set(table):
                table[key] = dtype
        if not {"dtype", "torch_dtype"} & set(config):
            config["torch_dtype"] = dtype
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return text if is_utf8(text) else json.dumps(config, indent=2) + "\n"


def side_files(path: Path) -> list[Path]:
    """The files that accompany a checkpoint's weights, relative to its folder, sorted.

    Config, generation config, tokenizer, chat template, remote code, licence; no weights of any format, no
    README, no optimizer states, no `checkpoint-*`, `original/` or hidden folders. Anything other than a file, and links
    to folders, which may lead anywhere, are left out with a warning.

    Raises:
        InputError: A file or folder cannot be read, has a name that is not UTF-8, or is a git-lfs pointer.
    """
    return sorted(file.relative_to(path) for file in _side_files(path))


def _side_files(folder: Path) -> Iterator[Path]:
    for name in _names(folder):
        entry = folder / name
        is_folder = os.path.isdir(entry)  # noqa: PTH112 - never raises
        foreign = FOREIGN_FOLDERS if is_folder else (*FOREIGN_SUFFIXES, ".*")
        kind = None if _matches(name, foreign) else kind_of(entry)
        if kind == "a folder" and not entry.is_symlink():
            yield from _side_files(entry)
        elif kind is not None:
            log.warning("%s is %s; not copied", entry, "a link to a folder" if kind == "a folder" else kind)
        elif not _matches(name, foreign):
            _require_copyable(entry)
            yield entry


def _require_copyable(file: Path) -> None:
    _require_utf8(file)
    with open_file(file) as stream:
        if stream.read(HEAD_BYTES).startswith(LFS_POINTER):
            raise InputError(f"{file} is a git-lfs pointer: run `git lfs pull`, or remove it")


def _require_utf8(file: Path) -> None:
    if not is_utf8(str(file)):
        raise InputError(f"the name of {shown(str(file))} is not UTF-8; rename it")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def source_fingerprint(location: Location) -> dict[str, Any]:
    """Identifies a model's state: its commit on the hub, or its files' headers, sizes and times."""
    if location.hub_id is not None:
        return {"hub_id": location.hub_id, "revision": location.revision}
    return fingerprint(location.path)


def fingerprint(path: Path) -> dict[str, Any]:
    """Identifies a model folder's state without reading its weights.

    Every large file's size and modification time, and one hash over the safetensors headers, the ends of .bin files
    and the small files.

    Returns:
        `files` (name → [bytes, mtime in ns]) and `headers_xxh3` (hexadecimal).

    Raises:
        InputError: A file cannot be read, such as a broken link.
    """
    hasher = xxhash.xxh3_128()
    files: dict[str, list[int]] = {}
    for name in _names(path):
        file = path / name
        if not name.endswith(FINGERPRINTED) or kind_of(file) is not None:
            continue
        _require_utf8(file)
        status = file.stat()
        if name.endswith((".safetensors", ".bin")) or status.st_size > MAX_TEXT_BYTES:
            files[name] = [status.st_size, status.st_mtime_ns]
        hasher.update(name.encode())
        for block in _hashed_content(file):
            hasher.update(block)
    return {"headers_xxh3": hasher.hexdigest(), "files": files}


def weights_xxh3(path: Path) -> dict[str, str]:
    """File name → XXH3-128 of each weight file in a model folder, read as a whole."""
    suffix = ".bin" if holds_only_bin(path) else ".safetensors"
    hashes = {name: hash_file(path / name) for name in _names(path) if name.endswith(suffix)}
    return {name: xxh3 for name, xxh3 in hashes.items() if xxh3 is not None}


def _hashed_content(file: Path) -> Iterator[bytes]:
    """The header of safetensors files, the end of .bin files, the first bytes of other large files; otherwise all."""
    with open_file(file) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if file.suffix == ".bin":
                stream.seek(max(0, size - BIN_TAIL_BYTES))
                yield stream.read(BIN_TAIL_BYTES)
                return
            head = stream.read(8)
            length = int.from_bytes(head, "little") if file.suffix == ".safetensors" else size
            yield head
            if length <= min(MAX_TEXT_BYTES, size):
                yield stream.read(length)
        except OSError as error:
            raise unreadable(file, error) from error
