"""Teams: on a Ray cluster, the engines of one model, which share its jobs; on one machine a `Lane` has one engine.

A job is an α's answers, or their rewards by one model. Where there are more engines than jobs it is divided into parts,
which are joined when all are there. A machine that dies, has no room or is slow is `rows.workers.Crew`'s care. Whoever
waits for a machine with room gets that of another team's engines which have nothing to do: in a grid, reward models
take over the machines that the policy leaves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from expo.engines.torch_tools import gpus_per_engine
from expo.rows import RowJob
from expo.rows.cluster import Cluster, ClusterWorker, Share, forget_names, local_inputs
from expo.rows.loop import left_of
from expo.rows.parts import join_parts, missing_parts, parts_begun
from expo.rows.ways import parts_for
from expo.rows.worker import Task, Worker
from expo.rows.workers import POLL_SECONDS, Crew, RoomWatch, stop_all
from expo.verbs.sweep.lanes import AfterJob, Joining, Lanes
from expo.verbs.sweep.plan import SweepPlan, flags_of_sweep

ROOM_SECONDS = 5.0
"""How long an engine waits for a machine with room before others give up theirs; starting takes a second or two."""


class Machines:
    """The cluster of a sweep, connected to when it is first needed, and how its room is shared out."""

    def __init__(self, job: SweepPlan) -> None:
        self._job = job
        self._stack = ExitStack()

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster, whose machines share the sweep's folder and inputs.

        Raises:
            MissingExtra: Ray is not installed.
            InputError: They do not.
            EnvironmentFailure: There is no cluster.
        """
        folder = self._job.folder
        cluster = self._stack.enter_context(Cluster(self._job.config.ray or "auto"))
        cluster.require_shared(folder, local_inputs(self._job.config), list(folder.rglob(".*.journal.jsonl")))
        return cluster

    @cached_property
    def shares(self) -> list[Share]:
        """Of the policy, and of each reward model: how many engines, and what each gets of its machine.

        In a race, in which engines are needed again after every look, each reward model keeps one beside the policy's,
        where there is room.

        Raises:
            InputError: There is no room.
        """
        job, cluster = self._job, self.cluster
        with flags_of_sweep():
            policy = cluster.share(job.config.data_parallel, job.first.gpus_per_engine(cluster.has_gpus))
        rewards = []
        for model in job.reward_models:
            asked, there = job.config.reward_engine, cluster.has_gpus
            with flags_of_sweep(reward=True):
                gpus = gpus_per_engine(model.engine, model.spec, model.config, asked=asked, there=there)
                rewards.append(cluster.share(None, gpus))
        if job.race is None:
            return [policy, *rewards]
        left = max(1, policy.processes - (len(rewards) if job.config.data_parallel is None else 0))
        return [replace(policy, processes=left), *(replace(share, processes=1) for share in rewards)]

    def close(self) -> None:
        """Leave the cluster."""
        self._stack.close()


@dataclass
class _Divided:
    """A job that is done in parts."""

    whole: RowJob
    count: int
    """In how many parts."""
    left: int
    """How many of them are still to be made."""


