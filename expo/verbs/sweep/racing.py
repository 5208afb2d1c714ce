"""A race with engines: makes the answers that it asks for, gives it their rewards, and confirms the α that it finds.

The course of a race is a function of the rewards, so what is on disk is all there is to remember: a race that was
interrupted is run again from its first look, and finds its answers there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from expo.files import Row
from expo.stats.means import Floats, Whole
from expo.verbs.compare.comparison import ENDED, compare
from expo.verbs.compare.pairing import of_rows
from expo.verbs.compare.run import RowKey, Run
from expo.verbs.sweep.choice import doubts, ends_measurably, vetoes
from expo.verbs.sweep.confirm import LEVEL, Confirmation, confirm
from expo.verbs.sweep.figures import Raced, Rejection, describe_look
from expo.verbs.sweep.making import Making
from expo.verbs.sweep.plan import SweepPlan
from expo.verbs.sweep.race import Answered, Ask, Course, Look, race
from expo.verbs.sweep.race_plan import RacePlan
from expo.verbs.sweep.record import made_from, read_record, write_unfinished
from expo.verbs.sweep.words import not_confirmed, shown_for, told_look

log = logging.getLogger(__name__)


def run_race(job: SweepPlan, plan: RacePlan, made: Making) -> Raced:
    """Run the race, and confirm what it finds.

    Args:
        job: The sweep's plan.
        plan: The race's.
        made: The lanes.

    Raises:
        InputError: Settings or inputs are at fault.
        EnvironmentFailure: An engine, the disk or the network failed; finished rows are kept.
    """
    racing = _Racing(job, plan, made)
    running = race(plan.rules, plan.alphas, clusters_of(job, plan.order.race))
    ask = next(running)
    try:
        while True:
            ask = running.send(racing.answers(ask))
    except StopIteration as ended:
        course: Course = ended.value
    racing.say(course.looks)
    return racing.confirmed(course)


class _Racing:
    """What the race asks of the engines, and what they answered."""

    def __init__(self, job: SweepPlan, plan: RacePlan, made: Making) -> None:
        self._job, self._plan, self._made = job, plan, made
        self._said = 0  # looks
        self._shown = shown_for(job.config.last_step)

    def say(self, looks: Sequence[Look]) -> None:
        """Tell of the looks that have not been told of."""
        for look in looks[self._said :]:
            log.info("%s", told_look(look, self._shown))
        self._said = len(looks)

    def answers(self, ask: Ask) -> dict[float, Answered]:
        """Make what is asked for, as far as it is missing, and read it."""
        self.say(ask.looks)
        ids = self._plan.order.in_race(ask.questions)
        jobs = {alpha: self._job.job_of(alpha).of(ids) for alpha in ask.alphas}
        if not ask.looks:  # what is measured for reference is not in the race
            jobs |= {alpha: job.of(ids) for alpha, job in self._job.jobs.items() if alpha < 0}
        before = partial(self._write, ask.looks, ask.alphas)
        self._made.make(jobs, f"look {len(ask.looks) + 1}", before=before, more=True)
        runs = self._made.runs(ask.alphas)
        keys = keys_of(runs[0], self._plan.order.race[: ask.questions])
        return {alpha: answered(run, keys) for alpha, run in zip(ask.alphas, runs, strict=True)}

    def confirmed(self, course: Course) -> Raced:
        """Choose the candidate, write it down, and test it on the prompts that were set aside."""
        order, asked = self._plan.order, course.last.questions
        against = self._against(course)
        candidate = next((alpha for alpha in course.ranking if alpha not in against), None)
        ahead = course.ranking[: None if candidate is None else course.ranking.index(candidate)]
        passed_over = {alpha: against[alpha] for alpha in ahead}
        if candidate is None:
            return Raced(self._plan, course, None, passed_over, None, (), self._share(course, None))
        log.info("α = %s is to be confirmed on %d prompts", self._shown(candidate), len(order.confirmation))
        ids = [*order.in_race(asked), *order.to_confirm]
        jobs = {alpha: self._job.job_of(alpha).of(ids) for alpha in (0.0, candidate)}
        before = partial(self._write, course.looks, course.last.left, candidate)
        self._made.make(jobs, "confirmation", before=before)
        runs = self._made.runs((0.0, candidate))
        keys = keys_of(runs[0], order.confirmation)
        base, own = (answered(run, keys).rewards for run in runs)
        found = confirm(candidate, own, base, clusters_of(self._job, order.confirmation))
        rejections = tuple(_rejections(found, [of_rows(run, set(keys)) for run in runs]))
        return Raced(self._plan, course, candidate, passed_over, found, rejections, self._share(course, candidate))

    def _against(self, course: Course) -> dict[float, tuple[Rejection, ...]]:
        """What speaks against α that are ahead of α = 0, on the prompts of the race."""
        if not course.ranking:
            return {}
        runs = self._made.runs((0.0, *course.ranking))
        keys = set(keys_of(runs[0], self._plan.order.race[: course.last.questions]))
        comparison = compare([of_rows(run, keys) for run in runs], intersect=True, flips=0)
        measurable = ends_measurably(comparison)
        found = {}
        for first, *further in zip(*(table.others for table in comparison.tables), strict=True):
            seconds = list(zip(comparison.tables[1:], further, strict=True))
            found[first.alpha or 0.0] = tuple(doubts(first, seconds, measurable=measurable))
        return {alpha: reasons for alpha, reasons in found.items() if reasons}

    def _share(self, course: Course, candidate: float | None) -> float:
        """What was spent of what the grid would have cost: in tokens, or in rows where not all tokens are known."""
        order, spent = self._plan.order, dict[float, Floats]()
        asked = {alpha: look.questions for look in course.looks for alpha in look.asked}
        for alpha, run in zip(asked, self._made.runs(tuple(asked)), strict=True):
            confirms = candidate is not None and alpha in (0.0, candidate)
            keys = keys_of(run, [*order.race[: asked[alpha]], *(order.confirmation if confirms else ())])
            spent[alpha] = answered(run, keys).tokens
        if not all(np.isfinite(tokens).all() and tokens.sum() > 0 for tokens in spent.values()):
            spent = {alpha: np.ones(len(tokens)) for alpha, tokens in spent.items()}
        grid = sum(float(spent[alpha].mean()) for alpha in self._plan.alphas) * len(self._job.first.keys)
        return sum(float(tokens.sum()) for tokens in spent.values()) / grid

    def _write(self, looks: Sequence[Look], alphas: Iterable[float], candidate: float | None = None) -> None:
        """Say in sweep.json how far the race is, before anything more is answered."""
        jobs = {alpha: self._job.job_of(alpha) for alpha in sorted({*self._plan.alphas, *alphas, *_seen(looks)})}
        described = [describe_look(look) for look in looks]
        there = read_record(self._job.folder)
        earlier = {} if there is None else there.content
        record: Row = {
            **{name: earlier[name] for name in ("pair", "switch") if name in earlier},
            "search": self._job.config.search,
            "task": self._job.first.task.name,
            "alphas": [{"alpha": alpha, "name": job.name} for alpha, job in jobs.items()],
            "fingerprint": dict(made_from(self._job.fingerprint)),
            **self._made.known,
            "race": {"settings": self._plan.settings, "looks": described, "ended": None, "candidate": candidate},
        }
        write_unfinished(self._job.folder, record)


def _seen(looks: Iterable[Look]) -> set[float]:
    return {alpha for look in looks for alpha in look.asked}


def clusters_of(job: SweepPlan, questions: Sequence[Sequence[str]]) -> Whole:
    """(rows,): the number of the question of each row of these questions."""
    rows_of = Counter(key[0] for key in job.first.keys)  # prompt → its rows
    rows = [sum(rows_of[name] for name in ids) for ids in questions]
    return np.repeat(np.arange(len(rows), dtype=np.int64), rows)


def keys_of(base: Run, questions: Iterable[Sequence[str]]) -> list[RowKey]:
    """The rows of these questions, in their order, as the run of α = 0 has them."""
    rows: dict[str, list[RowKey]] = {}
    for row in base.rows:
        rows.setdefault(row.id, []).append(row.key)
    return [key for ids in questions for name in ids for key in rows[name]]


def answered(run: Run, keys: Sequence[RowKey]) -> Answered:
    """A run's rewards by its first reward model, and its answers, in the order of these rows."""
    place_of = {row.key: place for place, row in enumerate(run.rows)}
    places = [place_of[key] for key in keys]
    rewards = next(iter(run.rewards.values()))
    rows = [run.rows[place] for place in places]
    values = (
        [rewards[place] for place in places],
        [row.tokens for row in rows],
        [ENDED.get(row.finish_reason or "") for row in rows],
    )
    return Answered(
        *(np.array([np.nan if one is None else one for one in column], dtype=np.float64) for column in values)
    )


def _rejections(found: Confirmation, runs: Sequence[Run]) -> Iterator[Rejection]:
    """What speaks against a candidate on the prompts that were set aside: `vetoes`, at the test's level."""
    if not found.is_shown:
        yield not_confirmed(found)
        return
    comparison = compare(runs, intersect=True, flips=0, level=LEVEL)
    first, *further = (table.others[0] for table in comparison.tables)
    seconds = list(zip(comparison.tables[1:], further, strict=True))
    yield from vetoes(first, seconds, measurable=ends_measurably(comparison))
