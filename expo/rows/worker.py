"""A process that runs row jobs for this one: how it is given them, its progress, and its last error line.

The protocol: jobs go to the process as lines of JSON on one pipe, and it answers on another: a line when its engine is
open and has the job's weights, one when the job has ended. It exits when the first pipe is closed, or after a job that
failed. So a worker given a single job exits after it, and one that stays takes the next job with its engine open. Its
standard input is a third pipe, by which it notices that this process is gone (`expo.orphans`). `expo/cli/work.py` is
the other end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from expo.errors import EnvironmentFailure
from expo.orphans import environment_for_child
from expo.rows.job import RowJob

log = logging.getLogger(__name__)

TAIL_BYTES = 1 << 16
SEE_ABOVE = re.compile(r"See (?:root cause above|stack trace \(above\) for the root cause)")
"""How vLLM refers to what its other processes have logged."""
LOGGED_ERROR = re.compile(r"\bERROR\b[^]]*] ((?:\w+\.)*\w+(?:Error|Exception)(?:: .*)?)$")
MAX_STARTS = 4
"""How many times the process of one job is started in one run."""


class LineCount:
    """How many lines a growing file has, reading each byte once; none where there is no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = self._inode = 0

    def __call__(self) -> int:
        """The lines so far."""
        try:
            with self._path.open("rb") as stream:
                now = os.fstat(stream.fileno())
                if now.st_size < self._offset or now.st_ino != self._inode:
                    self._offset, self._lines, self._inode = 0, 0, now.st_ino  # rewritten
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return self._lines
        self._offset += len(data)
        self._lines += data.count(b"\n")
        return self._lines


def job_line(job: RowJob) -> str:
    """A job as sent to a process: the verb, every resolved setting, and which of the verb's jobs it is."""
    part = None if job.part is None else str(job.part)
    config = dataclasses.replace(job.config, data_parallel=1, join=None, part=part)
    settings = {**dataclasses.asdict(config), "engine": job.engine}
    return json.dumps({"verb": job.verb, "settings": settings, "options": job.worker_options()}) + "\n"


