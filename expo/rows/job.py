"""What a row job is.

`expo generate` and `expo score` are row jobs: each one's plan is a subclass of `RowJob`, which is all that the loop,
the parts and the workers know of it. To add a job, write a subclass; there is no table to edit.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from expo.config import RowsConfig
from expo.files import Row
from expo.parts import Part
from expo.rows.dates import TemplateDate
from expo.rows.files import Columns, LineCount, RowFiles

Key = tuple[Any, ...]
"""Identifies a row within its output."""
Rows = dict[Key, Row]
"""Row key → row, as recorded in the journal."""

TRANSIENT = ("overwrite", "dry_run", "output_dir", "part", "join", "data_parallel", "ray", "template_date")
"""Settings of how a run is executed, not of what it produces."""


class Setup(Protocol):
    """What an engine is started with; see `expo.engines`."""

    def takes_over(self, started: Any) -> bool:  # noqa: ANN401 - a setup of the same kind
        """Whether an engine started with another setup can switch to this one."""


@dataclass(frozen=True)
class Figures:
    """The cost of one run of the engine."""

    rows: int = 0
    tokens: int = 0
    engine_start_seconds: float = 0.0
    seconds: float = 0.0
    engine_step_seconds: float = 0.0
    repeatable: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """The engine's speed, excluding its start."""
        return round(self.tokens / self.seconds, 1) if self.seconds else 0.0


@dataclass(frozen=True)
class Done:
    """A job after its run."""

    job: RowJob
    meta: Row
    status: str
    """"written" or "already complete"."""

    @property
    def reason(self) -> str | None:
        """Why the first of the failed rows failed; None where none did, or it is not recorded."""
        errors = self.meta.get("errors")
        of_part = f" of part {self.job.part}" if self.job.part else ""
        return f"row {errors[0]['row']}{of_part}: {errors[0]['reason']}" if errors else None

    @property
    def can_retry(self) -> bool:
        """Whether the same command tries failed rows again, which may help."""
        runs_rows = self.status == "written" and self.job.config.join is None
        return runs_rows and any(not error.get("lasting") for error in self.meta.get("errors", ()))


