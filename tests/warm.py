"""A process that has imported vLLM, and forks itself for each program that runs vLLM: `python warm.py`.

To import vLLM takes many times as long as to start a tiny engine. A line on stdin names a program, its environment and
where its output goes; a line on stdout tells its exit code.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from crashes import ended, mend_torch_threads


def main() -> None:
    from expo.engines.vllm_tools import prepare_environment

    prepare_environment()
    from vllm import LLM  # noqa: F401 - what takes the time
    from vllm.v1.worker import cpu_worker  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        print(in_a_fork(**json.loads(line)), flush=True)


def in_a_fork(**asked: Any) -> int:
    """`run`, in a fork of this process."""
    child = os.fork()
    if not child:
        mend_torch_threads()
        atexit._clear()  # the exit handlers of this process are not the child's
        os._exit(run(**asked))
    return ended(child)


def run(words: list[str], env: dict[str, str], stdout: str, stderr: str) -> int:
    """What `python WORDS` does, in this process; returns its exit code."""
    for number, file in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    try:
        _execute(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _execute(words: list[str]) -> Any:
    if words[0] == "-m":
        sys.argv = words[1:]
        return runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    return runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
