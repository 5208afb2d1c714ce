"""In how many parts a run on several machines is divided, so that machines which fail or are slow cost least.

    python benchmarks/failures.py [--replays 50] [--machines 8] [--seed 0]

A simulation; nothing is run. A run has N = machines × parts per machine parts, dealt as `expo.parts` and
`expo.output.parts.share` deal them. Whoever is free takes the part that waits, as in `expo.rows.workers.Crew`.

- A machine lives for an exponential time. Its failure is noticed after DETECTED_S: the health check of Ray, and the
  wait until its lock may be taken. It is back after a repair, with no process.
- What is finished is durable, row by row or shard by shard. The rest of a lost part waits for a free machine. A machine
  without a process starts one first: for rows with an engine.
- Of the machines, STRAGGLERS run at half speed. (`Crew` takes a part back from a machine that is slower still.)
- Many parts cost time, too: each is planned, and each ends with few answers in flight. All answers in flight take a
  step together, whose time is that of reading the weights and a little for each of them, so that a part takes as long
  as its longest answer, at least.

The tables have the mean of the replays' times and, in brackets, their 95th percentile, both divided by the mean of one
part per machine where no machine fails or is slow. All columns have the same failures and answers. Regret is how much
longer a mean is than that of the best number; chosen is the smallest worst regret over all runs and conditions. For
generate, two numbers are chosen: the most parts per engine, and how many rows each has at least.
"""

from __future__ import annotations

import argparse
import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

MACHINES = 8
PARTS = (1, 2, 3, 4, 6, 8)
"""Per machine; those that are compared."""
ROWS_PER_PART = (100, 250, 500, 1_000, 2_000)
"""Of `generate`, at least; those that are compared."""
HOUR_S, NEVER = 3600.0, float("inf")
CONDITIONS = {
    "1 h, not back": (HOUR_S, NEVER),
    "1 h": (HOUR_S, 600.0),
    "6 h": (6 * HOUR_S, 600.0),
    "1 day": (24 * HOUR_S, 600.0),
    "never": (NEVER, 600.0),
}
"""Mean time between failures of one machine, and the time until it is back: from machines that are lent and taken away
again, to those of one's own."""
DETECTED_S = 60.0
STRAGGLERS = 1 / 16
LIVES = 64
"""How many lives are drawn for a machine; the first comes again after the last."""


class Work(Protocol):
    """What is done, in items that are durable one by one."""

    items: int
    start_s: float
    """Until a process is ready for its first part."""

    def sizes(self, rng: np.random.Generator) -> Floats:
        """How large each item is."""

    def finish(self, sizes: Floats) -> Floats:
        """When each of a part's items is finished, in seconds after the part was begun."""


@dataclass(frozen=True)
class Generating:
    """Rows made by an engine that has up to `width` answers in flight."""

    items: int
    mean_tokens: float = 500.0
    most_tokens: float = 2048.0
    width: int = 256
    """vLLM's `max_num_seqs`."""
    step_s: float = 0.029
    """A step's time whatever is in flight: 141 GB of weights read by two GPUs, of 4.8 TB/s each, at half of that."""
    row_s: float = 0.00022
    """A step's time for each answer in flight: 141 GFLOP at 363 TFLOP/s of each GPU, and reading its cache."""
    start_s: float = 60.0
    part_s: float = 2.0
    """Planning a part and writing its files."""

    def sizes(self, rng: np.random.Generator) -> Floats:
        """Tokens, spread as the lengths of 805 published answers are: 95 % below 2.2 times the mean, one of 6 times."""
        return np.clip(np.ceil(rng.gamma(2, self.mean_tokens / 2, self.items)), 1, self.most_tokens)

    def finish(self, sizes: Floats) -> Floats:
        """As `Work`: an answer's step of its last token, and the time of all steps until then."""
        tokens = sizes.tolist()
        slots, later = tokens[: self.width], []
        heapq.heapify(slots)
        for count in tokens[self.width :]:
            later.append(slots[0] + count)
            heapq.heapreplace(slots, later[-1])
        last = np.array([*tokens[: self.width], *later])
        order = np.argsort(last, kind="stable")
        in_flight = np.minimum(self.width, np.arange(len(sizes), 0, -1))
        steps = np.diff(last[order], prepend=0.0)
        times = np.empty(len(sizes))
        times[order] = self.part_s + np.cumsum(steps * (self.step_s + self.row_s * in_flight))
        return times


