"""`expo score` on the command line."""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated

import typer

from expo.cli.options import (
    BatchTokensOption,
    ChatTemplateOption,
    ConfigOption,
    DataParallelOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    JoinOption,
    JsonOption,
    LimitOption,
    ModelDtypeOption,
    OutputDirOption,
    OverwriteOption,
    PartOption,
    RecipeOption,
    TaskArgument,
    TrustRemoteCodeOption,
    settings_from,
)
from expo.cli.printing import exit_after, print_data, print_result
from expo.config import ScoreConfig
from expo.engines import SCORERS

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo score alpaca --name zephyr-7b-beta\n"
    "  expo score prompts.jsonl --name my-model --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1 --json"
)


def command(
    ctx: typer.Context,
    *,
    task: TaskArgument,
    name: Annotated[str, typer.Option(metavar="NAME", help="The output's name, as `expo generate` gave it.")],
    outputs: Annotated[
        str | None, typer.Option(metavar="FILE", help="The file to score, where it lies elsewhere.")
    ] = ScoreConfig.outputs,
    dataset: Annotated[
        str | None, typer.Option(metavar="PATH|ID", help="mtbench's questions from a local file or another data set.")
    ] = ScoreConfig.dataset,
    reward_model: Annotated[
        str, typer.Option(metavar="RM", help="A directory, hub id, or id@revision; one label.")
    ] = ScoreConfig.reward_model,
    engine: Annotated[
        str, typer.Option(metavar="|".join(["auto", *SCORERS]), help="What runs the reward model.")
    ] = ScoreConfig.engine,
    limit: LimitOption = ScoreConfig.limit,
    output_dir: OutputDirOption = ScoreConfig.output_dir,
    device: DeviceOption = ScoreConfig.device,
    dtype: ModelDtypeOption = ScoreConfig.dtype,
    data_parallel: DataParallelOption = ScoreConfig.data_parallel,
    part: PartOption = ScoreConfig.part,
    join: JoinOption = ScoreConfig.join,
    batch_tokens: BatchTokensOption = ScoreConfig.batch_tokens,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Longest conversation in tokens. [default: the model's own]")
    ] = ScoreConfig.max_length,
    chat_template: ChatTemplateOption = ScoreConfig.chat_template,
    trust_remote_code: TrustRemoteCodeOption = ScoreConfig.trust_remote_code,
    overwrite: OverwriteOption = ScoreConfig.overwrite,
    dry_run: DryRunOption = ScoreConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
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
