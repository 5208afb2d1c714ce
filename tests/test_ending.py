"""A process ends at once, and yet nothing is lost: threads are waited for, exit handlers run, streams are flushed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from helpers import run_python

SCRIPT = """
import atexit, sys, threading
from expo.cli.ending import leave

class Told:
    def __del__(self):
        sys.stderr.write("taken apart\\n")

told = Told()
go = threading.Event()
threading.Thread(target=lambda: (go.wait(), print("a thread's last words"))).start()
atexit.register(print, "a handler's last words")
print("said before")
threading.Timer(0.05, go.set).start()
leave({code})
"""


BUFFERED = {"PYTHONUNBUFFERED": ""}


@pytest.mark.parametrize("code", [0, 3])
def test_all_is_said_before_the_end_and_modules_are_left(code: int) -> None:
    done = run_python(SCRIPT.replace("{code}", str(code)), env=BUFFERED)
    assert (done.code, done.stderr) == (code, "")
    assert done.stdout.splitlines() == ["said before", "a thread's last words", "a handler's last words"]


def test_pythons_own_end_would_take_modules_apart() -> None:
    assert "taken apart" in run_python(SCRIPT.replace("leave({code})", "sys.exit(0)")).stderr


def test_a_thread_that_hangs_is_not_waited_for_after_an_interrupt() -> None:
    script = """
import signal, threading
from expo.cli.ending import leave
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=threading.Event().wait).start()
shutdown = threading._shutdown
threading._shutdown = lambda: (print("waiting", flush=True), shutdown())
leave(5)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (5, b"")


def test_output_that_cannot_be_written_is_no_success() -> None:
    script = "import sys; sys.stdout = open('/dev/full', 'w'); from expo.cli.ending import leave; print(1); leave(0)"
    done = run_python(script, env=BUFFERED)
    assert done.code == 120
    assert "No space left on device" in done.stderr
