"""The result of `expo score`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from expo.files import Row, read_json, read_rows
from expo.output.frames import frame
from expo.rows.job import Done

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scored:
    """The result of one reward model."""

    rewards: Path
    meta: Path
    status: str
    """"written" or "already complete"."""
    n: int
    mean: float | None
    standard_error: float | None
    failed: int
    reason: str | None = None
    """Why the first failed row failed."""
    can_retry: bool = False
    """Whether the same command tries failed rows again, which may help."""
    further: tuple[Scored, ...] = ()
    """Of the first: the results of the run's further reward models, in order."""

    def __fspath__(self) -> str:
        return str(self.rewards)

    def describe(self) -> Row:
        """The result as plain data; those of further reward models under `further`, where there are any."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "further"}
        return own | ({"further": [one.describe() for one in self.further]} if self.further else {})

    def to_pandas(self) -> DataFrame:
        """A row per answer and reward model: `reward_model`, `id`, `sample`, `reward`, `tokens`, `truncated`."""
        return frame(
            {"reward_model": read_json(one.meta).get("reward_model"), **row}
            for one in (self, *self.further)
            for row in read_rows(one.rewards.with_name(f"{one.rewards.stem}.rows.jsonl"))
        )


def scored(done: Done) -> Scored:
    """The result of one reward model's job."""
    meta, files = done.meta, done.job.files
    n, mean, error = meta.get("n", meta["rows"] - meta["failed"]), meta.get("mean"), meta.get("standard_error")
    return Scored(files.final, files.meta, done.status, n, mean, error, meta["failed"], done.reason, done.can_retry)
