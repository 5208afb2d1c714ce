"""Options that several commands share, declared once; `commands/` has those of one command alone.

Options are read from the context (`settings_from`), by the names of the config fields they fill.

A config file's and a recipe's values become typer's defaults, so that they are checked as flags are.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from expo import config, config_files, recipes
from expo.files import shown
from expo.theta.rules import RULES

Config = TypeVar("Config", bound=config.CommonConfig)

log = logging.getLogger("expo")


def _use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        _add_defaults(ctx, "config", config_files.load_tables(path))
    return path


def _use_recipe(ctx: typer.Context, name: str | None) -> str | None:
    if name is not None:
        recipe = recipes.load(name)
        if recipe.trust_remote_code:
            log.info("%s comes with model code of its own: --trust-remote-code runs it", recipe.name)
        _add_defaults(ctx, "recipe", recipe.tables)
    return name


def _add_defaults(ctx: typer.Context, source: str, tables: config_files.Tables) -> None:
    """Flag > config file > recipe > default: typer checks these values as it checks flags."""
    command = str(ctx.info_name)
    ctx.meta[f"expo.{source}"] = config_files.values_for(command, tables)
    ctx.meta[f"expo.{source}.own"] = tables.get(command, {}).keys()
    ctx.default_map = {**ctx.meta.get("expo.recipe", {}), **ctx.meta.get("expo.config", {})}


def _set_debug(debug: bool) -> bool:
    if debug:
        log.setLevel(logging.DEBUG)
    return debug


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        is_eager=True,
        callback=_use_config,
        help="Settings from a file: one table per command, and [common].",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", is_eager=True, callback=_use_recipe, help="Settings of a known model."),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", is_eager=True, callback=_set_debug, help="Tracebacks and the engines' logs.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output made with other settings, once the new one is whole.")
]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where tensors are computed.")]
SftOption = Annotated[str, typer.Option(metavar="SFT", help="θ_sft: a directory, hub id, or id@revision.")]
DpoOption = Annotated[
    str, typer.Option("--dpo", "--aligned", metavar="DPO", help="θ_dpo, trained from θ_sft, or its LoRA adapter.")
]
WorkersOption = Annotated[int | None, typer.Option(metavar="N", help="Threads. [default: the CPU count, at most 4]")]
RuleOption = Annotated[
    str, typer.Option(metavar="|".join(RULES), hidden=len(RULES) == 1, help="The formula that makes θ(α).")
]
AlphaForOption = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=A", help="Tensors with an α of their own; repeatable, first match wins."),
]
ExcludeOption = Annotated[list[str] | None, typer.Option(metavar="REGEX", help="Tensors copied from DPO; repeatable.")]
MissingOption = Annotated[config.Missing, typer.Option(help="Tensors that SFT lacks: refuse, or copy from DPO.")]
VocabOption = Annotated[
    config.Vocab, typer.Option(help="Vocabularies of different size: refuse, or extrapolate the common rows.")
]
AllowNonfiniteOption = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take NaN and infinity in θ(α) instead of refusing them.")
]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights (pickles) where there are no others.")
]
PictureOption = Annotated[str | None, typer.Option(metavar="FILE", help="A picture to draw: .png, .svg or .pdf.")]
TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.")
]
OutputDirOption = Annotated[str, typer.Option(metavar="DIR", help="Holds outputs_<task>/ and rewards_<task>/.")]
LimitOption = Annotated[int | None, typer.Option(metavar="N", help="Only the first N prompts; extends later.")]
ModelDtypeOption = Annotated[config.Dtype, typer.Option(help="Data type the model runs in.")]
ChatTemplateOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="Jinja file used instead of the model's own chat template.")
]
TrustRemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")]
BatchTokensOption = Annotated[
    int, typer.Option(metavar="N", help="Token budget of one batch of the transformers engine.")
]


def given_names(ctx: typer.Context) -> tuple[set[str], set[str], set[str], set[str]]:
    """The settings that flags, the command's own table, `[common]` and the recipe give, what counts most first."""
    flags = {name for name in ctx.params if str(ctx.get_parameter_source(name)).endswith(".COMMANDLINE")}
    file, own = set(ctx.meta.get("expo.config", ())), set(ctx.meta.get("expo.config.own", ()))
    return flags, own, file - own, set(ctx.meta.get("expo.recipe", ()))


def refused_value(error: Exception) -> str:
    """What a usage error of typer's leaves out: the value, and the option that gave it where that was no flag.

    Returns:
        The end of a message; empty where no value was refused.
    """
    checked = getattr(error.__cause__, "errors", None)  # pydantic's, which checks values for typer
    details: list[dict[str, Any]] = checked() if checked else []
    param, ctx = getattr(error, "param", None), getattr(error, "ctx", None)
    if not details or param is None or ctx is None:
        return ""
    from_file = str(ctx.get_parameter_source(param.name)).endswith(".DEFAULT_MAP")
    files = [f"--{source}" for source in ("config", "recipe") if param.name in ctx.meta.get(f"expo.{source}", ())]
    origin = f", from {files[0]}" if from_file and files else ""
    return f"; it is {shown(details[0].get('input'))}{origin}"


def settings_from(ctx: typer.Context, kind: type[Config], leave_out: Collection[str] = ()) -> Config:
    """The command's config object, from the option values typer has parsed and checked.

    Args:
        ctx: The command's context.
        kind: The config class.
        leave_out: Settings that keep their default whatever was given.
    """
    given = {name: value for name, value in ctx.params.items() if value is not None and name not in leave_out}
    values: dict[str, Any] = {}
    for name in {field.name for field in dataclasses.fields(kind)} & given.keys():
        values[name] = tuple(given[name]) if isinstance(given[name], list) else given[name]
    return kind(**values)
