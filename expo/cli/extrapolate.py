"""`expo extrapolate` on the command line."""

from __future__ import annotations

import dataclasses
import logging

import typer

from expo.cli.options import options_of, settings_from
from expo.cli.printing import print_data, print_result
from expo.config import ExtrapolateConfig

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo extrapolate --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1\n"
    "  expo extrapolate --recipe Starling-LM-7B-beta --output checkpoints/starling --dry-run"
)


@options_of(ExtrapolateConfig)
def command(ctx: typer.Context, *, as_json: bool) -> None:
    """Write the extrapolated checkpoint θ(α), streaming both inputs in constant memory."""
    settings = settings_from(ctx, ExtrapolateConfig)
    from expo import extrapolate as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    written = verb.run(settings)
    for output_written in written:
        log.info("α = %r: %s: %s", output_written.alpha, output_written.status, output_written.path)
        if output_written.pushed:
            log.info("α = %r: pushed: %s", output_written.alpha, output_written.pushed.url)
    data = {"outputs": [dataclasses.asdict(one) for one in written]}
    print_result(data, "\n".join(str(one.path) for one in written), as_json=as_json)
