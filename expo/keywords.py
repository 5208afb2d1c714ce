"""Settings as keyword arguments of a Python function: what `api.py` makes its functions of.

`arguments.py` is the same for a command line.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from expo.config import CommandConfig
from expo.cpus import QUIET_THREADS
from expo.errors import InputError
from expo.files import shown
from expo.settings import settings_of, spelling

C = TypeVar("C", bound=CommandConfig)

WIDTH = 100
"""Of a docstring's lines."""


def takes(config: type[C]) -> Callable[[Callable[[C], Any]], Callable[..., Any]]:
    """Let a verb's function, which takes a config object, take its settings as arguments.

    Args:
        config: The config class. With `dry_run` the function returns the plan as plain data, and does nothing.
    """

    def wrap(verb: Callable[[C], Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def call(*words: object, **settings: object) -> Any:  # noqa: ANN401 - the verb's result
            asked = read_settings(config, words, settings)
            for variable, wanted in QUIET_THREADS.items():
                os.environ.setdefault(variable, wanted)
            if asked.dry_run:
                return import_module(f"expo.verbs.{verb.__name__}").plan(asked).describe()
            return verb(asked)

        call.__signature__ = signature_of(config, verb.__annotations__["return"])  # type: ignore[attr-defined]
        call.__doc__ = f"{textwrap.dedent(f'    {verb.__doc__}').rstrip()}\n\n{arguments_of(config)}\n"
        return call

    return wrap


def read_settings(config: type[C], words: Iterable[object], settings: dict[str, Any]) -> C:
    """The config object for a call.

    Args:
        config: The config class.
        words: The positional arguments: a value for the setting that is an argument on the command line, too.
        settings: The keyword arguments.

    Raises:
        TypeError: An argument is unknown, missing or given twice.
        InputError: A value is of another type, or out of its range.
    """
    given = {**settings, **_positional(config, list(words), settings)}
    known = [field.name for field in dataclasses.fields(config)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name!r} is not a setting of {config.__name__}{meant}")
    hints = get_type_hints(config)
    return config(**{name: _value(config, name, value, hints[name]) for name, value in given.items()})


def _positional(config: type[CommandConfig], words: list[object], settings: dict[str, Any]) -> dict[str, object]:
    if not words:
        return {}
    name = next((name for name, one in settings_of(config).items() if one.positional), None)
    if name is None:
        raise TypeError("settings are given by name, such as sft=…")
    if name in settings:
        raise TypeError(f"{name!r} is given twice")
    if get_origin(get_type_hints(config)[name]) is tuple:
        return {name: words[0] if len(words) == 1 and isinstance(words[0], list | tuple) else words}
    if len(words) > 1:
        raise TypeError(f"only {name!r} may be given without its name, but {len(words)} arguments are")
    return {name: words[0]}


def _value(config: type[CommandConfig], name: str, value: object, hint: Any) -> Any:  # noqa: ANN401 - types
    """A value of a setting's type: paths as text, numpy's numbers as Python's, one or none of several as a tuple."""
    from pydantic import TypeAdapter, ValidationError

    plain = _plain(value)
    if isinstance(plain, Iterable) and not isinstance(plain, str | bytes):
        plain = tuple(map(_plain, plain))
    elif get_origin(hint) is tuple:
        plain = () if plain is None else (plain,)
    try:
        return TypeAdapter(hint).validate_python(plain)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{spelling(config, name)}: {problem['msg']}; got {shown(problem['input'])}") from None


def _plain(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)  # of a number in numpy and torch
    return item() if callable(item) and not getattr(value, "shape", ()) else value


# --- what is said of arguments -----------------------------------------------------------------------------------


def signature_of(config: type[CommandConfig], returns: str) -> Signature:
    """A function's signature: the setting that is an argument on the command line, too, then all others by name."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    settings = settings_of(config)
    parameters = []
    for name in sorted(settings, key=lambda name: not settings[name].positional):
        default = Parameter.empty if fields[name].default is dataclasses.MISSING else fields[name].default
        several = settings[name].positional and default == ()
        parameters.append(
            Parameter(
                name,
                _KINDS[settings[name].positional, several],
                default=Parameter.empty if several else default,
                annotation=argument_type(config, name),
            )
        )
    return Signature(parameters, return_annotation=returns)


_KINDS = {
    (False, False): Parameter.KEYWORD_ONLY,
    (True, False): Parameter.POSITIONAL_OR_KEYWORD,
    (True, True): Parameter.VAR_POSITIONAL,
}
"""Of a parameter: whether its setting is positional, and whether it is several words."""


def argument_type(config: type[CommandConfig], name: str) -> str:
    """The type of an argument as it is written: a path is text or path-like, several values may be one."""
    hint = get_type_hints(config)[name]
    if get_origin(hint) is tuple:
        one = _written(get_args(hint)[0])
        return one if settings_of(config)[name].positional else f"{one} | Iterable[{one}]"
    return _written(hint)


def _written(hint: Any) -> str:  # noqa: ANN401 - a type
    text = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    return re.sub(r"\bstr\b", "str | PathLike[str]", str(text))


def arguments_of(config: type[CommandConfig]) -> str:
    """The `Args:` of a docstring, from the settings' descriptions."""
    lines = ["Args:"]
    for name, one in settings_of(config).items():
        said = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), f"{name}: {one.help}")
        lines += textwrap.wrap(said, WIDTH, initial_indent="    ", subsequent_indent="        ")
    return "\n".join(lines)
