"""The command reference in docs/reference/, made of the program: its commands, settings, recipes and exit codes.

`python tools/make_reference.py` writes the pages; with `--check` it writes nothing, names those that are not what the
program says, and exits with 1. Nothing on these pages is written by hand.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from typer.models import ArgumentInfo

from expo import recipes
from expo.cli import program
from expo.config import COMMANDS, CommandConfig, EngineConfig
from expo.engines import GENERATORS, SCORERS, EngineSpec
from expo.errors import EXIT_CODES, PARTLY_FAILED
from expo.settings import Setting, flag, headings_of, settings_of

FOLDER = Path(__file__).parents[1] / "docs" / "reference"

CHANGES = {"nothing": "", "rows": "rows", "batches": "rows, if the engine pads", "weights": "weights"}
TYPES = {str: "text", int: "integer", float: "number", bool: "switch", Path: "file"}
UNSET: tuple[object, ...] = (None, (), False)
"""Defaults that a help text explains, where there is anything to say."""


@dataclass(frozen=True)
class Option:
    """An option or argument, as the program is given it."""

    group: str
    spelling: str
    kind: str
    default: str
    help: str
    changes: str

    def row(self) -> str:
        """A row of the table."""
        cells = (f"`{self.spelling}`<br>{self.kind}", self.default, self.help, self.changes)
        return f"| {' | '.join(cells)} |"


def main() -> int:
    """Write the pages, or check them.

    Returns:
        The exit code: 1 where a page is stale.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is stale")
    check = parser.parse_args().check
    wanted = pages()
    if check:
        found = stale(wanted)
        print("\n".join(found) or "the reference is what the program says")
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"written: {len(wanted)} pages in {FOLDER}")
    return 0


def stale(wanted: dict[str, str]) -> list[str]:
    """A line for each page that is missing, not what it should be, or there without a command."""
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    names = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
    return [f"docs/reference/{name} is stale: run python tools/make_reference.py" for name in names]


def pages() -> dict[str, str]:
    """File name → the page: one per command, and their overview."""
    commands = [one for one in program.app.registered_commands if not one.hidden]
    made = {f"{one.name}.md": _command_page(one) for one in commands}
    return {"index.md": _overview(commands), **made}


def _overview(commands: list[Any]) -> str:
    lines = [
        *_front("Commands, their options, and the exit codes of expo."),
        "# All commands",
        "",
        "| command | does |",
        "| --- | --- |",
        *(f"| [`expo {one.name}`]({one.name}.md) | {_cell(one.callback.__doc__)} |" for one in commands),
        "",
        "Every command takes `--help`; `expo --version` prints the version, and `python -m expo` is the same program.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "| --- | --- |",
        *(f"| {code} | {_cell(meaning)} |" for code, meaning in EXIT_CODES.items()),
    ]
    return "\n".join(lines) + "\n"


def _command_page(command: Any) -> str:  # noqa: ANN401 - typer's
    options = sorted(options_of(command), key=lambda one: one.spelling.startswith("--"))
    arguments = " ".join(one.spelling for one in options if not one.spelling.startswith("--"))
    config = COMMANDS.get(command.name)
    has_rows = config is not None and issubclass(config, EngineConfig)
    codes = [code for code in EXIT_CODES if code != PARTLY_FAILED or has_rows]
    blocks = [
        *_front(f"Every option of expo {command.name}: type, default, what it does and what it changes."),
        f"# expo {command.name}",
        "",
        " ".join(command.callback.__doc__.split()),
        "",
        "```text",
        f"expo {command.name} [OPTIONS] {arguments}".rstrip(),
        "```",
        "",
        *_examples(command.epilog),
        *_tables(options),
    ]
    if command.name == "recipes":
        blocks += _known_models()
    blocks += ["## Exit codes of this command", "", *(f"- {code}: {EXIT_CODES[code]}" for code in codes)]
    return "\n".join(blocks) + "\n"


def _front(description: str) -> list[str]:
    return ["---", f'description: "{description}"', "---", "", "<!-- made by tools/make_reference.py -->", ""]


def _examples(epilog: str) -> list[str]:
    """The examples at the end of a command's help: paragraphs of a heading and commands."""
    lines = ["## Examples", ""]
    for paragraph in epilog.split("\b\n")[1:]:
        heading, *commands = paragraph.strip().splitlines()
        lines += [] if heading == "Examples:" else [heading, ""]
        lines += ["```sh", *map(str.strip, commands), "```", ""]
    return lines


def _tables(options: list[Option]) -> Iterator[str]:
    for group in dict.fromkeys(one.group for one in options):
        yield from (f"## {group}", "", "| option | default | what it does | changes |", "| --- | --- | --- | --- |")
        yield from (one.row() for one in options if one.group == group)
        yield ""


