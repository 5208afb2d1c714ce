"""Which way a row job is run: all its rows in this process, one part of them, several processes, or parts joined."""

from __future__ import annotations

from expo.rows.job import Done, EngineKeeper, RowJob, run_rows
from expo.rows.parts import join_parts, kept_of_the_whole
from expo.rows.workers import run_in_processes


def run(job: RowJob, keeper: EngineKeeper | None = None) -> Done:
    """Make every row that is not there yet.

    Args:
        job: What to do.
        keeper: Has an engine that goes on after this job; without one the job's engine is closed at its end.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call goes on with the rest.
    """
    if job.config.join is not None:
        return join_parts(job, job.config.join)
    if job.config.data_parallel > 1:
        return run_in_processes(job)
    is_cut = job.whole is not None or job.files.parts_folder.is_dir()
    return run_rows(job, kept_of_the_whole(job) if is_cut else {}, keeper)
