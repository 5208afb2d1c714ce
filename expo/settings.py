"""What a setting says of itself, said once: options, config files, fingerprints and checks follow from it.

A setting is a field of a config class, `name: Annotated[type, Setting("…")] = default`. Here is what is asked of such
fields; the fields themselves are in `config.py`, and `cli/options.py` makes the options.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_type_hints

from expo.durable import Row

POSITIONAL = "task"
"""The one setting that is an argument and no option."""

Change: TypeAlias = Literal["nothing", "rows", "batches", "weights"]


@dataclass(frozen=True)
class Setting:
    """A setting, beside its name, type and default."""

    help: str
    """The sentence that describes it, here and in `--help`."""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    """Further spellings of its flag."""
    changes: Change = "nothing"
    """What its value changes, and so is recorded for: rows, weights, or how rows are batched, which changes the rows of
    an engine that pads. What is recorded by its content (models, data sets, templates) is `nothing` here."""
    needs: str | None = None
    """What an engine must be capable of for it (`EngineSpec.can`); None: it goes with every engine."""
    absent: object = ...
    """The value that outputs were made with whose fingerprint lacks this setting: what was done before it existed. It
    never changes, whatever becomes of the default. An engine whose outputs differ says so (`EngineSpec.absent`)."""

    def __post_init__(self) -> None:
        """Check that the author of a setting thought of the outputs that exist already."""
        if (self.changes == "nothing") is not (self.absent is ...):
            raise TypeError(f"{self.help!r}: `absent` belongs to settings that change something, and to each of them")


def settings_of(kind: type) -> dict[str, Setting]:
    """A config class's settings: its own first, in the order they are written, then those it shares."""
    hints = get_type_hints(kind, include_extras=True)
    written = (name for base in kind.__mro__ for name in inspect.get_annotations(base))
    return {name: hints[name].__metadata__[0] for name in dict.fromkeys(written)}


def flag(name: str) -> str:
    """A setting as the command line spells it."""
    return name.upper() if name == POSITIONAL else f"--{name.replace('_', '-')}"


def changing(kind: type, *what: Change) -> tuple[str, ...]:
    """The settings that change something of these."""
    return tuple(name for name, setting in settings_of(kind).items() if setting.changes in what)


def recorded(config: object, *what: Change) -> Row:
    """The values of the settings that change something of these, as JSON has them."""
    return {name: _plain(getattr(config, name)) for name in changing(type(config), *what)}


def absent_values(config: object, *what: Change) -> Row:
    """What outputs were made with that say nothing of the settings that change something of these.

    Args:
        config: The config.
        what: What the settings change.
    """
    return {name: _plain(one.absent) for name, one in settings_of(type(config)).items() if one.changes in what}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
