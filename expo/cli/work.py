"""The worker process: runs jobs read as lines from a pipe, with one engine for all (`expo.rows.worker`)."""

from __future__ import annotations

import atexit
import json
import os
import sys
from contextlib import closing, suppress
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from expo.config import COMMANDS
from expo.engines import GENERATORS, SCORERS
from expo.errors import PARTLY_FAILED
from expo.rows import EngineKeeper


def command(
    jobs: Annotated[int, typer.Option(help="Descriptor of the pipe to read jobs from.")],
    replies: Annotated[int, typer.Option(help="Descriptor of the pipe to write a line per job to.")],
    preload: Annotated[str | None, typer.Option(help="VERB:ENGINE to import before the first job is there.")] = None,
) -> None:
    """Run jobs for the process that started this one."""
    if preload is not None:
        _preload(*preload.split(":"))
    with closing(EngineKeeper()) as keeper, os.fdopen(jobs) as lines, os.fdopen(replies, "w") as answers:
        for line in lines:
            code = _do(json.loads(line), keeper)
            answers.write(json.dumps({"exit_code": code}) + "\n")
            answers.flush()
    _end()


def _end() -> NoReturn:
    """Exit without taking apart all that was imported, which takes seconds of a core after vLLM; exit handlers run."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _preload(verb: str, engine: str) -> None:
    """Import a verb and an engine; whatever is wrong with them, the first job says."""
    with suppress(Exception):
        import_module(f"expo.{verb}")
        spec = {"generate": GENERATORS, "score": SCORERS}[verb][engine]
        spec.load()
        spec.call("preload")


def _do(job: dict[str, Any], keeper: EngineKeeper) -> int:
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in job["settings"].items()
    }
    kind: Any = COMMANDS[job["verb"]]
    verb = import_module(f"expo.{job['verb']}")
    result = verb.run(kind(**settings), keeper, **job["options"])
    return PARTLY_FAILED if result.failed else 0
