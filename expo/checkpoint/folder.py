"""Read the layout of a safetensors checkpoint: where each tensor is, from headers alone.

Here: the folder with its index, config.json and model card, and fingerprints. Not here: the side files
(`side_files.py`), what a folder without weights is (`elsewhere.py`), one file's header (`header.py`), pickled weights
(`pickled.py`), quantized ones (`quantized.py`), reading tensor data in bulk (`theta/stream.py`), and finding or
fetching the folder (`hub.py`).
To add a format of weights, write a reader of its shards and a `WeightFormat`.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from expo.checkpoint.elsewhere import elsewhere, names_below
from expo.checkpoint.header import (
    Packed as Packed,
    Shard as Shard,
    TensorInfo as TensorInfo,
    View as View,
    is_text_map,
    read_shard as read_shard,
)
from expo.checkpoint.read_ahead import ReadAhead
from expo.errors import InputError
from expo.files import (
    MAX_TEXT_BYTES,
    hash_file,
    is_utf8,
    kind_of,
    name_problem,
    natural,
    open_file,
    read_json as read_json,
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

FINGERPRINTED = (".safetensors", ".bin", ".json", ".jinja")
MAX_CARD_BYTES = 1_000_000
FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL)
LOADABLE = ("*.safetensors", "*.bin", "*.pt")
"""Files that some engine loads as weights, whatever their names."""
NOT_LOADABLE = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "pytorch_model_fsdp*")
"""What a training leaves beside them."""
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
    read_remote: Callable[[], Checkpoint] | None = field(default=None, compare=False)
    """Reads the layout of weights that stay on the hub (`remote.py`), so that `path` has only the small files."""

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
            raise InputError(
                f"the output {output} is the input {location.path} or lies inside it; choose another {flag}"
            )


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
    open_remote: Callable[[], ReadAhead] | None = None
    """Opens weights that stay on the hub; None if the shards are files here."""
    dequantized: str | None = None
    """How the weights are stored of which `tensors` are the bfloat16 values (`quantized.py`); None if as they are."""


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
    each: Callable[[Callable[[Path], Shard], Iterable[Path]], Iterable[Shard]] = map
    """Applies `read_shard` to every file, in their order."""


SAFETENSORS = WeightFormat("safetensors", SINGLE_FILE, INDEX_FILE, "*.safetensors", read_shard)


def read_checkpoint(path: Path, weights: WeightFormat = SAFETENSORS, remote: Iterable[str] = ()) -> Checkpoint:
    """Read a checkpoint's headers, index and config.

    Args:
        path: The checkpoint's folder.
        weights: The format to read.
        remote: Names of further weight files, which are not in the folder and which `weights.read_shard` finds.

    Raises:
        InputError: No such weights, an unfinished or ambiguous folder, or damaged files.
    """
    entries, index_file = sorted({*_names(path), *remote}), path / weights.index
    if PARTIAL_FOLDER in entries:
        raise InputError(f"{path} is an unfinished output of expo: rerun the command that writes it")
    present = fnmatch.filter(entries, weights.pattern)
    index = read_json(index_file, unique=True) if weights.index in entries else None
    weight_map = {} if index is None else _weight_map(index_file, index, weights, entries)
    names = sorted(set(weight_map.values())) or [weights.single]
    if index is None and weights.single not in present:
        raise InputError(_no_weights(path, present, weights))
    if weights.single in present and weights.single not in names:
        raise InputError(
            f"{path} has both {weights.single} and {weights.index}, and the index does not list it: remove the stale "
            "one"
        )
    shards = tuple(weights.each(weights.read_shard, [path / name for name in names]))
    if index is not None:
        shards = _as_loaders_read(index_file, shards, weight_map)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    if not tensors:
        raise InputError(f"{path} contains no tensors")
    if index is not None:
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
    there = elsewhere(names_below(path), str(path))
    if not present:
        return f"{path} contains no {weights.name} weights ({weights.single} or {weights.index})" + (
            f": {there}" if there else ""
        )
    advice = there or f"if it is the whole model, unquantized, rename it to {weights.single}"
    return f"{path} contains {shown(present[0])} but neither {weights.single} nor {weights.index}: {advice}"


def require_loadable(path: Path) -> None:
    """Refuse a model folder that has something else in the place of weights; loaders find more than is read here.

    Raises:
        InputError: It is one; the message says what is there and what makes a checkpoint of it.
    """
    names = [name for name in _names(path) if not _matches(name, NOT_LOADABLE)]
    if not any(_matches(name, LOADABLE) for name in names) and (there := elsewhere(names_below(path), str(path))):
        raise InputError(f"{path} contains no weights ({SINGLE_FILE} or {INDEX_FILE}): {there}")


def require_generator(path: Path) -> None:
    """Refuse a model folder that cannot generate: an unfinished output of expo, or a reward model.

    Raises:
        InputError: It is one of these.
    """
    for architecture in read_config(path).get("architectures") or []:
        if str(architecture).endswith("ForSequenceClassification"):
            raise InputError(f"{path.name} is a reward model ({architecture}), which cannot generate")
    if (path / PARTIAL_FOLDER).exists():
        raise InputError(f"{path} is an unfinished output of expo: rerun the command that writes it")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _weight_map(
    index: Path, content: dict[str, Any], weights: WeightFormat, entries: Collection[str]
) -> dict[str, str]:
    weight_map = content.get("weight_map")
    if not weight_map or not is_text_map(weight_map):
        raise InputError(f"{index} has no weight_map")
    for name in sorted(set(weight_map.values())):
        if name_problem(name) or name != os.path.basename(name) or not name.endswith(Path(weights.single).suffix):
            raise InputError(f"{index} names {shown(name)}, which is not a {weights.name} file in the same folder")
        if name not in entries:
            raise InputError(f"{index} names {name}, which is missing; download it again")
    return weight_map


def _as_loaders_read(index: Path, shards: tuple[Shard, ...], weight_map: dict[str, str]) -> tuple[Shard, ...]:
    """The shards without superseded copies of tensors; a warning says where the index disagrees with them.

    transformers and vLLM take from the index only which files to read, and then every tensor of these files, one file
    after the other: where the index says that a tensor lies does not matter, and of two copies the last one counts.

    Raises:
        InputError: No shard has a tensor of the index, or loaders take a tensor from elsewhere than the index says.
    """
    files: dict[str, list[str]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            files.setdefault(tensor.name, []).append(shard.file.name)
    copied = {name: found for name, found in files.items() if len(found) > 1}
    _refuse_ambiguous(index, weight_map, files, copied)
    moved = [name for name, found in files.items() if name not in copied and weight_map.get(name, found[0]) != found[0]]
    unlisted = [name for name in files if name not in weight_map]
    for names, disagreement in (
        (moved, "lists %d tensors in the wrong shard (%s …): following the shards, as loaders do"),
        (copied, "%d tensors are in more than one shard (%s …): taking them from where the index places them"),
        (unlisted, "does not list %d tensors of its shards (%s …): reading them, as loaders do"),
    ):
        if names:
            log.warning(f"%s: {disagreement}", index, len(names), shown(min(names)))
    return _without_superseded(shards, weight_map, copied) if copied else shards


def _refuse_ambiguous(
    index: Path, weight_map: dict[str, str], files: dict[str, list[str]], copied: dict[str, list[str]]
) -> None:
    for name, found in copied.items():
        taken = {max(found), max(found, key=natural)}  # the last in the order of transformers, and of vLLM
        if taken != {weight_map.get(name)}:
            said = f"the index says {weight_map[name]}" if name in weight_map else "the index does not list it"
            raise InputError(
                f"{index.parent}: tensor {shown(name)} is in more than one shard ({', '.join(found)}); {said}, and "
                f"loaders take it from {' or '.join(sorted(taken))}: remove the stray copies"
            )
    absent = [name for name in weight_map if name not in files]
    if absent:
        more = f" (and {len(absent) - 1} more tensors)" if len(absent) > 1 else ""
        raise InputError(
            f"{index} says tensor {shown(absent[0])} is in {weight_map[absent[0]]}, but it is not in any shard{more}: "
            "download the checkpoint again or, if the model has no such tensor, remove it from the index"
        )


def _without_superseded(
    shards: tuple[Shard, ...], weight_map: dict[str, str], copied: dict[str, list[str]]
) -> tuple[Shard, ...]:
    kept = []
    for shard in shards:
        own = tuple(t for t in shard.tensors if t.name not in copied or weight_map[t.name] == shard.file.name)
        if own:  # without its header, which lists the others too
            kept.append(shard if own == shard.tensors else replace(shard, header=b"", tensors=own))
    return tuple(kept)


def _compare_total_size(index: Path, metadata: object, nbytes: int) -> None:
    # Only a warning: all tensors are complete, and tools disagree on what total_size counts (tied tensors).
    said = metadata.get("total_size", nbytes) if isinstance(metadata, dict) else nbytes
    if said != nbytes:
        log.warning("%s says total_size %s, but its tensors (all complete) have %d bytes", index, shown(said), nbytes)


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json, empty where there is none."""
    return read_json(path / CONFIG_FILE) if os.path.lexists(path / CONFIG_FILE) else {}


