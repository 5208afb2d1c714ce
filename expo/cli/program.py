"""The program: options from settings, wiring, streams, exit codes. Commands declare; verbs decide.

stdout carries data only (with `--json` exactly one JSON object); progress, warnings and errors go to stderr. Each
field of a command's config class becomes an option, whose value is read back from typer's context by name. A config
file's and a recipe's values become typer's defaults, so that they are checked as flags are.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from expo import __version__, config, config_files, recipes as known_recipes
from expo.cli import compare, extrapolate, generate, inspect, recipes, report, score, sweep, work
from expo.cli.command import Command, Levels, Shown
from expo.cli.completion import completing
from expo.cli.ending import leave
from expo.cli.failures import EXPECTED, clean, exit_code_of, fail, say
from expo.cpus import QUIET_THREADS
from expo.errors import PARTLY_FAILED, Stopped
from expo.files import shown
from expo.orphans import VARIABLE, end_with_parent
from expo.settings import Setting, flag, headings_of, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

Config = TypeVar("Config", bound=config.CommandConfig)

INTERRUPTED = 130

log = logging.getLogger("expo")

PROCESS_ENVIRONMENT = {
    **QUIET_THREADS,
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "true",  # here alone: in another's process a fork would wait for threads it lacks
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Set before torch is loaded, which then reads it; existing values are kept."""

GC_OBJECTS = 20_000
"""Allocations between garbage collections; the default, 700, costs a seventh of the time of engine imports."""

NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Set if stderr is not a terminal, where the libraries' progress bars would fill a log."""

# --- options -------------------------------------------------------------------------------------------------------


def _use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        _add_defaults(ctx, "config", config_files.load_tables(path))
    return path


def _use_recipe(ctx: typer.Context, name: str | None) -> str | None:
    if name is not None:
        recipe = known_recipes.load(name)
        if recipe.trust_remote_code:
            log.info("%s ships its own model code: pass --trust-remote-code to run it", recipe.name)
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


def all_recipes() -> list[str]:
    """The names of recipes, those of reward models last."""
    return [*known_recipes.names(), *known_recipes.reward_model_names()]


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        is_eager=True,
        callback=_use_config,
        help="Read settings from a file with one table per command, plus [common].",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        is_eager=True,
        callback=_use_recipe,
        autocompletion=completing(all_recipes),
        help="Use the settings of a known model.",
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
"""The options that are not settings, of every command with settings, and their defaults."""


def options_of(command: Command) -> Callable[..., None]:
    """A function that runs a command, with a parameter for each of its settings and of `NO_SETTINGS`.

    Typer reads a function's signature, which is built here from the fields of the config class.
    """

    def run_it(ctx: typer.Context, as_json: bool, **_others: object) -> None:
        run_command(command, ctx, as_json=as_json)

    kinds = get_type_hints(command.config)
    defaults = {field.name: field.default for field in dataclasses.fields(command.config)}
    settings = {
        name: _option(name, one, kinds[name], defaults[name], command.choices.get(name))
        for name, one in settings_of(command.config).items()
    }
    run_it.__doc__ = command.help
    run_it.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(
                Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=default)
                for name, (hint, default) in {**settings, **NO_SETTINGS}.items()
                if name != "recipe" or command.takes_recipe
            ),
        ]
    )
    run_it.__annotations__ = {}
    return run_it


def _option(
    name: str,
    setting: Setting,
    kind: Any,  # noqa: ANN401 - a type
    default: object,
    choices: Collection[str] | None,
) -> tuple[Any, object]:
    """A setting for typer: an annotation and a default; booleans are switches, tuples repeatable or several words."""
    default = Parameter.empty if default is dataclasses.MISSING else default
    text: dict[str, Any] = {"metavar": setting.metavar, "help": setting.help}
    if choices is not None:
        text |= {"metavar": "|".join(choices), "hidden": len(choices) == 1}
        text["autocompletion"] = completing(lambda: choices)
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    if setting.positional:
        return Annotated[kind, typer.Argument(**text)], default
    spelling = f"{flag(name)}/--no-{flag(name)[2:]}" if default is True else flag(name)
    return Annotated[kind, typer.Option(spelling, *setting.flags, **text)], default


