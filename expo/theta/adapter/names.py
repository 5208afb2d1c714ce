"""Which tensor of the base an adapter's names mean: they are those of a loaded model, and the base's those on disk."""

from __future__ import annotations

from collections.abc import Iterable

from expo.checkpoint.folder import Checkpoint
from expo.checkpoint.names import spelling
from expo.checkpoint.tied import TIED_HEADS, ties_head
from expo.errors import InputError


def base_names(names: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """Which tensor of the base each of an adapter's names means.

    Args:
        names: The adapter's names, each with the ending of its tensor.
        base: Its base.

    Returns:
        The adapter's name → the base's, or a tied head's that the base does not store, or, where it has neither, the
        adapter's own.

    Raises:
        InputError: A name may mean several tensors, or two mean one.
    """
    stored: dict[str, list[str]] = {}
    for name in (*base.tensors, *(head for head, _ in tied_heads(base) if head not in base.tensors)):
        stored.setdefault(spelling(name), []).append(name)
    found = {name: _base_name(name, stored, base) for name in names}
    owners: dict[str, str] = {}
    for name, target in found.items():
        if (other := owners.setdefault(target, name)) != name:
            raise InputError(f"the adapter's {other} and {name} both mean {target} of {base.path.name}; save it again")
    return found


def _base_name(name: str, stored: dict[str, list[str]], base: Checkpoint) -> str:
    if name in base.tensors:
        return name
    meant = stored.get(spelling(name), [name])
    if len(meant) > 1:
        raise InputError(
            f"the adapter's {name} may mean {' or '.join(meant)} of {base.path.name}: merge it with peft's "
            "merge_and_unload and give the merged checkpoint as --dpo"
        )
    return meant[0]


def tied_heads(base: Checkpoint) -> list[tuple[str, str]]:
    """A checkpoint's tied heads, each with its embedding; if the config does not say, the heads it does not store.

    Of names that a head may have, it is the one that is stored, otherwise the first, as transformers would store it.
    """
    ties = ties_head(base.config)
    heads: dict[str, list[str]] = {}
    for head, embedding in TIED_HEADS:
        if embedding in base.tensors and (head not in base.tensors if ties is None else ties):
            heads.setdefault(embedding, []).append(head)
    return [(next((head for head in names if head in base.tensors), names[0]), its) for its, names in heads.items()]
