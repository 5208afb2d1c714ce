"""A process that does jobs: the seam between whoever gives it jobs and where it runs, and the one that runs here.

The protocol: jobs go to the process as lines of JSON on one pipe, and it answers on another: a line that says which
process it is, a line when its engine is open and has the job's weights, one when the job has ended. A line may have
several jobs, which are done together (`together.py`), and each that ends is told of. The process exits when the first
pipe is closed, or after a job that failed. Its standard input is a third pipe, by which it notices that this
process is gone (`expo.orphans`). `expo/cli/work.py` is the other end; `cluster.py` has processes on other machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

import psutil

from expo.files import Row
from expo.locks import Holder
from expo.orphans import environment_for_child

TAIL_BYTES = 1 << 16


class Process(Protocol):
    """A process that is given jobs, wherever it runs."""

    @property
    def lost(self) -> str | None:
        """Why nothing more can be learned of it, such as that its machine is gone; None where that is not so."""

    @property
    def holder(self) -> Holder | None:
        """Which process it is, for whoever looks at its locks on another machine; None where that need not be known."""

    @property
    def is_placed(self) -> bool:
        """Whether it has begun; False while there is no room for it."""

    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def replies(self) -> list[Row]:
        """What it has answered since the last call; call `exit_code` first, so that nothing is missed at the end."""

    def send(self, line: str) -> None:
        """Give it a job; does nothing if it has already exited."""

    def dismiss(self) -> None:
        """Let it exit after its current job."""

    def tail(self) -> str:
        """The end of what it has printed."""

    def memory_bytes(self) -> int:
        """What it, and those it started, have in memory; 0 where that is not known."""

    def terminate(self) -> None:
        """Ask it to stop cleanly."""

    def wait(self, seconds: float) -> None:
        """Wait for it to exit."""

    def kill(self) -> None:
        """Kill it and any it started: an engine's subprocesses may hold GPU memory."""

    def close(self) -> None:
        """Let go of what belongs to it here; it has exited."""


def work_command(jobs: int, replies: int, *, debug: bool) -> list[str]:
    """The command line of a process; the arguments are the descriptors of its two pipes."""
    words = ["--debug"] if debug else []
    return [sys.executable, "-m", "expo", *words, "work", f"--jobs={jobs}", f"--replies={replies}"]


class Command(Protocol):
    """The command line of a process, given the descriptors of its two pipes."""

    def __call__(self, jobs: int, replies: int) -> list[str]:
        """As words."""


class LocalProcess:
    """A process on this machine, in its own session: a Ctrl-C reaches it only through its parent.

    Args:
        command: Its command line.
        words: Added to it.
        environment: Added to this process's environment.
    """

    lost = None
    holder = None
    is_placed = True

    def __init__(self, command: Command, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        jobs, to_jobs = os.pipe()
        replies, to_replies = os.pipe()
        self._process = subprocess.Popen(
            [*command(jobs, to_replies), *words],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment_for_child({**os.environ, **environment}),
            start_new_session=True,
            pass_fds=(jobs, to_replies),
        )
        os.close(jobs)
        os.close(to_replies)
        os.set_blocking(replies, False)
        self._jobs, self._replies = os.fdopen(to_jobs, "wb"), os.fdopen(replies, "rb")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """As `Process`."""
        return self._process.poll()

    def replies(self) -> list[Row]:
        """As `Process`."""
        said = []
        while not self._replies.closed and (line := self._replies.readline()):
            said.append(json.loads(line))
        return said

    def send(self, line: str) -> None:
        """As `Process`."""
        with contextlib.suppress(BrokenPipeError):  # it has already exited; its exit code says why
            self._jobs.write(line.encode())
            self._jobs.flush()

    def dismiss(self) -> None:
        """As `Process`."""
        _close(self._jobs)

    def tail(self) -> str:
        """As `Process`; where it writes, which it shares with this process, is left alone."""
        number = self._log.fileno()
        start = max(0, os.fstat(number).st_size - TAIL_BYTES)
        return os.pread(number, TAIL_BYTES, start).decode(errors="replace")

    def memory_bytes(self) -> int:
        """As `Process`."""
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            return sum(one.memory_info().rss for one in (own, *own.children(recursive=True)))
        return 0

    def terminate(self) -> None:
        """As `Process`."""
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """As `Process`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """As `Process`."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._jobs, self._replies, self._process.stdin):
            _close(pipe)

    def close(self) -> None:
        """As `Process`."""
        self._log.close()


def _close(pipe: IO[Any] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
