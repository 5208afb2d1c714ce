"""A worker: a process that runs jobs for this one (`process.py`), its progress, restarts, and last error line.

A worker given a single job exits after it, and one that stays takes the next job with its engine open.
"""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from expo.errors import EnvironmentFailure
from expo.locks import release
from expo.parts import Part
from expo.rows.process import LocalProcess, Process, work_command

log = logging.getLogger(__name__)

SEE_ABOVE = re.compile(r"See (?:root cause above|stack trace \(above\) for the root cause)")
"""How vLLM refers to what its other processes have logged."""
LOGGED_ERROR = re.compile(r"\bERROR\b[^]]*] ((?:\w+\.)*\w+(?:Error|Exception)(?:: .*)?)$")
MAX_STARTS = 4
"""How many times the process of one job is started in one run."""
RELEASE_SECONDS = 30.0
"""How long a process may still write after nothing is heard of it any more (`orphans.GRACE_SECONDS`)."""
MAX_RELEASE_SECONDS = 300.0
"""How long a file server may hold the locks of a machine that is gone; whoever has the job then says what is wrong."""


class Task(Protocol):
    """What a worker is given to do: a row job, several of them, or a part of another verb's work."""

    @property
    def part(self) -> Part | None:
        """Which part of the whole it is."""

    @property
    def total(self) -> int:
        """How much it is, in rows or bytes."""

    @property
    def journals(self) -> Sequence[Path]:
        """What it writes while it runs."""

    def line(self) -> str:
        """The job as sent to a process: one line of JSON."""

    def counter(self) -> Callable[[], int]:
        """What tells how much of it is finished, as far as this process can see."""