def under_headings(command: Command) -> type[TyperCommand]:
    """A command whose help lists its options under the headings of its config class."""
    headings = headings_of(command.config)

    class UnderHeadings(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer's own click
            groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
            for param in self.get_params(ctx):
                record = param.get_help_record(ctx)
                if record is None:
                    continue
                is_argument = param.param_type_name == "argument"
                heading = "Arguments" if is_argument else headings.get(str(param.name), config.CommandConfig.HEADING)
                groups.setdefault(heading, []).append((str(param.metavar), record[1]) if is_argument else record)
            for heading, records in groups.items():
                if records:
                    with formatter.section(heading):
                        formatter.write_dl(records)

    return UnderHeadings


def given_names(ctx: typer.Context) -> Levels:
    """The settings given by flags, the command's own table, `[common]` and the recipe, in order of precedence."""
    flags = {name for name in ctx.params if str(ctx.get_parameter_source(name)).endswith(".COMMANDLINE")}
    file, own = set(ctx.meta.get("expo.config", ())), set(ctx.meta.get("expo.config.own", ()))
    return flags, own, file - own, set(ctx.meta.get("expo.recipe", ()))


def refused_value(error: Exception) -> str:
    """What typer's usage errors leave out: the value, and where it came from if not a flag.

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
    return f"; got {shown(details[0].get('input'))}{origin}"


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


# --- commands ------------------------------------------------------------------------------------------------------


def run_command(command: Command, ctx: typer.Context, *, as_json: bool) -> None:
    """Plan or run a command's verb, and print the result."""
    if command.needs_alpha and not ctx.params["alpha"] and ctx.params["recipe"] is not None:
        recipes.require_alpha(ctx.params["recipe"], (ctx.params["sft"], ctx.params["dpo"]))
    left_out = command.leave_out(given_names(ctx)) if command.leave_out else ()
    settings = settings_from(ctx, command.config, left_out)
    verb = import_module(command.verb)
    if settings.dry_run:
        print_plan(verb.plan(settings).describe(), as_json=as_json)
        return
    print_result(command.show(verb.run(settings)), as_json=as_json)


def print_result(result: Shown, *, as_json: bool) -> None:
    """Print a result, as JSON or as text, and end with exit code 3 where rows failed."""
    print(_json(result.data) if as_json else result.text)
    if result.failed:
        log.warning("%s", _failures(result))
        raise typer.Exit(PARTLY_FAILED)


def _failures(result: Shown) -> str:
    """How many rows failed, why the first did, and whether to try again."""
    one = result.failed == 1
    count = f"{result.failed} {'row' if one else 'rows'} failed and {'is' if one else 'are'} marked"
    reason = "" if result.reason is None else f"{':' if one else '; the first is'} {result.reason}"
    again = f"; the same command tries {'it' if one else 'them'} again" if result.can_retry else ""
    return count + reason + again


def print_plan(data: dict[str, Any], *, as_json: bool) -> None:
    """Print a plan, as JSON or as a line per key, and per entry where there is a list of them."""
    if as_json:
        print(_json(data))
        return
    for key, value in data.items():
        for line in value if isinstance(value, list) else [value]:
            text = ", ".join(f"{k} {_short(v)}" for k, v in line.items()) if isinstance(line, dict) else line
            print(f"{key.replace('_', ' '):<18}{text}")


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, default=str)


def _short(value: object) -> object:
    if not isinstance(value, list):
        return value
    words = [str(one) for one in value]
    return " ".join(words if len(words) <= 4 else [*words[:2], "…", words[-1]])


app = typer.Typer(
    name="expo",
    help="ExPO model extrapolation: θ(α) = θ_dpo + α(θ_dpo − θ_sft), a better-aligned model without training.",
    epilog="\b\nExamples:"
    "\n  expo extrapolate --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1"
    "\n  expo recipes --show zephyr-7b-beta\n  expo sweep --help",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"expo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    pass


COMMANDS = {
    "inspect": inspect,
    "sweep": sweep,
    "extrapolate": extrapolate,
    "generate": generate,
    "score": score,
    "compare": compare,
    "report": report,
}
for name, module in COMMANDS.items():
    app.command(name, cls=under_headings(module.COMMAND), epilog=module.EXAMPLES)(options_of(module.COMMAND))


@app.command("recipes", epilog=recipes.EXAMPLES)
def _recipes(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", autocompletion=completing(all_recipes), help="Only these recipes."),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            "--show",
            metavar="NAME",
            autocompletion=completing(all_recipes),
            help="Print one in full: pair, α, source, published scores, commands.",
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List known pairs with their α, and known reward models."""
    print_result(recipes.show(names, show), as_json=as_json)


app.command("work", hidden=True)(work.command)


# --- wiring -----------------------------------------------------------------------------------------------------


def _on_terminate(signal_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(signal_number)


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def _run(arguments: Sequence[str] | None) -> int:
    if VARIABLE in os.environ:
        end_with_parent()
    code = int(app(arguments, prog_name="expo", standalone_mode=False) or 0)
    sys.stdout.flush()
    return code


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: The words after `expo`; None takes the process's own.
    """
    try:
        return _run(arguments)
    except typer.TyperException as error:
        return _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Stopped as stop:
        return stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        return exit_code_of(error)


def _usage_error(error: typer.TyperException) -> int:
    message = getattr(error, "format_message", error.__str__)()
    if message.startswith("Usage:"):
        print(message, file=sys.stderr)
        return 2
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return fail(error, " ".join(message.split()).rstrip(".") + refused_value(error) + hint, 2)


def main() -> NoReturn:
    """The `expo` program, which ends this process."""
    leave(start())


def start() -> int:
    """Set the process up and run the command it was started with; the exit code."""
    for name, value in (PROCESS_ENVIRONMENT | ({} if sys.stderr.isatty() else NO_BARS)).items():
        os.environ.setdefault(name, value)
    gc.set_threshold(GC_OBJECTS)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the terminal's encoding lacks
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("expo: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    signal.signal(signal.SIGTERM, _on_terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    code = run()
    if code in (INTERRUPTED, 128 + signal.SIGTERM):
        say("stopped; rerun the same command to continue")
    return code
