"""What becomes of an embedding and its head: copies that an adapter stores, ties, vocabularies of another size.

Copies are as in PEFT: those of a module in `modules_to_save` belong to a module of their own, and if the base ties
embedding and head they are one no longer; all others are loaded into the base itself, so that a tied pair stays one,
with the copy that is loaded last, the head's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.checkpoint.tied import TIED_HEADS
from expo.errors import InputError
from expo.theta.adapter.names import tied_heads
from expo.theta.adapter.settings import Settings


def settle_tied(
    path: Path,
    base: Checkpoint,
    settings: Settings,
    factors: dict[str, Any],
    saved: dict[str, TensorInfo],
    trained: Collection[str],
) -> Checkpoint:
    """Decide what a tied pair of the base becomes; `factors` and `saved` then have what is done to each tensor.

    Args:
        path: The adapter's folder.
        base: Its base.
        settings: The adapter's.
        factors: By the names of the base's tensors.
        saved: Whole tensors, by the names of the base's; a tied head's name may be one that the base does not store.
        trained: Which of these were trained as modules of their own, `modules_to_save`.

    Returns:
        The base, with a head of its own where the pair is not tied any more.

    Raises:
        InputError: Only one of the two changes, and merged, that would affect the other too.
    """
    layout = base
    for head, embedding in tied_heads(base):
        changed = [name for name in (head, embedding) if name in saved or name in factors]
        if any(name in factors for name in changed) or (settings.tied and head in base.tensors):
            _require_both(path, base, settings, changed, (head, embedding))
            if embedding in changed and head not in base.tensors:
                saved.pop(head, None)
                factors.pop(head, None)
        elif not settings.tied and any(name in trained for name in changed):
            _require_stored(path, settings, saved, (head, embedding))
            layout = _untied(layout, head, embedding)
        elif changed:
            copy = saved.get(head, saved.get(embedding))
            saved.pop(head, None)
            saved |= {name: copy for name in (head, embedding) if copy is not None and name in base.tensors}
    return layout


def _require_both(path: Path, base: Checkpoint, settings: Settings, changed: list[str], pair: tuple[str, str]) -> None:
    if changed and (not settings.tied or (len(changed) == 1 and pair[0] in base.tensors)):
        raise InputError(
            f"the adapter {path.name} changes {changed[0]}, but {base.path.name} ties {pair[0]} to {pair[1]}: "
            "merged, the change would reach both; train it with ensure_weight_tying, or on an untied base"
        )


def _require_stored(path: Path, settings: Settings, saved: dict[str, TensorInfo], pair: tuple[str, str]) -> None:
    lacking = next((name for name in pair if name not in saved and settings.trains(name.removesuffix(".weight"))), None)
    if lacking is not None:
        raise InputError(
            f"the adapter {path.name} names {lacking.removesuffix('.weight')} among its modules_to_save, but does not "
            "store it; save the adapter again"
        )


def _untied(base: Checkpoint, head: str, embedding: str) -> Checkpoint:
    """A checkpoint whose head, the embedding's values so far, is a tensor of its own."""
    config = {name: _without_tie(value) if isinstance(value, dict) else value for name, value in base.config.items()}
    base = replace(base, config={**config, "tie_word_embeddings": False})
    if head in base.tensors:
        return base
    own = replace(base.tensors[embedding], name=head)
    shards = tuple(
        replace(shard, header=b"", tensors=(*shard.tensors, own))
        if any(tensor.name == embedding for tensor in shard.tensors)
        else shard
        for shard in base.shards
    )
    return replace(base, shards=shards, tensors={**base.tensors, head: own})


def _without_tie(table: dict[str, Any]) -> dict[str, Any]:
    return {**table, "tie_word_embeddings": False} if "tie_word_embeddings" in table else table


# --- the vocabulary -----------------------------------------------------------------------------------------------


def resized(base: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Embeddings and heads of which an adapter has another number of rows.

    Args:
        base: The adapter's base.
        shapes: Of what the adapter has for the base's tensors.

    Returns:
        The base's name → its rows, and the adapter's.
    """
    names = dict.fromkeys(name for pair in TIED_HEADS for name in pair if name in base.tensors)
    return {
        name: (base.tensors[name].shape[0], shapes[name][0])
        for name in names
        if name in shapes
        and len(shapes[name]) == len(base.tensors[name].shape) == 2
        and shapes[name][0] != base.tensors[name].shape[0]
        and shapes[name][1:] == base.tensors[name].shape[1:]
    }


def resized_problem(base: Checkpoint, rows: dict[str, tuple[int, int]], saved: Collection[str]) -> str | None:
    """Why a vocabulary of another size cannot be taken over; None where it can."""
    names = {name for pair in TIED_HEADS for name in pair if name in base.tensors}
    unsaved = sorted(names - set(saved))
    if rows and (unsaved or len(set(rows.values())) > 1 or names != set(rows)):
        shown = ", ".join(f"{name} with {own} rows, not {theirs}" for name, (theirs, own) in rows.items())
        others = ", ".join(unsaved or sorted(names - set(rows)) or sorted(names))
        return (
            f"its vocabulary differs in size ({shown}), and it does not store the whole of {others} for it: save it "
            "from the model it was trained in with save_embedding_layers=True"
        )
    return None


def with_rows(base: Checkpoint, rows: dict[str, tuple[int, int]]) -> Checkpoint:
    """A checkpoint whose vocabulary is the adapter's: its config and headers, which are made anew."""
    theirs, own = next(iter(rows.values()))
    config = _with_size(base.config, theirs, own)
    if config == base.config:  # the config says another size than the embedding has
        config = {**config, "vocab_size": own} if "vocab_size" in config else config
    shards = tuple(
        replace(shard, header=b"") if any(tensor.name in rows for tensor in shard.tensors) else shard
        for shard in base.shards
    )
    return replace(base, config=config, shards=shards)


def _with_size(config: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    changed = {
        name: _with_size(value, old, new) if isinstance(value, dict) else value for name, value in config.items()
    }
    return {**changed, "vocab_size": new} if changed.get("vocab_size") == old else changed
