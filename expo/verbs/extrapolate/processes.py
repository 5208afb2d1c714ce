"""Writing an output's parts in processes, each a worker like those of rows, and joining them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from expo.config import ExtrapolateConfig
from expo.cpus import usable_cpus
from expo.output.parts import counts_in, require_same_cut, share
from expo.output.writer import JOURNAL_FILE, read_records, staging_folder
from expo.parts import Part
from expo.progress import bytes_bar
from expo.rows.cluster import Cluster, forget_names, local_inputs
from expo.rows.worker import Worker
from expo.rows.workers import Crew
from expo.verbs.extrapolate.commit import join
from expo.verbs.extrapolate.plan import ExtrapolatePlan

MAX_THREADS = 4
"""Of all processes of one machine together, where `--workers` does not say it."""
PARTS_PER_PROCESS = 6
"""In how many parts an output is divided for each process of a cluster, where it has so many files.

It is what `benchmarks/failures.py` chooses: the more, the sooner others have done what a lost or slow machine has not.
"""


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
        config = replace(
            self.config, data_parallel=None, ray=None, join=None, part=str(self.part), push_to_hub=None, private=False
        )
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
    tasks = _missing(job, count, max(1, min(MAX_THREADS, usable_cpus()) // count))
    if tasks:
        with Crew([Worker(None, {}) for _ in tasks], [(task, 0) for task in tasks]) as crew:
            _watch(job, crew, tasks)
    join(job, count)


def write_on_cluster(job: ExtrapolatePlan, address: str) -> None:
    """Write what is missing of the outputs in processes on the machines of a Ray cluster, and join it.

    Args:
        job: The plan.
        address: The cluster's, or auto.

    Raises:
        InputError: The settings or inputs are at fault, or the machines do not share what they need.
        EnvironmentFailure: The cluster is gone, or a part failed repeatedly; complete shards are kept.
    """
    with Cluster(address) as cluster:
        share = cluster.share(job.config.data_parallel, int(job.config.device.startswith("cuda")))
        begun = {count for output in job.todo for count in counts_in(output.folder)}
        count = begun.pop() if len(begun) == 1 else min(len(job.pair.shards), PARTS_PER_PROCESS * share.processes)
        tasks = _missing(job, count, min(MAX_THREADS, share.cpus))
        if tasks:
            journals = [journal for task in tasks for journal in task.journals]
            for folder in {output.folder.parent for output in job.todo}:
                cluster.require_shared(folder, local_inputs(job.config), journals)
            with cluster.crew(share, [(task, 0) for task in tasks]) as crew:
                _watch(job, crew, tasks)
            staged = {journal.parent for task in tasks for journal in task.journals}
            forget_names([*{folder.parent for folder in staged}, *staged])
    join(job, count)


def _watch(job: ExtrapolatePlan, crew: Crew, tasks: Sequence[ShardsTask]) -> None:
    total = job.nbytes * len(job.todo)
    crew.watch("extrapolate", total, total - sum(task.total for task in tasks), bar=bytes_bar)


def _missing(job: ExtrapolatePlan, count: int, threads: int) -> list[ShardsTask]:
    """The parts that are not finished."""
    for output in job.todo:
        require_same_cut(output.folder, count, overwrite=job.config.overwrite)
    missing = {state.part for output in job.todo for state in job.states(output, count) if not state.is_finished}
    config = replace(job.config, workers=job.config.workers or threads)
    return [_task(job, config, part) for part in sorted(missing, key=lambda part: part.index)]


def _task(job: ExtrapolatePlan, config: ExtrapolateConfig, part: Part) -> ShardsTask:
    nbytes = sum(shard.nbytes for shard in share(job.pair.shards, part)) * len(job.todo)
    journals = tuple(staging_folder(output.folder, part) / JOURNAL_FILE for output in job.todo)
    return ShardsTask(config, part, nbytes, journals)
