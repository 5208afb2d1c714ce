"""Lanes: processes that stay, each with one engine, and the jobs that each does one after the other.

On a cluster a `Team` takes the place of a lane (`team.py`).

The policy's lane makes one α after the other; when one is there, its answers go to the lanes of the reward models,
while the policy goes on with the next. A process that dies is started again where its rows allow it, and no row is
lost: each is durable when it is finished, and the same command continues.

Engines that share a GPU are opened one after the other: vLLM measures the memory that is taken while it starts, and
would charge each engine for what another loads meanwhile.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Protocol

from expo.cpus import usable_cpus
from expo.errors import EnvironmentFailure, InputError
from expo.progress import rows_progress
from expo.rows import RowJob
from expo.rows.together import Together
from expo.rows.worker import Task, Worker
from expo.rows.workers import FINISHED, STOP_SECONDS, stop_all
from expo.verbs.sweep.placement import Place

POLL_SECONDS = 0.05

log = logging.getLogger(__name__)

AfterJob = Callable[[RowJob], None]
"""Called when a job's files are there."""
Joining = Callable[[Sequence[RowJob]], Together]
"""Makes one task of several jobs."""


def environment_of(place: Place) -> dict[str, str]:
    """What is set for the process of an engine: its GPUs, or the threads of a CPU."""
    if place.gpus:
        return {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(usable_cpus()))}


def shared_gpus(place: Place) -> frozenset[str]:
    """The GPUs of which an engine has only a share."""
    return frozenset(place.gpus if place.gpu_share is not None else ())


class Engines(Protocol):
    """The engines of one model, and their jobs: a `Lane` on this machine, or a `Team` on a cluster."""

    label: str
    """The model, for messages."""
    waits: bool
    """Whether they start only when those before them in the run are over."""
    shares: frozenset[str]
    """The GPUs that others' engines may be on, too."""
    stays: bool
    """Whether a process, and its engine, go on from job to job."""
    join: Joining | None
    """Makes one task of all jobs that wait, for an engine that does them at once; None where it does one by one."""

    def add(self, job: RowJob) -> None:
        """Add a job to be done after the others."""

    def new_worker(self, job: Task) -> Worker:
        """A process whose first job this is, which `start` begins."""

    def take_over(self, worker: Worker) -> None:
        """Go on with a process that is there, with its engine open."""

    @property
    def waiting(self) -> Sequence[RowJob]:
        """The jobs that are not begun."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, nor comes any more."""

    @property
    def rows(self) -> int:
        """The rows of this run that are finished."""

    @property
    def is_opening(self) -> bool:
        """Whether an engine is, or may be, opening on the GPUs of `shares`."""

    def step(self, *, may_open: bool = True) -> None:
        """Begin what can be begun, or look how it stands."""

    def dismiss(self) -> bool:
        """Let the processes end by themselves; whether what they held is given back."""

    def close(self) -> None:
        """End the processes; rows that are finished stay."""


