"""The rewards of a run by one reward model: a file of numbers, and what the files beside it say of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from expo.errors import InputError
from expo.files import Row, open_file, read_rows, shown
from expo.verbs.compare.answers import Names
from expo.verbs.compare.finding import meta_beside
from expo.verbs.compare.run import UNKNOWN, Scoring


@dataclass(frozen=True)
class Rewards:
    """A file of rewards."""

    path: Path
    values: tuple[float | None, ...]
    """In the file's order; None where a row has none."""
    names: tuple[Names, ...] | None
    """The rows they belong to; None where no file says it."""
    scoring: Scoring
    """With rows by their number in this file."""
    prompts_sha256: str | None
    outputs_sha256: str | None

    @property
    def reward_model(self) -> str:
        """What identifies the reward model: its name and revision."""
        name, revision = self.scoring.model or UNKNOWN, self.scoring.revision
        return name if revision is None else f"{name}@{revision}"


def read_rewards(path: Path) -> Rewards:
    """One reward model's rewards of a run.

    Raises:
        InputError: It is no file of numbers, or the files beside it do not belong to it.
    """
    meta = meta_beside(path)
    meta = meta if meta.get("command") == "score" else {}
    values = read_numbers(path)
    rows_file = path.with_name(f"{path.stem}.rows.jsonl")
    rows = read_rows(rows_file) if rows_file.is_file() else None
    if rows is not None and not _belong(rows, values):
        raise InputError(f"{rows_file} and {path.name} hold different rewards: score again with --overwrite")
    names = None if rows is None else tuple(_names(row, number, rows_file) for number, row in enumerate(rows))
    if names is not None and len(set(names)) < len(names):
        raise InputError(f"{rows_file} names a row twice: score again with --overwrite")
    truncated = frozenset(number for number, row in enumerate(rows or ()) if row.get("truncated") is True)
    model = _text(meta.get("reward_model")) or path.stem.partition("@")[2] or None
    settings = meta.get("fingerprint")
    scoring = Scoring(
        model,
        _text(meta.get("revision")),
        truncated,
        {**_not_finite(path, values), **_reasons(meta)},
        settings if isinstance(settings, dict) else {},
    )
    finite = tuple(value if value is not None and math.isfinite(value) else None for value in values)
    return Rewards(path, finite, names, scoring, _text(meta.get("prompts_sha256")), _text(meta.get("outputs_sha256")))


def read_numbers(path: Path) -> list[float | None]:
    """One JSON number or null per line, as the paper's code writes rewards.

    Raises:
        InputError: A line holds something else.
    """
    with open_file(path) as stream:
        lines = stream.read().splitlines()
    numbers: list[float | None] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = line.decode(errors="replace")
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise InputError(f"{path}, line {number} is not a reward (a number or null): {shown(value)}")
        numbers.append(None if value is None else _float(value))
    if not numbers:
        raise InputError(f"{path} contains no rewards")
    return numbers


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _belong(rows: list[Row], values: list[float | None]) -> bool:
    """Whether the rows file holds these rewards."""
    same = (row.get("reward") == value or value != value for row, value in zip(rows, values, strict=False))
    return len(rows) == len(values) and all(same)


def _names(row: Row, number: int, file: Path) -> Names:
    sample, turn = row.get("sample", 0), row.get("turn", 0)
    if not isinstance(row.get("id"), str) or type(sample) is not int or type(turn) is not int:
        raise InputError(f"row {number} of {file} has no id, sample and turn: score again with --overwrite")
    return Names(row["id"], sample, turn)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _not_finite(path: Path, values: list[float | None]) -> dict[int, str]:
    bad = (number for number, value in enumerate(values) if value is not None and not math.isfinite(value))
    return {number: f"its reward in {path.name} is {values[number]}" for number in bad}


def _reasons(meta: Row) -> dict[int, str]:
    errors = meta.get("errors")
    known = [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    return {error["row"]: str(error.get("reason")) for error in known if isinstance(error.get("row"), int)}
