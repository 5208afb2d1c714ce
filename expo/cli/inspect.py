"""`expo inspect` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import InspectConfig

if TYPE_CHECKING:
    from expo.output.findings import Inspection

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo inspect --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta\n"
    "  expo inspect --recipe Starling-LM-7B-beta --output starling.png --json"
)


def show(found: Inspection) -> Shown:
    """The findings; the picture's path is logged."""
    log.info("%s", f"picture: {found.picture}" if found.picture else "--output FILE.png plots ‖Δ‖ by layer and module")
    return Shown(found.describe(), found.text())


COMMAND = Command(
    config=InspectConfig,
    verb="expo.verbs.inspect",
    help="Judge whether ExPO suits a pair. Measures ‖θ_dpo − θ_sft‖ per layer and module.",
    examples=EXAMPLES,
    show=show,
)