class Lane:
    """A process with an engine, started for its first job.

    Args:
        label: What it does, for messages.
        environment: Added to this process's environment: its GPUs, its threads.
        after: Called after each job.
        fed_by: The lane whose finished jobs give this one its own; None where all are there from the start.
        waits: Whether it starts only when the lane before it in the run is over, as memory is for one of them.
        shares: The GPUs that other lanes' engines may be on, too.
    """

    def __init__(
        self,
        label: str,
        environment: Mapping[str, str],
        after: AfterJob,
        *,
        fed_by: Lane | None = None,
        waits: bool = False,
        shares: Collection[str] = (),
    ) -> None:
        self.label = label
        self.waits = waits
        self.shares = frozenset(shares)
        self.stays = True
        """Whether the process, and its engine, go on from job to job."""
        self.join: Joining | None = None
        """As of `Engines`."""
        self.rows_done = 0
        self._environment = environment
        self._after = after
        self._fed_by = fed_by
        self._queue: deque[RowJob] = deque()
        self._current: RowJob | Together | None = None
        self._told: set[int] = set()  # of jobs that are done together: those that have ended
        self._is_held = False
        """Whether the present job is still to be started, or started again."""
        self._worker: Worker | None = None
        self._preloaded: Worker | None = None
        self._dismissed: float | None = None

    def add(self, job: RowJob) -> None:
        """Add a job to be done after the others."""
        self._queue.append(job)

    def take_over(self, worker: Worker) -> None:
        """Go on with a process that is there, with its engine open."""
        self._worker = worker

    def use(self, preloaded: Worker) -> None:
        """Take this as the next new process: it has imported what an engine needs, and has no job yet."""
        self._preloaded = preloaded

    def preload(self, verb: str, engine: str) -> None:
        """Start the next new process now, which imports what jobs of this verb with this engine need."""
        self._preloaded = Worker(None, self._environment, stays=True)
        self._preloaded.preload(verb, engine)

    def new_worker(self, job: Task) -> Worker:
        """A process of this lane whose first job this is, which `start` begins."""
        worker, self._preloaded = self._preloaded or Worker(None, self._environment), None
        worker.stays = self.stays
        worker.take(job)
        return worker

    @property
    def waiting(self) -> Sequence[RowJob]:
        """The jobs that are not begun."""
        return tuple(self._queue)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, nor comes any more."""
        idle = self._current is None and not self._queue
        return idle and (self._fed_by is None or self._fed_by.is_over)

    @property
    def rows(self) -> int:
        """The rows of this run that are finished."""
        running = self._worker.rows() if self._worker is not None and self._current is not None else 0
        return self.rows_done + running

    @property
    def memory_bytes(self) -> int:
        """What the process, and those it started, have in memory; 0 where there is none."""
        return 0 if self._worker is None else self._worker.memory_bytes()

    @property
    def is_opening(self) -> bool:
        """Whether its process has been given a job and may be opening its engine."""
        has_begun = self._current is not None and not self._is_held
        return has_begun and self._worker is not None and not self._worker.has_engine

    def step(self, *, may_open: bool = True) -> None:
        """Begin the next job, or look how the present one stands.

        Args:
            may_open: Whether an engine may be opened now.

        Raises:
            InputError: The process rejects its settings or inputs.
            EnvironmentFailure: It failed repeatedly.
        """
        if self._current is None or self._worker is None or self._is_held:
            self._begin(may_open)
            return
        code = self._worker.outcome()
        self._tell_of(self._worker.ended)
        if code is None:
            return
        if code in FINISHED:
            self._finish(self._worker, self._current, may_open)
        else:
            self._recover(self._worker, code)

    def _begin(self, may_open: bool) -> None:
        """Take up the next job, where there is one, and start it as soon as an engine is there or may be opened."""
        if self._current is None and self._queue:
            self._dismissed = None  # a process that was let go is started again
            self._current, self._is_held = self._next(), True
            self._worker = self._worker or self.new_worker(self._current)
            self._worker.stays = self.stays
            self._worker.take(self._current)
        if self._is_held and self._worker is not None and (may_open or self._worker.has_engine):
            self._is_held = False
            self._worker.start()

    def _next(self) -> RowJob | Together:
        """Take the next job, or all that wait."""
        self._told = set()
        if self.join is None:
            return self._queue.popleft()
        jobs = self.join(self._queue)
        self._queue.clear()
        return jobs

    def _tell_of(self, ended: Collection[int]) -> None:
        """Go on with what was done together and has ended."""
        for number in sorted(set(ended) - self._told):
            assert isinstance(self._current, Together)
            self._told.add(number)
            self._after(self._current.jobs[number])

    def _finish(self, worker: Worker, job: RowJob | Together, may_open: bool) -> None:
        self.rows_done += job.total
        self._current = None
        if not self.stays:
            worker.wait(STOP_SECONDS)
            worker.kill()
        self._begin(may_open)  # the engine works while what comes after is planned
        if isinstance(job, RowJob):
            self._after(job)

    def _recover(self, worker: Worker, code: int) -> None:
        worker.wait(STOP_SECONDS)  # it gives back what its engine holds
        worker.kill()
        reason = worker.last_error_line()
        if code == InputError.exit_code:
            raise InputError(reason)
        if not worker.may_restart(code):
            raise EnvironmentFailure(f"{self.label}: {reason}; rerun the same command to continue")
        log.warning("%s: %s; restarting", self.label, reason)
        self._is_held = True

    def dismiss(self) -> bool:
        """Let the process end by itself, and kill it where that takes too long; whether its memory is given back."""
        if self._worker is None:
            return True
        if self._dismissed is None:
            self._dismissed = time.monotonic()
            self._worker.dismiss()
        if self._worker.exit_code() is None and time.monotonic() - self._dismissed > STOP_SECONDS:
            log.warning("%s: its process does not exit by itself and is killed", self.label)
            self._worker.kill()
        return self._worker.exit_code() is not None

    def close(self) -> None:
        """End the process; rows that are finished stay."""
        stop_all([worker for worker in (self._worker, self._preloaded) if worker is not None])
        self._worker = self._preloaded = None


class Lanes:
    """The lanes of a run; none of their processes is left running after the `with` block.

    Args:
        lanes: In order; one that `waits` starts when those before it are over.
    """

    def __init__(self, lanes: Sequence[Engines]) -> None:
        self._lanes = lanes

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for lane in self._lanes:
            lane.dismiss()
        for lane in self._lanes:
            lane.close()

    def _may_open(self, lane: Engines) -> bool:
        """Whether no other engine is being opened on the lane's GPUs."""
        return not any(other.is_opening and other.shares & lane.shares for other in self._lanes if other is not lane)

    def between_looks(self) -> None:
        """Give the processes time."""
        time.sleep(POLL_SECONDS)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do in any lane."""
        return all(lane.is_over for lane in self._lanes)

    def run(
        self,
        label: str,
        total: int,
        initial: int,
        meanwhile: Callable[[], object] = lambda: None,
        *,
        more: bool = False,
    ) -> None:
        """Do all jobs, with one progress bar.

        Args:
            label: The bar's label.
            total: All rows, of whatever lane.
            initial: The rows that are there already.
            meanwhile: Called once, when the first jobs are begun.
            more: Whether further jobs may come after these: processes stay, but where memory is for one of them.

        Raises:
            InputError: A process rejects its settings or inputs.
            EnvironmentFailure: A process failed repeatedly.
        """
        shown = sum(lane.rows for lane in self._lanes)
        with closing(rows_progress(label, total, initial)) as progress:
            begun = False
            while not self.is_over:
                for number, lane in enumerate(self._lanes):
                    if lane.is_over:
                        if not more:
                            lane.dismiss()
                    elif not lane.waits or all(other.is_over and other.dismiss() for other in self._lanes[:number]):
                        lane.step(may_open=self._may_open(lane))
                now = sum(lane.rows for lane in self._lanes)
                progress.update(max(0, now - shown))
                if not begun:
                    begun = True
                    meanwhile()
                shown = max(shown, now)
                self.between_looks()
            while more and not all(lane.dismiss() for lane in self._lanes if lane.waits):
                time.sleep(POLL_SECONDS)  # what comes next may need their memory
