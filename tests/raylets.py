"""A Ray cluster of several raylets, in a process of its own: `python tests/raylets.py`, with a command on each line.

Whatever has Ray in it cannot be forked any more, and other tests fork. Each answer is a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from typing import Any

from ray.cluster_utils import Cluster

MEMORY_BYTES = 80 << 20
WAIT_S = 120


class Machines:
    """A head without CPUs, and machines with one CPU each."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._machines: dict[int, Any] = {}

    def add(self) -> int:
        """Another machine; its raylet's process."""
        machine = self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY_BYTES)
        self._cluster.wait_for_nodes()
        raylet: int = machine.all_processes["raylet"][0].process.pid
        self._machines[raylet] = machine
        return raylet

    def kill(self, raylet: int) -> bool:
        """A machine is gone at once."""
        self._cluster.remove_node(self._machines.pop(raylet), allow_graceful=False)
        return True

    def address(self) -> str:
        """The cluster's."""
        return str(self._cluster.address)

    def wait_for(self, count: int) -> bool:
        """Wait until so many machines are there, the head and those that others start included."""
        deadline = time.monotonic() + WAIT_S
        while sum(node["Alive"] for node in self._cluster.global_state.node_table()) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def shutdown(self) -> bool:
        """The end of all of it."""
        self._cluster.shutdown()
        return True


def main() -> None:
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        machines = Machines()
        for line in sys.stdin:
            name, *words = json.loads(line)
            answers.write(json.dumps(getattr(machines, name)(*words)) + "\n")
            answers.flush()
        machines.shutdown()


if __name__ == "__main__":
    main()
