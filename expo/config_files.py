"""TOML files of settings: one table per command, and `[common]`.

Only names are checked here; typer checks the values as it checks flags, and so do the classes in `config/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from expo.config import COMMANDS, ThetaConfig
from expo.errors import InputError
from expo.settings import settings_of

Tables: TypeAlias = dict[str, dict[str, Any]]


def field_names(command: str) -> set[str]:
    """The names of a command's settings, as Python spells them."""
    return {field.name for field in dataclasses.fields(COMMANDS[command])}


def load_tables(path: Path, *, extra_tables: frozenset[str] = frozenset()) -> Tables:
    """Read a TOML file with one table per command and `[common]`.

    Args:
        path: The file.
        extra_tables: Further table names that are allowed and returned unchecked.

    Returns:
        Table name → key → value, keys spelled with underscores.

    Raises:
        InputError: No such file, invalid TOML, or an unknown table or key (the nearest one is named).
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    known_tables = {"common", *COMMANDS, *extra_tables}
    tables: Tables = {}
    for table, content in document.items():
        if not isinstance(content, dict):
            where = "[common] or a command's, such as [extrapolate]"
            raise InputError(f"{path}: {table!r} is outside any table; move it into {where}")
        if table not in known_tables:
            raise InputError(f"{path}: unknown table [{table}]{_nearest(table, known_tables)}")
        tables[table] = content if table in extra_tables else _checked_keys(path, table, content)
    return tables


def _checked_keys(path: Path, table: str, content: dict[str, Any]) -> dict[str, Any]:
    commands = list(COMMANDS) if table == "common" else [table]
    known = set().union(*map(field_names, commands))
    repeatable_names = set().union(*(_names_with(tuple, command) for command in commands))
    switches = set().union(*(_names_with(bool, command) for command in commands))
    values = {key.replace("-", "_"): value for key, value in content.items()}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r} in [{table}]{_nearest(key, known)}")
        repeatable = key in repeatable_names
        if isinstance(value, (list, dict)) and not repeatable:
            raise InputError(f"{path}: {key!r} in [{table}] expects one value, not {value!r}")
        each = value if isinstance(value, list) else [value]
        if any(isinstance(one, (list, dict)) for one in each):
            raise InputError(f"{path}: {key!r} in [{table}] expects a value or a flat list of values, not {value!r}")
        if any(isinstance(one, str) and "\0" in one for one in each):
            raise InputError(f"{path}: {key!r} in [{table}] contains a NUL character, which no path or name may have")
        if any(isinstance(one, bool) for one in each) and key not in switches:
            raise InputError(f"{path}: {key!r} in [{table}] expects a value, not true or false")
        values[key] = [value] if repeatable and not isinstance(value, list) else value
    return values


def _names_with(kind: type, command: str) -> set[str]:
    """The settings whose default has this type: tuples are repeatable, booleans are switches."""
    return {field.name for field in dataclasses.fields(COMMANDS[command]) if isinstance(field.default, kind)}


def _nearest(word: str, known: set[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def values_for(command: str, tables: Tables) -> dict[str, Any]:
    """The values in a file for one command: its own table over `[common]`."""
    shared = {key: value for key, value in tables.get("common", {}).items() if key in field_names(command)}
    for key in shared.keys() - _names_with(tuple, command):  # one α, say, where another command takes several
        if isinstance(shared[key], list) and len(shared[key]) == 1:
            shared[key] = shared[key][0]
    return {**shared, **tables.get(command, {})}


def _types_in_json(kind: Any) -> tuple[type, ...]:  # noqa: ANN401 - a type
    if get_origin(kind) is tuple:
        return list, tuple
    if get_origin(kind) is Literal:
        return (str,)
    if isinstance(kind, UnionType):
        return tuple(one for part in get_args(kind) for one in _types_in_json(part))
    return (int, float) if kind is float else (kind,)


LOADER_KEYS = {name: _types_in_json(get_type_hints(ThetaConfig)[name]) for name in settings_of(ThetaConfig)}
"""The keys that `--model-loader-extra-config` accepts with vLLM's `--load-format expo`, and their types."""


def theta_from(values: dict[str, Any], model: str) -> ThetaConfig:
    """The θ(α) described by plain data, such as the options of an engine's loader.

    Args:
        values: The keys of `LOADER_KEYS`; `sft` and `alpha`, or `target_step`, are needed.
        model: The engine's model, which is θ_dpo where `dpo` is not given.

    Raises:
        InputError: A key is unknown or missing, or a value is invalid.
    """
    known = f"the load format expo takes {', '.join(LOADER_KEYS)}"
    unknown = sorted(values.keys() - LOADER_KEYS.keys())
    if unknown:
        raise InputError(f"{known}, not {', '.join(unknown)}")
    place = "target_step" if "target_step" in values else "alpha"
    lacking = [key for key in ("sft", place) if key not in values]
    if lacking:
        raise InputError(f"{known}, and {' and '.join(lacking)} must be given")
    for key, value in values.items():
        texts = value if isinstance(value, (list, tuple)) else ()
        if type(value) not in LOADER_KEYS[key] or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{key} of the load format expo cannot be {value!r}")
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    own = {} if settings.get("checkpoint") else {"dpo": model}
    return ThetaConfig(**{**own, **settings})
