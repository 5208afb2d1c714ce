"""Files: reading small untrusted ones; reading rows; atomic writes.

A name in a model folder may belong to a pipe, a device, a web page or a git-lfs pointer, and JSON may contain what
cannot be written back: reading returns a value or fails with a one-line message. expo's own files get their final
name by `os.replace`, once they are complete and on disk.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash

from expo.errors import EnvironmentFailure, InputError, first_line

Row = dict[str, Any]
"""A row, or any other JSON object."""

MAX_TEXT_BYTES = 100_000_000
"""The largest JSON or text file that is read; a tokenizer with a million tokens has about 70 MB."""

SHOWN_CHARACTERS = 60

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""What a path may be other than a file."""

LFS_POINTER = (b"version https://git-lfs", b"version https://hawser")
STAND_INS = (
    (LFS_POINTER, "a git-lfs pointer: run `git lfs pull`, or download it again"),
    ((b"<!doc", b"<html", b"<?xml", b"<head"), "a web page: download it again"),
)
"""What failed downloads leave in a file's place: how it begins (in lower case), what it is and what to do."""

HEAD_BYTES = 64
"""Enough of a file to recognise a stand-in."""


def shown(value: object) -> str:
    """A value from a file for a message: on one line, shortened."""
    text = repr(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def is_utf8(text: str) -> bool:
    """Whether text can be encoded; a name or JSON may contain half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def repeated(names: Iterable[str]) -> str | None:
    """The first name that appears twice; None where all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def natural(name: str) -> list[str | int]:
    """Sorts names by the numbers in them: checkpoint-90 before checkpoint-500."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def name_problem(name: str) -> str | None:
    """Why a tensor's or file's name from a header or index is invalid; None where it is valid.

    Such names end up in messages, manifests and, with other tools, in paths: `a/b` is a name, `/a` and `../a` are not.
    """
    if not name:
        return "is empty"
    if not is_utf8(name):
        return "cannot be written as UTF-8"
    if not name.isprintable() and any(unicodedata.category(letter) == "Cc" for letter in name):
        return "contains control characters"
    parts = name.replace("\\", "/").split("/")
    return "is a path that leaves its folder" if parts[0] == "" or ".." in parts else None


def stand_in(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do, if a failed download left it; otherwise None."""
    begin = head.lstrip().lower()
    return next((what for beginnings, what in STAND_INS if begin.startswith(beginnings)), None)


def unreadable(file: Path, error: Exception) -> InputError:
    """The error for a file that cannot be read: an `OSError`, or a name that no file can have."""
    return InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}")


def kind_of(file: Path) -> str | None:
    """What a path is if not a file, such as "a pipe"; links are followed.

    Raises:
        InputError: It does not exist, or access to it is denied.
    """
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    return KINDS.get(stat.S_IFMT(mode))


def open_file(file: Path) -> BinaryIO:
    """Open a file for reading in bytes.

    Raises:
        InputError: It cannot be read, or is not a file: a pipe would block, and a device never ends.
    """
    kind = kind_of(file)
    if kind is not None:
        raise InputError(f"{file} is {kind}, not a file")
    try:
        return os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise unreadable(file, error) from error


