"""Reading small files from others without trusting them.

A name in a model folder may belong to a pipe, a device, a web page or a git-lfs pointer, and JSON may contain what
cannot be written back. Every function here returns a value or raises an error of one line that says what is wrong.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from expo.errors import InputError

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
"""What a name may belong to other than a file."""

LFS_POINTER = (b"version https://git-lfs", b"version https://hawser")
STAND_INS = (
    (LFS_POINTER, "a git-lfs pointer: run `git lfs pull`, or download it again"),
    ((b"<!doc", b"<html", b"<?xml", b"<head"), "a web page: download it again"),
)
"""What failed downloads leave in a file's place: how it begins (in lower case), what it is and what to do."""

HEAD_BYTES = 64
"""Enough of a file to recognise a stand-in."""


def shown(value: object) -> str:
    """A value from a file as messages show it: on one line, shortened to fit."""
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
    """What a file that begins with `head` is if a failed download left it, and what to do; None for any other."""
    begin = head.lstrip().lower()
    return next((what for beginnings, what in STAND_INS if begin.startswith(beginnings)), None)


def unreadable(file: Path, error: Exception) -> InputError:
    """The error for a file that cannot be read: an `OSError`, or a name that no file can have."""
    return InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}")


def kind_of(file: Path) -> str | None:
    """What a name belongs to if not to a file, such as "a pipe"; links are followed.

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
            raise InputError(f"{file} has {size} bytes, more than any such file should have: is it what its name says?")
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
    """A JSON file that holds an object.

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
        raise InputError(f"{file} does not hold a JSON object")
    return content
