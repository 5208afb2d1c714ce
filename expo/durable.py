"""Files that are whole or absent, and text that is written the same each time: atomic writes, JSON, checksums.

A final name only ever appears by `os.replace` of a file that is complete and on the disk.
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
    """Write a file (text as UTF-8) so that `path` holds the old content or the new one, never a part.

    Raises:
        EnvironmentFailure: Writing failed; `path` is as it was.
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
        with suppress(OSError):  # of a folder that cannot be written this fails as well
            temporary.unlink()
        raise EnvironmentFailure(f"writing {path} failed: {error.strerror}") from error


def sync(stream: IO[Any]) -> None:
    """Force a file's content to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames) to the disk."""
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
    """A JSON value, text as it is (escaped only where UTF-8 cannot hold it)."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if is_utf8(text) else json.dumps(value, indent=indent)


def json_line(row: object) -> str:
    """One JSON value on one line, written as `json_text` writes it."""
    return json_text(row) + "\n"


def json_lines(rows: Iterable[object]) -> str:
    """One JSON value a line."""
    return "".join(map(json_line, rows))


def texts_sha256(texts: Iterable[object]) -> str:
    """SHA-256 over JSON values, one a line; equal for equal prompts wherever they came from."""
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(json_line(text).encode())
    return hasher.hexdigest()
