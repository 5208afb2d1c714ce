"""`expo generate` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Levels, Shown
from expo.config import PAIR_SETTINGS, GenerateConfig
from expo.engines import GENERATORS
from expo.theta.trajectory import rule_names

if TYPE_CHECKING:
    from expo.verbs.generate import Generated

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta\n"
    "  expo generate prompts.jsonl --model checkpoints/zephyr-7b-beta-ExPO-a0.1 --engine vllm --limit 100\n"
    "  expo generate alpaca --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1\n"
    "  expo generate alpaca --recipe zephyr-7b-beta --alpha 0.2\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta --data-parallel 8\n"
    "  expo generate alpaca --engine openai --base-url http://localhost:8000/v1 --model NAME\n"
    "\n\b\nAs a Slurm array of eight tasks, then joined:\n"
    "  sbatch --array=0-7 --gpus=1 --wrap 'expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta --part slurm'\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta --join 8"
)

PAIR = frozenset({"sft", "dpo", "alpha", "checkpoint", "target_step"})


def show(result: Generated) -> Shown:
    """Where the output is."""
    log.info("%s: %d rows", result.status, result.rows)
    return Shown(result.describe(), result.output, result.failed, result.reason, result.can_retry)


def not_meant(levels: Levels) -> frozenset[str]:
    """The settings of the source that is not used: a recipe names both a model and its pair, and so may `[common]`.

    The first of flags, the command's table, `[common]` and the recipe that names a source decides. A recipe alone means
    its model.
    """
    for number, level in enumerate(levels, start=1):
        lower = frozenset().union(*levels[number:]) - level
        if "model" in level:
            of_recipe = level if number == len(levels) else frozenset()
            return (lower | of_recipe) & PAIR.union(PAIR_SETTINGS)
        if level & PAIR:
            return lower & {"model"}
    return frozenset()


COMMAND = Command(
    config=GenerateConfig,
    verb="expo.verbs.generate",
    help="Answer a task's prompts with a model or with θ(α).",
    examples=EXAMPLES,
    show=show,
    choices={"engine": ("auto", *GENERATORS), "rule": rule_names()},
    leave_out=not_meant,
)
