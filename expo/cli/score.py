"""`expo score` on the command line."""

from __future__ import annotations

import dataclasses
import logging

import typer

from expo.cli.options import options_of, settings_from
from expo.cli.printing import exit_after, print_data, print_result
from expo.config import ScoreConfig
from expo.engines import SCORERS

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo score alpaca --name zephyr-7b-beta\n"
    "  expo score prompts.jsonl --name my-model --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1 --json"
)


@options_of(ScoreConfig, engines=SCORERS)
def command(ctx: typer.Context, *, as_json: bool) -> None:
    """Score generated answers with a reward model: raw logits, one per row."""
    settings = settings_from(ctx, ScoreConfig)
    from expo import score as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    result = verb.run(settings)
    if result.mean is not None:
        log.info(
            "%s: mean reward %.4f ± %.4f over %d rows",
            result.status,
            result.mean,
            result.standard_error or 0.0,
            result.n,
        )
    print_result(dataclasses.asdict(result), result.rewards, as_json=as_json)
    exit_after(result.failed)
