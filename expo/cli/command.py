"""What defines a command: its config class gives its options, its verb does the work, and `show` presents the result.

To add a command, write its config class, its verb, and a module here with a `COMMAND`; list both in `config.COMMANDS`
and in `program.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from expo.config import CommandConfig

Levels: TypeAlias = tuple[set[str], set[str], set[str], set[str]]
"""The names of the settings given by flags, the command's own table, `[common]` and the recipe."""


class Shown(NamedTuple):
    """How a result is printed."""

    data: dict[str, Any]
    """With --json."""
    text: object
    """Without it."""
    failed: int = 0
    """How many rows failed."""
    reason: str | None = None
    """Why the first of them failed."""
    can_retry: bool = False
    """Whether the same command tries them again, which may help."""


@dataclass(frozen=True)
class Command:
    """A command that has settings."""

    config: type[CommandConfig]
    verb: str
    """The module with `plan` and `run`, imported when needed."""
    help: str
    examples: str
    show: Callable[[Any], Shown]
    """Logs the outcome and says what to print, from what `run` returns."""
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Setting → its choices, where a table of extensions lists them; hidden while there is only one."""
    takes_recipe: bool = True
    """Whether a known model says anything about its settings."""
    needs_alpha: bool = False
    """Whether nothing can be done without an α, which a recipe may lack."""
    leave_out: Callable[[Levels], Collection[str]] | None = None
    """The settings that keep their default, whatever was given; none if omitted."""
