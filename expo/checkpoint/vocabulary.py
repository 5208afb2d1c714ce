"""How many tokens a model has vectors for: the rows of its embedding, read from one header.

A tokenizer may know more tokens than the model (some were added, and the model was not resized) or fewer (the rows are
padded). To support another name of the embedding, add it to `EMBEDDING`. Here, too: whether two models' probabilities
are of the same tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from expo.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Location, is_adapter, read_config, read_json, read_shard
from expo.checkpoint.tied import config_tables
from expo.checkpoint.tokens import require_same_ids
from expo.errors import InputError

EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|shared|embeddings)\.weight$"
)
"""Names of the embedding of tokens, at the end of a tensor's name."""

Shapes = Iterable[tuple[str, tuple[int, ...]]]
"""Tensors' names and shapes."""


def embedding_rows(folder: Path) -> int | None:
    """The rows of a model's embedding, from its safetensors files, else from its config; None if not known."""
    try:
        shards = [read_shard(folder / name) for name in _files(folder)]
    except InputError:  # whatever loads the weights says what is wrong with them
        return None
    rows = rows_in((tensor.name, tensor.shape) for shard in shards for tensor in shard.tensors)
    return rows if shards else _configured(folder)


def require_same_vocabulary(sft: Location, dpo: Location) -> None:
    """Refuse models whose probabilities are not of the same tokens; an adapter has the vectors of its base.

    Raises:
        InputError: They have vectors for different numbers of tokens, or an id is another token in one of them.
    """
    ours, theirs = embedding_rows(sft.path), None if is_adapter(dpo.path) else embedding_rows(dpo.path)
    if ours is not None and theirs is not None and ours != theirs:
        raise InputError(
            f"{sft.label} has vectors for {ours} tokens and {dpo.label} for {theirs}: their probabilities are of "
            "different tokens; use the SFT model that DPO was trained from"
        )
    require_same_ids(sft.path, dpo.path, theirs or ours or sys.maxsize)


def rows_in(tensors: Shapes) -> int | None:
    """The rows of the embedding among tensors; None if there is none."""
    found = (shape[0] for name, shape in tensors if len(shape) == 2 and EMBEDDING.search(name))
    return max(found, default=None)


def _files(folder: Path) -> set[str]:
    """The files that hold the embedding."""
    if (folder / SINGLE_FILE).exists():
        return {SINGLE_FILE}
    weight_map = read_json(folder / INDEX_FILE).get("weight_map") if (folder / INDEX_FILE).exists() else None
    pairs = weight_map.items() if isinstance(weight_map, dict) else ()
    return {file for name, file in pairs if isinstance(file, str) and EMBEDDING.search(name)}


def _configured(folder: Path) -> int | None:
    sizes = (table.get("vocab_size") for table in config_tables(read_config(folder)))
    return max((size for size in sizes if type(size) is int and size > 0), default=None)
