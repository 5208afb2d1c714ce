"""What a sweep would cost, for `--dry-run`: the plan's rows, at the speed and length that a few of them show.

The probe generates and scores the first prompts with one α, in processes and places like those of the sweep, into a
folder that is removed again. Few rows do not fill an engine, so a long run is faster than it says rather than slower.
Where no proof of a switch is kept, the start that it costs is counted, too.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expo.config import SweepConfig
from expo.files import Row
from expo.output.findings import Inspection
from expo.rows import RowJob, missing_rows
from expo.verbs.generate import GenerateJob
from expo.verbs.generate.plan import plan as plan_generate
from expo.verbs.score import ScoreJob
from expo.verbs.sweep import likelihood, modules
from expo.verbs.sweep.lanes import Lane, Lanes, environment_of
from expo.verbs.sweep.pair import inspect_pair, is_one_model
from expo.verbs.sweep.plan import SweepPlan, plan
from expo.verbs.sweep.race import SHARE_OF_GRID
from expo.verbs.sweep.record import EQUAL, read_record
from expo.verbs.sweep.switch import is_known

PROBE_PROMPTS = 16
OF_RACE = "half of the grid's tokens: this many rows if all answers are equally long"
OF_SEARCH = (
    "half of what the arms of each race would take on all of its prompts, and the test at the end: this many rows if "
    "all answers are equally long"
)

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

    config: SweepConfig
    job: SweepPlan | None
    """None where both sides of the pair are one folder."""
    search: modules.ModulesPlan | None = None
    """With `--search modules`."""

    def describe(self) -> Row:
        """As plain data; the pair is inspected and the cost measured now, as the run would begin.

        Raises:
            InputError: A model or a setting is at fault, or the pair is one that ExPO does not suit.
            EnvironmentFailure: An engine does not start, or failed.
        """
        if self.job is None:
            return {"sft": self.config.sft, "dpo": self.config.dpo, **NOTHING, "pair": EQUAL}
        described = (self.search or self.job).describe()
        missing = _missing(self.job) if self.search is None else _missing_of_search(self.search)
        if not any(missing):
            return {**described, **NOTHING}
        found = inspect_pair(self.config) if missing[0] else None
        if found is not None and found.suits == EQUAL:
            return {**described, "pair": EQUAL, **NOTHING}
        pair = {} if found is None else {"pair": found.suits}
        if self.config.ray is not None:  # whose engines are not started for a plan
            return {**described, **pair, "rows_to_generate": missing[0], "rows_to_score": sum(missing[1:])}
        most = (OF_RACE if self.job.race else None) if self.search is None else OF_SEARCH
        return {**described, **pair, **estimate(self.job, missing, found, most)}


def plan_with_cost(config: SweepConfig) -> CostedPlan | likelihood.LikelihoodPlan:
    """The plan for `--dry-run`; nothing is written. That of likelihoods says how many tokens are read.

    Raises:
        InputError: The pair, the task, a reward model or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    if config.likelihood is not None:
        return likelihood.plan(config)
    if config.search == "modules":
        search = modules.plan(config)
        return CostedPlan(config, search.sweep, search)
    return CostedPlan(config, None if is_one_model(config) else plan(config))


NOTHING: Row = {"rows_to_generate": 0, "rows_to_score": 0}


def _missing(job: SweepPlan) -> list[int]:
    """How many rows the policy and each reward model have to do; of a race, if all α answer at one length, at most."""
    whole = _missing_of_grid(job)
    if job.race is None:
        return whole
    record = read_record(job.folder)
    if record is not None and record.best_alpha is not None:
        return [0 for _ in whole]
    most = int(SHARE_OF_GRID * job.rows * len(job.race.alphas))
    there = [job.rows * len(job.jobs) - rows for rows in whole]
    return [min(rows, max(0, most - known)) for rows, known in zip(whole, there, strict=True)]