def read_small(file: Path) -> bytes:
    """A file's content.

    Raises:
        InputError: It cannot be read, or is larger than `MAX_TEXT_BYTES`.
    """
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_TEXT_BYTES:
            raise InputError(f"{file} has {size} bytes, more than any such file should have: is it the right file?")
        try:
            return stream.read(MAX_TEXT_BYTES)
        except OSError as error:
            raise unreadable(file, error) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=…)`: an object whose keys must differ.

    Raises:
        ValueError: A key appears twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"{shown(repeated(name for name, _ in pairs))} appears twice")
    return result


def read_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON file that contains an object.

    Args:
        file: The file.
        unique: Refuse duplicate keys, of which Python would take the last.

    Raises:
        InputError: It cannot be read, or contains something else.
    """
    raw = read_small(file)
    if found := stand_in(raw[:HEAD_BYTES]):
        raise InputError(f"{file} is {found}")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} does not contain a JSON object")
    return content


# --- rows ----------------------------------------------------------------------------------------------------------

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How UTF-16 text begins."""


WRAPPERS = ("data", "rows", "examples", "instances", "prompts", "questions", "train", "test")
"""Keys under which a .json file may hold its rows, of which only the list itself is read."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl or .json (a list of objects, or an object per line), .parquet or .csv file.

    Raises:
        InputError: The file is missing, of another kind, or damaged.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: a file of rows must end in {', '.join(SUFFIXES)}")
    content = _content(path)
    try:
        rows = reader(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a valid {path.suffix[1:]} file: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} does not contain a list of objects, but {_what(rows)}")
    number = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if number is not None:
        raise InputError(f"{path} does not contain a list of objects: row {number} is {shown(rows[number])}")
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
    """What a JSON file contains instead of a list."""
    if not isinstance(value, dict):
        return shown(value)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    return "one object" + (f"; the list under its key {lists[0]!r} belongs in its own file" if lists else "")


def _utf8_text(content: bytes) -> str:
    if content.startswith(UTF_16):
        raise ValueError("it is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start})") from error


def _read_json(content: bytes) -> Any:  # noqa: ANN401 - any JSON value; checked by the caller
    """A list of rows, whole or a row per line, or one row; pandas and datasets write lines into .json."""
    rows = _rows(_utf8_text(content))
    return rows[0] if isinstance(rows, list) and len(rows) == 1 and _is_wrapped(rows[0]) else rows


def _read_jsonl(content: bytes) -> Any:  # noqa: ANN401 - any JSON value; checked by the caller
    text = _utf8_text(content)
    return _rows(text) if text.strip() else []


def _rows(text: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{") and error.msg != "Extra data":
            raise
        lines = enumerate(text.split("\n"), 1)  # str.splitlines would split at U+2028 too
        return [_json_line(number, line) for number, line in lines if line.strip()]
    return [value] if isinstance(value, dict) else value


def _is_wrapped(row: object) -> bool:
    """Whether an object that is alone in its file is no row but holds the rows."""
    return isinstance(row, dict) and any(isinstance(row.get(key), list) for key in WRAPPERS)


def _json_line(number: int, line: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.pos}") from error


def _read_csv(content: bytes) -> list[Any]:
    text = _utf8_text(content)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    number = next((number for number, row in enumerate(rows) if None in row), None)
    if number is not None:
        raise ValueError(f"row {number} has more fields than the header; quote text that contains commas")
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


# --- writing -------------------------------------------------------------------------------------------------------

HASH_BLOCK_BYTES = 1 << 20


def write_atomic(path: Path, content: str | bytes, *, fsync: bool = True) -> None:
    """Write a file (text as UTF-8) so that `path` has the old content or the new, never part of it.

    Raises:
        EnvironmentFailure: Writing failed; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                sync(stream)
        os.replace(temporary, path)
        if fsync:
            sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # this fails as well in a read-only folder
            temporary.unlink()
        raise EnvironmentFailure(f"writing {path} failed: {error.strerror}") from error


def sync(stream: IO[Any]) -> None:
    """Flush a file's content to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(file: Path) -> str | None:
    """XXH3-128 of a whole file, hexadecimal; None where there is no file."""
    if not file.is_file():
        return None
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def json_text(value: object, *, indent: int | None = None) -> str:
    """A JSON value; text is not escaped, except where UTF-8 cannot encode it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if is_utf8(text) else json.dumps(value, indent=indent)


def json_line(row: object) -> str:
    """One JSON value on one line, formatted as by `json_text`."""
    return json_text(row) + "\n"


def json_lines(rows: Iterable[object]) -> str:
    """JSON values, one per line."""
    return "".join(map(json_line, rows))


def texts_sha256(texts: Iterable[object]) -> str:
    """SHA-256 over JSON values, one per line; the same prompts have the same hash wherever they came from."""
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(json_line(text).encode())
    return hasher.hexdigest()
