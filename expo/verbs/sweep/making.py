"""Making what a sweep lacks: answers by the policy's engines, their rewards by those of the reward models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Self

from expo.errors import InputError
from expo.files import Row
from expo.output.findings import Inspection
from expo.rows import RowJob, is_complete
from expo.rows.files import RowFiles
from expo.rows.parts import parts_begun
from expo.rows.together import Together
from expo.rows.worker import Worker
from expo.verbs.compare.finding import Source
from expo.verbs.compare.reading import read_sources
from expo.verbs.compare.run import Run
from expo.verbs.generate import GenerateJob
from expo.verbs.score import ScoreJob
from expo.verbs.sweep.adapters import room_for, try_adapters
from expo.verbs.sweep.lanes import Engines, Lane, Lanes, environment_of, shared_gpus
from expo.verbs.sweep.pair import inspect_pair
from expo.verbs.sweep.plan import SweepPlan, quiet
from expo.verbs.sweep.record import mark_unfinished
from expo.verbs.sweep.switch import Elsewhere, prove
from expo.verbs.sweep.team import Machines, Team, Teams
from expo.verbs.sweep.vector import Vector, Which

log = logging.getLogger(__name__)


class Making:
    """The engines of a sweep, what goes from one to the next, and what was made.

    Args:
        job: The plan.
        processes: Of the policy and of the first reward model, where they have been started already; taken from here.
        inspected: The pair, where something is to be generated.
    """

    def __init__(self, job: SweepPlan, processes: list[Worker], inspected: Inspection | None) -> None:
        self.generated: list[float | Vector] = []
        """The α, or vectors, whose answers were made in this run."""
        self.rewards: dict[float | Vector, list[RowFiles]] = {}
        """α, or vector → the files of each reward model."""
        self._first_rewards: list[ScoreJob] = []  # planned first: those of other α have their engines and dates
        self.switch: Row | None = None
        """Whether the policy's engine could be switched, where it was asked."""
        self._job, self._inspected = job, inspected
        self._alpha_of: dict[Path, float | Vector] = {}
        self._policy: Engines
        self._judges: Sequence[Engines]
        self._machines = None if job.config.ray is None else Machines(job)
        if self._machines is None:
            self._policy, *self._judges = lanes = self._lanes(processes)
            self._running = Lanes(lanes)
        else:
            self._policy, *self._judges = teams = self._teams(self._machines)
            self._running = Teams(teams, self._machines)
        self._is_asked = self._is_proved = False
        self._loaded: float | Vector | None = None  # the α whose weights the policy's engine has
        self._settled: set[float | Vector] = set()  # the α that lack no reward of an answer

    def _lanes(self, processes: list[Worker]) -> list[Lane]:
        """On this machine: a lane of the policy, and one of each reward model."""
        policy, *others = self._job.places
        first = Lane("the policy", environment_of(policy), self._pass_on, shares=shared_gpus(policy))
        lanes = [first]
        for model, place in zip(self._job.reward_models, others, strict=True):
            waits, shares = not place.side_by_side, shared_gpus(place)
            lanes.append(
                Lane(model.location.label, environment_of(place), _say, fed_by=first, waits=waits, shares=shares)
            )
        for lane in lanes:
            if processes:
                lane.use(processes.pop(0))
        return lanes

    def _teams(self, machines: Machines) -> list[Team]:
        """The same on a cluster."""
        first = Team("the policy", machines, 0, self._pass_on)
        labels = [model.location.label for model in self._job.reward_models]
        return [first, *(Team(label, machines, 1 + i, _say, fed_by=first) for i, label in enumerate(labels))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    def make(
        self,
        jobs: Mapping[Which, GenerateJob],
        label: str = "sweep",
        *,
        before: Callable[[], object] = lambda: None,
        more: bool = False,
    ) -> None:
        """Generate and score what is missing of some α, or vectors.

        Args:
            jobs: α, or vector → the answers that are needed, in the order in which they are made.
            label: Of the progress bar.
            before: Called before anything is made, if something is.
            more: Whether further ones may be asked for.

        Raises:
            InputError: Settings or inputs are at fault.
            EnvironmentFailure: An engine, the disk or the network failed; finished rows are kept.
        """
        there = 0
        for alpha in sorted(jobs, key=lambda alpha: alpha != self._loaded):  # the one that the engine has comes first
            one = jobs[alpha]
            self._alpha_of[one.files.final] = alpha
            if is_complete(one):
                there += len(one.keys) * (1 + len(self._judges)) - self._add_rewards(alpha)
            else:
                self._add(self._policy, one)
        if self._running.is_over:
            return
        mark_unfinished(self._job.folder, self._job.fingerprint)
        before()
        if not self._is_proved:
            self._prove(self._policy.waiting, may_switch=more or len(self._policy.waiting) > 1)
        total = sum(len(one.keys) for one in jobs.values()) * (1 + len(self._judges))
        self._running.run(label, total, max(there, 0), _import_what_chooses, more=more)

    def _add(self, engines: Engines, job: RowJob) -> None:
        """Give a job to the engines of its model.

        Raises:
            InputError: A run on a cluster has begun it in parts, and this one is on one machine.
        """
        if self._machines is None and not job.config.overwrite and parts_begun(job) is not None:
            raise InputError(
                f"{job.files.parts_folder} has parts of a sweep on a cluster: go on with --ray, or start over with "
                "--overwrite"
            )
        engines.add(job)

    def runs(self, alphas: Sequence[float] | Sequence[Vector]) -> list[Run]:
        """The answers of these α, or vectors, and their rewards by this run's reward models, as they are on disk."""
        return read_sources([self._source(alpha) for alpha in alphas], self._job.config.dataset)

    def _source(self, alpha: float | Vector) -> Source:
        answers = self._job.job_of(alpha)
        files = tuple(file.final for file in self.rewards[alpha])
        return Source(answers.name, answers.name, answers.task.name, answers.files.final, files)

    @property
    def known(self) -> Row:
        """What is known of the pair and of the switch in this run."""
        pair = {"suits": self._inspected.suits, "verdict": self._inspected.verdict} if self._inspected else None
        return {name: said for name, said in (("pair", pair), ("switch", self.switch)) if said is not None}

    def _prove(self, waiting: Sequence[RowJob], *, may_switch: bool) -> None:
        """Before rows depend on it: see that the policy's engine can go from one α to the next."""
        if not waiting or not may_switch:
            return
        self._is_proved = True
        which = self._alpha_of[waiting[0].files.final]
        first = self._job.job_of(which.alpha if isinstance(which, Vector) else which)  # with which all tensors move
        if self._job.tries_adapters and self._try_adapters(waiting[0], first):
            return
        self._inspected = self._inspected or inspect_pair(self._job.config)
        there = None if self._machines is None else Elsewhere(self._machines.cluster.hardware, self._job.folder)
        proof = prove(lambda: self._new_policy(waiting[0]), first, self._inspected, there)
        seconds = {"start_seconds": proof.start_seconds, "switch_seconds": proof.switch_seconds}
        known = {key: round(value, 3) for key, value in seconds.items() if value is not None}
        way = first.config.space if first.setup.in_logit_space else "reload"
        self.switch = {"way": way, "proved": proof.proved, "reason": proof.reason, **known}
        if proof.worker is not None:
            self._policy.take_over(proof.worker)
        if proof.proved:
            log.info("switching α in the live engine: %s", proof.reason)
        else:
            log.warning("%s; starting a new engine for each α instead", proof.reason)
            self._policy.stays = False

    def _try_adapters(self, waiting: RowJob, first: GenerateJob) -> bool:
        """Whether the policy's engine has all α in one batch; if so, it is given those that wait together."""
        alphas, insist = tuple(self._job.jobs), self._job.config.switch == "adapter"
        trial = try_adapters(lambda: self._new_policy(waiting), first, alphas, insist=insist)
        timed = {} if trial.slowdown is None else {"slowdown": round(trial.slowdown, 3)}
        if not trial.works:
            log.log(logging.WARNING if insist else logging.INFO, "each α is loaded by itself: %s", trial.reason)
            return False
        log.info("all α in one batch, each as an adapter: %s", trial.reason)
        self.switch = {"way": "adapter", "proved": True, "reason": trial.reason, **timed}
        room = room_for(alphas)
        self._policy.join = lambda jobs: Together(tuple(_with_room(job, room) for job in jobs))
        if trial.worker is not None:
            self._policy.take_over(trial.worker)
        return True

    def _new_policy(self, first: RowJob) -> Worker:
        """A process for a proof; the one that comes after it imports its engine meanwhile."""
        worker = self._policy.new_worker(first)
        if isinstance(self._policy, Lane) and not self._is_asked:
            self._is_asked = True
            self._policy.preload(self._job.first.verb, self._job.first.engine)
        return worker

    def _pass_on(self, made: RowJob) -> None:
        """Hand an α's answers to the reward models."""
        alpha = self._alpha_of[made.files.final]
        self.generated += [] if alpha in self.generated else [alpha]
        self._loaded = alpha
        self._settled.discard(alpha)
        speed = made.files.look().meta["tokens_per_second"]
        said = alpha if isinstance(alpha, Vector) else f"α = {alpha!r}"
        log.info("%s: %d answers, %.0f tokens/s", said, len(made.keys), speed)
        self._add_rewards(alpha)

    def _add_rewards(self, alpha: float | Vector) -> int:
        """Queue the rewards that an α lacks, and say how many rows they are."""
        if alpha in self._settled:
            return 0
        with quiet(logging.WARNING):
            jobs = self._job.scoring(alpha, self._first_rewards)
            self._first_rewards = self._first_rewards or jobs
            missing = [job for job in jobs if not is_complete(job)]
        self.rewards[alpha] = [job.files for job in jobs]
        for job in missing:
            self._add(self._judges[job.number], job)
        self._settled.add(alpha)  # or will be, before its next answers are asked for
        return sum(len(job.keys) for job in missing)


def _with_room(job: RowJob, room: int) -> RowJob:
    """A job for an engine that applies adapters."""
    assert isinstance(job, GenerateJob)
    return replace(job, room=room)


def _import_what_chooses() -> None:
    """While engines start: what is needed at the end takes seconds to import."""
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.special"):
        import_module(name)


def _say(scored: RowJob) -> None:
    """What a reward model thinks of an α, as soon as it is known."""
    meta = scored.files.look().meta
    if isinstance(scored, ScoreJob) and meta.get("mean") is not None:
        spread = "" if meta["standard_error"] is None else f" ± {meta['standard_error']:.3g}"
        figure = f"{meta['mean']:.4g}{spread} of {meta['n']:,} answers"
        log.info("%s: mean reward %s by %s", scored.config.name, figure, scored.location.label)