@dataclass(frozen=True, kw_only=True)
class RowJob(ABC):
    """Everything a verb will do: what its rows are, how to produce them and how to write them."""

    verb: ClassVar[str]
    """The command's name."""
    columns: ClassVar[Columns]
    """The columns of every row in the journal."""
    seconds_key: ClassVar[str]
    """The meta file's key for the seconds that the engine worked."""

    config: RowsConfig
    engine: str
    """The resolved engine."""
    name: str
    """The output's name."""
    files: RowFiles
    fingerprint: Row
    """Every setting and source that changes the rows."""
    setup: Setup
    """What the engine is started with."""
    date: TemplateDate | None = None
    """The date that the chat template writes into prompts; None where it writes none."""
    part: Part | None = None
    """Which part of a job this is; None is the whole."""
    whole: Self | None = None
    """Of a part: the job it is a part of."""

    # --- its rows

    @property
    @abstractmethod
    def keys(self) -> Sequence[Key]:
        """All rows, in output order."""

    @property
    @abstractmethod
    def items(self) -> Sequence[object]:
        """What the rows are made from, in output order."""

    @abstractmethod
    def everything(self) -> Self:
        """The job of all rows that an output with these settings may have, for their keys and items; also of a part."""

    @abstractmethod
    def covering(self, keys: Collection[Key]) -> Self:
        """The same job with further rows of `everything`, such as the output has; keys that it lacks do not count."""

    def takes_in(self, keys: Collection[Key]) -> bool:  # noqa: ARG002 - for jobs that may be of any of their rows
        """Whether a run goes on with rows that another has begun and this job does not ask for."""
        return False

    @abstractmethod
    def share(self, part: Part) -> Self:
        """The same job restricted to one part's rows and files."""

    @abstractmethod
    def key_of(self, row: Row) -> Key:
        """The key of a row of the journal."""

    @abstractmethod
    def is_answered(self, row: Row) -> bool:
        """Whether a row of the journal is a result, not a failure."""

    def is_interim(self, row: Row) -> bool:  # noqa: ARG002 - for jobs whose rows take several steps
        """Whether a row of the journal is only a step towards one: kept for a rerun, and counted as no row."""
        return False

    def is_current(self, row: Row) -> bool:  # noqa: ARG002 - for jobs whose rows can be outdated
        """Whether a row of the journal was made from the current input."""
        return True

    @abstractmethod
    def pending(self, done: Mapping[Key, Row]) -> bool:
        """Whether any row that can be produced is not done."""

    def require_sound(self, done: Rows) -> None:  # noqa: B027 - for jobs whose rows can show it
        """Refuse rows that show, together, that the engine did not work; they stay in the journal.

        Args:
            done: All rows, from this run and before.

        Raises:
            InputError: They do.
        """

    @abstractmethod
    def impossible(self, done: Mapping[Key, Row]) -> Rows:
        """The rows that cannot be produced, marked as failed, once all others are done."""

    # --- producing them

    @property
    def total(self) -> int:
        """How many rows there are."""
        return len(self.keys)

    @property
    def journals(self) -> Sequence[Path]:
        """What is written while it runs."""
        return (self.files.journal,)

    def line(self) -> str:
        """The job as sent to a process: the verb, every resolved setting, and which of the verb's jobs it is."""
        part = None if self.part is None else str(self.part)
        config = dataclasses.replace(self.config, data_parallel=None, ray=None, join=None, part=part)
        settings = {**dataclasses.asdict(config), "engine": self.engine}
        return json.dumps({"verb": self.verb, "settings": settings, "options": self.worker_options()}) + "\n"

    def counter(self) -> Callable[[], int]:
        """What tells how many rows the journal has, each byte of which is read once."""
        lines = LineCount(self.files.journal)
        return lambda: max(0, lines() - 1)

    def worker_options(self) -> dict[str, Any]:
        """What the verb's `run` is given besides the settings, in a process that does this job or a part of it."""
        return {} if self.date is None else {"moment": self.date.moment}

    @abstractmethod
    def open_engine(self) -> Any:  # noqa: ANN401 - of the verb's kind
        """Start the engine."""

    @abstractmethod
    def execute(self, engine: Any, done: Rows) -> Iterator[list[Row]]:  # noqa: ANN401
        """Produce the rows that are not done, in the journal's form, and yield them as they finish.

        Args:
            engine: The engine, with this job's setup.
            done: The rows that are done; the caller adds those that are yielded.
        """

    @abstractmethod
    def tokens(self, row: Row) -> int:
        """The tokens of a row that count towards tokens per second."""

    @abstractmethod
    def worker_environments(self, count: int) -> list[dict[str, str]]:
        """The environment of each of several processes that share the job: its GPUs, or its share of CPU threads.

        Raises:
            InputError: There are too few GPUs, or the engine does not run here.
        """

    @abstractmethod
    def gpus_per_engine(self, there: bool) -> int:
        """How many GPUs an engine takes on a machine of a cluster; 0 where it runs on CPUs.

        Args:
            there: Whether the cluster has GPUs.

        Raises:
            InputError: The engine was chosen for this machine, which has none.
        """

    # --- writing them

    @abstractmethod
    def finished_keys(self, meta: Row) -> list[Key] | None:
        """Which rows the finished output has, in its order, as its files name them; None where they do not."""

    @abstractmethod
    def finished_rows(self, meta: Row, keys: Sequence[Key]) -> list[Row]:
        """The rows of the finished output, in the journal's form.

        Args:
            meta: Its meta file.
            keys: Which rows they are.

        Raises:
            InputError: It is damaged.
        """

    @abstractmethod
    def render(self, rows: Sequence[Row]) -> dict[Path, str]:
        """The final files and their contents, from all rows in output order."""

    @abstractmethod
    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:
        """The content of the meta file, including `rows`, `failed`, `errors`, `fingerprint` and the hash of the items.

        Each of the `errors` has the number of a `row`, a `reason`, and `lasting` where trying again does not help.

        Args:
            rows: All rows in output order.
            figures: The cost of this run.
            extends: Whether some of the rows are from a previously finished output.
        """

    # --- derived

    def by_key(self, rows: Iterable[Row]) -> Rows:
        """Rows under their keys."""
        return {self.key_of(row): row for row in rows}

    def answered(self, rows: Iterable[Row]) -> Rows:
        """The rows that need not be produced again."""
        return self.by_key(row for row in rows if self.is_answered(row) and self.is_current(row))

    def describe_date(self) -> Row:
        """The plan's entry about the date in prompts."""
        return {} if self.date is None else {"template_date": self.date.moment}

    def recorded_config(self) -> Row:
        """The settings as recorded in the meta file."""
        values = dataclasses.asdict(self.config)
        return {name: value for name, value in values.items() if name not in TRANSIENT}

    def figures_in(self, meta: Row) -> Figures:
        """The cost of a run, from its meta file."""
        seconds = meta[self.seconds_key]
        return Figures(
            rows=meta["rows_this_run"],
            tokens=round(meta["tokens_per_second"] * seconds),
            engine_start_seconds=meta["engine_start_seconds"],
            seconds=seconds,
            engine_step_seconds=meta.get("engine_step_seconds", 0.0),
            repeatable=meta.get("repeatable", False),
            versions={name: text for name, text in meta["versions"].items() if name != "expo"},
        )
