"""vLLM's own OpenAI-compatible server; `python vllm_server.py SOCKET ARGUMENTS` is the program.

It listens on a socket that is open already: a port that is only known to have been free may be taken meanwhile.

On a CPU vLLM imports itself anew in the engine's process and in the worker's. Here the engine is forked from the
server, which has imported it, and is its own worker: a third of the time, and the same code answers.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM insists on a worker process
    from vllm.entrypoints.launchers import launcher
    from vllm.utils import system_utils

    door = socket.socket(fileno=int(sys.argv.pop(1)))
    launcher.create_server_socket = lambda *_, **__: door
    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.argv[1:] = [*sys.argv[1:], "--distributed-executor-backend", "uni"]
    main()
