"""What commands print on stdout: data, and nothing else; and the exit code where rows failed."""

from __future__ import annotations

import json
import logging
from typing import Any

import typer

from expo.errors import PARTLY_FAILED

log = logging.getLogger(__name__)


def print_json(data: Any) -> None:  # noqa: ANN401 - anything JSON takes
    """Print one JSON object on one line."""
    print(json.dumps(data, ensure_ascii=False, default=str))


def print_result(data: dict[str, Any], text: object, *, as_json: bool) -> None:
    """Print a result, as JSON or as text."""
    if as_json:
        print_json(data)
    else:
        print(text)


def print_data(data: dict[str, Any], *, as_json: bool) -> None:
    """Print a plan, as JSON or as a line per key, and per entry where there is a list of them."""
    if as_json:
        print_json(data)
        return
    for key, value in data.items():
        for line in value if isinstance(value, list) else [value]:
            text = ", ".join(f"{k} {_short(v)}" for k, v in line.items()) if isinstance(line, dict) else line
            print(f"{key.replace('_', ' '):<18}{text}")


def _short(value: object) -> object:
    if not isinstance(value, list):
        return value
    return " ".join(value if len(value) <= 4 else [*value[:2], "…", value[-1]])


def exit_after(failed: int) -> None:
    """End with exit code 3 where rows failed."""
    if failed:
        log.warning("%d rows failed and are marked; the same command tries them again", failed)
        raise typer.Exit(PARTLY_FAILED)
