"""Read the layout of a `.bin` checkpoint: where in torch's zip archives each tensor's bytes are.

`torch.save` writes a zip archive without compression: one pickle of names, types, shapes and strides, and a record
of raw bytes per storage. Here the archive is copied without its weights, torch's weights_only loader unpickles the
copy, and each tensor is traced back to its record, so that all later code reads .bin files at offsets, just like
safetensors files. No weights are read here, and Python's own unpickler never runs.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from expo.checkpoint.dtypes import FROM_TORCH
from expo.checkpoint.folder import (
    BIN_FILE,
    BIN_INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    Location,
    Shard,
    TensorInfo,
    WeightFormat,
    holds_only_bin,
    read_checkpoint,
)
from expo.checkpoint.header import MAX_HEADER_BYTES
from expo.checkpoint.tied import ties_head
from expo.errors import EnvironmentFailure, InputError, first_line
from expo.files import HEAD_BYTES, open_file, stand_in

if TYPE_CHECKING:
    from torch import Tensor

NEEDED_TORCH = (2, 11)
"""Before 2.10 the weights_only loader has known bypasses; before 2.11 loading to the meta device reads weights."""

METADATA = {"format": "pt"}
"""What transformers expects in the header of a safetensors file of torch tensors."""

HEADS = ("lm_head.weight", "embed_out.weight")
"""Suffixes of the names of output heads."""

CONVERT = "load the model with transformers and write it with `save_pretrained`"
"""What to do with weights that are valid but in an unsupported layout."""

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip record: signature, …, bytes of its name, bytes of its extra field."""

DAMAGES = (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, ValueError, struct.error)
"""What Python's zip reader raises on damaged archives."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    """The bytes of one storage."""

    start: int
    """Offset in the .bin file."""
    nbytes: int


@dataclass(frozen=True)
class _Outline:
    """An archive without its weights."""

    archive: io.BytesIO
    """The same records, but empty for storages."""
    records: dict[int, _Record]
    """A storage's offset in `archive` → its record in the .bin file."""


def read_source(location: Location, allow_pickle: bool) -> Checkpoint:
    """Read the layout of a model's safetensors weights or, if it has none and that is allowed, of its .bin weights.

    Raises:
        InputError: No such weights, or damaged ones.
        EnvironmentFailure: The installed torch is too old to read .bin weights safely.
    """
    if location.read_remote is not None:
        checkpoint = location.read_remote()
    elif allow_pickle and holds_only_bin(location.path):
        checkpoint = read_pickled_checkpoint(location.path)
    else:
        checkpoint = read_checkpoint(location.path)
    if checkpoint.ignored:
        log.warning("%s: ignoring %s, which is not part of it", location.label, ", ".join(checkpoint.ignored))
    return checkpoint


def read_pickled_checkpoint(path: Path) -> Checkpoint:
    """Read the layout of a checkpoint whose weights are pytorch_model.bin, or shards with an index.

    A head that shares its bytes with the embedding, in a model whose config ties the two, is left out, as
    `save_pretrained` leaves it out of safetensors files.

    Args:
        path: The checkpoint's folder.

    Raises:
        InputError: The files are damaged, contain anything but tensors, or need code to be read.
        EnvironmentFailure: The installed torch is too old to read them safely.
    """
    _require_torch()
    found = read_checkpoint(path, PICKLED)
    tied = _tied_heads(found)
    if tied:
        log.info(
            "%s: %s is tied to the embedding and written once, as the embedding", path.name, ", ".join(sorted(tied))
        )
    shards = tuple(
        replace(
            shard,
            tensors=tuple(tensor for tensor in shard.tensors if tensor.name not in tied),
            output_name=_output_name(found, number),
        )
        for number, shard in enumerate(found.shards, 1)
    )
    tensors = {name: info for name, info in found.tensors.items() if name not in tied}
    return replace(found, shards=shards, tensors=tensors)


def _require_torch() -> None:
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < NEEDED_TORCH:
        needed = ".".join(map(str, NEEDED_TORCH))
        raise EnvironmentFailure(
            f"--allow-pickle needs torch {needed} or later, to read .bin files safely and without loading them, and "
            f"this is {torch.__version__}: pip install 'torch>={needed}'"
        )


def _output_name(checkpoint: Checkpoint, number: int) -> str:
    if not checkpoint.sharded:
        return SINGLE_FILE
    return f"model-{number:05d}-of-{len(checkpoint.shards):05d}.safetensors"


def _tied_heads(checkpoint: Checkpoint) -> set[str]:
    if not ties_head(checkpoint.config):
        return set()
    places = {name: replace(info, name="") for name, info in checkpoint.tensors.items()}
    heads = {name for name in places if f".{name}".endswith(tuple(f".{head}" for head in HEADS))}
    embeddings = {place for name, place in places.items() if name not in heads}
    return {name for name in heads if places[name] in embeddings}


# --- one file -----------------------------------------------------------------------------------------------------


def read_pickled_shard(file: Path) -> Shard:
    """Find a .bin file's tensors, without reading them.

    Raises:
        InputError: The file is not a complete archive of a state dict; the message says what is wrong.
    """
    outline = _read_outline(file)
    state = _unpickle(file, outline.archive)
    if not isinstance(state, dict):
        raise InputError(f"{file} contains a {type(state).__name__}, not a model's state dict; {CONVERT}")
    # dict's own method: the pickle may have shadowed that of its OrderedDict
    tensors = [_tensor(file, name, value, outline.records) for name, value in dict.items(state)]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    return Shard(file, b"", METADATA, tuple(tensors), file.stat().st_size)


