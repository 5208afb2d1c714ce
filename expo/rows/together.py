"""Several row jobs that one process does at once with one engine: as a worker is given them, and how they are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from expo.rows.job import Done, RowJob
from expo.rows.keeper import EngineKeeper
from expo.rows.loop import steps_of_rows
from expo.rows.ways import kept_rows


@dataclass(frozen=True)
class Together:
    """Jobs as a `worker.Task`; the process tells of each that has ended."""

    jobs: tuple[RowJob, ...]
    """Whole ones of one verb."""
    part = None

    @property
    def total(self) -> int:
        """How many rows there are."""
        return sum(job.total for job in self.jobs)

    @property
    def journals(self) -> Sequence[Path]:
        """What is written while they run."""
        return [journal for job in self.jobs for journal in job.journals]

    def line(self) -> str:
        """The jobs as sent to a process."""
        return json.dumps({"verb": self.jobs[0].verb, "together": [json.loads(job.line()) for job in self.jobs]}) + "\n"

    def counter(self) -> Callable[[], int]:
        """What tells how many rows their journals have."""
        counters = [job.counter() for job in self.jobs]
        return lambda: sum(count() for count in counters)


def run_together(jobs: Sequence[RowJob], keeper: EngineKeeper) -> Iterator[tuple[int, Done]]:
    """Produce the missing rows of several jobs in turns, and tell of each that ends, by its number.

    Args:
        jobs: Whole ones, none of them in several processes.
        keeper: Gives each job a seat at one engine (`expo.engines.shared`).

    Raises:
        InputError: The settings or inputs of one are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    with ExitStack() as stack:
        running = {
            number: stack.enter_context(closing(steps_of_rows(job, kept_rows(job), keeper)))
            for number, job in enumerate(jobs)
        }
        while running:
            for number, steps in list(running.items()):
                try:
                    next(steps)
                except StopIteration as ended:
                    del running[number]
                    yield number, ended.value
