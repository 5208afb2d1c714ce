"""Files that are complete or absent, and text that is always written the same way: atomic writes, JSON, checksums.

A final name only ever appears by `os.replace` of a file that is complete and on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import xxhash

from expo.errors import EnvironmentFailure
from expo.files import is_utf8

Row = dict[str, Any]
"""A row, or any other JSON object."""

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
