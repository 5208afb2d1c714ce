"""Worker processes forked from the test's own, which has imported everything: each starts in no time.

For tests of what workers are told and make; that a worker is `python -m expo work` is `test_workers.py`'s.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from crashes import forked

from expo.cli import program as cli


class Fork:
    """`python -m expo WORDS`, as `subprocess.Popen` gives it to `expo.rows.process`; `before` runs first in it."""

    before: Callable[[], object] = staticmethod(lambda: None)

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        env: dict[str, str],
        start_new_session: bool,
        pass_fds: Sequence[int],
    ) -> None:
        assert (command[:3], stdin, start_new_session) == ([sys.executable, "-m", "expo"], subprocess.PIPE, True)
        ours, theirs = os.pipe()

        def run() -> int:
            atexit._clear()  # what its parent does at its own end
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]
            weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
            os.setsid()
            for number, stream in enumerate((ours, stdout.fileno(), stderr.fileno())):
                os.dup2(stream, number)
            _close_all_but(pass_fds)
            sys.stdin, sys.stdout, sys.stderr = map(open, range(3), "rww")
            os.environ.clear()
            os.environ.update({**env, "TOKENIZERS_PARALLELISM": "false"})  # its threads are not in a fork
            self.before()
            return _program(command[3:])

        self.pid = forked(run)
        os.close(ours)
        self.stdin = os.fdopen(theirs, "wb")
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, as `Popen.poll`."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end, as `Popen.wait`."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.005)
        return code

    def terminate(self) -> None:
        """SIGTERM, as `Popen.terminate`."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def _close_all_but(kept: Sequence[int]) -> None:
    """Close what a program of its own would not have, such as the other ends of its pipes."""
    for number in (int(name) for name in os.listdir("/proc/self/fd")):
        if number > 2 and number not in kept:
            with suppress(OSError):
                os.close(number)


def _program(words: Sequence[str]) -> int:
    sys.argv = ["expo", *words]
    try:
        return cli.start()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
