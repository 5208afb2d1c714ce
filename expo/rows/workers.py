"""The workers of a run in parts: started, watched, restarted, and given what another cannot finish."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Protocol

from expo.errors import PARTLY_FAILED, EnvironmentFailure, InputError
from expo.progress import Progress, rows_bar
from expo.rows.worker import Task, Worker

POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
"""How long workers may take to stop cleanly."""

FINISHED = (0, PARTLY_FAILED)

ROOM_SECONDS = 30.0
MAX_GIVEN_BACK = 20
"""How many times a job may lose its machine."""
STRAGGLER_SECONDS, STRAGGLER_FACTOR = 60.0, 3.0
"""A process is too slow when it needs, and has needed, so many seconds more than so many times what another would."""

log = logging.getLogger(__name__)


class MakeBar(Protocol):
    """Makes a progress bar."""

    def __call__(self, total: int, label: str, *, initial: int) -> Progress:
        """The bar, which begins at `initial`."""


def stop_all(workers: Sequence[Worker]) -> None:
    """Ask workers to stop, and kill those that take too long."""
    for worker in workers:
        worker.ask_to_stop()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.wait(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.close()


@dataclass(frozen=True)
class Waiting:
    """A job that no worker has."""

    job: Task
    kept: int = 0
    """How many of its rows the whole output already has."""
    is_free: Callable[[], bool] = lambda: True
    """Whether the process that had it has let go of it."""


class RoomWatch:
    """Says so when processes wait for a machine with room, and none of them has one, for a while."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def look(self, crews: Sequence[Crew]) -> None:
        """See how they stand."""
        if any(crew.is_working for crew in crews) or not any(crew.waits_for_room(0.0) for crew in crews):
            self._since = time.monotonic()
        elif time.monotonic() > self._since + ROOM_SECONDS:
            self._since = math.inf
            log.warning("no machine has room for a process; waiting until one has")


