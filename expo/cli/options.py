"""The options of the commands: made of the fields of their config classes, and those that are no settings.

They are read from the context again (`settings_from`), by the names of the fields.

A config file's and a recipe's values become typer's defaults, so that they are checked as flags are.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Iterable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import typer

from expo import config, config_files, recipes
from expo.files import shown
from expo.settings import POSITIONAL, Setting, flag, settings_of

Command: TypeAlias = Callable[..., None]
"""What a command does: takes the context and `as_json`."""
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
        help="Read settings from a file with a table per command, and [common].",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME", is_eager=True, callback=_use_recipe, help="Take the settings of a known model."
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", is_eager=True, callback=_set_debug, help="Show tracebacks and the engines' logs.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

NO_SETTINGS: dict[str, tuple[Any, object]] = {
    "as_json": (JsonOption, False),
    "config_file": (ConfigOption, None),
    "recipe": (RecipeOption, None),
    "debug": (DebugOption, False),
}
"""The options of every command with settings that are none themselves, and their defaults."""


def options_of(
    kind: type[config.CommonConfig], engines: Iterable[str] = ()
) -> Callable[[Command], Callable[..., None]]:
    """Give a command an option (or argument) for every setting of a config class, and those of `NO_SETTINGS`.

    Args:
        kind: The config class.
        engines: What `--engine` takes beside auto, where there is one.

    Returns:
        A decorator for the command, which takes the context, to make the settings from, and whether to print JSON.
        Typer reads a function's signature: that of the result has a parameter per option.
    """

    def decorate(command: Command) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(ctx: typer.Context, as_json: bool, **_others: object) -> None:
            command(ctx, as_json=as_json)

        kinds, defaults = get_type_hints(kind), {field.name: field.default for field in dataclasses.fields(kind)}
        known = settings_of(kind)
        if "engine" in known:
            known = {**known, "engine": dataclasses.replace(known["engine"], metavar="|".join(["auto", *engines]))}
        settings = {name: _option(name, one, kinds[name], defaults[name]) for name, one in known.items()}
        with_options.__signature__ = Signature(  # type: ignore[attr-defined]
            [
                Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context),
                *(
                    Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=default)
                    for name, (hint, default) in {**settings, **NO_SETTINGS}.items()
                ),
            ]
        )
        with_options.__annotations__ = {}
        return with_options

    return decorate


def _option(name: str, setting: Setting, kind: Any, default: object) -> tuple[Any, object]:  # noqa: ANN401 - a type
    """A setting as typer has it: an annotation, and a default; booleans are switches, tuples are repeatable."""
    default = Parameter.empty if default is dataclasses.MISSING else default
    text: dict[str, Any] = {"metavar": setting.metavar, "help": setting.help}
    if name == POSITIONAL:
        return Annotated[kind, typer.Argument(**text)], default
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    spelling = f"{flag(name)}/--no-{flag(name)[2:]}" if default is True else flag(name)
    return Annotated[kind, typer.Option(spelling, *setting.flags, **text)], default


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
