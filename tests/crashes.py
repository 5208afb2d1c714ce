"""A program that kills `expo extrapolate` again and again, and looks at what is left: `python tests/crashes.py KIND …`.

Runs are forked from a process that has loaded everything, so that a kill costs milliseconds. `moments` sends SIGKILL
at random times; `steps` ends the process just before its 1st, 2nd, 3rd … change to the disk, which leaves out none.
Prints one JSON object per kill; what `trouble` says is wrong.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers import tree, without_clock
from tqdm import tqdm

from expo.cli import program as cli

DIED = 9
CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"})
"""Python's audit events for a change to a folder."""
WRITES = ("pwrite", "pwritev", "write", "ftruncate", "copy_file_range", "sendfile", "fsync")
"""Calls without such an event."""


def mend_torch_threads() -> None:
    """In a child, before it has threads: torch makes its thread pool anew when it is first asked for, and two threads
    that ask at once may find none ("Invalid thread pool!")."""
    if (torch := sys.modules.get("torch")) is not None:
        torch._C.set_num_threads(torch.get_num_threads())


def forked(action: Callable[[], int | None]) -> int:
    """Run something in a child process, silently but for what it raises; returns the child's number."""
    child = os.fork()
    if not child:
        loud = os.fdopen(os.dup(2), "w")
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        mend_torch_threads()
        tqdm.set_lock(threading.RLock())  # its own is shared by all children, and stays taken where one was killed
        code = 1
        try:
            code = action() or 0
        except BaseException:
            traceback.print_exc(file=loud)
            loud.flush()
        finally:  # whatever happens, it must not go on as its parent
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_when(ready: Callable[[], bool], action: Callable[[], int | None]) -> int:
    """Run something in a child process and send it SIGKILL as soon as `ready`; its exit code."""
    child = forked(action)
    deadline = time.monotonic() + 120
    while not ready() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def run(sft: Path, dpo: Path, output: Path, *args: str) -> int:
    return cli.run(["extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--output", str(output), *args])


def warm_up(sft: Path, dpo: Path, folder: Path) -> None:
    """Run once in this process, so that the children find every module loaded."""
    os.fsync = lambda _: None  # a kill does not empty the kernel's buffers, and waiting for a disk takes minutes
    assert run(sft, dpo, folder / "warm", "--alpha", "1") == 0
    shutil.rmtree(folder / "warm")
    gc.freeze()


def finished(folder: Path) -> dict[str, object]:
    return without_clock(tree(folder))


def trouble(output: Path, *wholes: dict[str, object]) -> str:
    """What is wrong with a folder a killed run left: it loads, and is not whole; empty where nothing is wrong."""
    left = {name: data for name, data in tree(output).items() if not name.startswith(".expo-partial")}
    whole = "expo.json" in left and without_clock(left) in wholes
    return f"loads, and is not whole: {sorted(left)}" if "config.json" in left and not whole else ""


def phase(output: Path) -> str:
    """How far a killed run had come."""
    journal = output / ".expo-partial" / "journal.jsonl"
    if not journal.exists():
        return "done" if (output / "config.json").exists() else "before"
    text = journal.read_text()
    return "renaming" if '"commit"' in text else "writing" if '"shard"' in text else "begun"


# --- SIGKILL at random moments --------------------------------------------------------------------------------------


def moments(sft: Path, dpo: Path, folder: Path, seed: int, count: int) -> Iterator[dict[str, object]]:
    chance, output = random.Random(seed), folder / "out"

    def command() -> int:
        return run(sft, dpo, output, "--alpha", "0.3")

    warm_up(sft, dpo, folder)
    started = time.perf_counter()
    assert ended(forked(command)) == 0
    duration, whole = time.perf_counter() - started, finished(output)
    shutil.rmtree(output)
    killed = 0
    while killed < count:
        delay = chance.random() * duration
        child = forked(command)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        code, found, wrong = ended(child), phase(output), trouble(output, whole)
        killed += code == -signal.SIGKILL
        rerun = None
        if code == 0 or killed == count or chance.random() < 0.4:
            rerun = command()
            wrong = wrong or ("" if rerun == 0 and finished(output) == whole else "the rerun ended otherwise")
            shutil.rmtree(output)
        yield {"delay": delay, "code": code, "phase": found, "rerun": rerun, "trouble": wrong}


# --- the end before each change to the disk -------------------------------------------------------------------------


def die_at(step: int, output: Path) -> None:
    """Let this process end just before its change number `step` to the disk."""
    left = iter(range(step))

    def change() -> None:
        if next(left, None) is None:
            os._exit(DIED)

    def hear(event: str, args: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES or (opened and str(args[0]).startswith(str(output))):
            change()

    def before(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **named: object) -> object:
            change()
            return call(*args, **named)

        return counted

    for name in WRITES:
        setattr(os, name, before(getattr(os, name)))
    sys.addaudithook(hear)


def steps(sft: Path, dpo: Path, folder: Path, over_another: int, stride: int) -> Iterator[dict[str, object]]:
    """Every `stride`-th step; over another output, those between the ones into nothing."""
    output, old, args = folder / "out", folder / "old", ("--alpha", "0.3", "--overwrite")
    warm_up(sft, dpo, folder)
    for alpha, target in ((0.1, old), (0.3, folder / "whole")):
        assert ended(forked(lambda alpha=alpha, target=target: run(sft, dpo, target, "--alpha", str(alpha)))) == 0
    wholes = finished(folder / "whole"), finished(old)

    def broken(step: int) -> int:
        die_at(step, output)
        return run(sft, dpo, output, *args)

    for step in range(over_another % stride, 10_000, stride):
        if over_another:
            shutil.copytree(old, output)
        code = ended(forked(lambda step=step: broken(step)))
        found, wrong = phase(output), trouble(output, *wholes)
        rerun = run(sft, dpo, output, *args)
        wrong = wrong or ("" if rerun == 0 and finished(output) == wholes[0] else "the rerun ended otherwise")
        shutil.rmtree(output)
        yield {"step": step, "code": code, "phase": found, "rerun": rerun, "trouble": wrong}
        if code == 0:
            return


def main(kind: str, sft: str, dpo: str, folder: str, *rest: str) -> None:
    kinds = {"moments": moments, "steps": steps}
    results = sys.stdout
    sys.stdout = sys.stderr  # of the run in this process
    for result in kinds[kind](Path(sft), Path(dpo), Path(folder), *map(int, rest)):  # type: ignore[operator]
        print(json.dumps(result), flush=True, file=results)


if __name__ == "__main__":
    main(*sys.argv[1:])
