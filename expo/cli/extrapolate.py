"""`expo extrapolate` on the command line."""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated

import typer

from expo import config
from expo.cli.options import (
    AllowNonfiniteOption,
    AllowPickleOption,
    AlphaForOption,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DpoOption,
    DryRunOption,
    ExcludeOption,
    JsonOption,
    MissingOption,
    OverwriteOption,
    RecipeOption,
    RuleOption,
    SftOption,
    VocabOption,
    WorkersOption,
    settings_from,
)
from expo.cli.printing import print_data, print_result
from expo.config import ExtrapolateConfig

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo extrapolate --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1\n"
    "  expo extrapolate --recipe Starling-LM-7B-beta --output checkpoints/starling --dry-run"
)


def command(
    ctx: typer.Context,
    *,
    sft: SftOption,
    dpo: DpoOption,
    alpha: Annotated[
        list[float] | None, typer.Option(metavar="A", help="Extrapolation strength α; repeat for several.  [required]")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Output folder; may hold {alpha}. [default: checkpoints/<DPO name>-ExPO-a<A>]",
        ),
    ] = ExtrapolateConfig.output,
    device: DeviceOption = ExtrapolateConfig.device,
    dtype: Annotated[
        config.Dtype, typer.Option(help="Data type of the written weights; auto keeps each DPO tensor's own.")
    ] = ExtrapolateConfig.dtype,
    workers: WorkersOption = ExtrapolateConfig.workers,
    max_shard_size: Annotated[
        str,
        typer.Option(metavar="keep|SIZE", help="Most bytes of one file, such as 500MB or 5GB; keep has DPO's files."),
    ] = ExtrapolateConfig.max_shard_size,
    rule: RuleOption = ExtrapolateConfig.rule,
    alpha_for: AlphaForOption = None,
    exclude: ExcludeOption = None,
    missing: MissingOption = ExtrapolateConfig.missing,
    vocab: VocabOption = ExtrapolateConfig.vocab,
    allow_pickle: AllowPickleOption = ExtrapolateConfig.allow_pickle,
    allow_nonfinite: AllowNonfiniteOption = ExtrapolateConfig.allow_nonfinite,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all weights, of inputs and finished outputs, by their checksums.")
    ] = ExtrapolateConfig.verify,
    fsync: Annotated[
        bool, typer.Option("--fsync/--no-fsync", help="Force files to the disk before they get their names.")
    ] = ExtrapolateConfig.fsync,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Upload the output to this model repository; may hold {alpha}."),
    ] = ExtrapolateConfig.push_to_hub,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private where it is new.")
    ] = ExtrapolateConfig.private,
    overwrite: OverwriteOption = ExtrapolateConfig.overwrite,
    dry_run: DryRunOption = ExtrapolateConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
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
