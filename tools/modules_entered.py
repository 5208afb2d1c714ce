"""Counts the modules of expo that one command enters: how many files a reader opens to follow it.

    python tools/modules_entered.py generate prompts.jsonl --model MODEL --engine transformers

A module is entered when a function of its own is called while the command runs, in any thread of this process; what is
called while a module is imported does not count. Prints the modules with the calls into each, then how many modules and
functions there are, and how often one module called into another.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

from expo.cli import program

ROOT = Path(program.__file__).parents[1]


class Entered:
    """What was called, seen by a profile function."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.functions: set[tuple[str, str]] = set()
        self.changes = 0
        self._names: dict[str, str | None] = {}

    def module_of(self, frame: FrameType) -> str | None:
        """The module of expo that a frame's code stands in."""
        file = frame.f_code.co_filename
        if file not in self._names:
            path = Path(file)
            self._names[file] = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else None
        return self._names[file]

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """Note a call."""
        if event != "call" or (module := self.module_of(frame)) is None or is_importing(frame):
            return
        self.calls[module] += 1
        self.functions.add((module, frame.f_code.co_qualname))
        caller = frame.f_back
        self.changes += caller is not None and self.module_of(caller) not in (module, None)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported while this is called."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def main() -> int:
    """Run the command line under the counter."""
    entered = Entered()
    threading.setprofile(entered)
    sys.setprofile(entered)
    try:
        code = program.run(sys.argv[1:])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # the types leave None out
    for module, calls in sorted(entered.calls.items()):
        print(f"{calls:8} {module}", file=sys.stderr)
    totals = f"{len(entered.calls)} modules, {len(entered.functions)} functions, {entered.changes} changes of module"
    print(totals, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
