"""`expo generate` on the command line."""

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
    BatchTokensOption,
    ChatTemplateOption,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    ExcludeOption,
    JsonOption,
    LimitOption,
    MissingOption,
    ModelDtypeOption,
    OutputDirOption,
    OverwriteOption,
    RecipeOption,
    RuleOption,
    TaskArgument,
    TrustRemoteCodeOption,
    VocabOption,
    given_names,
    settings_from,
)
from expo.cli.printing import exit_after, print_data, print_result
from expo.config import DEFAULT_TEMPERATURE, RULES, GenerateConfig

log = logging.getLogger(__name__)

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta\n"
    "  expo generate prompts.jsonl --model checkpoints/zephyr-7b-beta-ExPO-a0.1 --engine vllm --limit 100\n"
    "  expo generate alpaca --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1\n"
    "  expo generate alpaca --recipe zephyr-7b-beta --alpha 0.2\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta --data-parallel 8\n"
    "  expo generate alpaca --engine openai --base-url http://localhost:8000/v1 --model NAME\n"
    "\n\b\nAs a Slurm array of eight tasks, then joined:\n"
    "  sbatch --array=0-7 --gpus=1 --wrap 'expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta --part slurm'\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta --join 8"
)

PAIR = frozenset({"sft", "dpo", "alpha"})


def command(
    ctx: typer.Context,
    *,
    task: TaskArgument,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What answers: a directory, hub id, or id@revision; for openai the server's name."
        ),
    ] = GenerateConfig.model,
    sft: Annotated[
        str | None, typer.Option(metavar="SFT", help="Without a checkpoint of θ(α): θ_sft, …")
    ] = GenerateConfig.sft,
    dpo: Annotated[
        str | None, typer.Option("--dpo", "--aligned", metavar="DPO", help="… θ_dpo or its LoRA adapter, …")
    ] = GenerateConfig.dpo,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="… and α; θ(α) is made while the engine loads.")
    ] = GenerateConfig.alpha,
    rule: RuleOption = GenerateConfig.rule,
    alpha_for: AlphaForOption = None,
    exclude: ExcludeOption = None,
    missing: MissingOption = GenerateConfig.missing,
    vocab: VocabOption = GenerateConfig.vocab,
    allow_pickle: AllowPickleOption = GenerateConfig.allow_pickle,
    allow_nonfinite: AllowNonfiniteOption = GenerateConfig.allow_nonfinite,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the output. [default: the model's, or <DPO name>-ExPO-a<A>]"),
    ] = GenerateConfig.name,
    engine: Annotated[
        config.GenerateEngine, typer.Option(help="auto: vLLM where it is installed and can run.")
    ] = GenerateConfig.engine,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The openai engine's server; its key is in OPENAI_API_KEY.")
    ] = GenerateConfig.base_url,
    concurrency: Annotated[
        int, typer.Option(metavar="N", help="Requests under way at once (openai).")
    ] = GenerateConfig.concurrency,
    engine_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Given to the engine as it is; repeatable.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="PATH|ID", help="The task's prompts from a local file or another data set.")
    ] = GenerateConfig.dataset,
    limit: LimitOption = GenerateConfig.limit,
    output_dir: OutputDirOption = GenerateConfig.output_dir,
    device: DeviceOption = GenerateConfig.device,
    dtype: ModelDtypeOption = GenerateConfig.dtype,
    tensor_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs per engine (vllm). [default: all]")
    ] = GenerateConfig.tensor_parallel,
    data_parallel: Annotated[
        int, typer.Option(metavar="N", help="Processes that share the rows, each with GPUs of its own.")
    ] = GenerateConfig.data_parallel,
    part: Annotated[
        str | None, typer.Option(metavar="i/N|slurm", help="Do the i-th of N parts of the rows, from 0.")
    ] = GenerateConfig.part,
    join: Annotated[
        int | None, typer.Option(metavar="N", help="Check that all N parts are there and join them.")
    ] = GenerateConfig.join,
    batch_tokens: BatchTokensOption = GenerateConfig.batch_tokens,
    chat_template: ChatTemplateOption = GenerateConfig.chat_template,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message put before every prompt.")
    ] = GenerateConfig.system,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Samples per prompt.")] = GenerateConfig.n,
    temperature: Annotated[
        float | None,
        typer.Option(help=f"0 decodes greedily. [default: {DEFAULT_TEMPERATURE}; mtbench: by category]"),
    ] = GenerateConfig.temperature,
    top_k: Annotated[int, typer.Option(help="0 or -1 for all; -1 sends openai servers none.")] = GenerateConfig.top_k,
    top_p: Annotated[float, typer.Option(help="Probability mass to sample from.")] = GenerateConfig.top_p,
    presence_penalty: Annotated[
        float, typer.Option(help="Off the logit of each token generated before.")
    ] = GenerateConfig.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(help="Off a token's logit per time it was generated.")
    ] = GenerateConfig.frequency_penalty,
    seed: Annotated[int, typer.Option(help="Seed of every request.")] = GenerateConfig.seed,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most new tokens.")] = GenerateConfig.max_tokens,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Further token id that ends an answer; repeatable.")
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = GenerateConfig.trust_remote_code,
    overwrite: OverwriteOption = GenerateConfig.overwrite,
    dry_run: DryRunOption = GenerateConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
    """Answer a task's prompts; TASK is ultrafeedback, alpaca, mtbench, or a file of prompts."""
    settings = settings_from(ctx, GenerateConfig, _not_meant(ctx))
    from expo import generate as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    result = verb.run(settings)
    log.info("%s: %d rows", result.status, result.rows)
    print_result(dataclasses.asdict(result), result.output, as_json=as_json)
    exit_after(result.failed)


def _not_meant(ctx: typer.Context) -> frozenset[str]:
    """What names the other source: a recipe names a model and the pair it is of, and so may `[common]`.

    The first of flags, the command's table, `[common]` and the recipe that names one decides. A recipe alone means its
    model.
    """
    levels = given_names(ctx)
    for number, level in enumerate(levels, start=1):
        lower = frozenset().union(*levels[number:]) - level
        if "model" in level:
            of_recipe = level if number == len(levels) else frozenset()
            return (lower | of_recipe) & PAIR.union(RULES)
        if level & PAIR:
            return lower & {"model"}
    return frozenset()