class Worker:
    """A process, which can be restarted, and the job it runs.

    Args:
        job: Its first job, a part of the run; None if that is not known yet.
        environment: Added to this process's environment: its GPUs, its threads.
        kept: How many of the job's rows the whole output already has.
        stays: Whether it waits for another job after finishing one.
    """

    job: RowJob

    def __init__(
        self, job: RowJob | None, environment: Mapping[str, str], kept: int = 0, *, stays: bool = False
    ) -> None:
        self.stays = stays
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs: IO[bytes] | None = None
        self._replies: IO[bytes] | None = None
        self._has_opened = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        if job is not None:
            self.take(job, kept)

    def take(self, job: RowJob, kept: int = 0) -> None:
        """Accept a job; `start` begins it."""
        self.job = job
        self.starts = 0
        self._kept = kept
        self._lines = LineCount(job.files.journal)
        self._rows_at_start = 0
        self._reply: int | None = None

    def preload(self, verb: str, engine: str) -> None:
        """Start the process, which imports what jobs of this verb with this engine need, before there is a job."""
        self._spawn(f"--preload={verb}:{engine}")

    def start(self) -> None:
        """Send the job to the process, starting it if it is not running."""
        self.starts += 1
        self._rows_at_start = self.rows()
        self._reply = None
        if self._process is None or self._process.poll() is not None:
            self._spawn()
        with contextlib.suppress(BrokenPipeError):  # it has already exited; its exit code says why
            if self._jobs is not None:
                self._jobs.write(job_line(self.job).encode())
                self._jobs.flush()
        if not self.stays:
            self.dismiss()

    def _spawn(self, *words: str) -> None:
        """Start the process in its own session: a Ctrl-C reaches it only through its parent."""
        self._close_pipes()
        self._has_opened = False
        self._log.seek(0)
        self._log.truncate()
        jobs, to_jobs = os.pipe()
        replies, to_replies = os.pipe()
        self._process = subprocess.Popen(
            [*self.command(jobs, to_replies), *words],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment_for_child({**os.environ, **self._environment}),
            start_new_session=True,
            pass_fds=(jobs, to_replies),
        )
        os.close(jobs)
        os.close(to_replies)
        os.set_blocking(replies, False)
        self._jobs, self._replies = os.fdopen(to_jobs, "wb"), os.fdopen(replies, "rb")

    def command(self, jobs: int, replies: int) -> list[str]:
        """The command line; the arguments are the descriptors of its two pipes."""
        debug = ["--debug"] if log.isEnabledFor(logging.DEBUG) else []
        return [sys.executable, "-m", "expo", *debug, "work", f"--jobs={jobs}", f"--replies={replies}"]

    def rows(self) -> int:
        """The number of finished rows, as far as this process knows."""
        return min(len(self.job.keys), max(0, self._lines() - 1) + self._kept)

    def has_come_further(self) -> bool:
        """Whether a row has been finished since the last start."""
        return self.rows() > self._rows_at_start

    def may_restart(self, code: int) -> bool:
        """Whether to start a job again that ended so: not one that failed before its first row, as it would again."""
        return self.starts < MAX_STARTS and (code != EnvironmentFailure.exit_code or self.has_come_further())

    def outcome(self) -> int | None:
        """The exit code of the job, or of the process if it died without a reply; None while the job runs.

        A process whose job failed may still be there: it closes its engine, and then ends.
        """
        exit_code = self.exit_code()
        while self._reply is None and self._replies is not None and (line := self._replies.readline()):
            said = json.loads(line)
            self._has_opened = self._has_opened or "ready" in said
            self._reply = said.get("exit_code")
        return exit_code if self._reply is None else self._reply

    @property
    def has_engine(self) -> bool:
        """Whether the process runs and has an engine, as far as `outcome` has heard."""
        return self._has_opened and self.exit_code() is None

    def exit_code(self) -> int | None:
        """The exit code of the process; None while it runs."""
        return self._process.poll() if self._process else None

    def memory_bytes(self) -> int:
        """What the process, and those it started, have in memory; 0 where there is none."""
        if self._process is None:
            return 0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            return sum(one.memory_info().rss for one in (own, *own.children(recursive=True)))
        return 0

    def last_error_line(self) -> str:
        """Why a job failed: the error line of its process, if there is one, or how the process ended."""
        code = self._reply or self.exit_code() or 0
        tail = self._tail()
        log.debug("what the process printed last:\n%s", tail)
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        errors = [line.removeprefix("expo: error: ") for line in lines if line.startswith("expo: error: ")]
        said = (errors or lines or [f"exit code {code}"])[-1]
        return re.sub(r"\s+", " ", _with_cause(said, lines))

    def _tail(self) -> str:
        """The end of the process's output; where it writes, which it shares with this process, is left alone."""
        number = self._log.fileno()
        start = max(0, os.fstat(number).st_size - TAIL_BYTES)
        return os.pread(number, TAIL_BYTES, start).decode(errors="replace")

    def ask_to_stop(self) -> None:
        """Ask the process to stop cleanly."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for the process to exit."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def dismiss(self) -> None:
        """Let the process exit after its current job."""
        _close(self._jobs)

    def end(self, seconds: float) -> None:
        """Let the process give back what its engine holds and exit, kill it if that takes longer, and close the log."""
        self.dismiss()
        self.wait(seconds)
        self.kill()
        self.close()

    def kill(self) -> None:
        """Kill the process and any it started: an engine's subprocesses may hold GPU memory."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._jobs, self._replies, self._process.stdin if self._process else None):
            _close(pipe)

    def close(self) -> None:
        """Close the log; the process has exited."""
        self._log.close()


def _with_cause(said: str, lines: Sequence[str]) -> str:
    """An error line, with the last error that vLLM logged in place of a reference to it."""
    causes = [found[1].rstrip(".") for line in lines if (found := LOGGED_ERROR.search(line))]
    return SEE_ABOVE.sub(lambda _: causes[-1], said) if causes else said


def _close(pipe: IO[Any] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
