"""sweep.json: what a sweep found, from what, and what it cost; and whether it still says what the files say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from expo.errors import InputError
from expo.files import Row, open_file, read_json
from expo.output.sweeps import RECORD
from expo.settings import Fingerprint, require_same


def made_from(fingerprint: Row) -> Fingerprint:
    """What all α of a sweep have in common, from the fingerprint of the answers of one."""
    absent = fingerprint.absent if isinstance(fingerprint, Fingerprint) else {}
    return Fingerprint({key: value for key, value in fingerprint.items() if key != "alpha"}, absent)


def read_record(folder: Path) -> Row | None:
    """The sweep.json of a folder; None where there is none.

    Raises:
        InputError: It is not one that expo wrote.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    record = read_json(file)
    known = isinstance(record.get("alphas"), list) and isinstance(record.get("fingerprint"), dict)
    if not known:
        raise InputError(f"{file} exists and expo sweep did not write it: move it away, or choose another --output")
    return record


def earlier_alphas(folder: Path, fingerprint: Row, *, overwrite: bool) -> set[float]:
    """The α that the sweep in this folder has, which a further run goes on with.

    Args:
        folder: The sweep's folder.
        fingerprint: Of the answers of an α.
        overwrite: Whether a sweep that was made with other settings may be replaced.

    Raises:
        InputError: It was made with other settings, and may not be replaced; or expo did not write it.
    """
    record = read_record(folder)
    if record is None:
        return set()
    ours = made_from(fingerprint)
    if ours != record["fingerprint"]:
        if not overwrite:
            require_same(folder / RECORD, record["fingerprint"], ours)
        return set()
    return {float(one["alpha"]) for one in record["alphas"]}


def digest(files: Iterable[Path]) -> str:
    """A hash of the content of files, in this order."""
    total = xxhash.xxh3_128()
    for file in files:
        with open_file(file) as stream:
            total.update(xxhash.xxh3_128_digest(stream.read()))
    return total.hexdigest()


def is_current(record: Row | None, found: Row) -> bool:
    """Whether a record says the same as what was found just now, but for what it cost."""
    return record is not None and all(record.get(key) == value for key, value in found.items())


def plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """A value as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
