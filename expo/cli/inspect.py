"""`expo inspect` on the command line."""

from __future__ import annotations

import logging

import typer

from expo.cli.options import options_of, settings_from
from expo.cli.printing import print_data, print_result
from expo.config import InspectConfig

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo inspect --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta\n"
    "  expo inspect --recipe Starling-LM-7B-beta --output starling.png --json"
)


@options_of(InspectConfig)
def command(ctx: typer.Context, *, as_json: bool) -> None:
    """Measure ‖θ_dpo − θ_sft‖ per layer and module, and tell whether the pair looks like one ExPO suits."""
    settings = settings_from(ctx, InspectConfig)
    from expo import inspection as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    found = verb.run(settings)
    print_result(found.describe(), found.text(), as_json=as_json)
    log.info("%s", f"drawn: {found.picture}" if found.picture else "--output FILE.png draws it, layer by module")
