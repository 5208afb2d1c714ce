"""Names of tensors: what wrappers of training add to them, and one spelling of those that differ between versions.

A vision-language model's parts have other prefixes in memory than on disk, and these changed between versions of
transformers; a language model by itself has others again. `spelling` brings all to one.
To support another model's prefix, add a line to `SPELLINGS`.
"""

from __future__ import annotations

import re

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed add to a name, at any place of it."""
PARALLEL = "module."
"""What (distributed) data parallelism adds in front."""
PEFT_PREFIX = "base_model.model."
"""What PEFT adds in front."""
UNMERGED = re.compile(r"\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|original_module)\.")
"""Parts of the names of a model that was saved with its adapter not merged."""

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


def without_parts(name: str) -> str:
    """A name without the parts that only wrappers of training have."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def without_wrappers(name: str) -> str:
    """A name without what wrappers of training added, data parallelism too."""
    name = without_parts(name)
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
