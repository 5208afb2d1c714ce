"""`expo compare` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import CompareConfig

if TYPE_CHECKING:
    from expo.verbs.compare import Compared

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo compare zephyr-7b-dpo zephyr-7b-dpo-ExPO-a0.3 --task alpaca\n"
    "  expo compare rewards_alpaca/A.jsonl rewards_alpaca/B.jsonl --json\n"
    "  expo compare A.json B.json C.json --intersect --markdown > table.md"
)


def show(result: Compared) -> Shown:
    """The tables; what a reader must know of the rows is logged."""
    for line in result.comparison.notes:
        log.warning("%s", line)
    return Shown(result.describe(), result.text)


COMMAND = Command(
    config=CompareConfig,
    verb="expo.verbs.compare",
    help="Compare runs on the prompts they share. RUN is a name, an output file or a reward file.",
    examples=EXAMPLES,
    show=show,
    takes_recipe=False,
)
