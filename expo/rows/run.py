"""How a row job is run: in this process (whole or one part), in several processes, or by joining parts."""

from __future__ import annotations

from expo.rows.job import Done, EngineKeeper, RowJob, run_rows
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
