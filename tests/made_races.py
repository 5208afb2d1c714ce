"""Races without engines: rewards that are made up from α, the race over them, and the folder that a sweep leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expo.files import Row, json_text
from expo.output.sweeps import PICTURE, RECORD
from expo.verbs.compare.pairing import of_rows
from expo.verbs.compare.run import RowKey, Run, RunRow
from expo.verbs.sweep.choice import choose
from expo.verbs.sweep.confirm import confirm
from expo.verbs.sweep.figures import Choice, Raced, Rejection, describe_look
from expo.verbs.sweep.order import Asked, put_in_order
from expo.verbs.sweep.picture import picture
from expo.verbs.sweep.race import Answered, Course, Rules, race
from expo.verbs.sweep.race_plan import RacePlan
from expo.verbs.sweep.record import plain
from expo.verbs.sweep.words import not_confirmed

RM, SECOND = "org/rm", "org/second"


@dataclass(frozen=True)
class MadeRace:
    """What a race leaves."""

    choice: Choice
    runs: tuple[Run, ...]
    """Each with the rows that its α has answered."""

    @property
    def raced(self) -> Raced:
        assert self.choice.raced is not None
        return self.choice.raced

    @property
    def record(self) -> Row:
        """sweep.json, as far as it is about what was found."""
        return {**plain(self.choice.describe()), "search": "race", "fingerprint": {}}

    @property
    def unfinished(self) -> Row:
        """sweep.json before the last look."""
        looks, names = self.raced.course.looks[:-1], [(run.alpha, run.name) for run in self.runs]
        race = {"settings": self.raced.plan.settings, "looks": [describe_look(look) for look in looks]}
        return {
            "best_alpha": None,
            "verdict": None,
            "notes": ["not finished"],
            "task": "prompts",
            "alphas": [{"alpha": alpha, "name": name} for alpha, name in sorted(names)],
            "search": "race",
            "race": plain({**race, "ended": None, "candidate": None}),
        }

    def write(self, folder: Path, record: Row | None = None) -> Path:
        """The folder of the sweep, as far as a report reads it."""
        for run in self.runs:
            outputs, rewards = (folder / f"{kind}_prompts" / f"{run.name}.jsonl" for kind in ("outputs", "rewards"))
            for file in (outputs, rewards):
                file.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "id": row.id,
                    "prompt": row.prompt,
                    "output": row.output,
                    "length": row.tokens,
                    "finish_reason": row.finish_reason,
                }
                for row in run.rows
            ]
            outputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
            rewards.write_text("".join(f"{reward}\n" for reward in run.rewards[RM]))
        (folder / RECORD).write_text(json_text(self.record if record is None else record))
        (folder / PICTURE).write_bytes(picture(self.choice))
        return folder


def made_race(
    gain: Callable[[float], float],
    alphas: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    *,
    prompts: int = 120,
    samples: int = 2,
    noise: float = 0.5,
    indifference: float = 0.02,
    refine: bool = False,
    second: bool = False,
    seed: int = 0,
) -> MadeRace:
    """A race over rewards that rise by `gain` of α over those of α = 0."""
    names = [str(number) for number in range(prompts)]
    order = put_in_order([Asked(name, name, None) for name in names], seed=seed, confirm=0.3)
    rules = Rules(len(order.race), len(order.confirmation), 10, 0.95, indifference, refine)
    plan = RacePlan(tuple(sorted({0.0, *alphas})), rules, order, seed, (RM,))
    runs: dict[float, Run] = {}

    def run_of(alpha: float) -> Run:
        if alpha not in runs:
            runs[alpha] = _run(alpha, gain(alpha), names, samples, noise, second=second)
        return runs[alpha]

    def answered(alpha: float, asked: Sequence[Sequence[str]]) -> tuple[Answered, set[RowKey]]:
        run = run_of(alpha)
        places = [int(name) * samples + sample for ids in asked for name in ids for sample in range(samples)]
        rewards = np.array(run.rewards[RM])[places]
        tokens = np.array([float(run.rows[place].tokens or 0) for place in places])
        return Answered(rewards, tokens, np.ones(len(places))), {run.rows[place].key for place in places}

    going = race(rules, plan.alphas, np.repeat(np.arange(rules.questions), samples))
    ask = next(going)
    try:
        while True:
            ask = going.send({alpha: answered(alpha, order.race[: ask.questions])[0] for alpha in ask.alphas})
    except StopIteration as ended:
        course: Course = ended.value
    candidate = next(iter(course.ranking), None)
    found, rejections = None, tuple[Rejection, ...]()
    if candidate is not None:
        clusters = np.repeat(np.arange(rules.confirmation), samples)
        both = [answered(alpha, order.confirmation)[0].rewards for alpha in (candidate, 0.0)]
        found = confirm(candidate, *both, clusters)
        rejections = () if found.is_shown else (not_confirmed(found),)
    raced = Raced(plan, course, candidate, {}, found, rejections, 0.43)
    own = []
    for alpha in course.alphas:
        asked = max(look.questions for look in course.looks if alpha in look.means)
        confirms = order.confirmation if alpha in (0.0, candidate) else ()
        own.append(of_rows(run_of(alpha), answered(alpha, [*order.race[:asked], *confirms])[1]))
    return MadeRace(choose(own, raced), tuple(own))


def _run(alpha: float, gain: float, names: Sequence[str], samples: int, noise: float, *, second: bool) -> Run:
    """All rows of an α: a task's prompts, of which a prompt's samples have a part of their reward in common."""
    quality = np.random.default_rng(0).normal(0, 1, len(names)).repeat(samples)
    rng = np.random.default_rng([round(1000 * alpha), 1])
    sizes = rng.integers(60, 140, len(quality))
    rows = tuple(
        RunRow(RowKey(name, sample), name, f"prompt {name}", (), "x" * int(size), None, int(size) // 4, "stop")
        for (name, sample), size in zip(((n, s) for n in names for s in range(samples)), sizes, strict=True)
    )
    rewards = {
        model: tuple(map(float, quality + gain + rng.normal(0, noise, len(quality))))
        for model in (RM, *([SECOND] if second else []))
    }
    return Run(f"dpo-ExPO-a{alpha!r}", "prompts", rows, rewards, alpha)