SERVED_S = 8 * 10 / 12.5
"""A shard of 5 GB, both sides read by eight machines at once from a file server on 100 Gb/s."""


@dataclass(frozen=True)
class Extrapolating:
    """Shards, one after another."""

    items: int
    shard_s: float = 1.6
    """Of 5 GB, both sides read and one written: combining a pair of 5 GB a side (RESULTS.md)."""
    start_s: float = 3.0
    """A process, and importing torch."""
    part_s: float = 0.3
    """Planning a part: headers alone are read (RESULTS.md)."""

    def sizes(self, rng: np.random.Generator) -> Floats:
        """Seconds; a disk that others use, too, is not always as fast."""
        return self.shard_s * rng.uniform(0.75, 1.25, self.items)

    def finish(self, sizes: Floats) -> Floats:
        """As `Work`."""
        return self.part_s + np.cumsum(sizes)


GENERATE: Mapping[str, Generating] = {
    "1,000 prompts": Generating(1_000),
    "× 2 samples": Generating(2_000),
    "× 4 samples": Generating(4_000),
    "× 8 samples": Generating(8_000),
    "× 32 samples": Generating(32_000),
}
EXTRAPOLATE: Mapping[str, Extrapolating] = {
    "70B, each its own disk": Extrapolating(29),
    "70B, one file server": Extrapolating(29, SERVED_S),
    "671B, each its own disk": Extrapolating(269),
    "671B, one file server": Extrapolating(269, SERVED_S),
}


@dataclass(frozen=True)
class Machines:
    """What is drawn for the machines of a replay."""

    lives: Floats  # (machines, LIVES), in mean times between failures
    is_slow: NDArray[np.bool_]

    @classmethod
    def drawn(cls, rng: np.random.Generator, count: int, stragglers: float = STRAGGLERS) -> Machines:
        """Machines of a replay."""
        return cls(rng.exponential(size=(count, LIVES)), rng.random(count) < stragglers)

    @classmethod
    def perfect(cls, count: int) -> Machines:
        """Machines that never fail, at full speed."""
        return cls(np.full((count, LIVES), NEVER), np.zeros(count, dtype=np.bool_))


@dataclass(frozen=True)
class Outcome:
    """How a run went."""

    makespan_s: float
    """`NEVER` where all machines are gone before the end."""
    times_done: Whole
    """How many times each item was finished."""
    lost: int
    """Machines that failed while they had a part."""


