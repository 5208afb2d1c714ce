"""Run the commands that are printed in README.md, the documentation, helps and scripts, on tiny models.

    python tools/run_documents.py --all
    python tools/run_documents.py README.md docs/reproduction.md

`--ci` runs the blocks that are marked `<!-- ci -->` only, as the tests do. What the names in the texts resolve to is
in `tools/documents/stand_ins.py`, which words are added to a command in `tools/documents/shortened.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.documents.pages import PYTHON, SHELL, Block, printed
from tools.documents.session import ADDRESS, TAIL, Outcome, end, processes_of, refused, run_page, world

RECIPES = ("tulu-2-dpo-7b", "Instella-3B-Instruct", "Skywork-Reward-V2-Qwen3-0.6B")
"""Of all recipes, whose commands differ by names: one with an α and one without, each with a flag that it needs, and a
reward model."""


def main() -> int:
    """Run pages, and say of each command how it ended; 1 if one did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="files, such as README.md or expo/cli/sweep.py")
    parser.add_argument("--all", action="store_true", help="every page")
    parser.add_argument("--ci", action="store_true", help="only blocks that are marked for the tests")
    parser.add_argument("--list", action="store_true", help="say which pages there are, and run nothing")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new folder that keeps what the commands write")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="pages at a time")
    given = parser.parse_args()
    chosen = select(given.pages, in_ci=given.ci)
    if given.list or not (given.pages or given.all or given.ci):
        print("\n".join(chosen))
        return 0
    if unknown := set(given.pages) - chosen.keys():
        parser.error(f"nothing is run on {', '.join(sorted(unknown))}")
    folder = (given.work or Path(tempfile.mkdtemp(prefix="expo-documents-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run(chosen, folder, given.jobs, vllm=not given.ci)
    print(table(outcomes))
    if given.work is None:
        shutil.rmtree(folder)
    return 0 if all(one.passed for one in outcomes) else 1


def select(pages: list[str], *, in_ci: bool = False) -> dict[str, list[Block]]:
    """Page → its blocks that are run or written (files in any case); all pages where none is named."""
    recipes = {f"expo recipes --show {name}" for name in RECIPES}
    found = {
        page: [block for block in blocks if block.language in (SHELL, PYTHON) or block.title]
        for page, blocks in groupby(printed(), lambda block: block.page)
        if (page in pages if pages else page in recipes or not page.startswith("expo recipes"))
    }
    if in_ci:
        marked = [page for page, blocks in found.items() if any(block.in_ci for block in blocks)]
        found = {page: [one for one in found[page] if one.in_ci or one.title] for page in marked}
    return {page: blocks for page, blocks in found.items() if blocks}


def run(pages: dict[str, list[Block]], folder: Path, jobs: int = 1, *, vllm: bool = True) -> list[Outcome]:
    """Run pages, so many at a time; what is run is told as it ends.

    Pages that name ports of this machine are run by one worker, one after another.
    """
    waiting = {True: deque(name for name in pages if serves(pages[name])), False: deque()}
    waiting[False].extend(name for name in pages if name not in waiting[True])
    found: dict[str, list[Outcome]] = {name: [] for name in pages}

    def work(number: int) -> None:
        while queue := (number == 0 and waiting[True]) or waiting[False]:
            page = queue.popleft()
            for one in run_page(shared, page, pages[page]):
                say(one)
                found[page].append(one)

    with world(folder, vllm=vllm) as shared, ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(work, number) for number in range(jobs)]:
                done.result()
        except BaseException:  # what is at work ends, and nothing else begins
            for queue in waiting.values():
                queue.clear()
            end(processes_of(folder))
            raise
        found["the hub"] = refused(shared)
    return [one for outcomes in found.values() for one in outcomes]


def serves(blocks: list[Block]) -> bool:
    """Whether a page's text names ports, which are there once on a machine."""
    return any(ADDRESS.search(block.text) or "vllm serve" in block.text for block in blocks)


def say(one: Outcome) -> None:
    """A line of a command that ended well; the end of its output of another."""
    print(f"{'ok' if one.passed else 'FAILED':<7}{one.seconds:6.1f} s  {first_line(one)}", file=sys.stderr, flush=True)
    if not one.passed:
        print("\n".join(f"    {line}" for line in one.output.splitlines()[-TAIL:]), file=sys.stderr, flush=True)


def first_line(one: Outcome) -> str:
    """A command, by its first line."""
    first, _, more = str(one.command).partition("\n")
    return first + " …" * bool(more)


def table(outcomes: list[Outcome]) -> str:
    """What was run: page, line, command, seconds, exit code."""
    rows = [("page", "line", "command", "seconds", "exit code")]
    for one in outcomes:
        command = " ".join(one.command.text.split())
        code = f"{one.code}{'' if one.passed else ' FAILED'}{f' ({one.note})' if one.note else ''}"
        rows.append((one.command.page, str(one.command.line), command[:90], f"{one.seconds:.1f}", code))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    failed = sum(not one.passed for one in outcomes)
    return "\n".join(
        [*lines, f"{len(outcomes)} commands, {failed} failed, {sum(one.seconds for one in outcomes):.0f} s"]
    )


def stop(number: int, _frame: FrameType | None) -> NoReturn:
    """End as by Ctrl-C, with all that was started."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
