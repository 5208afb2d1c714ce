"""The worker process: runs jobs read as lines from a pipe, with one engine for all (`expo.rows.worker`)."""

from __future__ import annotations

import json
import os
from contextlib import closing
from importlib import import_module
from typing import Annotated, Any

import typer

from expo.config import COMMANDS
from expo.errors import PARTLY_FAILED
from expo.rows import EngineKeeper


def command(
    jobs: Annotated[int, typer.Option(help="Descriptor of the pipe to read jobs from.")],
    replies: Annotated[int, typer.Option(help="Descriptor of the pipe to write a line per job to.")],
) -> None:
    """Run jobs for the process that started this one."""
    with closing(EngineKeeper()) as keeper, os.fdopen(jobs) as lines, os.fdopen(replies, "w") as answers:
        for line in lines:
            code = _do(json.loads(line), keeper)
            answers.write(json.dumps({"exit_code": code}) + "\n")
            answers.flush()


def _do(job: dict[str, Any], keeper: EngineKeeper) -> int:
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in job["settings"].items()
    }
    kind: Any = COMMANDS[job["verb"]]
    verb = import_module(f"expo.{job['verb']}")
    result = verb.run(kind(**settings), keeper, **job["options"])
    return PARTLY_FAILED if result.failed else 0
