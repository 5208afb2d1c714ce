"""How a row job is run: in this process (whole or one part), in several processes, or by joining parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from expo.config import RowsConfig
from expo.rows.dates import agree
from expo.rows.job import Done, RowJob
from expo.rows.keeper import EngineKeeper
from expo.rows.loop import run_rows
from expo.rows.parts import join_parts, kept_of_the_whole
from expo.rows.workers import run_in_processes


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
    if job.config.data_parallel > 1:
        return run_in_processes(job)
    is_cut = job.whole is not None or job.files.parts_folder.is_dir()
    return run_rows(job, kept_of_the_whole(job) if is_cut else {}, keeper)


Config = TypeVar("Config", bound=RowsConfig)
Job = TypeVar("Job", bound=RowJob)


def plan_to_run(plan: Callable[[Config], Job], config: Config) -> Job:
    """A job's plan; if its chat template writes a date, with the one on which all processes that share the job agree.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The date cannot be written.
    """
    job = plan(config)
    is_shared = config.part is not None or config.data_parallel > 1
    if job.date is None or not job.date.is_new or not is_shared:
        return job
    agreed = agree((job.whole or job).files, job.fingerprint, job.date.moment)
    return job if agreed == job.date.moment else plan(config)
