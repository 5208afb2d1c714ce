"""An engine that goes on from one row job to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from expo.rows.job import RowJob


class EngineKeeper:
    """An engine that outlives a job: opened when it is first needed, and given the next job's settings and weights.

    Close it at the end (`contextlib.closing`).
    """

    is_shared = False
    """Whether the engine works for other jobs at the same time, so that time is theirs, too."""

    def __init__(self) -> None:
        self.opened = False
        """Whether the engine was opened for the job it is at, and did not go on from another."""
        self._engine: Any = None
        self._opened_for: RowJob | None = None

    def engine_for(self, job: RowJob) -> Any:  # noqa: ANN401 - of the verb's kind
        """The live engine where it can do this job, else a new one."""
        if self._engine is not None and self._opened_for is not None and self._goes_on(self._opened_for, job):
            try:
                self._engine.load(job.setup)
                self.opened = False
            except BaseException:
                self.close()  # what its weights are now is not known
                raise
        else:
            self.close()
            self._engine, self._opened_for = job.open_engine(), job
            self.opened = True
        return self._engine

    @staticmethod
    def _goes_on(before: RowJob, job: RowJob) -> bool:
        same = before.engine == job.engine and type(before.setup) is type(job.setup)
        return same and job.setup.takes_over(before.setup)

    def close(self) -> None:
        """Close the engine, where there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


@contextmanager
def kept_or_own(keeper: EngineKeeper | None) -> Iterator[EngineKeeper]:
    """The keeper; where there is none, one that is closed at the end."""
    if keeper is not None:
        yield keeper
        return
    with closing(EngineKeeper()) as own:
        yield own
