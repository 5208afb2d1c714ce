"""How a row job is run: in this process (whole or one part), in several, here or on a cluster, or by joining parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from expo.config import RowsConfig
from expo.rows.cluster import Cluster, forget_names, local_inputs
from expo.rows.dates import agree
from expo.rows.job import Done, RowJob, Rows
from expo.rows.keeper import EngineKeeper
from expo.rows.loop import is_complete, left_of, run_rows
from expo.rows.parts import join_parts, kept_of_the_whole, missing_parts, parts_begun
from expo.rows.worker import Worker
from expo.rows.workers import Crew

PARTS_PER_ENGINE, ROWS_PER_PART = 2, 500
"""In how many parts a run on a cluster is divided for each engine, at most, and how many rows each has, at least.

The more parts, the less another engine takes up; but at a part's end only its longest answers are in flight. Both are
what `benchmarks/failures.py` chooses.
"""

log = logging.getLogger(__name__)


def run(job: RowJob, keeper: EngineKeeper | None = None) -> Done:
    """Produce every missing row.

    Args:
        job: What to do.
        keeper: Keeps the engine open after this job; without one, the engine is closed at the end.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    if job.config.join is not None:
        return join_parts(job, job.config.join)
    if job.config.ray is not None and not is_complete(job):
        return run_on_cluster(job, job.config.ray)
    if job.config.processes > 1:
        return run_in_processes(job)
    return run_rows(job, kept_rows(job), keeper)


def kept_rows(job: RowJob) -> Rows:
    """Where a job is a part, or has parts: the rows that the whole output already has."""
    is_cut = job.whole is not None or job.files.parts_folder.is_dir()
    return kept_of_the_whole(job) if is_cut else {}


def run_in_processes(whole: RowJob) -> Done:
    """Produce the rows in `data_parallel` processes.

    Raises:
        InputError: The settings or inputs are at fault, as found here or by a worker.
        EnvironmentFailure: A part failed repeatedly; finished rows are kept.
    """
    count = whole.config.processes
    environments = whole.worker_environments(count)
    left = left_of(whole)
    whole, todo = left.job, missing_parts(left, count)
    if todo:
        log.info("%s: %d workers with %s", whole.name, len(todo), whole.engine)
        elsewhere = len(whole.keys) - sum(job.total for job, _ in todo)
        with Crew([Worker(None, environment) for environment in environments[: len(todo)]], todo) as crew:
            crew.watch(whole.verb, len(whole.keys), elsewhere)
    return join_parts(whole, count)


def run_on_cluster(whole: RowJob, address: str) -> Done:
    """Produce the rows in processes on the machines of a Ray cluster.

    Args:
        whole: The job.
        address: The cluster's, or auto.

    Raises:
        InputError: The settings or inputs are at fault, or the machines do not share what they need.
        EnvironmentFailure: The cluster is gone, or a part failed repeatedly; finished rows are kept.
    """
    left = left_of(whole)
    whole = left.job
    with Cluster(address) as cluster:
        share = cluster.share(whole.config.data_parallel, whole.gpus_per_engine(cluster.has_gpus))
        count = parts_begun(whole) or parts_for(len(whole.keys), share.processes)
        todo = missing_parts(left, count)
        if todo:
            journals = [journal for job, _ in todo for journal in job.journals]
            cluster.require_shared(whole.files.final.parent, local_inputs(whole.config), journals)
            log.info("%s: %d parts on %d workers with %s", whole.name, len(todo), share.processes, whole.engine)
            elsewhere = len(whole.keys) - sum(job.total for job, _ in todo)
            with cluster.crew(share, todo) as crew:
                crew.watch(whole.verb, len(whole.keys), elsewhere)
            forget_names([whole.files.parts_folder])
    return join_parts(whole, count)


def parts_for(rows: int, engines: int) -> int:
    """In how many parts a run on a cluster is divided: one for each engine, or several where they are large enough."""
    each = min(PARTS_PER_ENGINE, rows // (ROWS_PER_PART * engines))
    return min(rows, engines * max(1, each))


Config = TypeVar("Config", bound=RowsConfig)
Job = TypeVar("Job", bound=RowJob)


def plan_to_run(plan: Callable[[Config], Job], config: Config) -> Job:
    """A job's plan; if its chat template writes a date, with the one on which all processes that share the job agree.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The date cannot be written.
    """
    job = plan(config)
    is_shared = config.part is not None or config.makes_parts
    if job.date is None or not job.date.is_new or not is_shared:
        return job
    agreed = agree((job.whole or job).files, job.fingerprint, job.date.moment)
    return job if agreed == job.date.moment else plan(config)
