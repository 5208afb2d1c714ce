"""Adapter folders among a command's inputs: where they are allowed, and which files accompany them."""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path

from expo.checkpoint.folder import ADAPTER_CONFIG, Location, is_adapter, read_json
from expo.checkpoint.side_files import side_files
from expo.errors import InputError
from expo.settings import is_hub_id

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""A tokenizer needs one of these."""
TEMPLATES = ("chat_template.*", "additional_chat_templates/*")
TOKENIZERS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *(*VOCABULARIES, *TEMPLATES),
)
"""What training changes besides the weights, so that the adapter's files take precedence."""


log = logging.getLogger(__name__)


def require_base(sft: Location, dpo: Location) -> None:
    """Refuse an adapter as SFT; warn where DPO is an adapter to another model of the hub.

    Raises:
        InputError: SFT is an adapter.
    """
    if is_adapter(sft.path):
        raise InputError(
            f"--sft {sft.label} is an adapter, not a checkpoint: give the model it was trained on; if DPO was trained "
            "on both, merge it into that model with peft's merge_and_unload and give the merged checkpoint"
        )
    if sft.hub_id and is_adapter(dpo.path):
        trained_on = read_json(dpo.path / ADAPTER_CONFIG).get("base_model_name_or_path")
        if isinstance(trained_on, str) and is_hub_id(trained_on) and trained_on.lower() != sft.hub_id.lower():
            log.warning("%s was trained on %s, and --sft is %s: are they the same?", dpo.label, trained_on, sft.hub_id)


def output_side_files(sft: Path, dpo: Path) -> dict[str, Path]:
    """The files that accompany θ(α).

    They are DPO's. If DPO is an adapter they are SFT's, except for the tokenizer and chat template files that the
    adapter's folder has. A tokenizer is taken as a whole: if the adapter's folder has a vocabulary, none of SFT's
    tokenizer files or chat templates is used, as they would mix with, or override, what DPO was trained with.

    Args:
        sft: SFT's folder.
        dpo: DPO's folder.

    Returns:
        Name in the output → file.
    """
    if not is_adapter(dpo):
        return {str(file): dpo / file for file in side_files(dpo)}
    own = [file for file in side_files(dpo) if _is_among(file, TOKENIZERS)]
    replaced: tuple[str, ...] = ()
    if any(_is_among(file, VOCABULARIES) for file in own):
        replaced = TOKENIZERS
    elif any(_is_among(file, TEMPLATES) for file in own):
        replaced = TEMPLATES
    kept = [file for file in side_files(sft) if not _is_among(file, replaced)]
    return {str(file): folder / file for folder, files in ((sft, kept), (dpo, own)) for file in files}


def _is_among(file: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(str(file), pattern) for pattern in patterns)
