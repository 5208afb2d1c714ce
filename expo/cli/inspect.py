"""`expo inspect` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import InspectConfig
from expo.theta.trajectory import rule_names

if TYPE_CHECKING:
    from expo.output.findings import Inspection

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo inspect --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta\n"
    "  expo inspect --recipe Starling-LM-7B-beta --output starling.png --json\n"
    "\n\b\nA training run: whether it moves along straight lines:\n"
    "  expo inspect --sft my-sft --checkpoint 100=my-run/step-100 --checkpoint 200=my-run/step-200 "
    "--checkpoint 300=my-run/step-300 --output way.png"
)


def show(found: Inspection) -> Shown:
    """The findings; the picture's path is logged."""
    what = "‖Δ‖ by layer and module" if found.trajectory is None else "each module's way over the steps"
    log.info("%s", f"picture: {found.picture}" if found.picture else f"--output FILE.png plots {what}")
    return Shown(found.describe(), found.text())


COMMAND = Command(
    config=InspectConfig,
    verb="expo.verbs.inspect",
    help="Judge whether ExPO suits a pair. Measures ‖θ_dpo − θ_sft‖ per layer and module.",
    examples=EXAMPLES,
    show=show,
    choices={"rule": rule_names()},
)
