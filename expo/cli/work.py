"""The worker process: runs jobs read as lines from a pipe, with one engine for all (`expo.rows.worker`)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from importlib import import_module
from typing import IO, Annotated, Any

import typer

from expo.cli.ending import leave
from expo.cli.failures import EXPECTED, exit_code_of
from expo.config import COMMANDS, GenerateConfig, RowsConfig
from expo.engines import GENERATORS, SCORERS
from expo.errors import PARTLY_FAILED
from expo.rows import EngineKeeper, RowJob


def command(
    jobs: Annotated[int, typer.Option(help="Descriptor of the pipe to read jobs from.")],
    replies: Annotated[int, typer.Option(help="Descriptor of the pipe to write to how jobs go.")],
    preload: Annotated[str | None, typer.Option(help="VERB:ENGINE to import before the first job is there.")] = None,
) -> None:
    """Run jobs for the process that started this one."""
    if preload is not None:
        _preload(*preload.split(":"))
    with os.fdopen(jobs) as lines, os.fdopen(replies, "w") as answers, closing(_Keeper(answers)) as keeper:
        for line in lines:
            code = _outcome(json.loads(line), keeper)
            keeper.tell(exit_code=code)
            if code not in (0, PARTLY_FAILED):
                raise typer.Exit(code)
    leave(0)


class _Keeper(EngineKeeper):
    """Tells the process that gives the jobs how they go, and when the engine is open."""

    def __init__(self, answers: IO[str]) -> None:
        super().__init__()
        self._answers = answers

    def engine_for(self, job: RowJob) -> Any:  # noqa: ANN401 - of the verb's kind
        engine = super().engine_for(job)
        self.tell(ready=True)
        return engine

    def tell(self, **said: int) -> None:
        """Answer with a line."""
        self._answers.write(json.dumps(said) + "\n")
        self._answers.flush()


def _preload(verb: str, engine: str) -> None:
    """Import a verb and an engine; whatever is wrong with them, the first job says."""
    with suppress(Exception):
        import_module(f"expo.verbs.{verb}")
        spec = {"generate": GENERATORS, "score": SCORERS}[verb][engine]
        spec.load()
        spec.call("preload")


def _outcome(job: dict[str, Any], keeper: _Keeper) -> int:
    """Do a job; the exit code, once stderr has its error line: to close the engine of one that failed may hang."""
    try:
        return _do(job, keeper)
    except EXPECTED as error:
        code = exit_code_of(error)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    return code


def _do(job: dict[str, Any], keeper: _Keeper) -> int:
    if "together" in job:
        return _do_together(job["together"], keeper)
    settings = _settings(job)
    kind: Any = COMMANDS[job["verb"]]
    verb = import_module(f"expo.verbs.{job['verb']}")
    if not issubclass(kind, RowsConfig):
        verb.run(kind(**settings))
        return 0
    result = verb.run(kind(**settings), keeper, **job["options"])
    return PARTLY_FAILED if result.failed else 0


def _do_together(jobs: Sequence[dict[str, Any]], keeper: _Keeper) -> int:
    """Do jobs of `expo generate` at once, and tell of each that has ended."""
    from expo.verbs import generate

    given = [(GenerateConfig(**_settings(job)), job["options"]) for job in jobs]
    failed = 0
    for number, result in generate.run_together(given, keeper):
        failed += result.failed
        keeper.tell(done=number)
    return PARTLY_FAILED if failed else 0


def _settings(job: dict[str, Any]) -> dict[str, Any]:
    """A job's settings, with tuples as they were before they were JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in job["settings"].items()}
