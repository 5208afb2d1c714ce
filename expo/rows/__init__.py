"""Row jobs (generate, score): what one is, the loop that runs it, its files, its parts and its workers."""

from expo.rows.job import RowJob
from expo.rows.keeper import EngineKeeper, kept_or_own
from expo.rows.loop import is_complete, missing_rows
from expo.rows.ways import plan_to_run, run

__all__ = ["EngineKeeper", "RowJob", "is_complete", "kept_or_own", "missing_rows", "plan_to_run", "run"]
