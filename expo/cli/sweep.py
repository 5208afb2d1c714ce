"""`expo sweep` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import SweepConfig
from expo.engines import GENERATORS
from expo.theta.trajectory import rule_names

if TYPE_CHECKING:
    from expo.verbs.sweep import Swept

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo sweep --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --limit 200\n"
    "  expo sweep --recipe zephyr-7b-beta --reward-model weqweasdas/RM-Mistral-7B "
    "--reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1\n"
    "  expo sweep --sft my-sft --dpo my-dpo --alpha 0.5 --alpha 1 --alpha 2 --with-sft --task prompts.jsonl --n 4 "
    "--reward-model my-rm --output my-sweep --write\n"
    "\n\b\nA run of reinforcement learning: the step to extrapolate to, in place of α:\n"
    "  expo sweep --sft my-sft --checkpoint 100=my-run/step-100 --checkpoint 200=my-run/step-200 --target-step 400 "
    "--target-step 800 --reward-model my-rm --task prompts.jsonl\n"
    "\n\b\nFor at most half of the tokens, with the α that is found confirmed on prompts set aside:\n"
    "  expo sweep --sft my-sft --dpo my-dpo --reward-model my-rm --search race --refine\n"
    "\n\b\nExploratory: whether modules with α of their own do better than one α for all:\n"
    "  expo sweep --sft my-sft --dpo my-dpo --reward-model my-rm --task prompts.jsonl --search modules\n"
    "\n\b\nExploratory: what every θ(α) says of preference pairs, with nothing generated:\n"
    "  expo sweep --sft my-sft --dpo my-dpo --likelihood HuggingFaceH4/ultrafeedback_binarized --limit 200\n"
    "\n\b\nWhat a sweep would cost, measured on a few rows:\n"
    "  expo sweep --sft my-sft --dpo my-dpo --reward-model my-rm --dry-run"
)


def show(result: Swept) -> Shown:
    """The table, the verdict, and what to do with it."""
    for note in result.record["notes"]:
        log.warning("%s", note)
    log.info("%s: %s", result.status, result.file)
    if result.checkpoint is not None:
        alpha = result.record.get("best_alpha")
        log.info("%s: %s", "θ" if alpha is None else f"θ({alpha!r})", result.checkpoint)
    return Shown(result.describe(), result.text, result.failed, result.reason, result.can_retry)


COMMAND = Command(
    config=SweepConfig,
    verb="expo.verbs.sweep",
    help="Find the best α. One engine answers with every θ(α), and a reward model scores the answers.",
    examples=EXAMPLES,
    show=show,
    choices={
        "engine": ("auto", *(name for name, spec in GENERATORS.items() if "local" in spec.can)),
        "rule": rule_names(),
    },
)
