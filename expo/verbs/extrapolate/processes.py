"""Writing an output's parts in processes, each a worker like those of rows, and joining them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from expo.config import ExtrapolateConfig
from expo.cpus import usable_cpus
from expo.output.parts import share
from expo.output.writer import JOURNAL_FILE, read_records, staging_folder
from expo.parts import Part, all_parts
from expo.progress import bytes_bar
from expo.rows.worker import Worker
from expo.rows.workers import Crew
from expo.verbs.extrapolate.commit import join
from expo.verbs.extrapolate.plan import ExtrapolatePlan

MAX_THREADS = 4
"""Of all processes of one machine together, where `--workers` does not say it."""


@dataclass(frozen=True)
class ShardsTask:
    """A part of the shards of every output."""

    config: ExtrapolateConfig
    part: Part
    total: int
    """Bytes."""
    journals: tuple[Path, ...]
    """Of each output's part."""

    def line(self) -> str:
        """As `rows.worker.Task`."""
        config = replace(self.config, data_parallel=1, join=None, part=str(self.part), push_to_hub=None, private=False)
        return json.dumps({"verb": "extrapolate", "settings": asdict(config), "options": {}}) + "\n"

    def counter(self) -> Callable[[], int]:
        """As `rows.worker.Task`: the bytes of the shards that are complete."""
        return lambda: sum(record.nbytes for file in self.journals for record in read_records(file))


def write_in_processes(job: ExtrapolatePlan, count: int) -> None:
    """Write what is missing of the outputs in `count` processes, and join it.

    Raises:
        InputError: The settings or inputs are at fault, as found here or by a worker.
        EnvironmentFailure: A part failed repeatedly; complete shards are kept.
    """
    tasks = [_task(job, part) for part in all_parts(count) if share(job.pair.shards, part)]
    missing = {state.part for output in job.todo for state in job.states(output, count) if not state.is_finished}
    workers = [Worker(task, {}) for task in tasks if task.part in missing]
    if workers:
        with Crew(workers) as crew:
            total = sum(task.total for task in tasks)
            crew.watch("extrapolate", total, total - sum(worker.job.total for worker in workers), bar=bytes_bar)
    join(job, count)


def _task(job: ExtrapolatePlan, part: Part) -> ShardsTask:
    config, todo = job.config, job.todo
    threads = config.workers or max(1, min(MAX_THREADS, usable_cpus()) // config.data_parallel)
    nbytes = sum(shard.nbytes for shard in share(job.pair.shards, part)) * len(todo)
    journals = tuple(staging_folder(output.folder, part) / JOURNAL_FILE for output in todo)
    return ShardsTask(replace(config, workers=threads), part, nbytes, journals)
