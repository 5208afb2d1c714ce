"""A process that has imported vLLM or expo, and forks itself for each program that runs it: `python warm.py vllm`.

To import vLLM takes many times as long as to start a tiny engine, and to import torch as a small command. A line on
stdin names one of `ASKED` and what it needs: a program, its environment and where its output goes, or a program's
process. A line on stdout is its answer.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from crashes import ended, mend_torch_threads


def main() -> None:
    gc.disable()
    IMPORTS[sys.argv[1]]()
    gc.enable()
    gc.freeze()  # vLLM's modules are a million objects, and an engine has all objects looked through some ten times
    gc.freeze = gc.unfreeze = lambda: None  # at its end it would thaw them, though not only its own are frozen
    for line in sys.stdin:
        name, asked = json.loads(line)
        print(json.dumps(ASKED[name](**asked)), flush=True)


def import_vllm() -> None:
    from expo.engines.vllm_tools import import_vllm

    import_vllm()
    from vllm.entrypoints.openai import api_server  # noqa: F401


def import_expo() -> None:
    """What commands without an engine need, but for the hub's library, which reads the environment when imported."""
    import expo.cli.program
    import expo.verbs.extrapolate
    import expo.verbs.inspect  # noqa: F401

    assert "huggingface_hub" not in sys.modules


def in_a_fork(**asked: Any) -> int:
    """`run`, in a fork of this process."""
    return ended(_fork(asked))


def start(**asked: Any) -> int:
    """The same, without waiting for its end; its process, which leads a group."""
    return _fork(asked, os.setsid)


def _fork(asked: dict[str, Any], first: Callable[[], None] = lambda: None) -> int:
    child = os.fork()
    if not child:
        first()
        mend_torch_threads()
        atexit._clear()  # the exit handlers of this process are not the child's
        os._exit(run(**asked))
    return child


def is_alive(child: int) -> bool:
    """Whether what was started is there; its process can be ended in any case."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(child: int) -> int:
    """End what was started, kindly so that nothing of it is left, then for certain; its exit code."""
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
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
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        return exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    return runpy.run_path(words[0], run_name="__main__")


IMPORTS = {"vllm": import_vllm, "expo": import_expo}
ASKED = {"run": in_a_fork, "start": start, "is alive": is_alive, "end": end}

if __name__ == "__main__":
    main()
