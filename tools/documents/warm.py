"""A process that has imported what takes long, and forks itself for the programs of pages: `python warm.py DOOR`.

An interpreter that begins with `CLIENT` and is to run expo, or a page's Python blocks, hands its words, environment,
folder and open files to the process that listens on the socket DOOR, and ends as its fork does. Without `VARIABLE` in
the environment every program starts by itself, as in the full check.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

VARIABLE = "EXPO_DOCUMENTS_DOOR"
"""In a page's environment: the socket's name."""
MODULES = (
    "expo.engines.transformers",
    "expo.engines.transformers_reward",
    "expo.output.charts",
    "expo.verbs.extrapolate",
    "expo.verbs.inspect",
    "expo.verbs.sweep",
    "transformers.models.llama.modeling_llama",
)
MOST_FILES = 200

CLIENT = f"""
import os, sys

def ask(address):
    import fcntl, json, signal, socket
    from contextlib import suppress
    files = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                files.append(number)
    asked = {{"words": sys.orig_argv, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}}
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(address)
        socket.send_fds(door, [b"."], files)
        door.sendall(json.dumps(asked).encode() + b"\\n")
        told = door.makefile()
        fork = int(told.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(fork, number))
        code = int(told.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code

if {VARIABLE!r} in os.environ and sys.orig_argv[1:3] in (["-m", "expo"], ["-u", "-c"]):
    try:
        os._exit(ask(os.environ[{VARIABLE!r}]))
    except Exception as error:
        print(f"warm.py does not answer: {{error!r}}", file=sys.stderr, flush=True)
        os._exit(1)
"""
"""What `sitecustomize` does for a page's interpreters."""


def main() -> None:
    """Listen until the parent, who holds the other end of standard input, is gone."""
    from expo.cli.program import PROCESS_ENVIRONMENT

    os.environ.update({**PROCESS_ENVIRONMENT, **os.environ})
    gc.disable()
    for name in MODULES:
        import_module(name)
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who serve
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(sys.argv[1])
        door.listen(64)
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            connection, _ = door.accept()
            if not os.fork():
                door.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                serve(connection)
                os._exit(0)
            connection.close()


def serve(connection: socket.socket) -> None:
    """Fork for one program, tell its process and its end, and kill it when nobody listens any more."""
    _, files, _, _ = socket.recv_fds(connection, 1, MOST_FILES)
    asked = json.loads(connection.makefile("rb").readline())
    child = os.fork()
    if not child:
        connection.close()
        os._exit(run(files, asked))
    for file in files:
        os.close(file)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):
        connection.sendall(f"{code}\n".encode())


def run(files: list[int], asked: dict[str, Any]) -> int:
    """What the interpreter with these words does, in this process; its exit code."""
    import torch

    os.setsid()
    atexit._clear()  # what the server does at its own end
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for file in files]
    for name in os.listdir("/proc/self/fd"):
        if 2 < int(name) < 1000:
            with suppress(OSError):
                os.close(int(name))
    for file, number in zip(high, asked["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (open(file, mode) for file, mode in enumerate("rww"))  # noqa: SIM115
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    torch._C.set_num_threads(torch.get_num_threads())  # its pool is made anew, and two threads must not ask at once
    code: object = 1
    try:
        code = execute(asked["words"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def execute(words: list[str]) -> int:
    """`python -m expo WORDS`, or `python -u -c TEXT WORDS`."""
    sys.path.insert(0, "")
    if words[1] == "-m":
        from expo.cli.program import start

        sys.argv = ["expo", *words[3:]]
        return start()
    sys.argv = ["-c", *words[4:]]
    exec(compile(words[3], "<string>", "exec"), {"__name__": "__main__"})
    return 0


if __name__ == "__main__":
    main()
