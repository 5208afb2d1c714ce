"""Signs of a mistaken pair of checkpoints: the same model twice, swapped, unrelated.

A certain mistake is refused; an unlikely pair gets a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from expo.checkpoint.folder import Checkpoint, Location, Shard, read_card, read_config
from expo.errors import InputError

if TYPE_CHECKING:
    from expo.theta.trajectory.fit import Quality

UNRELATED_CHANGE = 0.3
"""‖θ_dpo − θ_sft‖/‖θ_sft‖ above which a pair is suspect: zephyr's SFT → DPO has 0.036, pretrained → SFT 0.99."""

FAR = 20
"""Times the last checkpoint's step, up to which RELEX (arXiv 2605.21468) shows trajectories."""
LOW_R2, LOW_EXPLAINED = 0.9, 0.5
"""Below these, a run's changes are no straight lines."""

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


def check_steps(steps: Sequence[Location], weights: Sequence[Checkpoint]) -> None:
    """Look for a training run's checkpoint that is given twice.

    Raises:
        InputError: Two of them are the same files.
    """
    for (one, files), (other, others) in combinations(zip(steps, map(_files, weights), strict=True), 2):
        if files == others:
            raise InputError(f"the checkpoints {one.path} and {other.path} are the same files, and so one step")


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


def check_target(target: float, last: float) -> None:
    """Warn of a step that is far out.

    Args:
        target: T, in steps.
        last: The last step that has a checkpoint.
    """
    if target > FAR * last:
        log.warning(
            "step %g is %.3g times the last checkpoint's: the furthest that was published is %d times, for RL with "
            "verifiable rewards (RELEX), not for DPO",
            *(target, target / last, FAR),
        )


def is_straight(found: Quality) -> bool:
    """Whether a training run moves along straight lines, as far as its checkpoints show.

    Args:
        found: Of all its tensors.
    """
    return (found.explained or 0.0) >= LOW_EXPLAINED and (found.r2 is None or found.r2 >= LOW_R2)


def told_lines(found: Quality, steps: int) -> str:
    """The same as a sentence.

    Args:
        found: Of all its tensors.
        steps: The number of its checkpoints.
    """
    if found.explained is None:
        return "no checkpoint differs from the start"
    r2 = "" if found.r2 is None else f", R² {found.r2:.3f}"
    fit = f"the lines explain {found.explained:.0%} of the changes{r2}"
    if not is_straight(found):
        return (
            f"this run does not move along straight lines ({fit}): see first how well a step that has a checkpoint is "
            "reached from earlier ones. That RL runs with verifiable rewards do is RELEX's finding; for DPO nobody "
            "has shown it"
        )
    return f"{fit}; any two checkpoints lie on a line: a third one shows whether the run does" if steps == 2 else fit


def check_lines(found: Quality, steps: int) -> None:
    """Warn of a training run that does not move along straight lines.

    Args:
        found: Of all its tensors.
        steps: The number of its checkpoints.
    """
    log.log(logging.INFO if is_straight(found) else logging.WARNING, "%s", told_lines(found, steps))


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
