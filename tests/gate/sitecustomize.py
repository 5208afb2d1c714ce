"""On the path of a cluster's processes: a worker waits at its second row or shard while the test holds the gate.

`hold` in the folder EXPO_TEST_GATE closes the gate, `go` opens it; `at-PID` says that process PID waits there.
"""

import os
import sys
import time
from pathlib import Path

if "work" in sys.orig_argv and "EXPO_TEST_GATE" in os.environ:
    from expo.journal import Journal

    gate = Path(os.environ["EXPO_TEST_GATE"])
    append = Journal.append

    def append_and_wait(journal: Journal, rows: list) -> None:
        append(journal, rows)
        seen = getattr(journal, "_seen", 0) + len(rows)
        journal._seen = seen
        if seen >= 2 and (gate / "hold").exists():  # the header is the first
            (gate / f"at-{os.getpid()}").touch()
            while not (gate / "go").exists():
                time.sleep(0.01)

    Journal.append = append_and_wait
