"""A run in parts: how a part is named, which rows it has, and where its files are. Nothing is read or written here.

Part i of N has the rows i, i + N, i + 2N, …: long and short prompts spread evenly, and further rows, such as those of a
larger `--limit`, are added to each part's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from expo.errors import InputError

Item = TypeVar("Item")

MAX_PARTS = 10_000

SLURM_INDEX, SLURM_COUNT = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
SLURM_FIRST, SLURM_LAST, SLURM_STEP = (f"SLURM_ARRAY_TASK_{name}" for name in ("MIN", "MAX", "STEP"))

FILE_NAME = re.compile(r"\.?(\d+-of-(\d+))\.(?:jsonl|meta\.json|journal\.jsonl)")
"""A part's files: its rows, its meta file, and the journal while it runs."""

DATE_NAME = ".date-"
"""How the files begin that say the date which all parts of a run give their chat template."""


@dataclass(frozen=True)
class Part:
    """The i-th of N parts of a run."""

    index: int
    """From 0."""
    count: int
    """N."""

    def __str__(self) -> str:
        """In the syntax of `--part`."""
        return f"{self.index}/{self.count}"

    @property
    def file_stem(self) -> str:
        """The name of its files."""
        return f"{self.index}-of-{self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This part's items, in order."""
        return items[self.index :: self.count]


def all_parts(count: int) -> list[Part]:
    """Every part of a run in `count` parts."""
    return [Part(index, count) for index in range(count)]


def folder_name(name: str) -> str:
    """The folder beside an output `name` that holds its parts until they are joined."""
    return f"{name}.parts"


def counts_in(file_names: Sequence[str]) -> set[int]:
    """How many parts a run was divided into, from the file names in its folder of parts; several numbers are a mix."""
    return {int(found[2]) for found in map(FILE_NAME.fullmatch, file_names) if found}


def array_list(indices: Iterable[int]) -> str:
    """Ascending indices in the syntax of `sbatch --array`: `0-2,5`; "" where there are none."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def read_part(text: str, environment: Mapping[str, str]) -> Part:
    """The part that `--part` names.

    Args:
        text: `i/N`; `slurm` for both from the array job's environment, or `slurm/N` for i alone, which the array need
            not number from 0 without a gap.
        environment: The process's environment.

    Raises:
        InputError: It is none of these, i is out of range, or this is not a task of an array job.
    """
    if text == "slurm":
        return _from_slurm(environment)
    found = re.fullmatch(r"(\d{1,9}|slurm)/(\d{1,9})", text, re.ASCII)
    if found is None:
        raise InputError(f"--part must be i/N (such as 0/8), slurm or slurm/N, not {text!r}")
    count = int(found[2])
    require_count("--part", count)
    index = _slurm_number(environment, SLURM_INDEX, text) if found[1] == "slurm" else int(found[1])
    if index >= count and found[1] == "slurm":
        raise InputError(f"--part {text}: {SLURM_INDEX} is {index}; submit --array=0-{count - 1}, or some of these")
    if index >= count:
        raise InputError(f"--part {text}: parts are counted from 0, so i is at most {count - 1}")
    return Part(index, count)


def require_count(flag: str, count: int) -> None:
    """Refuse an invalid number of parts.

    Raises:
        InputError: It is not between 1 and `MAX_PARTS`.
    """
    if not 1 <= count <= MAX_PARTS:
        raise InputError(f"{flag} must be 1 to {MAX_PARTS} parts, not {count}")


def _from_slurm(environment: Mapping[str, str]) -> Part:
    number, first, count = (_slurm_number(environment, key) for key in (SLURM_INDEX, SLURM_FIRST, SLURM_COUNT))
    step = max(_slurm_number({SLURM_STEP: "1", **environment}, SLURM_STEP), 1)
    end = first + step * (count - 1)
    last = _slurm_number({SLURM_LAST: str(end), **environment}, SLURM_LAST)
    index, beside = divmod(number - first, step)
    if beside or not 0 <= index < count or last != end:
        raise InputError(
            f"--part slurm: task {number} of an array of {count} from {first} in steps of {step} is not a valid part; "
            "submit a plain range such as --array=0-7, or give --part slurm/N to make some parts of N"
        )
    require_count("--part slurm", count)
    return Part(index, count)


def _slurm_number(environment: Mapping[str, str], key: str, given: str = "slurm") -> int:
    text = environment.get(key)
    if text is None:
        raise InputError(
            f"--part {given}: {key} is not set; submit an array job (sbatch --array=0-7), or give --part i/N"
        )
    if re.fullmatch(r"\d{1,9}", text, re.ASCII) is None:
        raise InputError(f"--part {given}: {key} is {text!r}, not a number")
    return int(text)