PICKLED = WeightFormat(".bin", BIN_FILE, BIN_INDEX_FILE, "pytorch_model*.bin", read_pickled_shard)


def _read_outline(file: Path) -> _Outline:
    try:
        with open_file(file) as stream:
            _check_signature(file, stream.read(HEAD_BYTES))
            with zipfile.ZipFile(stream) as archive:
                return _outline(file, archive, stream)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except DAMAGES as error:
        raise InputError(f"{file} is truncated or damaged ({first_line(error)}); download it again") from error


def _check_signature(file: Path, prefix: bytes) -> None:
    if found := stand_in(prefix):
        raise InputError(f"{file} is not weights but {found}")
    if prefix.startswith(b"\x80"):
        raise InputError(
            f"{file} is a bare pickle, or in torch's format from before 1.6, which is not supported; {CONVERT}"
        )
    if not prefix.startswith(b"PK\3\4"):
        raise InputError(f"{file} is not a torch archive: download it again")


def _outline(file: Path, archive: zipfile.ZipFile, stream: IO[bytes]) -> _Outline:
    entries = _entries(archive)
    if not {"data.pkl", "version"} <= entries.keys():
        raise InputError(f"{file} is a zip archive, but not one of torch's; {CONVERT}")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise InputError(f"{file} was written on a big-endian machine, which is not supported; {CONVERT}")
    copy, records = io.BytesIO(), {}
    with zipfile.ZipFile(copy, "w") as small:
        for name, entry in entries.items():
            is_storage = name.startswith("data/")
            small.writestr(zipfile.ZipInfo(f"archive/{name}"), b"" if is_storage else archive.read(entry))
            if is_storage:
                records[copy.tell()] = _Record(_data_start(entry, stream), entry.file_size)
    copy.seek(0)
    return _Outline(copy, records)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The records torch reads, by their names below the archive's one folder.

    Raises:
        zipfile.BadZipFile: One is duplicated, compressed, encrypted, or has an impossible position.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if not name.startswith("data/") and name not in ("data.pkl", "version", "byteorder"):
            continue
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if name in entries or not stored or entry.flag_bits & 1:
            raise zipfile.BadZipFile(f"its record {name!r} is duplicated, compressed or encrypted")
        if entry.header_offset < 0 or (not name.startswith("data/") and entry.file_size > MAX_HEADER_BYTES):
            raise zipfile.BadZipFile(f"its record {name!r} begins before the file, or is absurdly large")
        entries[name] = entry
    return entries


def _data_start(entry: zipfile.ZipInfo, stream: IO[bytes]) -> int:
    stream.seek(entry.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    start = int(entry.header_offset + LOCAL_HEADER.size + name_length + extra_length)
    if signature != b"PK\3\4" or start + entry.file_size > stream.seek(0, io.SEEK_END):
        raise zipfile.BadZipFile(f"its record {entry.filename!r} is not where its directory says")
    return start


def _unpickle(file: Path, archive: io.BytesIO) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and old classes, which a user cannot act on
            return torch.load(archive, map_location="meta", weights_only=True, mmap=False)
    except Exception as error:  # a pickle made by others can raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {named[1]!r}" if named else type(error).__name__
        raise InputError(
            f"{file} is refused by torch's weights_only loader ({reason}): it is damaged, or contains more than "
            "tensors; use a safetensors version of it"
        ) from error


def _tensor(file: Path, name: object, value: object, records: dict[int, _Record]) -> TensorInfo:
    import torch

    if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
        what = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise InputError(f"{file} has {what} as a tensor name; {CONVERT}")
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{file}: {name!r} is a {type(value).__name__}, not a tensor: this is a trainer's checkpoint, not a "
            f"model's state dict; {CONVERT}"
        )
    tensor = torch.Tensor.detach(value)  # without saved attributes that could shadow its methods
    oddity = _oddity(tensor)
    record = None if oddity else _record(tensor, records)
    if record is None:
        raise InputError(f"{file}: tensor {name!r} {oddity or 'has no values in the file'}; {CONVERT}")
    begin, nbytes = int(tensor.storage_offset()) * tensor.itemsize, tensor.numel() * tensor.itemsize
    if begin + nbytes > record.nbytes:
        raise InputError(f"{file} is damaged: tensor {name!r} ends beyond its data")
    shape = tuple(map(int, tensor.shape))
    return TensorInfo(name, FROM_TORCH[_dtype_name(tensor)], shape, file, record.start + begin, nbytes)


def _is_unicode(name: str) -> bool:
    """Whether the name can be written in a safetensors header, which is UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _oddity(tensor: Tensor) -> str | None:
    """Why a tensor's values are not one contiguous run of bytes, or None."""
    if str(tensor.layout) != "torch.strided":
        return "is sparse"
    if _dtype_name(tensor) not in FROM_TORCH:
        return f"has the type {_dtype_name(tensor)}"
    if tensor.is_conj() or tensor.is_neg():
        return "is the conjugate or negative of what is stored"
    if not tensor.is_contiguous():
        return f"of shape {list(tensor.shape)} is a view with strides {list(tensor.stride())}"
    return None


def _record(tensor: Tensor, records: dict[int, _Record]) -> _Record | None:
    """The record of a tensor: torch records in a storage loaded to the meta device where its bytes are."""
    offset = tensor.untyped_storage()._checkpoint_offset
    return records.get(offset) if isinstance(offset, int) else None
