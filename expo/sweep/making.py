"""Making what a sweep lacks: answers in the policy's lane, their rewards in the lanes of the reward models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Self

from expo.files import Row
from expo.output.findings import Inspection
from expo.rows import RowJob, is_complete
from expo.rows.files import RowFiles
from expo.rows.worker import Worker
from expo.score import ScoreJob
from expo.sweep.lanes import Lane, Lanes, environment_of, shared_gpus
from expo.sweep.plan import SweepPlan, quiet
from expo.sweep.record import mark_unfinished
from expo.sweep.switch import prove

log = logging.getLogger(__name__)


class Making:
    """The lanes of a sweep, what goes from one to the next, and what was made.

    Args:
        job: The plan.
        processes: Of the policy and of the first reward model, where they have been started already; taken from here.
        inspected: The pair, where something is to be generated.
    """

    def __init__(self, job: SweepPlan, processes: list[Worker], inspected: Inspection | None) -> None:
        self.generated: list[float] = []
        """The α whose answers were made in this run."""
        self.rewards: dict[float, list[RowFiles]] = {}
        """α → the files of each reward model."""
        self._first_rewards: list[ScoreJob] = []  # planned first: those of other α have their engines and dates
        self.switch: Row | None = None
        """Whether the policy's engine could be switched, where it was asked."""
        self._job, self._inspected = job, inspected
        self._alpha_of = {one.files.final: alpha for alpha, one in job.jobs.items()}
        policy, *others = job.places
        self._policy = Lane("the policy", environment_of(policy), self._pass_on, shares=shared_gpus(policy))
        self._lanes = [
            Lane(
                model.location.label,
                environment_of(place),
                _say,
                fed_by=self._policy,
                waits=not place.side_by_side,
                shares=shared_gpus(place),
            )
            for model, place in zip(job.reward_models, others, strict=True)
        ]
        for lane in (self._policy, *self._lanes):
            if processes:
                lane.use(processes.pop(0))
        self._is_asked = False
        self._running = Lanes([self._policy, *self._lanes])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    def run(self) -> None:
        """Generate and score what is missing.

        Raises:
            InputError: Settings or inputs are at fault.
            EnvironmentFailure: An engine, the disk or the network failed; finished rows are kept.
        """
        job, there = self._job, 0
        each = job.rows * (1 + len(self._lanes))
        for alpha, one in job.jobs.items():
            if alpha in job.to_generate:
                self._policy.add(one)
            else:
                there += each - self._add_rewards(alpha)
        if not self._running.is_over:
            mark_unfinished(job.folder, job.first.fingerprint)
            self._prove(self._policy.waiting)
            self._running.run("sweep", each * len(job.jobs), there, _import_what_chooses)

    def _prove(self, waiting: Sequence[RowJob]) -> None:
        """Before rows depend on it: see that the policy's engine can go from one α to the next."""
        if len(waiting) < 2:
            return
        first = next(one for one in self._job.jobs.values() if one is waiting[0])
        proof = prove(lambda: self._new_policy(first), first, self._inspected)
        seconds = {"start_seconds": proof.start_seconds, "switch_seconds": proof.switch_seconds}
        known = {key: round(value, 3) for key, value in seconds.items() if value is not None}
        self.switch = {"proved": proof.proved, "reason": proof.reason, **known}
        if proof.worker is not None:
            self._policy.take_over(proof.worker)
        if proof.proved:
            log.info("switching α in the live engine: %s", proof.reason)
        else:
            log.warning("%s; so the engine is started for each α", proof.reason)
            self._policy.stays = False

    def _new_policy(self, first: RowJob) -> Worker:
        """A process for a proof; the one that comes after it imports its engine meanwhile."""
        worker = self._policy.new_worker(first)
        if not self._is_asked:
            self._is_asked = True
            self._policy.preload(self._job.first.verb, self._job.first.engine)
        return worker

    def _pass_on(self, made: RowJob) -> None:
        """Hand an α's answers to the reward models."""
        alpha = self._alpha_of[made.files.final]
        self.generated.append(alpha)
        speed = made.files.look().meta["tokens_per_second"]
        log.info("α = %r: %d answers, %.0f tokens/s", alpha, len(made.keys), speed)
        self._add_rewards(alpha)

    def _add_rewards(self, alpha: float) -> int:
        """Queue the rewards that an α lacks, and say how many rows they are."""
        with quiet(logging.WARNING):
            jobs = self._job.scoring(alpha, self._first_rewards)
            self._first_rewards = self._first_rewards or jobs
            missing = [job for job in jobs if not is_complete(job)]
        self.rewards[alpha] = [job.files for job in jobs]
        for job in missing:
            self._lanes[job.number].add(job)
        return sum(len(job.keys) for job in missing)


def _import_what_chooses() -> None:
    """While engines start: what is needed at the end takes seconds to import."""
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.special"):
        import_module(name)


def _say(scored: RowJob) -> None:
    """What a reward model thinks of an α, as soon as it is known."""
    meta = scored.files.look().meta
    if isinstance(scored, ScoreJob) and meta.get("mean") is not None:
        spread = "" if meta["standard_error"] is None else f" ± {meta['standard_error']:.3g}"
        log.info("%s: mean reward %.4g%s by %s", scored.config.name, meta["mean"], spread, scored.location.label)
