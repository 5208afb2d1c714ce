"""Adapter folders among a command's inputs: where they are allowed, and which files accompany them."""

from __future__ import annotations

import fnmatch
import logging
import re
from pathlib import Path, PurePath

from expo.checkpoint.folder import ADAPTER_CONFIG, Location, expand_user, is_adapter, read_json
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


_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
"""A model in the hub's cache, in a path."""

log = logging.getLogger(__name__)


def require_base(sft: Location, dpo: Location) -> None:
    """Refuse an adapter as SFT; warn where DPO is an adapter to another model, by its hub id or folder.

    Raises:
        InputError: SFT is an adapter.
    """
    if is_adapter(sft.path):
        raise InputError(
            f"--sft {sft.label} is an adapter, not a checkpoint: give the model it was trained on; if DPO was trained "
            "on both, merge it into that model with peft's merge_and_unload and give the merged checkpoint"
        )
    trained_on = read_json(dpo.path / ADAPTER_CONFIG).get("base_model_name_or_path") if is_adapter(dpo.path) else None
    if isinstance(trained_on, str) and is_another_base(trained_on, sft):
        given = sft.hub_id or sft.path
        log.warning("%s was trained on %s, and --sft is %s: are they the same model?", dpo.label, trained_on, given)


def hub_id_in_cache(path: str) -> str | None:
    """The hub id of a model whose path in the hub's cache was recorded, maybe on another machine; None for others."""
    cached = _CACHED.search(path)
    return "/".join(cached.groups()) if cached else None


def is_another_base(trained_on: str, sft: Location) -> bool:
    """Whether an adapter's recorded base is another model than SFT, as far as their names say."""
    cached = hub_id_in_cache(trained_on)
    name = cached or trained_on
    folder = expand_user(trained_on)
    if not trained_on.strip() or (not cached and folder.is_dir() and folder.resolve() == sft.path.resolve()):
        return False
    if cached or (is_hub_id(name) and not folder.is_dir()):
        return sft.hub_id is not None and name.lower() != sft.hub_id.lower()
    if sft.hub_id is None and folder.is_dir():
        return True
    return PurePath(name).name != sft.name


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
