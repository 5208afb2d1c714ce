"""`--data-parallel N`: each part of a job runs in its own process, monitored and restarted; then they are joined."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol

from expo.errors import PARTLY_FAILED, EnvironmentFailure, InputError
from expo.parts import all_parts
from expo.progress import Progress, rows_bar
from expo.rows.job import Done, RowJob
from expo.rows.loop import left_of
from expo.rows.parts import is_finished, join_parts, require_same_cut
from expo.rows.worker import Worker

POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
"""How long workers may take to stop cleanly."""

FINISHED = (0, PARTLY_FAILED)

log = logging.getLogger(__name__)


class MakeBar(Protocol):
    """Makes a progress bar."""

    def __call__(self, total: int, label: str, *, initial: int) -> Progress:
        """The bar, which begins at `initial`."""


def run_in_processes(whole: RowJob) -> Done:
    """Produce the rows in `data_parallel` processes.

    Raises:
        InputError: The settings or inputs are at fault, as found here or by a worker.
        EnvironmentFailure: A part failed repeatedly; finished rows are kept.
    """
    count = whole.config.data_parallel
    environments = whole.worker_environments(count)
    left = left_of(whole)
    whole, kept = left.job, left.done
    require_same_cut(whole, count)
    shares = [whole.share(part) for part in all_parts(count)]
    workers = [
        Worker(job, environment, sum(key in kept for key in job.keys))
        for job, environment in zip(shares, environments, strict=True)
        if job.pending(kept) and not is_finished(job)
    ]
    if workers:
        log.info("%s: %d workers with %s", whole.name, len(workers), whole.engine)
        elsewhere = len(whole.keys) - sum(worker.job.total for worker in workers)
        with Crew(workers) as crew:
            crew.watch(whole.verb, len(whole.keys), elsewhere)
    return join_parts(whole, count)


def stop_all(workers: Sequence[Worker]) -> None:
    """Ask workers to stop, and kill those that take too long."""
    for worker in workers:
        worker.ask_to_stop()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.wait(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.close()


class Crew:
    """The workers of a run, started together; none is left running after the `with` block.

    Args:
        workers: Each with its first job.
        waiting: Further jobs, each with its number of finished rows, for whichever worker is free first.
    """

    def __init__(self, workers: Sequence[Worker], waiting: Iterable[tuple[RowJob, int]] = ()) -> None:
        self._workers = workers
        self._waiting = deque(waiting)
        self._finished_rows = 0
        self._running: list[Worker] = []
        self._lost: list[str] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_all(self._workers)

    def watch(self, label: str, total: int, elsewhere: int, bar: MakeBar = rows_bar) -> None:
        """Start the workers and wait until all jobs are done, with one progress bar for all of it.

        Args:
            label: The bar's label.
            total: All rows of the run, or bytes.
            elsewhere: Those of parts that are already finished.
            bar: Makes the bar.

        Raises:
            InputError: A worker rejects its settings or inputs.
            EnvironmentFailure: A part failed repeatedly.
        """
        for worker in self._workers:
            self._start(worker)
        shown = elsewhere + sum(worker.rows() for worker in self._workers)
        progress = bar(total, label, initial=shown)
        try:
            while self._running:
                time.sleep(POLL_SECONDS)
                for worker in list(self._running):
                    self._look_at(worker)
                now = elsewhere + self._finished_rows + sum(worker.rows() for worker in self._running)
                progress.update(max(0, now - shown))
                shown = max(shown, now)
        finally:
            progress.close()
        if self._lost:
            raise EnvironmentFailure(f"{'; '.join(self._lost)}; rerun the same command to continue")

    def _start(self, worker: Worker) -> None:
        self._running.append(worker)
        worker.start()

    def _look_at(self, worker: Worker) -> None:
        code = worker.outcome()
        if code is None:
            return
        self._running.remove(worker)
        if code in FINISHED:
            self._finished_rows += worker.job.total
            if not worker.stays:
                worker.wait(STOP_SECONDS)
                worker.kill()
            if self._waiting:
                worker.take(*self._waiting.popleft())
                self._start(worker)
            return
        worker.wait(STOP_SECONDS)  # it gives back what its engine holds
        worker.kill()
        if code == InputError.exit_code:
            raise InputError(worker.last_error_line())
        self._restart(worker, code)

    def _restart(self, worker: Worker, code: int) -> None:
        """Restart a part whose process died, unless it failed before its first row, as it would fail again."""
        part, reason = worker.job.part, worker.last_error_line()
        if worker.may_restart(code):
            log.warning("part %s: %s; restarting", part, reason)
            self._start(worker)
        else:
            log.warning("part %s: %s", part, reason)
            self._lost.append(f"part {part}: {reason}")
