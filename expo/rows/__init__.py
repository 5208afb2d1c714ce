"""Row jobs (generate, score): what one is, the loop that runs it, its files, its parts and its workers."""

from expo.rows.job import EngineKeeper, RowJob
from expo.rows.run import plan_to_run, run

__all__ = ["EngineKeeper", "RowJob", "plan_to_run", "run"]
