"""`expo report` on the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from expo.cli.command import Command, Shown
from expo.config import ReportConfig

if TYPE_CHECKING:
    from expo.verbs.report import Report

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo report zephyr-7b-beta zephyr-7b-beta-ExPO-a0.1 --task alpaca --output zephyr.html\n"
    "  expo report outputs_alpaca/dpo.json outputs_alpaca/expo.json --figures figures"
)


def show(report: Report) -> Shown:
    """Where the page is; what it says first, and what is missing, are logged."""
    log.info("%s", report.headline)
    for note in report.notes:
        log.info("%s", note)
    return Shown(report.describe(), report.page)


COMMAND = Command(
    config=ReportConfig,
    verb="expo.verbs.report",
    help="Write an HTML page that compares runs. RUN is a name, an output file or a reward file, or the folder of one "
    "sweep. The page shows which model wins, by how much, on which rows, and whether its answers are only longer.",
    examples=EXAMPLES,
    show=show,
    takes_recipe=False,
)