class Run:
    """One run in parts, simulated from event to event.

    Args:
        work: What is done.
        sizes: Of each item.
        parts: The items of each part.
        machines: What is drawn for them.
        mtbf_s: Mean time between failures of a machine.
        repair_s: Until one that failed is back.
        finished: When each part's items are finished, where that is known already.
    """

    def __init__(
        self,
        work: Work,
        sizes: Floats,
        parts: Sequence[Whole],
        machines: Machines,
        mtbf_s: float,
        repair_s: float,
        finished: Sequence[Floats] | None = None,
    ) -> None:
        self._work, self._sizes, self._machines, self._repair_s = work, sizes, machines, repair_s
        finished = finished or [work.finish(sizes[part]) for part in parts]
        self._waiting = deque(zip(parts, finished, strict=True))
        count = len(machines.is_slow)
        self._slower = np.where(machines.is_slow, 2.0, 1.0)
        self._lives = machines.lives if mtbf_s == NEVER else machines.lives * mtbf_s
        self._fails_at = self._lives[:, 0] if mtbf_s < NEVER else np.full(count, NEVER)
        self._fails_at = self._fails_at.copy()
        self._life = [0] * count
        self._has_process = [False] * count
        self._idle = set(range(count))
        self._events: list[tuple[float, int, int, Whole | None]] = []  # when, a number, machine, what is given back
        self._number = 0
        self._lost = 0
        self._last = 0.0
        self._times_done = np.zeros(len(sizes), dtype=np.int64)

    def outcome(self) -> Outcome:
        """Simulate it to the end."""
        self._hand_out(0.0)
        while self._events and not self._times_done.all():
            now, _, machine, given_back = heapq.heappop(self._events)
            if given_back is None:
                self._idle.add(machine)
            else:
                self._waiting.appendleft((given_back, self._work.finish(self._sizes[given_back])))
            self._hand_out(now)
        return Outcome(self._last if self._times_done.all() else NEVER, self._times_done, self._lost)

    def _at(self, when: float, machine: int, given_back: Whole | None = None) -> None:
        if when < NEVER:
            self._number += 1
            heapq.heappush(self._events, (when, self._number, machine, given_back))

    def _hand_out(self, now: float) -> None:
        """Give machines that are idle what waits, those first that have a process."""
        for machine in sorted(self._idle, key=lambda one: (not self._has_process[one], one)):
            if not self._waiting:
                return
            self._idle.remove(machine)
            if self._is_there(machine, now):
                self._begin(machine, now, *self._waiting.popleft())

    def _is_there(self, machine: int, now: float) -> bool:
        """Whether a machine is there that may have failed while it was idle; it comes when it is back."""
        while (failed := self._fails_at[machine]) <= now:
            self._replace(machine, failed)
            if failed + self._repair_s > now:
                self._at(failed + self._repair_s, machine)
                return False
        return True

    def _replace(self, machine: int, failed: float) -> None:
        self._life[machine] += 1
        self._has_process[machine] = False
        self._fails_at[machine] = failed + self._repair_s + self._lives[machine, self._life[machine] % LIVES]

    def _begin(self, machine: int, now: float, part: Whole, finished: Floats) -> None:
        slower = self._slower[machine]
        begin = now if self._has_process[machine] else now + slower * self._work.start_s
        ends = begin + slower * finished
        fails_at = self._fails_at[machine]
        durable = ends <= fails_at
        self._times_done[part[durable]] += 1
        self._last = max(self._last, ends[durable].max(initial=0.0))
        self._has_process[machine] = True
        if durable.all():
            self._at(ends.max(), machine)
            return
        self._lost += 1
        self._replace(machine, fails_at)
        self._at(fails_at + DETECTED_S, machine, part[~durable])
        self._at(fails_at + max(DETECTED_S, self._repair_s), machine)


def dealt(items: int, count: int) -> list[Whole]:
    """The items of each part; no part is empty."""
    count = min(items, count)
    return [np.arange(index, items, count) for index in range(count)]


@dataclass(frozen=True)
class Figures:
    """What was simulated of one kind of work."""

    times: Mapping[str, Floats]
    """Condition → (parts per machine, replays), in seconds."""
    ideal_s: float

    def regrets(self) -> Floats:
        """By how much a mean is above that of the best number, as a share of it: (conditions, parts per machine)."""
        means = np.array([of.mean(axis=1) for of in self.times.values()])
        return np.asarray(means / means.min(axis=1, keepdims=True) - 1)


