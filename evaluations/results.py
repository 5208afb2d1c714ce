"""What an evaluation found: a record beside the tool's own files, and a table for people.

A record says who judged, with which version of what, and when: a score means nothing without them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from expo.cli.failures import say
from expo.errors import InputError
from expo.files import json_text, name_problem, read_json, repeated, write_atomic


@dataclass(frozen=True)
class Result:
    """The scores of one model in one evaluation."""

    benchmark: str
    """Such as `AlpacaEval 2.0`."""
    name: str
    """The model's: that of its answers."""
    scores: Mapping[str, float | None]
    rows: int
    """How many answers, or questions, the scores are of."""
    made_from: Mapping[str, Any]
    """All that the scores depend on: hashes of answers and references, the judge's settings. What is made from the
    same is not judged again."""
    judge: Mapping[str, Any] | None = None
    """`model`, the name it was asked under, its address, what its server says of itself; None where nobody judges."""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    """When its last judgment was made, in UTC."""
    failed: int = 0
    """How many judgments are missing: a rerun asks for them again."""
    unanswered: int = 0
    """How many rows failed when they were generated: they are empty, and judged so."""


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions_of(*distributions: str) -> dict[str, str]:
    """Their installed versions."""
    return {name: version(name) for name in distributions}


def write(path: Path, result: Result) -> None:
    """Write a record; it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json_text(asdict(result), indent=2) + "\n")


def read(path: Path) -> Result | None:
    """A record; None where there is none, or one of another version of expo."""
    found = read_json(path) if path.exists() else {}
    return Result(**found) if found.keys() == {one.name for one in fields(Result)} else None


def finished(path: Path, made_from: Mapping[str, Any]) -> Result | None:
    """The record that is there, if it was made from the same and lacks nothing."""
    found = read(path)
    whole = found is not None and not found.failed and found.made_from == json.loads(json.dumps(made_from))
    return found if whole else None


def file_name(name: str) -> str:
    """A model's name as that of a file or a folder.

    Raises:
        InputError: It cannot be one.
    """
    problem = "is a folder" if name == "." else name_problem(name)
    if problem:
        raise InputError(f"the name {name!r} {problem}: results are filed under it")
    return name.replace("/", "--")


def require_different(names: Iterable[str]) -> None:
    """Refuse to file two models under one name.

    Raises:
        InputError: Two names are the same.
    """
    if (twice := repeated(map(file_name, names))) is not None:
        raise InputError(
            f"two files have the answers of {twice}: results are filed under the name, so give each its own"
        )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it until the end, however that comes.

    Raises:
        InputError: Another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is at work in {folder}: wait for it, or pass another --output-dir"
            ) from error
        yield


def once(folder: Path, made_from: Mapping[str, Any], make: Callable[[], Result]) -> Result:
    """The result that is filed beside a folder, if it is made from the same and lacks nothing; else a new one.

    Args:
        folder: Where what makes it keeps its files; no other run works there meanwhile.
        made_from: All that it depends on.
        make: Makes it.
    """
    record = folder.with_name(f"{folder.name}.json")
    with only_one(folder):
        if (known := finished(record, made_from)) is not None:
            say(f"{known.name}: already complete: {record}")
            return known
        if record.exists():
            say(f"{record} is not whole, or was made from something else: it is made again")
        found = make()
        write(record, found)
    return found


def digest(value: object) -> str:
    """Names what judgments depend on, so that those of another judge never count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def moment(seconds: float) -> str:
    """A time in seconds since 1970, as records have it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Column:
    """A score as a column."""

    key: str
    title: str
    digits: int = 1
    published: str | None = None
    """Its key among a recipe's published scores."""


def table(
    results: Sequence[Result], columns: Sequence[Column], published: Mapping[str, tuple[float, float]] | None
) -> str:
    """A line per model, with the paper's scores below, and a last line that says who judged, with what, and when.

    Args:
        results: DPO and ExPO, or any models.
        columns: Which scores, in order.
        published: The paper's, DPO → ExPO; None where there are none.
    """
    width = max(len(name) for name in [*(one.name for one in results), "published, DPO"])
    lines = [f"{results[0].benchmark:<{width}}" + "".join(f"{one.title:>{_width(one)}}" for one in columns) + "  rows"]
    lines.append("─" * len(lines[0]))
    for one in results:
        cells = "".join(f"{shown(one.scores.get(c.key), c.digits):>{_width(c)}}" for c in columns)
        lacking = f"  {one.failed} judgments are missing: rerun to ask again" if one.failed else ""
        failed = f"  {one.unanswered} rows failed and are empty: rerun to answer them" if one.unanswered else ""
        lines.append(f"{one.name:<{width}}{cells}  {one.rows:>4}{lacking}{failed}")
    for index, label in enumerate(("DPO", "ExPO") if published else ()):
        values = [None if published is None or c.published is None else published.get(c.published) for c in columns]
        cells = "".join(
            f"{shown(value[index] if value else None, c.digits):>{_width(c)}}"
            for c, value in zip(columns, values, strict=True)
        )
        if any(values):
            lines.append(f"{f'published, {label}':<{width}}{cells}")
    return "\n".join([*lines, "", *dict.fromkeys(_who(one) for one in results)])


def shown(value: float | None, digits: int) -> str:
    """A score; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _width(column: Column) -> int:
    return max(len(column.title), 8) + 2


def _who(result: Result) -> str:
    tools = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    if result.judge is None:
        return f"measured with {tools}, {result.date[:10]}"
    asked = "" if result.judge["asked_as"] == result.judge["model"] else f" (asked as {result.judge['asked_as']})"
    return f"judge: {result.judge['model']}{asked} at {result.judge['address']}; {tools}, {result.date[:10]}"
