"""A program that stops `expo generate` again and again, and looks at what is left: `python tests/kills.py ENGINE …`.

Runs are forked from a process that has loaded everything (of vLLM a started engine too), so that one costs a second.
Signals come at random moments of the generation phase. Prints one JSON object per stop; what `trouble` says is wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crashes import ended, forked

from expo.cli import program as cli
from expo.config import GenerateConfig
from expo.locks import LOCK_SUFFIX
from expo.verbs.generate import GenerateJob, plan

NAME = "mine"
WAIT_S = 120
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}


@dataclass(frozen=True)
class Case:
    """One command, and where its files lie."""

    settings: dict[str, Any]
    folder: Path

    @property
    def final(self) -> Path:
        return self.folder / f"outputs_{Path(self.settings['task']).stem}" / f"{NAME}.jsonl"

    @property
    def journal(self) -> Path:
        return self.final.with_name(f".{NAME}.journal.jsonl")

    @property
    def lock(self) -> Path:
        return self.journal.with_name(self.journal.name + LOCK_SUFFIX)

    def writer(self) -> int | None:
        """The process that writes; one that was killed is, until the next one takes over its lock."""
        try:
            return int(json.loads(str(self.lock.readlink()))["pid"])
        except OSError:
            return None

    def is_finished(self) -> bool:
        return self.final.exists() and not self.journal.exists()

    def meta(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.final.with_name(f"{NAME}.meta.json").read_text())
        return content

    def command(self) -> list[str]:
        words = ["expo", "generate", self.settings["task"], "--name", NAME, "--output-dir", str(self.folder)]
        for key, value in self.settings.items():
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{key.replace('_', '-')}", str(one)] if key != "task" else []
        return words

    def run(self) -> int:
        """The program, in this process."""
        sys.argv = self.command()
        return cli.start()


def keep_engine(case: Case) -> None:
    """Start the engine here, so that every child has it."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in case.settings.items()}
    work = plan(GenerateConfig(name=NAME, **settings))
    engine = work.open_engine()
    engine.close = lambda: None  # it is the parent's
    GenerateJob.open_engine = lambda _job: engine  # type: ignore[method-assign]


def whole_rows(journal: Path) -> list[bytes]:
    """A journal's rows that ended before the kill; its first line is the header."""
    content = journal.read_bytes() if journal.exists() else b""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")][1:]


def stop(case: Case, number: int, delay: float) -> tuple[int, list[bytes]]:
    """Start a run and stop it `delay` seconds after it began to write; its exit code and the rows seen before."""
    child = forked(case.run)
    deadline = time.monotonic() + WAIT_S
    while case.writer() != child and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        assert time.monotonic() < deadline, "it does not begin to write"
        time.sleep(0.001)
    time.sleep(delay)
    seen = whole_rows(case.journal)
    os.kill(child, number)
    return ended(child), seen


def lost(case: Case, seen: list[bytes], left: list[bytes], whole: bytes) -> str:
    """What is wrong after a stop, which may have come after the end too."""
    if not case.is_finished() and left[: len(seen)] != seen:
        return f"of {len(seen)} rows in the journal {len(left)} are left"
    if case.final.exists() and case.final.read_bytes() != whole:
        return "a final name before the end"
    return ""


def ends_otherwise(case: Case, left: list[bytes], whole: bytes, total: int) -> str:
    """Go on to the end; what is wrong with it."""
    finished = case.meta() if case.is_finished() else None
    if ended(forked(case.run)) != 0:
        return "the rerun failed"
    if case.final.read_bytes() != whole:
        return "the rerun ended otherwise"
    if finished:
        return "" if case.meta() == finished else "a finished output was made again"
    again = case.meta()["rows_this_run"] - (total - len(left))
    return f"{again} rows generated again" if again else ""


def stops(case: Case, seed: int, count: int) -> Iterator[dict[str, object]]:
    """SIGKILL `count` times, then SIGTERM and SIGINT; after a stop the rerun goes to its end, or is stopped too."""
    chance = random.Random(seed)
    assert ended(forked(case.run)) == 0
    whole, meta = case.final.read_bytes(), case.meta()
    shutil.rmtree(case.folder)
    signals = [signal.SIGKILL] * count + [signal.SIGTERM, signal.SIGINT]
    while signals:
        code, seen = stop(case, signals[0], chance.random() * meta["generate_seconds"])
        left, stopped, rerun = whole_rows(case.journal), code == CODES[signals[0]], False
        if stopped:
            wrong = lost(case, seen, left, whole)
        else:
            wrong = f"exit code {code}" if code else "" if case.final.read_bytes() == whole else "another output"
        if stopped and (len(signals) == 1 or chance.random() < 0.5):
            wrong, rerun = wrong or ends_otherwise(case, left, whole, meta["rows"]), True
        name = signals.pop(0).name if stopped or wrong else "none"
        yield {"signal": name, "seen": len(seen), "left": len(left), "rerun": rerun, "trouble": wrong}
        if case.final.exists() or wrong:
            shutil.rmtree(case.folder)


def main(settings: str, folder: str, seed: str, count: str) -> None:
    case = Case(json.loads(settings), Path(folder) / "out")
    keep_engine(case)
    for result in stops(case, int(seed), int(count)):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
