"""Child processes that end when their parent does, however the parent ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

VARIABLE = "EXPO_ENDS_WITH_PARENT"
"""Set for a process whose standard input is a pipe that the parent keeps open and never writes to."""
GRACE_SECONDS = 20.0


def environment_for_child(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process with a pipe as standard input that must not outlive this process."""
    return {**environment, VARIABLE: "1"}


def end_with_parent() -> None:
    """If the parent asked for it, end this process with SIGTERM as soon as the parent is gone.

    One that does not end is killed, with all that it started where it leads its process group.

    The kernel closes a dead process's end of the pipe, also after SIGKILL, and no other process holds that end.
    """
    if os.environ.pop(VARIABLE, None) == "1":
        threading.Thread(target=_wait_for_the_end, args=(sys.stdin.fileno(),), daemon=True).start()


def _wait_for_the_end(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)  # after it, the main thread is stuck in a call that does not return
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # with an engine's processes, which hold GPU memory
    os._exit(128 + signal.SIGTERM)
