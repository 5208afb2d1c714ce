"""`expo extrapolate`: write what is missing of every output, or of one part of it, or join parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expo.config import ExtrapolateConfig
from expo.errors import InputError
from expo.files import Row
from expo.output.frames import frame
from expo.output.publish import Pushed, make_repository, push
from expo.output.writer import finish_interrupted
from expo.verbs.extrapolate.commit import join
from expo.verbs.extrapolate.plan import ExtrapolatePlan, Output, plan
from expo.verbs.extrapolate.processes import write_in_processes, write_on_cluster
from expo.verbs.extrapolate.write import write

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Written:
    """One output after the run."""

    alpha: float
    path: Path
    status: str
    """"written" or "already complete"."""
    pushed: Pushed | None = None
    """Where it is on the hub, if it was pushed."""
    part: str | None = None
    """The part that was made, i/N; None for the whole."""
    target_step: float | None = None
    """Of a training run, the step that it is extrapolated to."""

    def __fspath__(self) -> str:
        return str(self.path)

    def describe(self) -> Row:
        """The output as plain data."""
        own = ("part", "target_step")
        return {name: value for name, value in asdict(self).items() if name not in own or value is not None}


class Extrapolated(tuple[Written, ...]):
    """The result of a run: an output per α, in the order in which they were asked for."""

    __slots__ = ()

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The checkpoint's folder, where there is one α.

        Raises:
            InputError: There are several.
        """
        if len(self) > 1:
            raise InputError(f"there are {len(self)} checkpoints, one for each α: take the path of one, as in [0].path")
        return self[0].path

    def describe(self) -> Row:
        """The outputs as plain data."""
        return {"outputs": [one.describe() for one in self]}

    def to_pandas(self) -> DataFrame:
        """A row per α: `alpha`, `path`, `status`, and where it was pushed."""
        return frame(one.describe() for one in self)


def run(config: ExtrapolateConfig) -> Extrapolated:
    """Write every α's checkpoint that is not complete, or the part of each that is asked for.

    Raises:
        InputError: The settings or inputs are at fault; nothing is left behind.
        EnvironmentFailure: I/O failed; calling again continues.
    """
    job = plan(config)
    finished = [finish_interrupted(output.folder, output.fingerprint) for output in job.outputs]
    if any(finished):
        job = plan(config)
    for output in job.outputs:
        if output.destination:
            make_repository(output.destination, private=config.private)
    if job.todo and config.join is not None:
        join(job, config.join)
    elif job.todo and config.ray is not None:
        write_on_cluster(job, config.ray)
    elif job.todo and config.processes > 1:
        write_in_processes(job, config.processes)
    elif job.todo:
        write(job)
    return Extrapolated(_written(job, output) for output in job.outputs)


def _written(job: ExtrapolatePlan, output: Output) -> Written:
    pushed = push(output.destination, output.folder) if output.destination else None
    part = None if job.part is None else str(job.part)
    status = "already complete" if output.complete else "written"
    return Written(output.alpha, output.folder, status, pushed, part, output.target_step)
