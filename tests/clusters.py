"""A Ray cluster of the tests' own, and the gate at which its workers wait while something is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import environment
from test_orphans import wait_until_gone

WAIT_S = 120


class Raylets:
    """A cluster with a head without CPUs and two machines with one CPU (`raylets.py`), and the gate of its workers."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("ray") is None:
            pytest.skip("Ray is not installed; tests/run.sh installs it")
        self.gate = folder
        paths = [str(Path(__file__).with_name("gate")), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            "PYTHONPATH": os.pathsep.join(paths),
            "EXPO_TEST_GATE": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "2",
        }
        command, pipe = [sys.executable, Path(__file__).with_name("raylets.py")], subprocess.PIPE
        self._server = subprocess.Popen(command, env=environment(**settings), stdin=pipe, stdout=pipe, text=True)
        self.machines = [self.ask("add") for _ in range(2)]
        self.address = self.ask("address")

    def ask(self, *words: object) -> Any:
        """What the cluster's process answers to a command."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def kill_machine_of(self, pid: int) -> None:
        """The machine on which a process runs is gone at once."""
        (raylet,) = _ancestors(pid) & set(self.machines)
        self.ask("kill", raylet)
        self.machines.remove(raylet)
        wait_until_gone(pid)  # it ends with its actor, which ends with the machine

    def heal(self) -> None:
        """Two machines again."""
        for name in os.listdir(self.gate):
            (self.gate / name).unlink()
        while len(self.machines) < 2:
            self.machines.append(self.ask("add"))

    def hold(self) -> None:
        (self.gate / "hold").touch()

    def open(self) -> None:
        (self.gate / "go").touch()

    def waiting(self, count: int) -> list[int]:
        """The processes that wait at the gate, once there are so many."""
        deadline = time.monotonic() + WAIT_S
        while len(found := [int(path.name[3:]) for path in self.gate.glob("at-*")]) < count:
            assert time.monotonic() < deadline, "nobody comes to the gate"
            time.sleep(0.01)
        return found

    def shutdown(self) -> None:
        self._server.communicate(timeout=WAIT_S)


def _ancestors(pid: int) -> set[int]:
    """A process, and those that started it."""
    found = set()
    while pid > 1:
        found.add(pid)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
    return found
