"""What a sweep would cost, for `--dry-run`: the plan's rows, at the speed and length that a few of them show.

The probe generates and scores the first prompts with α = 0, in processes and places like those of the sweep, into a
folder that is removed again. Few rows do not fill an engine, so a long run is faster than it says rather than slower.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace

from expo.config import SweepConfig
from expo.files import Row
from expo.generate import GenerateJob, plan as plan_generate
from expo.rows import RowJob
from expo.score import plan as plan_score
from expo.sweep.lanes import Lane, Lanes, environment_of
from expo.sweep.plan import SweepPlan, plan, scoring

PROBE_PROMPTS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What the probe saw of one engine."""

    label: str
    rows: int
    tokens: float
    seconds: float
    start_seconds: float
    memory_bytes: int
    """Of the process, on the CPU's side."""

    def cost(self, rows: int) -> Row:
        """Of so many rows, as plain data."""
        share = rows / max(self.rows, 1)
        return {
            "for": self.label,
            "rows": rows,
            "tokens": round(self.tokens * share),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "seconds": round(self.seconds * share, 1),
            "start_seconds": round(self.start_seconds, 1),
            "memory_bytes": self.memory_bytes,
        }


@dataclass(frozen=True)
class CostedPlan:
    """A plan, and what it would cost."""

    job: SweepPlan

    def describe(self) -> Row:
        """As plain data; the cost is measured now.

        Raises:
            InputError: A model or a setting is at fault.
            EnvironmentFailure: An engine does not start, or failed.
        """
        return {**self.job.describe(), **estimate(self.job)}


def plan_with_cost(config: SweepConfig) -> CostedPlan:
    """The plan for `--dry-run`; nothing is written.

    Raises:
        InputError: The pair, the task, a reward model or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    return CostedPlan(plan(config))


def estimate(job: SweepPlan) -> Row:
    """The cost of what is missing, as plain data: rows, tokens, seconds and memory of each engine.

    Raises:
        InputError: A model or a setting is at fault.
        EnvironmentFailure: An engine does not start, or failed.
    """
    rows = len(job.to_generate) * job.rows
    if not rows:
        return {"rows_to_generate": 0}
    costs = [seen.cost(rows) for seen in _probe(job)]
    seconds = [cost["seconds"] + cost["start_seconds"] for cost in costs]
    beside = bool(job.places[0].gpus) and all(place.side_by_side for place in job.places)
    return {
        "rows_to_generate": rows,
        "cost": costs,
        "seconds_in_all": round(max(seconds) if beside else sum(seconds)),
    }


def _probe(job: SweepPlan) -> list[Seen]:
    """Generate and score a few rows."""
    seen: dict[str, Seen] = {}
    policy = Lane("policy", environment_of(job.places[0]), lambda made: answered(made))
    lanes = [
        Lane(model.location.label, environment_of(place), lambda made: look(made), fed_by=policy, waits=True)
        for model, place in zip(job.reward_models, job.places[1:], strict=True)
    ]

    def look(made: RowJob, lane: Lane | None = None) -> None:
        lane = lane or lanes[getattr(made, "number", 0)]
        seen[lane.label] = _seen(lane, made)

    def answered(made: RowJob) -> None:
        look(made, policy)
        first = plan_score(scoring(job.config, job.first, folder))
        for one in (first, *first.further):
            lanes[one.number].add(one)

    with tempfile.TemporaryDirectory(prefix="expo-") as folder, Lanes([policy, *lanes]) as running:
        answers = _answers(job, folder)
        policy.add(answers)
        log.info("probe: %d answers at α = 0", len(answers.keys))
        running.run("probe", len(answers.keys) * (1 + len(lanes)), 0)
    return list(seen.values())


def _answers(job: SweepPlan, folder: str) -> GenerateJob:
    """The first prompts, for an engine like the sweep's."""
    config = replace(job.first.config, output_dir=folder, limit=min(PROBE_PROMPTS, len(job.first.prompts)))
    return plan_generate(config).with_gpu_share(job.places[0].gpu_share)


def _seen(lane: Lane, made: RowJob) -> Seen:
    meta = made.files.look().meta
    seconds = float(meta[made.seconds_key])
    return Seen(
        label=lane.label,
        rows=int(meta["rows"]),
        tokens=float(meta["tokens_per_second"]) * seconds,
        seconds=seconds,
        start_seconds=float(meta["engine_start_seconds"]),
        memory_bytes=lane.memory_bytes,
    )
