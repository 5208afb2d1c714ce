"""`expo score` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Levels, Shown
from expo.config import ScoreConfig
from expo.engines import SCORERS

if TYPE_CHECKING:
    from expo.verbs.score import Scored

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo score alpaca --name zephyr-7b-beta\n"
    "  expo score prompts.jsonl --name my-model --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1 --json\n"
    "  expo score alpaca --name my-model --reward-model my-rm --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1\n"
    "  expo score alpaca --name my-dpo --implicit-reward --sft my-sft --dpo my-dpo"
)


def show(result: Scored) -> Shown:
    """Where the rewards are, of one reward model a line; their means are logged."""
    results = (result, *result.further)
    for one in results:
        if one.mean is not None:
            error = "" if one.standard_error is None else f" ± {one.standard_error:.4f}"
            of = "" if one is result else f"{one.rewards.stem}, "
            log.info("%s%s: mean reward %.4f%s over %d rows", of, one.status, one.mean, error, one.n)
    first_failed = next((one for one in results if one.failed), result)
    return Shown(
        data=result.describe(),
        text="\n".join(str(one.rewards) for one in results),
        failed=sum(one.failed for one in results),
        reason=first_failed.reason,
        can_retry=any(one.can_retry for one in results),
    )


def not_meant(levels: Levels) -> frozenset[str]:
    """The pair, where nobody asks for the implicit reward and `[common]` names it for other commands."""
    flags, own, *_ = levels
    asked = frozenset().union(*levels)
    return frozenset() if "implicit_reward" in asked else frozenset({"sft", "dpo"}) - flags - own


COMMAND = Command(
    config=ScoreConfig,
    verb="expo.verbs.score",
    help="Score answers with a reward model. Rewards are raw logits, one per row. With several reward models, --json "
    "prints the result of the first, which lists those of the others as `further`.",
    examples=EXAMPLES,
    show=show,
    choices={"engine": ("auto", *SCORERS)},
    leave_out=not_meant,
)
