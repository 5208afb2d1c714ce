"""A search over modules with engines: makes the answers that it asks for, tests what it finds, and writes modules.json.

Its course is a function of the rewards, so what is on disk is all there is to remember: a search that was interrupted
is run again from its first look, and finds its answers there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from expo.arguments import shown
from expo.config import SweepConfig
from expo.errors import InputError
from expo.files import Row, json_text, read_json, write_atomic
from expo.verbs import extrapolate
from expo.verbs.sweep.conclude import Swept, errors_of, history
from expo.verbs.sweep.confirm import confirm
from expo.verbs.sweep.making import Making
from expo.verbs.sweep.modules.found import Found, describe_steps, describe_test
from expo.verbs.sweep.modules.plan import ModulesPlan, plan
from expo.verbs.sweep.modules.search import Step, Wanted, search
from expo.verbs.sweep.modules.text import as_text, told, verdict
from expo.verbs.sweep.order import Order
from expo.verbs.sweep.pair import inspect_pair
from expo.verbs.sweep.plan import folder_of
from expo.verbs.sweep.preload import preloaded
from expo.verbs.sweep.race import Answered
from expo.verbs.sweep.racing import answered, clusters_of, keys_of
from expo.verbs.sweep.record import EQUAL, NOT_FINISHED, digest, is_current, made_from, plain
from expo.verbs.sweep.vector import Vector

ZERO = Vector(0.0)

log = logging.getLogger(__name__)


def run(config: SweepConfig) -> Swept:
    """Search, test what was found, and say it.

    Raises:
        InputError: The settings or inputs are at fault, or the pair is one that ExPO does not suit.
        EnvironmentFailure: An engine, the disk or the network failed; calling again continues.
    """
    started = time.perf_counter()
    with preloaded(config, folder_of(config)) as processes:
        job = plan(config)
        inspected = inspect_pair(config) if job.sweep.to_generate else None
        if inspected is not None and inspected.suits == EQUAL:
            raise InputError(f"{inspected.verdict}: every θ is DPO, so there is nothing to search for")
        with Making(job.sweep, processes, inspected) as made:
            found = _Searching(job, made).run()
            return _conclude(job, made, found, started)


@dataclass
class _Searching:
    """What the search asks of the engines, and what they answered."""

    job: ModulesPlan
    made: Making
    told: set[tuple[str, int]] = field(default_factory=set)
    """Steps and looks that have been told of."""

    @property
    def order(self) -> Order:
        """That of the prompts."""
        return self.job.race.order

    def run(self) -> Found:
        """Run the search, and test its end on the prompts that were set aside."""
        clusters = clusters_of(self.job.sweep, self.order.race)
        rules, alphas = self.job.race.rules, self.job.race.alphas
        going = search(rules, alphas, self.job.groups, clusters, norms=self.job.norms)
        wanted = next(going)
        try:
            while True:
                wanted = going.send(self.answers(wanted))
        except StopIteration as ended:
            steps: tuple[Step, ...] = ended.value
        self.tell(steps)
        return self.tested(Found(steps))

    def answers(self, wanted: Wanted) -> dict[Vector, Answered]:
        """Make what is asked for, as far as it is missing, and read it."""
        self.tell(wanted.steps)
        self.tell_looks(wanted)
        ids = self.order.in_race(wanted.questions)
        jobs = {vector: self.job.sweep.job_of(vector).of(ids) for vector in wanted.vectors}
        before = partial(self.write, describe_steps(wanted.steps, wanted.looks, wanted.arms))
        self.made.make(jobs, f"{wanted.name}, look {len(wanted.looks) + 1}", before=before, more=True)
        runs = self.made.runs(wanted.vectors)
        keys = keys_of(runs[0], self.order.race[: wanted.questions])
        return {vector: answered(run, keys) for vector, run in zip(wanted.vectors, runs, strict=True)}

    def tested(self, found: Found) -> Found:
        """The one test, of the last vector against one α for all, and how far both are above DPO."""
        if not found.uniform.alpha:
            return found
        vectors = tuple(dict.fromkeys((ZERO, found.uniform, found.final)))
        asked = {vector: [*self.order.in_race(found.asked[vector]), *self.order.to_confirm] for vector in vectors}
        jobs = {vector: self.job.sweep.job_of(vector).of(asked[vector]) for vector in vectors}
        self.made.make(jobs, "test", before=partial(self.write, describe_steps(found.steps)))
        runs = self.made.runs(vectors)
        keys, clusters = keys_of(runs[0], self.order.confirmation), clusters_of(self.job.sweep, self.order.confirmation)
        rewards = {vector: answered(run, keys).rewards for vector, run in zip(vectors, runs, strict=True)}
        above = {vector: confirm(vector.alpha, rewards[vector], rewards[ZERO], clusters) for vector in vectors[1:]}
        tested = None
        if found.final != found.uniform:
            tested = confirm(found.final.alpha, rewards[found.final], rewards[found.uniform], clusters)
        return replace(found, tested=tested, over_dpo=above)

    def tell(self, steps: Iterable[Step]) -> None:
        """Tell of the looks of these steps, and of who goes on."""
        for step in steps:
            for look in step.course.looks:
                self.say(step.name, look.number, told(step.name, look, step.arms))
            self.say(step.name, 0, f"{step.name}: {step.arms[step.taken].label} goes on ({step.vector})")

    def tell_looks(self, wanted: Wanted) -> None:
        """The same of a step that has not ended."""
        for look in wanted.looks:
            self.say(wanted.name, look.number, told(wanted.name, look, wanted.arms))

    def say(self, name: str, number: int, text: str) -> None:
        """Once."""
        if (name, number) not in self.told:
            self.told.add((name, number))
            log.info("%s", text)

    def write(self, steps: Row) -> None:
        """Say in modules.json how far the search is, before anything more is answered."""
        record = {
            "search": self.job.sweep.config.search,
            "task": self.job.sweep.first.task.name,
            "verdict": None,
            "notes": [NOT_FINISHED],
            "command": None,
            **steps,
            "settings": self.job.settings,
            "fingerprint": dict(made_from(self.job.sweep.fingerprint)),
            **self.made.known,
        }
        self.job.sweep.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.job.record, json_text(plain(record), indent=2) + "\n")


# --- the end ----------------------------------------------------------------------------------------------------------


def _conclude(job: ModulesPlan, made: Making, found: Found, started: float) -> Swept:
    """Write what was found where that is new, and the checkpoint where it is asked for."""
    vectors = tuple(found.asked)
    metas = {
        vector: [file.look().meta for file in (job.sweep.job_of(vector).files, *made.rewards[vector])]
        for vector in vectors
    }
    command = shown("extrapolate", job.extrapolating(found.final)) if found.final.alpha else None
    earlier = read_json(job.record) if job.record.is_file() else {}
    says = plain(_described(job, found, command, [_described_vector(job, found, made, vector) for vector in vectors]))
    says["rows_xxh3"] = digest(
        file.final for vector in vectors for file in (job.sweep.job_of(vector).files, *made.rewards[vector])
    )
    record, status = earlier, "already complete"
    if made.generated or not is_current(earlier, says):
        clock = _clock([meta for of_vector in metas.values() for meta in of_vector], time.perf_counter() - started)
        record, status = {**says, **plain(history(job.sweep, made, earlier)), "clock": clock}, "written"
        write_atomic(job.record, json_text(record, indent=2) + "\n")
    errors = errors_of(metas)
    return Swept(
        record=record,
        text=as_text(found, command),
        status=status,
        file=job.record,
        checkpoint=_write(job, found) if job.sweep.config.write else None,
        failed=len(errors),
        reason=next((error["reason"] for error in errors), None),
        can_retry=any(not error.get("lasting") for error in errors),
    )


def _described(job: ModulesPlan, found: Found, command: str | None, vectors: Sequence[Row]) -> Row:
    """What modules.json says, the same for the same rows."""
    over = {} if found.over_dpo is None else found.over_dpo
    return {
        "search": job.sweep.config.search,
        "task": job.sweep.first.task.name,
        "reward_model": job.race.judges[0],
        "verdict": verdict(found),
        "notes": job.sweep.notes,
        "command": command,
        "uniform": found.uniform.describe(),
        "final": {**found.final.describe(), **found.final.settings(job.sweep.patterns)},
        "test": describe_test(found.tested, claims=True),
        "over_dpo": [{**one.describe(), **(describe_test(said, claims=False) or {})} for one, said in over.items()],
        **describe_steps(found.steps),
        "vectors": vectors,
        "tokens": sum(one["tokens_in_all"] for one in vectors),
        "rows": sum(one["n"] for one in vectors),
        "most_rows": job.most_rows,
        "classes": {
            label: {"pattern": job.sweep.patterns[label], "tensors": len(names)} for label, names in job.classes.items()
        },
        "settings": job.settings,
        "fingerprint": dict(made_from(job.sweep.fingerprint)),
    }


def _described_vector(job: ModulesPlan, found: Found, made: Making, vector: Vector) -> Row:
    """A vector's answers, in figures."""
    (run,) = made.runs((vector,))
    order, aside = job.race.order, found.over_dpo or {}
    tested = found.over_dpo is not None and (vector == ZERO or vector in aside)
    keys = keys_of(run, [*order.race[: found.asked[vector]], *(order.confirmation if tested else ())])
    seen = answered(run, keys)
    return {
        "name": run.name,
        **vector.describe(),
        "n": len(keys),
        "answered": {"race": found.asked[vector], "confirmation": len(order.confirmation) if tested else 0},
        **_means(seen),
    }


def _means(seen: Answered) -> Row:
    """Of a vector's answers: their mean reward, and their tokens."""
    known = seen.rewards[seen.rewards == seen.rewards]  # NaN is not equal to itself
    tokens = seen.tokens[seen.tokens == seen.tokens]
    return {
        "mean": float(known.mean()) if len(known) else None,
        "tokens": float(tokens.mean()) if len(tokens) else None,
        "tokens_in_all": int(tokens.sum()),
    }


def _clock(metas: Sequence[Row], seconds: float) -> Row:
    """What this run took, and what the rows took in whatever run."""
    sums = ("engine_start_seconds", "generate_seconds", "score_seconds")
    taken = {key: round(sum(meta.get(key, 0.0) for meta in metas), 3) for key in sums}
    return {"seconds": round(seconds, 3), **taken}


def _write(job: ModulesPlan, found: Found) -> Path | None:
    """The checkpoint of the last vector, where it is better than one α for all."""
    if not found.is_shown:
        log.info("no checkpoint is written: nothing was shown to be better than one α for all tensors")
        return None
    config = replace(job.extrapolating(found.final), overwrite=job.sweep.config.overwrite)
    return extrapolate.run(config)[0].path
