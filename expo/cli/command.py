"""What a command says of itself. Its settings make its options, its verb does the work, and it says what is shown.

To add a command, write its config class, its verb, and a module here with a `COMMAND`; list both in `config.COMMANDS`
and in `program.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from expo.config import CommonConfig

Levels: TypeAlias = tuple[set[str], set[str], set[str], set[str]]
"""The names of the settings that flags, the command's own table, `[common]` and the recipe give."""


class Shown(NamedTuple):
    """What is printed of a result."""

    data: dict[str, Any]
    """With --json."""
    text: object
    """Without it."""
    failed: int = 0
    """How many rows failed."""


@dataclass(frozen=True)
class Command:
    """A command that has settings."""

    config: type[CommonConfig]
    verb: str
    """The module with `plan` and `run`, imported when it is needed."""
    help: str
    examples: str
    show: Callable[[Any], Shown]
    """Says and logs what came of it, from what `run` returns."""
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Setting → the names it takes, where a table of extensions has them; hidden while there is one only."""
    leave_out: Callable[[Levels], Collection[str]] | None = None
    """The settings that keep their default, whatever was given; by default there are none."""
