"""sweep.json: what a sweep found, from what, and what it cost; and whether it still says what the files say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from expo.errors import InputError
from expo.files import Row, json_text, open_file, write_atomic
from expo.output.sweeps import PICTURE, RECORD, SweepRecord, is_sweep, read_sweep
from expo.settings import Fingerprint, require_same

EQUAL = "identical"
"""What `expo inspect` finds where no weight differs."""
NOT_FINISHED = "this sweep was continued and has not finished: the same command continues it"


def made_from(fingerprint: Row) -> Fingerprint:
    """What all α of a sweep have in common, from the fingerprint of the answers of one."""
    absent = fingerprint.absent if isinstance(fingerprint, Fingerprint) else {}
    return Fingerprint({key: value for key, value in fingerprint.items() if key != "alpha"}, absent)


def read_record(folder: Path) -> SweepRecord | None:
    """The sweep.json of a folder; None where there is none.

    Raises:
        InputError: It is not one that expo wrote.
    """
    if not is_sweep(folder):
        return None
    record = read_sweep(folder)
    if not isinstance(record.content.get("fingerprint"), dict):
        raise InputError(
            f"{folder / RECORD} exists and expo sweep did not write it: move it away, or choose another --output"
        )
    return record


def is_of_equal_models(record: Row) -> bool:
    """Whether its two models were equal: then nothing was generated, and nothing is lost with it."""
    pair = record.get("pair")
    return isinstance(pair, dict) and pair.get("suits") == EQUAL


def mark_unfinished(folder: Path, fingerprint: Row) -> None:
    """Before rows are made: take back what an earlier run chose, so that it does not stand over other rows.

    Args:
        folder: The sweep's folder.
        fingerprint: Of the answers of an α; the record of a sweep with another one goes.
    """
    record = read_record(folder)
    if record is None:
        return
    (folder / PICTURE).unlink(missing_ok=True)
    if made_from(fingerprint) != record.content["fingerprint"]:
        (folder / RECORD).unlink()
    elif record.best_alpha is not None:
        write_unfinished(folder, record.content)


def write_unfinished(folder: Path, record: Row) -> None:
    """Say what a sweep is about, and that it has chosen nothing yet."""
    nothing = {"best_alpha": None, "verdict": None, "notes": [NOT_FINISHED], "command": None}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RECORD, json_text({**record, **nothing}, indent=2) + "\n")


def earlier_alphas(folder: Path, fingerprint: Row, race: Row | None, *, overwrite: bool) -> set[float]:
    """The α that the sweep in this folder has, which a further run goes on with.

    Args:
        folder: The sweep's folder.
        fingerprint: Of the answers of an α.
        race: The settings of a race, which takes up no α by itself, and goes on only with its own settings.
        overwrite: Whether a sweep that was made with other settings may be replaced.

    Raises:
        InputError: It was made with other settings, and may not be replaced; or expo did not write it.
    """
    record = read_record(folder)
    if record is None:
        return set()
    ours = made_from(fingerprint)
    if ours != record.content["fingerprint"]:
        if not overwrite and not is_of_equal_models(record.content):
            require_same(folder / RECORD, record.content["fingerprint"], ours)
        return set()
    if race is None:
        return set(record.alphas)
    if not is_of_equal_models(record.content):
        _require_same_race(folder / RECORD, record.content, race)
    return {alpha for alpha in record.alphas if alpha < 0}


def _require_same_race(file: Path, record: Row, race: Row) -> None:
    """Refuse a race whose rows were seen before, `--overwrite` or not, since that keeps rows of the same settings.

    Which α a race confirms, on which prompts, and when it ends, is fixed before the first row.
    """
    there = record.get("race")
    if not isinstance(there, dict) or not isinstance(there.get("settings"), dict):
        raise InputError(
            f"{file} is of a sweep that has already compared its rows, which leaves nothing to race for: choose "
            "another --output, or drop --search race"
        )
    differing = [name for name, value in plain(race).items() if there["settings"].get(name) != value]
    if differing:
        raise InputError(
            f"{file} is of a race with different rules ({', '.join(differing)}), which are fixed before its first "
            "answer: give the same ones to continue it, or another --output to start a new one"
        )


def digest(files: Iterable[Path]) -> str:
    """A hash of the content of files, in this order."""
    total = xxhash.xxh3_128()
    for file in files:
        with open_file(file) as stream:
            total.update(xxhash.xxh3_128_digest(stream.read()))
    return total.hexdigest()


def is_current(record: Row, found: Row) -> bool:
    """Whether a record says the same as what was found just now, but for what it cost."""
    return all(record.get(key) == value for key, value in found.items())


def plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """A value as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
