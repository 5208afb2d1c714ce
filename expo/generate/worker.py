"""One worker of `--data-parallel`: the process that does a part, how far it has come, and its last words."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from expo.arguments import arguments_of
from expo.generate.decide import Plan
from expo.orphans import environment_for_child

TAIL_BYTES = 1 << 16


class LineCount:
    """How many lines a growing file has, reading each byte once; none where there is no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = 0

    def __call__(self) -> int:
        """The lines so far."""
        try:
            with self._path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < self._offset:
                    self._offset = self._lines = 0  # made anew
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return self._lines
        self._offset += len(data)
        self._lines += data.count(b"\n")
        return self._lines


class Worker:
    """A part of the run and the process that does it, which can be started again.

    Args:
        work: The part.
        environment: What its environment has beside this process's own: its GPUs, its threads.
        kept: How many of its rows the whole output has already.
    """

    def __init__(self, work: Plan, environment: Mapping[str, str], kept: int = 0) -> None:
        self.work = work
        self.starts = 0
        self._environment = environment
        self._kept = kept
        self._lines = LineCount(work.files.journal)
        self._rows_at_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`

    def start(self) -> None:
        """Start the process, in a session of its own: a Ctrl-C reaches it through its parent only."""
        self.starts += 1
        self._rows_at_start = self.rows()
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            self.command(),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment_for_child({**os.environ, **self._environment}),
            start_new_session=True,
        )

    def command(self) -> list[str]:
        """The command line: every setting as it was resolved, so that no file or recipe is read again."""
        config = replace(self.work.config, data_parallel=1, part=str(self.work.part))
        return [sys.executable, "-m", "expo", "generate", *arguments_of(config), f"--engine={self.work.engine}"]

    def rows(self) -> int:
        """The rows that are there, as far as this process knows."""
        return min(len(self.work.keys), max(0, self._lines() - 1) + self._kept)

    def has_come_further(self) -> bool:
        """Whether a row was finished since the last start."""
        return self.rows() > self._rows_at_start

    def exit_code(self) -> int | None:
        """How the process ended; None while it runs."""
        return self._process.poll() if self._process else None

    def last_words(self) -> str:
        """What an ended process said last: its error line where there is one."""
        code = self.exit_code() or 0
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("expo: error: ") for line in lines if line.startswith("expo: error: ")]
        said = (errors or lines or [f"exit code {code}"])[-1]
        return re.sub(r"\s+", " ", said)

    def ask_to_stop(self) -> None:
        """Tell the process to unwind."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Give the process time to end."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def sweep(self) -> None:
        """Kill what is left of the process and of those it started: an engine's own may hold a GPU's memory."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if self._process.stdin:
                self._process.stdin.close()

    def close(self) -> None:
        """Let go of the log; the process has ended."""
        self._log.close()