def _missing_of_search(search: modules.ModulesPlan) -> list[int]:
    """The same of a search over modules: all that it may ask for, less the answers that its α have given."""
    job = search.sweep
    if search.is_finished:
        return [0 for _ in job.places]
    whole = _missing_of_grid(job)
    there = [job.rows * len(job.jobs) - rows for rows in whole]
    return [max(0, search.most_rows - known) for known in there]


def _missing_of_grid(job: SweepPlan) -> list[int]:
    generate = {alpha: missing_rows(one) for alpha, one in job.jobs.items()}
    score = [0 for _ in job.reward_models]
    like: list[ScoreJob] = []
    for alpha, one in job.jobs.items():
        jobs = job.scoring(alpha, like) if one.files.final.is_file() else []
        like = like or jobs
        for number in range(len(score)):
            there = len(jobs[number].keys) - missing_rows(jobs[number]) if jobs else 0
            score[number] += max(0, job.rows - there)
    return [sum(generate.values()), *score]


def estimate(job: SweepPlan, missing: Sequence[int], inspected: Inspection | None, at_most: str | None) -> Row:
    """The cost of what is missing, as plain data: rows, tokens, seconds and memory of each engine.

    Args:
        job: The plan.
        missing: The rows that the policy and each reward model have to do.
        inspected: The pair, where something is to be generated.
        at_most: What these rows are, where they are the most that there can be.

    Raises:
        InputError: A model or a setting is at fault.
        EnvironmentFailure: An engine does not start, or failed.
    """
    is_switched = len(job.to_generate) > 1
    starts_twice = is_switched and not is_known(job.first, inspected)
    seen = _probe(job)
    costs = [one.cost(rows) for one, rows in zip(seen, missing, strict=True) if rows]
    seconds = [cost["seconds"] + cost["start_seconds"] for cost in costs]
    beside = bool(job.places[0].gpus) and all(place.side_by_side for place in job.places)
    proof = round(seen[0].start_seconds, 1) if starts_twice else 0.0
    return {
        "rows_to_generate": missing[0],
        "rows_to_score": sum(missing[1:]),
        **({"at_most": at_most} if at_most else {}),
        "cost": costs,
        **({"seconds_of_the_proof": proof} if is_switched else {}),
        "seconds_in_all": round(proof + (max(seconds) if beside else sum(seconds))),
    }


def _probe(job: SweepPlan) -> list[Seen]:
    """Generate and score a few rows: what is seen of the policy and of each reward model."""
    seen: dict[int, Seen] = {}
    alpha = _probed(job)
    policy = Lane("policy", environment_of(job.places[0]), lambda made: answered(made))
    lanes = [
        Lane(model.location.label, environment_of(place), lambda made: scored(made), fed_by=policy, waits=True)
        for model, place in zip(job.reward_models, job.places[1:], strict=True)
    ]

    def answered(made: RowJob) -> None:
        seen[0] = _seen(policy, made)
        for one in job.scoring(alpha, folder=Path(folder)):
            lanes[one.number].add(one)

    def scored(made: RowJob) -> None:
        number = getattr(made, "number", 0)
        seen[1 + number] = _seen(lanes[number], made)

    with tempfile.TemporaryDirectory(prefix="expo-") as folder, Lanes([policy, *lanes]) as running:
        answers = _answers(job, alpha, folder)
        policy.add(answers)
        log.info("probe: %d answers at α = %g", len(answers.keys), alpha)
        running.run("probe", len(answers.keys) * (1 + len(lanes)), 0)
    return [seen[number] for number in sorted(seen)]


def _probed(job: SweepPlan) -> float:
    """The α of the probe: 0; in logit space, where one model answers by itself at 0, the smallest above it."""
    return min(alpha for alpha in job.jobs if alpha > 0) if job.first.setup.in_logit_space else 0.0


def _answers(job: SweepPlan, alpha: float, folder: str) -> GenerateJob:
    """The first prompts, for an engine like the sweep's."""
    config = replace(job.job_of(alpha).config, output_dir=folder, limit=min(PROBE_PROMPTS, len(job.first.prompts)))
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
