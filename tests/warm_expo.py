"""`expo` for scripts, in forks of the test's own process, which has imported everything: each starts in no time.

A folder of programs has an `expo` that hands its words, environment, folder and streams to a server, which forks for
each, and ends as the fork does.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from crashes import ended, forked

from expo.cli import program as cli

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as door:
    door.connect({address!r})
    asked = json.dumps({{"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}})
    socket.send_fds(door, [asked.encode() + b"\\n"], [1, 2])
    sys.exit(int(door.makefile().readline()))
"""


@contextmanager
def expo_in(programs: Path, before: Callable[[], object]) -> Iterator[None]:
    """Put `expo` into a folder of programs; `before` runs first in each of its processes."""
    address = f"/tmp/expo-{os.getpid()}-{programs.stat().st_ino}"  # the name of a socket has to be short
    file = programs / "expo"
    file.write_text(CLIENT.format(python=sys.executable, address=address))
    file.chmod(0o755)
    ours, theirs = socket.socketpair()  # closed when this process ends, too
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        server = forked(lambda: ours.close() or _serve(door, theirs, before))
    try:
        yield
    finally:
        ours.close()
        assert ended(server) == 0
        theirs.close()
        Path(address).unlink()


def _serve(door: socket.socket, parent: socket.socket, before: Callable[[], object]) -> None:
    """Until the parent has ended."""
    gc.freeze()
    while parent not in select.select([door, parent], [], [])[0]:
        connection, _ = door.accept()
        with connection:
            text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
            with connection.makefile("rb") as rest:
                asked = json.loads(text if text.endswith(b"\n") else text + rest.readline())
            code = ended(forked(lambda: _run(SimpleNamespace(**asked), streams, before)))  # noqa: B023 - it ends here
            for stream in streams:
                os.close(stream)
            connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())


def _run(asked: Any, streams: list[int], before: Callable[[], object]) -> int:
    """What `expo WORDS` does, in this process."""
    os.chdir(asked.folder)
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked.environment)
    before()
    sys.argv = ["expo", *asked.words]
    try:
        return cli.start()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
