"""The shapes of the tensors that a loader finds in a folder, from headers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from expo.checkpoint.folder import BIN_FILE, BIN_INDEX_FILE, INDEX_FILE, SINGLE_FILE
from expo.checkpoint.header import read_shard
from expo.files import read_json

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Tensor → its shape."""


def weight_files(model: Path) -> list[Path] | None:
    """The files whose tensors a loader takes; None where there are none under the usual names."""
    for single, index in ((SINGLE_FILE, INDEX_FILE), (BIN_FILE, BIN_INDEX_FILE)):
        if (model / single).is_file():
            return [model / single]
        if (model / index).is_file():
            weight_map = read_json(model / index).get("weight_map")
            names: list[Any] = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            return [model / name for name in names] if names and all(isinstance(name, str) for name in names) else None
    return None


def weight_shapes(model: Path) -> Shapes | None:
    """The tensors that a loader finds in a folder; None where there are none under the usual names.

    Raises:
        InputError: A safetensors file or an index is missing or damaged.
    """
    files = weight_files(model)
    if files is None:
        return None
    if files[0].suffix == ".bin":
        return pickled_shapes(files)
    shards = [read_shard(file) for file in files]
    return {tensor.name: tensor.shape for shard in shards for tensor in shard.tensors}


def pickled_shapes(files: Iterable[Path]) -> Shapes | None:
    """Shapes in .bin files, read as transformers reads them; None where it would refuse them, with its own reason."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in files:
            state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
            shapes |= {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception:  # a file made by others can raise anything
        return None
    return shapes
