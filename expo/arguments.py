"""A command's settings, resolved, as the arguments that give them again: for a process of its own, and to be shown."""

from __future__ import annotations

import dataclasses
import shlex

from expo.config import CommonConfig

POSITIONAL = "task"


def arguments_of(settings: CommonConfig) -> list[str]:
    """The arguments after `expo <command>` that make these settings, whatever file or recipe they came from.

    Every value goes as `--flag=value`, so that one that begins with a dash stays a value.
    """
    arguments: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == POSITIONAL:
            arguments.insert(0, value)
        elif value is not None and value != field.default:
            arguments += _flags(field.name.replace("_", "-"), value)
    return arguments


def _flags(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}={one}" for one in (value if isinstance(value, tuple) else (value,))]


def shown(command: str, settings: CommonConfig) -> str:
    """The command line of these settings, to be copied into a shell."""
    return shlex.join(["expo", command, *arguments_of(settings)])