class Worker:
    """A process, which can be restarted, and the job it runs.

    Args:
        job: The first job of the run; None if that is not known yet.
        environment: Added to this process's environment: its GPUs, its threads.
        kept: How many of the job's rows the whole output already has.
        stays: Whether it waits for another job after finishing one.
    """

    job: Task

    def __init__(self, job: Task | None, environment: Mapping[str, str], kept: int = 0, *, stays: bool = False) -> None:
        self.stays = stays
        self._environment = environment
        self._process: Process | None = None
        self._has_opened = False
        if job is not None:
            self.take(job, kept)

    def take(self, job: Task, kept: int = 0) -> None:
        """Accept a job; `start` begins it."""
        self.job = job
        self.starts = 0
        self.kept = kept
        self._count = job.counter()
        self.ended: set[int] = set()
        """Of jobs that are done together: the numbers of those that have ended."""
        self._rows_at_start = 0
        self._reply: int | None = None

    def preload(self, verb: str, engine: str) -> None:
        """Start the process, which imports what jobs of this verb with this engine need, before there is a job."""
        self._spawn(f"--preload={verb}:{engine}")

    def start(self) -> None:
        """Send the job to the process, starting it if it is not running."""
        self.starts += 1
        self.started_at = time.monotonic()
        self._rows_at_start = self.rows()
        self._reply = None
        if self._process is None or self._process.exit_code() is not None:
            self._spawn()
        if self._process is not None:
            self._process.send(self.job.line())
        if not self.stays:
            self.dismiss()

    def _spawn(self, *words: str) -> None:
        self._has_opened = False
        if self._process is not None:
            self._process.kill()
            self._process.close()
        self._process = self.new_process(words)

    def new_process(self, words: Sequence[str]) -> Process:
        """Start a process, with these words after its command line."""
        return LocalProcess(self.command, words, self._environment)

    def command(self, jobs: int, replies: int) -> list[str]:
        """The command line; the arguments are the descriptors of its two pipes."""
        return work_command(jobs, replies, debug=log.isEnabledFor(logging.DEBUG))

    def rows(self) -> int:
        """The number of finished rows, as far as this process knows."""
        return min(self.job.total, self._count() + self.kept)

    def has_come_further(self) -> bool:
        """Whether a row has been finished since the last start."""
        return self.rows() > self._rows_at_start

    def speed(self) -> float:
        """Rows per second since the last start."""
        return (self.rows() - self._rows_at_start) / max(time.monotonic() - self.started_at, 1e-9)

    def may_restart(self, code: int) -> bool:
        """Whether to start a job again that ended so: not one that failed before its first row, as it would again."""
        return self.starts < MAX_STARTS and (code != EnvironmentFailure.exit_code or self.has_come_further())

    def outcome(self) -> int | None:
        """The exit code of the job, or of the process if it died without a reply; None while the job runs.

        A process whose job failed may still be there: it closes its engine, and then ends.
        """
        exit_code = self.exit_code()
        for said in self._process.replies() if self._process is not None and self._reply is None else ():
            self._has_opened = self._has_opened or "ready" in said
            self.ended |= {said["done"]} if "done" in said else set()
            self._reply = said.get("exit_code", self._reply)
        return exit_code if self._reply is None else self._reply

    @property
    def has_engine(self) -> bool:
        """Whether the process runs and has an engine, as far as `outcome` has heard."""
        return self._has_opened and self.exit_code() is None

    def exit_code(self) -> int | None:
        """The exit code of the process; None while it runs."""
        return self._process.exit_code() if self._process else None

    @property
    def is_lost(self) -> bool:
        """Whether the process ended with its machine, or nothing can be learned of it any more."""
        return self._process is not None and self.exit_code() is not None and self._process.lost is not None

    @property
    def is_placed(self) -> bool:
        """Whether the process has begun; False while no machine has room for it."""
        return self._process is not None and self._process.is_placed

    @property
    def is_there(self) -> bool:
        """Whether its process runs, wherever."""
        return self.is_placed and self.exit_code() is None

    def release(self) -> Callable[[], bool]:
        """What tells whether the job of the process, which has ended, can be given to another one.

        A process that is lost may still be about to end; one that is known to have ended on another machine has left
        its locks there, which only this process can tell to be those of a dead one.
        """
        ended = self._process.holder if self._process else None
        begun, journals = time.monotonic(), self.job.journals
        known_after = RELEASE_SECONDS if self.is_lost else 0.0

        def is_free() -> bool:
            waited = time.monotonic() - begun
            freed = [release(journal, ended if waited >= known_after else None) for journal in journals]
            return ended is None or all(freed) or waited > MAX_RELEASE_SECONDS

        return is_free

    def memory_bytes(self) -> int:
        """What the process, and those it started, have in memory; 0 where there is none."""
        return self._process.memory_bytes() if self._process else 0

    def last_error_line(self) -> str:
        """Why a job failed: the error line of its process, if there is one, or how the process ended."""
        if self._process is None or self._process.lost is not None:
            return (self._process and self._process.lost) or "not started"
        code = self._reply or self.exit_code() or 0
        tail = self._process.tail()
        log.debug("what the process printed last:\n%s", tail)
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        errors = [line.removeprefix("expo: error: ") for line in lines if line.startswith("expo: error: ")]
        said = (errors or lines or [f"exit code {code}"])[-1]
        return re.sub(r"\s+", " ", _with_cause(said, lines))

    def ask_to_stop(self) -> None:
        """Ask the process to stop cleanly."""
        if self._process:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for the process to exit."""
        if self._process:
            self._process.wait(seconds)

    def dismiss(self) -> None:
        """Let the process exit after its current job."""
        if self._process:
            self._process.dismiss()

    def end(self, seconds: float) -> None:
        """Let the process give back what its engine holds and exit, kill it if that takes longer, and close it."""
        self.dismiss()
        self.wait(seconds)
        self.kill()
        self.close()

    def kill(self) -> None:
        """Kill the process and any it started: an engine's subprocesses may hold GPU memory."""
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """Let go of the process, which has exited."""
        if self._process:
            self._process.close()


def _with_cause(said: str, lines: Sequence[str]) -> str:
    """An error line, with the last error that vLLM logged in place of a reference to it."""
    causes = [found[1].rstrip(".") for line in lines if (found := LOGGED_ERROR.search(line))]
    return SEE_ABOVE.sub(lambda _: causes[-1], said) if causes else said
