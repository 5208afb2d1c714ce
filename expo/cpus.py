"""How many CPUs this process may use, and how its threads wait for work."""

from __future__ import annotations

import os

QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Read when torch is loaded: idle threads that spin make an engine on a CPU ten times slower."""


def usable_cpus() -> int:
    """The number of CPUs that this process may use, at least one: in a container or a batch job not all there are."""
    may_use = getattr(os, "sched_getaffinity", None)  # macOS has no such call
    return len(may_use(0)) if may_use else os.cpu_count() or 1