class Team:
    """The engines of one model, and their jobs: `lanes.Engines`.

    Args:
        label: The model, for messages.
        machines: Where they run.
        number: The place of their share in `Machines.shares`.
        after: Called after each job.
        fed_by: The team whose finished jobs give this one its own; None where all are there from the start.
    """

    waits = False
    shares: frozenset[str] = frozenset()
    is_opening = False

    def __init__(
        self, label: str, machines: Machines, number: int, after: AfterJob, *, fed_by: Team | None = None
    ) -> None:
        self.label = label
        self.stays = True
        self.join: Joining | None = None  # its engines load weights
        self._machines, self._number, self._after, self._fed_by = machines, number, after, fed_by
        self._new: list[RowJob] = []
        self._divided: dict[Path, _Divided] = {}
        self._rows_elsewhere = 0  # of parts that an earlier run has made
        self._proved: list[Worker] = []
        self._workers: list[Worker] = []
        self._crew: Crew | None = None

    def add(self, job: RowJob) -> None:
        """Add a job to be done after the others."""
        self._new.append(job)

    def new_worker(self, job: Task) -> Worker:
        """An engine of this team whose first job this is, which `start` begins."""
        worker = self._new_worker()
        worker.take(job)
        return worker

    def take_over(self, worker: Worker) -> None:
        """Have one of the engines be this one, which is there."""
        self._proved = [worker]

    @property
    def waiting(self) -> Sequence[RowJob]:
        """The jobs that are not begun."""
        return tuple(self._new)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, nor comes any more."""
        idle = not self._new and (self._crew is None or self._crew.is_over)
        return idle and (self._fed_by is None or self._fed_by.is_over)

    @property
    def rows(self) -> int:
        """The rows of this run that are finished."""
        return self._rows_elsewhere + (self._crew.rows if self._crew else 0)

    @property
    def crews(self) -> Sequence[Crew]:
        """The engines, once there was a job for them."""
        return [self._crew] if self._crew else []

    def step(self, *, may_open: bool = True) -> None:  # noqa: ARG002 - no GPU is shared
        """Begin what is new, and see how the engines stand.

        Raises:
            InputError: A process rejects its settings or inputs.
            EnvironmentFailure: One failed repeatedly.
        """
        if self._new:
            self._begin_new(self._crew or self._open())
        if self._crew:
            self._crew.step()
            if self._crew.is_over:
                self._crew.require_done()

    def let_go(self) -> None:
        """Give up the machines of engines that have nothing to do."""
        if self._crew:
            self._crew.let_go()

    def dismiss(self) -> bool:
        """Let the processes end by themselves; whether they have, and their machines have room again."""
        self.let_go()
        return not any(worker.is_there for worker in self._workers)

    def close(self) -> None:
        """End the processes; rows that are finished stay."""
        stop_all(self._workers or self._proved)

    def _open(self) -> Crew:
        more = self._machines.shares[self._number].processes - len(self._proved)
        self._workers = [*self._proved, *(self._new_worker() for _ in range(more))]
        self._crew = Crew(self._workers, after=self._finish, name=_name)
        return self._crew

    def _new_worker(self) -> Worker:
        worker = ClusterWorker(self._machines.cluster, self._machines.shares[self._number])
        worker.stays = self.stays
        return worker

    def _begin_new(self, crew: Crew) -> None:
        """Divide the new jobs where there are more engines than jobs, or parts that an earlier run has made."""
        new, self._new = self._new, []
        units = parts_for(sum(len(job.keys) for job in new), self._machines.shares[self._number].processes)
        for job in new:
            left = left_of(job)
            begun = parts_begun(left.job)
            count = begun or min(-(-units // len(new)), len(left.job.keys))
            if count == 1 and begun is None:
                crew.add(job)
                continue
            todo = missing_parts(left, count)
            self._rows_elsewhere += len(left.job.keys) - sum(part.total for part, _ in todo)
            self._divided[left.job.files.final] = _Divided(left.job, count, len(todo))
            for part, kept in todo:
                crew.add(part, kept)
            if not todo:
                self._join(left.job)

    def _finish(self, job: Task) -> None:
        """After a job, or after a part: the last one's whole."""
        assert isinstance(job, RowJob)
        if job.whole is None:
            forget_names([job.files.final.parent])
            self._after(job)
            return
        divided = self._divided[job.whole.files.final]
        divided.left -= 1
        if not divided.left:
            self._join(divided.whole)

    def _join(self, whole: RowJob) -> None:
        divided = self._divided.pop(whole.files.final)
        forget_names([whole.files.parts_folder])
        self._after(join_parts(whole, divided.count).job)


def _name(job: Task) -> str:
    """An α's answers, or their rewards, or a part of them."""
    own = job.name if isinstance(job, RowJob) else ""
    return own if job.part is None else f"{own}, part {job.part}"


class Teams(Lanes):
    """The teams of a run; none of their processes is left running after the `with` block."""

    def __init__(self, teams: Sequence[Team], machines: Machines) -> None:
        super().__init__(teams)
        self._teams, self._machines = teams, machines
        self._room = RoomWatch()

    def between_looks(self) -> None:
        """Where an engine waits for a machine, give up those of others that have nothing to do."""
        crews = [crew for team in self._teams for crew in team.crews]
        if any(crew.waits_for_room(ROOM_SECONDS) for crew in crews):
            for crew in crews:
                crew.let_go()
        self._room.look(crews)
        time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """End all processes, and leave the cluster."""
        super().close()
        self._machines.close()
