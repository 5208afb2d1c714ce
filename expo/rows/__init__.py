"""Everything that is made row by row: what a row job is, the loop that runs it, its files, its parts and workers."""

from expo.rows.job import EngineKeeper, RowJob
from expo.rows.run import run

__all__ = ["EngineKeeper", "RowJob", "run"]