def figures(work: Work, replays: int, machines: int, seed: int) -> Figures:
    """Simulate one kind of work under all conditions, the same draws for each."""
    times = {condition: np.empty((len(PARTS), replays)) for condition in CONDITIONS}
    ideal = np.empty(replays)
    for replay in range(replays):
        rng = np.random.default_rng([seed, replay])
        drawn, sizes = Machines.drawn(rng, machines), work.sizes(rng)
        for column, each in enumerate(PARTS):
            parts = dealt(work.items, each * machines)
            finished = [work.finish(sizes[part]) for part in parts]
            for condition, (mtbf_s, repair_s) in CONDITIONS.items():
                run = Run(work, sizes, parts, drawn, mtbf_s, repair_s, finished)
                times[condition][column, replay] = run.outcome().makespan_s
            if each == 1:
                perfect = Run(work, sizes, parts, Machines.perfect(machines), NEVER, 0.0, finished)
                ideal[replay] = perfect.outcome().makespan_s
    return Figures(times, float(ideal.mean()))


def chosen_per_process(found: Sequence[Figures]) -> int:
    """The parts per machine whose worst regret, over all that a verb does, is smallest."""
    worst = np.max([one.regrets().max(axis=0) for one in found], axis=0)
    return PARTS[int(worst.argmin())]


def regret_of_rule(found: Mapping[int, Figures], machines: int, most: int, least_rows: int) -> float:
    """The worst regret of `most` parts per machine, of at least so many rows each where there are several.

    Args:
        found: Rows of a run → what was simulated of it.
        machines: How many there were.
        most: Parts per machine, at most.
        least_rows: Rows of a part, at least.
    """
    worst = 0.0
    for rows, one in found.items():
        each = max(1, min(most, rows // (machines * least_rows)))
        column = max(column for column, parts in enumerate(PARTS) if parts <= each)
        worst = max(worst, float(one.regrets()[:, column].max()))
    return worst


def chosen_per_engine(found: Mapping[int, Figures], machines: int) -> tuple[int, int]:
    """The most parts per engine, and the least rows of one of them, whose worst regret is smallest, to a percent."""
    rules = product(PARTS, ROWS_PER_PART)
    return min(rules, key=lambda rule: (round(regret_of_rule(found, machines, *rule), 2), rule))


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table, its head first."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def times_table(found: Mapping[str, Figures]) -> str:
    """Runs and conditions by parts per machine."""
    lines = [["run (ideal)", "fails after", *map(str, PARTS)]]
    for name, one in found.items():
        for condition, times in one.times.items():
            cells = [f"{of.mean() / one.ideal_s:.2f} ({np.quantile(of, 0.95) / one.ideal_s:.2f})" for of in times]
            lines.append([f"{name} ({one.ideal_s:.0f} s)", condition, *cells])
        lines.append([name, "worst regret", *(f"{of:.0%}" for of in one.regrets().max(axis=0))])
    return markdown(lines)


def rules_table(found: Mapping[int, Figures], machines: int) -> str:
    """The worst regret of each rule: parts per engine at most, by rows of a part at least."""
    lines = [["parts per engine, at most", *(f"{rows:,} rows or more" for rows in ROWS_PER_PART)]]
    for most in PARTS:
        lines.append([str(most), *(f"{regret_of_rule(found, machines, most, rows):.0%}" for rows in ROWS_PER_PART)])
    return markdown(lines)


def main() -> None:
    """Print the tables, and what is chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--machines", type=int, default=MACHINES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    how = (given.replays, given.machines, given.seed)
    generated = {name: figures(work, *how) for name, work in GENERATE.items()}
    by_rows = {GENERATE[name].items: one for name, one in generated.items()}
    most, least_rows = chosen_per_engine(by_rows, given.machines)
    print("generate", times_table(generated), rules_table(by_rows, given.machines), sep="\n\n")
    print(f"\nAt most {most} parts per engine, of {least_rows} rows or more.\n", flush=True)
    written = {name: figures(work, *how) for name, work in EXTRAPOLATE.items()}
    print("extrapolate", times_table(written), sep="\n\n")
    print(f"\n{chosen_per_process(list(written.values()))} parts per process.")


if __name__ == "__main__":
    main()