def read_card(path: Path) -> dict[str, Any]:
    """The metadata of a model folder's card (README.md), its front matter; empty if missing or unreadable."""
    import yaml  # huggingface_hub's `metadata_load` is this, and takes half a second to import

    card = path / "README.md"
    try:
        readable = card.is_file() and card.stat().st_size <= MAX_CARD_BYTES
        found = FRONT_MATTER.match(card.read_text(encoding="utf-8-sig")) if readable else None
        metadata = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of config.json's content with this dtype, under whichever key it has."""
    config = copy.deepcopy(config)
    nested = [value for value in config.values() if isinstance(value, dict)]
    for table in (config, *nested):
        for key in {"dtype", "torch_dtype"} & set(table):
            table[key] = dtype
    if not {"dtype", "torch_dtype"} & set(config):
        config["torch_dtype"] = dtype
    return config


def config_text(config: dict[str, Any], dtype: str = "auto") -> str:
    """The text of config.json, unless `dtype` is auto with this dtype, under whichever key it has."""
    config = config if dtype == "auto" else with_dtype(config, dtype)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return text if is_utf8(text) else json.dumps(config, indent=2) + "\n"


def require_utf8(file: Path) -> None:
    """Refuse a path that cannot be written into a manifest or a fingerprint.

    Raises:
        InputError: It is not UTF-8.
    """
    if not is_utf8(str(file)):
        raise InputError(f"the name of {shown(str(file))} is not UTF-8; rename it")


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
        require_utf8(file)
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
