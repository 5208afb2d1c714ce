"""An adapter's module names, which are those of a loaded model, and its base's, which are those on disk.

A vision-language model's parts have other prefixes in memory than on disk, and these changed between versions of
transformers; a training wrapper adds its own. Here both are brought to one spelling.
To support another model's prefix, add a line to `SPELLINGS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from expo.checkpoint.folder import Checkpoint
from expo.checkpoint.tied import TIED_HEADS, ties_head
from expo.errors import InputError

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and activation checkpointing add to a name, at any place of it."""
PARALLEL = "module."
"""What (distributed) data parallelism adds in front."""

WHOLES = ("thinker.", "vlm.")
"""Of models that have a vision-language model as a part, which may also be loaded by itself."""
_MODALITY = (
    "vision_tower|vision_model|visual|image_tower|video_tower|audio_tower|multi_modal_projector|connector|"
    "image_newline|embed_vision|embed_audio"
)
SPELLINGS = (
    (r"(?:model\.)?(?:language_model|text_model)\.lm_head\.", "lm_head."),
    (r"embed_out\.", "lm_head."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (rf"(?:model\.)?({_MODALITY})(?=\.|$)", r"\1"),
    (r"model\.language_model\.|model\.text_model\.|(?:language_model|text_model)\.(?:model\.)?|model\.", "text."),
    (r"(?=layers\.\d|embed_tokens\.|norm\.)", "text."),
    (r"transformer\.(?=h\.\d|wte\.|wpe\.|ln_f\.)", ""),
)
"""Beginnings of names, and one spelling of each; the first that matches counts."""


def without_wrappers(name: str) -> str:
    """A name without what wrappers of training added."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(PARALLEL):
        name = name.removeprefix(PARALLEL)
    return name


def spelling(name: str) -> str:
    """A tensor's name in the one spelling, in which it is compared with others."""
    name = without_wrappers(name)
    for whole in WHOLES:
        name = name.removeprefix(whole)
    for pattern, replacement in SPELLINGS:
        changed, count = re.subn(rf"^(?:{pattern})", replacement, name)
        if count:
            return changed
    return name


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