def options_of(command: Any) -> Iterator[Option]:  # noqa: ANN401 - typer's
    """What a command takes, in the order of its help; typer reads the same signature."""
    config = COMMANDS.get(command.name)
    settings = settings_of(config) if config else {}
    for name, one in inspect.signature(command.callback, eval_str=True).parameters.items():
        if get_origin(one.annotation) is not Annotated:
            continue
        kind, info = get_args(one.annotation)
        setting = settings.get(name)
        help_text, default = _help_and_default(info.help, one.default)
        yield Option(
            group=_group(config, name),
            spelling=_spelling(name, kind, info),
            kind=_values(kind, info.metavar),
            default=default,
            help=_cell(help_text + _engines(command.name, setting)),
            changes="" if setting is None else CHANGES[setting.changes],
        )


def _group(config: type | None, name: str) -> str:
    if name in program.NO_SETTINGS:
        return CommandConfig.HEADING
    if config is None or settings_of(config)[name].positional:
        return "Options"
    return headings_of(config)[name]


def _spelling(name: str, kind: object, info: Any) -> str:  # noqa: ANN401 - typer's
    if isinstance(info, ArgumentInfo):
        return str(info.metavar or name.upper()) + ("…" if "repeatable" in _kind(kind) else "")
    written = (info.default, *(info.param_decls or ()))  # in an annotation, the first word is where a default may be
    flags = ", ".join(one.replace("/", " / ") for one in written if isinstance(one, str)) or flag(name)
    shown = info.metavar is not None and "|" not in info.metavar
    return f"{flags} {info.metavar}" if shown else flags


def _values(kind: object, metavar: str | None) -> str:
    """What it may be: its choices, or its type."""
    words = _choices(kind) or (metavar or "").split("|")
    return " ".join(f"`{word}`" for word in words) if len(words) > 1 else _kind(kind)


def _choices(kind: object) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _kind(kind: Any) -> str:  # noqa: ANN401 - a type
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is list:
        return f"{_kind(get_args(kind)[0])}, repeatable"
    return "choice" if _choices(kind) else TYPES[kind]


def _help_and_default(help_text: str, default: object) -> tuple[str, str]:
    """The help without `[default: …]`, and the default that it or the program has."""
    found = re.search(r"\s*\[(?:default: )?([^\[\]]*(?:\[[^\]]*\])?[^\[\]]*)\]$", help_text)
    if found:
        return help_text[: found.start()], _cell(found[1])
    if default is True:
        return help_text, "on"
    if default is inspect.Parameter.empty:
        return help_text, "required"
    return help_text, "" if default in UNSET else f"`{default}`"


def _engines(command: str, setting: Setting | None) -> str:
    """The engines that a setting is for, where not all of the command's are."""
    engines: dict[str, EngineSpec] = SCORERS if command == "score" else GENERATORS
    able = [name for name, spec in engines.items() if setting and setting.needs in (None, *spec.can)]
    if setting is None or setting.needs is None or len(able) == len(engines) or command == "sweep":
        return ""
    return f" Engines: {', '.join(able)}."


def _cell(text: str) -> str:
    """Text as a table's cell: one line, nothing that Markdown or HTML would read."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    line = re.sub(r"(?<![\w`-])(--[a-z][\w-]*)(?!`)", r"`\1`", line)
    return re.sub(r"([*_])(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\1", line)


def _known_models() -> Iterator[str]:
    pairs = [one for name in recipes.names() if isinstance(one := recipes.load(name), recipes.Recipe)]
    rewards = [
        one for name in recipes.reward_model_names() if isinstance(one := recipes.load(name), recipes.RewardRecipe)
    ]
    yield from ("## Known pairs", "", "| name | θ_sft | θ_dpo | α | source |", "| --- | --- | --- | --- | --- |")
    for pair in pairs:
        alpha = "not published" if pair.alpha is None else f"{pair.alpha:g}"
        yield f"| {pair.name} | {pair.sft} | {pair.dpo} | {alpha} | {_source(pair.source, pair.link)} |"
    yield from ("", "## Known reward models", "", "| name | hub id | settings | source |", "| --- | --- | --- | --- |")
    for model in rewards:
        special = ", ".join(f"`{flag(key)} {value}`" for key, value in model.settings.items())
        yield f"| {model.name} | {model.reward_model} | {special} | {_source(model.source, model.link)} |"
    yield ""


def _source(words: str, link: str) -> str:
    return f"[{_cell(words)}]({link})" if link else _cell(words)


if __name__ == "__main__":
    sys.exit(main())
