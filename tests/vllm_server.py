"""vLLM's own OpenAI-compatible server, started once for all tests; `python vllm_server.py ARGUMENTS` is the program.

On a CPU vLLM imports itself anew in the engine's process and in the worker's. Here the engine is forked from the
server, which has imported it, and is its own worker: a third of the time, and the same code answers.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM insists on a worker process
    from vllm.utils import system_utils

    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.argv[1:] = [*sys.argv[1:], "--distributed-executor-backend", "uni"]
    main()
