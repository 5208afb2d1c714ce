"""A child process ends with its parent, however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

CHILD = """
import os, pathlib, signal, sys, time
from expo.errors import Stopped
from expo.orphans import VARIABLE, end_with_parent
def stopped(number, frame):
    raise Stopped(number)
signal.signal(signal.SIGTERM, stopped)
end_with_parent()
assert VARIABLE not in os.environ
try:
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(60)
except Stopped:
    pathlib.Path(sys.argv[1]).write_text("unwound")
"""
STUCK = """
import os, pathlib, signal, subprocess, sys, threading
from expo import orphans
signal.signal(signal.SIGTERM, signal.SIG_IGN)
orphans.GRACE_SECONDS = 0.1
orphans.end_with_parent()
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
made = pathlib.Path(sys.argv[1] + "-made")
made.write_text(f"{os.getpid()} {own.pid}")
made.rename(sys.argv[1])
threading.Event().wait()
"""
PARENT = """
import os, subprocess, sys, time
from expo.orphans import environment_for_child
children = [
    subprocess.Popen([sys.executable, "-c", sys.argv[1], name], stdin=subprocess.PIPE,
                     env=environment_for_child(os.environ), start_new_session=True)
    for name in sys.argv[2:]
]
children[0].wait()
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_parent(tmp_path, stop):
    files = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-c", PARENT, CHILD, *map(str, files)]
    with subprocess.Popen(command, env=helpers.environment()) as parent:
        pids = [int(wait_for(file, str.isdigit)) for file in files]
        parent.send_signal(stop)
        parent.wait(60)
    for file, pid in zip(files, pids, strict=True):
        assert wait_for(file, "unwound".__eq__)
        wait_until_gone(pid)


def test_a_child_that_is_stuck_is_killed_with_what_it_started(tmp_path):
    command = [sys.executable, "-c", PARENT, STUCK, str(tmp_path / "pids")]
    with subprocess.Popen(command, env=helpers.environment()) as parent:
        pids = wait_for(tmp_path / "pids", str.split).split()
        parent.kill()
    assert len(pids) == 2
    for pid in pids:
        wait_until_gone(int(pid))


def test_a_process_that_nobody_ties_lives_on():
    script = "from expo.orphans import end_with_parent; end_with_parent(); import time; time.sleep(0.3); print('here')"
    done = subprocess.run([sys.executable, "-c", script], env=helpers.environment(), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "here\n"


def wait_for(file: Path, condition) -> str:
    deadline = time.monotonic() + 60
    while not (file.exists() and condition(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return file.read_text()


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):  # also between the two
        return False
