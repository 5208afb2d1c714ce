"""Files of rows: .jsonl, .json, .parquet and .csv, read whole.

Text is UTF-8, with or without a byte order mark, with any line ends. What would be lost without a word (a field too
many, an unclosed quote) is refused instead.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expo.durable import Row
from expo.errors import InputError, first_line
from expo.files import HEAD_BYTES, kind_of, open_file, shown, stand_in, unreadable

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How UTF-16 text begins."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .json (a list of objects), .parquet or .csv file.

    Raises:
        InputError: The file is missing, of another kind, or damaged.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: a file of rows ends in {', '.join(SUFFIXES)}")
    content = _content(path)
    try:
        rows = reader(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a valid {path.suffix[1:]} file: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} does not hold a list of objects, but {_what(rows)}")
    number = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if number is not None:
        raise InputError(f"{path} does not hold a list of objects: row {number} is {shown(rows[number])}")
    return rows


def _content(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"no such file: {path}")
    if kind := kind_of(path):
        raise InputError(f"{path} is {kind}, not a file of rows")
    with open_file(path) as stream:
        try:
            content = stream.read()
        except OSError as error:
            raise unreadable(path, error) from error
    if found := stand_in(content[:HEAD_BYTES]):
        raise InputError(f"{path} is {found}")
    return content


def _what(value: object) -> str:
    """What a JSON file holds instead of a list."""
    if not isinstance(value, dict):
        return shown(value)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    return "one object" + (f"; the list under its key {lists[0]!r} belongs in a file of its own" if lists else "")


def _text(content: bytes) -> str:
    if content.startswith(UTF_16):
        raise ValueError("it is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text (byte 0x{content[error.start]:02x} at {error.start})") from error


def _read_json(content: bytes) -> Any:  # noqa: ANN401 - any JSON value; checked by the caller
    return json.loads(_text(content))


def _read_jsonl(content: bytes) -> list[Any]:
    lines = enumerate(_text(content).split("\n"), 1)  # str.splitlines would split at U+2028 too
    return [_json_line(number, line) for number, line in lines if line.strip()]


def _json_line(number: int, line: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.pos}") from error


def _read_csv(content: bytes) -> list[Any]:
    text = _text(content)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    number = next((number for number, row in enumerate(rows) if None in row), None)
    if number is not None:
        raise ValueError(f"row {number} has more fields than the header; text that holds commas is quoted")
    return rows


def _read_parquet(content: bytes) -> list[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return list(ParquetFile(pyarrow.BufferReader(content)).read().to_pylist())
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        raise ValueError(first_line(error)) from error


READERS: dict[str, Callable[[bytes], Any]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
SUFFIXES = tuple(READERS)
