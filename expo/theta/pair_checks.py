"""Signs of a mistaken pair of checkpoints: the same model twice, swapped, unrelated.

A certain mistake is refused; an unlikely pair gets a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import PurePosixPath

from expo.checkpoint.folder import Checkpoint, Location, Shard, read_card, read_config
from expo.errors import InputError

UNRELATED_CHANGE = 0.3
"""‖θ_dpo − θ_sft‖/‖θ_sft‖ above which a pair is suspect: zephyr's SFT → DPO has 0.036, pretrained → SFT 0.99."""

log = logging.getLogger(__name__)


def check_pair(sft: Location, dpo: Location, sft_weights: Checkpoint, dpo_weights: Checkpoint) -> None:
    """Look for a mistaken pair before any weights are read.

    Raises:
        InputError: Both names refer to the same files.
    """
    if _files(sft_weights) == _files(dpo_weights):
        raise InputError(f"SFT ({sft.path}) and DPO ({dpo.path}) are the same files; every θ(α) would be DPO")
    if _is_made_from(sft, dpo) and not _is_made_from(dpo, sft):
        log.warning("%s says it was trained from %s: are --sft and --dpo swapped?", sft.label, dpo.label)


def _files(checkpoint: Checkpoint) -> set[tuple[int, int]]:
    return {(status.st_dev, status.st_ino) for status in (shard.file.stat() for shard in _local(checkpoint))}


def _local(checkpoint: Checkpoint) -> list[Shard]:
    """The shards that are files here: those that stay on the hub are not."""
    return [shard for shard in checkpoint.shards if checkpoint.open_remote is None or shard.file.exists()]


def _is_made_from(model: Location, other: Location) -> bool:
    """Whether a model's card or config names the other one as its base; a shared name does not count."""
    named = {name.rstrip("/") for name in _bases(model)}
    short = {PurePosixPath(name).name for name in named}
    return other.hub_id in named or str(other.path) in named or (other.name != model.name and other.name in short)


def _bases(model: Location) -> Iterator[str]:
    base = read_card(model.path).get("base_model")
    for name in (*(base if isinstance(base, list) else [base]), read_config(model.path).get("_name_or_path")):
        if isinstance(name, str) and name:
            yield name


def check_change(norm: float | None, relative: float | None) -> None:
    """Look for a mistaken pair once all weights were read.

    Args:
        norm: ‖θ_dpo − θ_sft‖ over the extrapolated tensors; None if it is not finite.
        relative: The same, divided by ‖θ_sft‖.

    Raises:
        InputError: Nothing differs. That is more often one model under two names than training without effect, and the
            output would be DPO under a misleading name.
    """
    if norm == 0:
        raise InputError(
            "SFT and DPO have the same weights in every tensor that is extrapolated, so θ(α) would be DPO: are both "
            "paths right?"
        )
    if relative is not None and relative > UNRELATED_CHANGE:
        log.warning(
            "‖θ_dpo − θ_sft‖ is %.2f of ‖θ_sft‖, but about 0.04 if DPO was trained from SFT: is this the right pair?",
            relative,
        )
