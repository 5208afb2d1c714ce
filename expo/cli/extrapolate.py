"""`expo extrapolate` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import ExtrapolateConfig
from expo.theta.trajectory import rule_names

if TYPE_CHECKING:
    from expo.verbs.extrapolate import Extrapolated

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo extrapolate --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1\n"
    "  expo extrapolate --recipe Starling-LM-7B-beta --output checkpoints/starling --dry-run\n"
    "\n\b\nA run of reinforcement learning, from its first checkpoints to a later step:\n"
    "  expo extrapolate --sft my-sft --checkpoint 100=my-run/step-100 --checkpoint 200=my-run/step-200 "
    "--target-step 1500\n"
    "\n\b\nAs a Slurm array of four tasks, then joined:\n"
    "  sbatch --array=0-3 --wrap 'expo extrapolate --recipe zephyr-7b-beta --part slurm'\n"
    "  expo extrapolate --recipe zephyr-7b-beta --join 4"
)


def show(outputs: Extrapolated) -> Shown:
    """The outputs' paths; the status of each is logged."""
    for output in outputs:
        which = f"α = {output.alpha!r}" if output.target_step is None else f"step {output.target_step:.12g}"
        log.info("%s: %s: %s", which, output.status, output.path)
        if output.pushed:
            log.info("%s: pushed: %s", which, output.pushed.url)
    return Shown(outputs.describe(), "\n".join(str(output.path) for output in outputs))


COMMAND = Command(
    config=ExtrapolateConfig,
    verb="expo.verbs.extrapolate",
    help="Write θ(α) as a checkpoint. Both inputs are streamed, in constant memory.",
    examples=EXAMPLES,
    show=show,
    choices={"rule": rule_names()},
    needs_alpha=True,
)
