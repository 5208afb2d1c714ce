"""A command's resolved settings as command-line arguments: for a new process, and for display."""

from __future__ import annotations

import dataclasses
import shlex

from expo.config import CommandConfig
from expo.settings import flag, settings_of


def arguments_of(settings: CommandConfig) -> list[str]:
    """The arguments after `expo <command>` that give these settings, whatever file or recipe they came from.

    A value that begins with a dash is written as `--flag=value`, so that it is not parsed as a flag.
    """
    arguments: list[str] = []
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, setting in settings_of(type(settings)).items():
        value = getattr(settings, name)
        if setting.positional:
            arguments[:0] = value if isinstance(value, tuple) else [value]
        elif value is not None and value != defaults[name] and name not in settings.derived:
            arguments += _words(flag(name), value)
    return arguments


def _words(spelling: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [spelling if value else f"--no-{spelling[2:]}"]
    if isinstance(value, tuple):
        return [word for one in value for word in _words(spelling, one)]
    return [f"{spelling}={value}"] if str(value).startswith("-") else [spelling, str(value)]


def shown(command: str, settings: CommandConfig) -> str:
    """The command line for these settings, quoted for a shell."""
    return shlex.join(["expo", command, *arguments_of(settings)])
