"""vLLM's own OpenAI-compatible server; `python vllm_server.py SOCKET ARGUMENTS` is the program.

It listens on a socket that is open already: a port that is only known to have been free may be taken meanwhile.
SOCKET is its number, or the name of a file for the port of a socket that is opened here.

On a CPU vLLM imports itself anew in the engine's process and in the worker's. Here the engine is forked from the
server, which has imported it, and is its own worker: a third of the time, and the same code answers.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM insists on a worker process
    from vllm.entrypoints.launchers import launcher
    from vllm.v1.engine import utils

    given = sys.argv.pop(1)
    door = socket.socket(fileno=int(given)) if given.isdecimal() else opened(Path(given))
    launcher.create_server_socket = lambda *_, **__: door
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def opened(file: Path) -> socket.socket:
    """A socket on a free port, which the file tells as soon as it is there."""
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    (new := file.with_suffix(".new")).write_text(str(door.getsockname()[1]))
    new.rename(file)
    return door


if __name__ == "__main__":
    sys.argv[1:] = [*sys.argv[1:], "--distributed-executor-backend", "uni"]
    main()
