"""`expo score` on the command line."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import ScoreConfig
from expo.engines import SCORERS

if TYPE_CHECKING:
    from expo.score import Scored

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo score alpaca --name zephyr-7b-beta\n"
    "  expo score prompts.jsonl --name my-model --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1 --json"
)


def show(result: Scored) -> Shown:
    """Where the rewards are; their mean is logged."""
    if result.mean is not None:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
        log.info("%s: mean reward %.4f%s over %d rows", result.status, result.mean, error, result.n)
    return Shown(dataclasses.asdict(result), result.rewards, result.failed, result.reason, result.can_retry)


COMMAND = Command(
    config=ScoreConfig,
    verb="expo.score",
    help="Score generated answers with a reward model: raw logits, one per row.",
    examples=EXAMPLES,
    show=show,
    choices={"engine": ("auto", *SCORERS)},
)
