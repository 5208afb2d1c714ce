"""The simulation of machines that fail: its laws, and that expo's defaults are what it chooses."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import failures
from benchmarks.failures import EXTRAPOLATE, GENERATE, NEVER, Extrapolating, Generating, Machines, Run, dealt
from expo.rows.ways import PARTS_PER_ENGINE, ROWS_PER_PART, parts_for
from expo.verbs.extrapolate.processes import PARTS_PER_PROCESS

SHARDS = Extrapolating(24, shard_s=20.0, start_s=5.0, part_s=1.0)
ROWS = Generating(60, width=8)


@pytest.mark.parametrize("work", [SHARDS, ROWS])
@pytest.mark.parametrize("count", [1, 5])
def test_one_machine_that_does_not_fail_takes_the_sum_of_the_parts(work, count: int) -> None:
    sizes = work.sizes(np.random.default_rng(0))
    parts = dealt(work.items, count)
    outcome = Run(work, sizes, parts, Machines.perfect(1), NEVER, 0.0).outcome()
    assert outcome.makespan_s == pytest.approx(
        work.start_s + sum(float(work.finish(sizes[part]).max()) for part in parts)
    )
    assert outcome.lost == 0


def test_answers_wait_for_a_place_in_the_batch() -> None:
    work = Generating(4, width=2, step_s=1.0, row_s=0.0, part_s=0.0)
    # 3 | 1 then 4 | then 2 after the 3
    assert work.finish(np.array([3.0, 1.0, 4.0, 2.0])).tolist() == [3.0, 1.0, 5.0, 5.0]
    slower = replace(work, row_s=0.5)
    # two in flight for five steps of 2 s
    assert slower.finish(np.array([3.0, 1.0, 4.0, 2.0])).tolist() == [6.0, 2.0, 10.0, 10.0]
    alone = replace(slower, width=1)
    assert alone.finish(np.array([3.0, 1.0])).tolist() == [4.5, 6.0]


def outcomes(work, mtbf_s: float, repair_s: float, replays: int = 40, parts: int = 12, machines: int = 3):
    for replay in range(replays):
        rng = np.random.default_rng([7, replay])
        drawn, sizes = Machines.drawn(rng, machines), work.sizes(rng)
        yield Run(work, sizes, dealt(work.items, parts), drawn, mtbf_s, repair_s).outcome()


@pytest.mark.parametrize("work", [SHARDS, ROWS])
def test_durable_work_is_done_once(work) -> None:
    found = list(outcomes(work, 120.0, 60.0))
    assert sum(one.lost for one in found) > len(found), "machines fail all the time"
    assert all((one.times_done == 1).all() for one in found)


def test_machines_that_do_not_come_back_may_leave_work_undone() -> None:
    found = list(outcomes(SHARDS, 60.0, NEVER))
    undone = [one for one in found if one.makespan_s == NEVER]
    assert undone
    assert all((one.times_done <= 1).all() and not one.times_done.all() for one in undone)


@pytest.mark.parametrize("work", [SHARDS, ROWS])
def test_fewer_failures_are_not_worse(work) -> None:
    often = (100.0, 300.0, 1_000.0, 10_000.0, NEVER)
    means = [np.mean([one.makespan_s for one in outcomes(work, mtbf_s, 60.0)]) for mtbf_s in often]
    assert all(rarer <= 1.03 * more_often for more_often, rarer in pairwise(means))
    assert means[-1] < 0.8 * means[0]


def test_a_lost_part_waits_until_that_is_noticed() -> None:
    drawn = Machines(np.array([[45.0] * 64, [1e9] * 64]), np.array([False, False]))
    work = Extrapolating(4, shard_s=20.0, start_s=0.0, part_s=0.0)
    run = Run(work, np.full(4, 20.0), dealt(4, 2), drawn, 1.0, 1e6)
    assert run.outcome().makespan_s == 40.0, "both are done before it fails"
    drawn = replace(drawn, lives=drawn.lives - 10)
    outcome = Run(work, np.full(4, 20.0), dealt(4, 2), drawn, 1.0, 1e6).outcome()
    assert outcome.makespan_s == 35 + failures.DETECTED_S + 20, "one shard of two is made again"
    assert outcome.lost == 1


def test_a_seed_has_one_result() -> None:
    first, again, other = (failures.figures(SHARDS, 3, 2, seed) for seed in (1, 1, 2))
    assert all((first.times[name] == again.times[name]).all() for name in first.times)
    assert any((first.times[name] != other.times[name]).any() for name in first.times)


def test_defaults_are_what_is_chosen() -> None:
    """Few replays with two machines know it to some percent; those of RESULTS.md choose exactly these."""
    replays, machines = 6, 2
    works = [replace(one, items=one.items // 4) for one in GENERATE.values()]
    rows = {one.items: failures.figures(one, replays, machines, 0) for one in works}
    rules = (failures.chosen_per_engine(rows, machines), (PARTS_PER_ENGINE, ROWS_PER_PART), (8, 100))
    best, defaults, worst = (failures.regret_of_rule(rows, machines, *rule) for rule in rules)
    assert defaults <= best + 0.05 < worst
    shards = [replace(one, items=one.items // 4) for one in EXTRAPOLATE.values()]
    found = [failures.figures(one, 16, machines, 0) for one in shards]
    regrets = np.max([one.regrets().max(axis=0) for one in found], axis=0)
    assert regrets[failures.PARTS.index(PARTS_PER_PROCESS)] <= regrets.min() + 0.05 < regrets[0]


@pytest.mark.parametrize(
    ("rows", "engines", "parts"), [(1, 8, 1), (5, 8, 5), (805, 8, 8), (7_999, 8, 8), (8_000, 8, 16), (10**6, 8, 16)]
)
def test_each_engine_has_a_part_and_two_where_they_are_large(rows: int, engines: int, parts: int) -> None:
    assert parts_for(rows, engines) == parts