class Crew:
    """The workers of a run; none is left running after the `with` block.

    A worker takes a further job when it has finished one: one that waits, or, where its process stays, that of a worker
    for which no machine has room, or of one that has become slow.

    Args:
        workers: In the order in which they get their first jobs.
        jobs: Each with its number of finished rows.
        after: Called after each job.
        name: What a job is called in messages; no two of them alike.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        jobs: Iterable[tuple[Task, int]] = (),
        after: Callable[[Task], None] = lambda _: None,
        name: Callable[[Task], str] = lambda job: f"part {job.part}",
    ) -> None:
        self._workers = workers
        self._waiting = deque(Waiting(job, kept) for job, kept in jobs)
        self._after, self._name = after, name
        self._finished_rows = 0
        self._running: list[Worker] = []
        self._idle = list(workers)
        self._lost: list[str] = []
        self._given_back: Counter[str] = Counter()
        self._speeds: list[float] = []  # of finished jobs, in rows per second

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
        self._hand_out()
        shown = elsewhere + self.rows
        room = RoomWatch()
        progress = bar(total, label, initial=shown)
        try:
            while not self.is_over:
                time.sleep(POLL_SECONDS)
                self.step()
                room.look([self])
                now = elsewhere + self.rows
                progress.update(max(0, now - shown))
                shown = max(shown, now)
        finally:
            progress.close()
        self.require_done()

    def add(self, job: Task, kept: int = 0) -> None:
        """Add a job to be done after the others, of whose rows so many are finished."""
        self._waiting.append(Waiting(job, kept))

    def step(self) -> None:
        """See how all stand, and give those that are free something to do.

        Raises:
            InputError: A worker rejects its settings or inputs.
        """
        for worker in list(self._running):
            self._look_at(worker)
        self._hand_out()

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, and nothing waits that could."""
        return not self._running and not (self._waiting and self._idle)

    def require_done(self) -> None:
        """See that no job was given up.

        Raises:
            EnvironmentFailure: One was.
        """
        if self._lost:
            raise EnvironmentFailure(f"{'; '.join(self._lost)}; rerun the same command to continue")

    @property
    def rows(self) -> int:
        """How many rows of the jobs are finished."""
        return self._finished_rows + sum(worker.rows() for worker in self._running)

    @property
    def is_working(self) -> bool:
        """Whether a worker with a job has a process somewhere."""
        return any(worker.is_placed for worker in self._running)

    def waits_for_room(self, seconds: float) -> bool:
        """Whether a worker with a job has waited for a machine with room for so long."""
        since = time.monotonic() - seconds
        return any(worker.started_at <= since and not worker.is_placed for worker in self._running)

    def let_go(self) -> None:
        """Have the processes of workers that nothing waits for end; each machine's room is free once its own has."""
        if self._waiting:
            return
        for worker in self._idle:
            if worker.is_there:
                worker.dismiss()
            else:
                worker.kill()

    def _start(self, worker: Worker) -> None:
        self._running.append(worker)
        worker.start()

    def _look_at(self, worker: Worker) -> None:
        code = worker.outcome()
        if code is None:
            return
        if code in FINISHED:
            self._finish(worker)
            return
        worker.wait(STOP_SECONDS)  # it gives back what its engine holds
        worker.kill()
        self._running.remove(worker)
        if code == InputError.exit_code:
            raise InputError(worker.last_error_line())
        if worker.is_lost:
            self._give_back(worker, worker.last_error_line())
            self._idle.append(worker)  # a new process, where there is room for one
        else:
            self._restart(worker, code)

    def _finish(self, worker: Worker) -> None:
        self._running.remove(worker)
        self._finished_rows += worker.job.total
        self._speeds.append(worker.speed())
        self._idle.append(worker)
        if not worker.stays:
            worker.wait(STOP_SECONDS)
            worker.kill()
        self._after(worker.job)

    def _restart(self, worker: Worker, code: int) -> None:
        """Restart a part whose process died, unless it failed before its first row, as it would fail again."""
        name, reason = self._name(worker.job), worker.last_error_line()
        if worker.may_restart(code):
            log.warning("%s: %s; restarting", name, reason)
            self._start(worker)
        else:
            log.warning("%s: %s", name, reason)
            self._lost.append(f"{name}: {reason}")

    def _give_back(self, worker: Worker, reason: str) -> None:
        """Let another worker have the job of one that has no process any more."""
        name = self._name(worker.job)
        self._given_back[name] += 1
        if self._given_back[name] > MAX_GIVEN_BACK:
            self._lost.append(f"{name}: {reason}")
            return
        log.warning("%s: %s; another process takes it up", name, reason)
        self._waiting.appendleft(Waiting(worker.job, worker.kept, worker.release()))

    def _hand_out(self) -> None:
        """Give workers that are idle something to do, those first that have a process."""
        for worker in sorted(self._idle, key=lambda worker: not worker.is_there):
            if not self._waiting and worker.stays and worker.is_there:
                self._take_back()
            waiting = next((one for one in self._waiting if one.is_free()), None)
            if waiting is not None:
                self._waiting.remove(waiting)
                self._idle.remove(worker)
                worker.take(waiting.job, waiting.kept)
                self._start(worker)

    def _take_back(self) -> None:
        """Take the job of a worker that does not get on, if there is one; one that is too slow gets no other."""
        stuck = next((worker for worker in self._running if not worker.is_placed), None)
        slow = max(self._running, key=self._seconds_left, default=None) if self._speeds else None
        if stuck is None and slow is not None and not self._is_straggler(slow):
            slow = None
        worker = stuck or slow
        if worker is None:
            return
        self._running.remove(worker)
        worker.kill()
        if worker is stuck:
            self._waiting.appendleft(Waiting(worker.job, worker.kept))
            self._idle.append(worker)
        else:
            self._give_back(worker, f"is far slower than the others ({worker.rows()} of {worker.job.total} are done)")

    def _seconds_left(self, worker: Worker) -> float:
        speed = worker.speed()
        return (worker.job.total - worker.rows()) / speed if speed else math.inf

    def _is_straggler(self, worker: Worker) -> bool:
        """Whether another worker, beginning now, would be done long before this one, by the speed of finished jobs."""
        usual = median(self._speeds)
        there = (worker.job.total - worker.rows()) / usual if usual else math.inf
        waited = time.monotonic() - worker.started_at
        patience = STRAGGLER_SECONDS + STRAGGLER_FACTOR * there
        first_time = not self._given_back[self._name(worker.job)]
        return first_time and waited > patience and self._seconds_left(worker) > patience
