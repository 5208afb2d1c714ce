"""`expo generate` on the command line."""

from __future__ import annotations

import dataclasses
import logging

import typer

from expo.cli.options import given_names, options_of, settings_from
from expo.cli.printing import exit_after, print_data, print_result
from expo.config import RULES, GenerateConfig
from expo.engines import GENERATORS

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


@options_of(GenerateConfig, engines=GENERATORS)
def command(ctx: typer.Context, *, as_json: bool) -> None:
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
