r"""Whether a race finds what the grid finds, at half of its tokens: replays on recorded and on made grids.

`race` replays a race as `expo sweep --search race` would run it, on rewards that are all there: a seeded order of the
prompts, a share of them set aside, the race on the rest, and one test of its candidate on what was set aside. It is
shown by how much the candidate, and the best of the whole grid's means, are worse than the true best, in standard
deviations of the paired difference (regret); how many of the grid's tokens were spent, α = 0 and the confirmation
counted; why races ended; and how often α > 0 is the verdict.

- A recorded grid is the folder of a finished `expo sweep`, whose samples are taken for the truth. A replay has an
  order of its own and all of the samples, or one or four that are drawn for each prompt.
- Made grids differ in shape, noise, prompts, samples and number of α; each replay draws new rewards.

`null` counts verdicts α > 0 where no α is better: α permuted once per prompt, all of its samples together, and made
grids in which α's are as good as 0, or worse, with equal and unequal noise, symmetric and skewed. At 5 %, 67 of 1,000
are 2.5 standard errors above what is expected.

`engines` runs `expo sweep` on a trio twice, a grid and a race, each into a folder of its own, and fails unless both
choose the same α, and the race takes half of the grid's tokens or less and its rows are the grid's.

Figures are appended to race.jsonl in --work, and tables printed. A grid is recorded, with many samples, by

    expo sweep --sft SFT --dpo DPO --reward-model RM --task prompts.jsonl --n 16 --alpha 0.5 --alpha 1 --alpha 2 \
        --alpha 4 --output grid

    python benchmarks/race.py race null --recorded grid --work /tmp/expo-race
    python benchmarks/race.py race --replays 20 --prompts 60 --kinds flat cliff --refine
    python benchmarks/race.py engines --trio demo-output --sweep "--alpha 1 --alpha 2 --alpha 4 --alpha 8 --n 4"
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from race_grids import ALPHAS, BEYOND, KINDS, NULLS, Column, Grid, made, recorded, replayed, values_of

from expo.config import SweepConfig
from expo.stats.means import Whole
from expo.verbs.sweep.confirm import confirm
from expo.verbs.sweep.order import Order, put_in_order
from expo.verbs.sweep.race import ALIKE, HALF, NONE_LEFT, ONE_LEFT, USED_UP, Answered, Course, Rules, race
from expo.verbs.sweep.race_plan import SLICES

CONFIRM, CONFIDENCE, INDIFFERENCE = SweepConfig.confirm, SweepConfig.confidence, SweepConfig.indifference
RESAMPLES = 1_999
"""Draws: p of a look is only compared with δ_k, of 0.005 or more."""
WORSE_THAN_GRID, OF_TOKENS, OF_NULLS = 0.05, 0.5, 0.067
"""What must hold."""
ENDS = {ALIKE: "alike", ONE_LEFT: "one", NONE_LEFT: "none", HALF: "half", USED_UP: "used up"}
MEANS = ("regret", "of grid", "beyond", "tokens", "as grid")
SIDES = {"sft": "sft", "dpo": "dpo", "reward-model": "rm", "task": "prompts.jsonl"}
SAMPLES = (1, 4)


# --- a replay -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of a race."""

    confirm: float = CONFIRM
    confidence: float = CONFIDENCE
    indifference: float = INDIFFERENCE
    slices: int = SLICES
    refine: bool = False


@dataclass(frozen=True)
class Replay:
    """What came of one race."""

    candidate: float
    shown: bool
    regret: float
    of_grid: float
    """The regret of the grid's own choice by means."""
    tokens: float
    """Share of the grid's."""
    agrees: bool
    """Whether the candidate is the α with the grid's highest mean."""
    ends: str
    looks: int
    lost_best: bool
    """Whether the best α was dropped."""


def replay(grid: Grid, settings: Settings, seed: int) -> Replay:
    """Race, confirm, and compare with the grid."""
    order = put_in_order(grid.prompts, seed=seed, confirm=settings.confirm)
    places = {one.id: place for place, one in enumerate(grid.prompts)}
    columns: dict[float, Column] = {alpha: grid.column(alpha) for alpha in grid.alphas}
    course = _run(grid, _rules(order, settings), places, order, columns)
    candidate = course.ranking[0] if course.ranking else 0.0
    aside = [places[name] for name in order.to_confirm]
    samples = columns[0.0].rewards.shape[1]
    clusters = np.repeat(np.arange(len(aside)), samples)
    one, zero = (columns[alpha].rewards[aside].ravel() for alpha in (candidate, 0.0))
    means = {alpha: float(np.nanmean(columns[alpha].rewards)) for alpha in grid.alphas}
    choice = max(grid.alphas, key=lambda alpha: means[alpha])
    cost = sum(
        _tokens(columns[alpha], [places[name] for name in order.in_race(count)])
        for alpha, count in _answered(course).items()
    )
    cost += sum(_tokens(columns[alpha], aside) for alpha in (candidate, 0.0)) if candidate else 0.0
    return Replay(
        candidate,
        bool(candidate) and confirm(candidate, one, zero, clusters, resamples=RESAMPLES).is_shown,
        grid.regret(candidate),
        grid.regret(choice),
        cost / sum(float(np.nansum(columns[alpha].tokens)) for alpha in grid.alphas),
        candidate == choice,
        ENDS[course.last.ends or ""],
        len(course.looks),
        grid.best in course.dropped,
    )


def _rules(order: Order, settings: Settings) -> Rules:
    size = max(SLICES, len(order.race) // settings.slices)
    return Rules(
        len(order.race),
        len(order.confirmation),
        size,
        settings.confidence,
        settings.indifference,
        settings.refine,
        RESAMPLES,
    )


def _run(grid: Grid, rules: Rules, places: Mapping[str, int], order: Order, columns: dict[float, Column]) -> Course:
    samples = columns[0.0].rewards.shape[1]
    clusters: Whole = np.repeat(np.arange(len(order.race)), samples)
    running = race(rules, grid.alphas, clusters)
    ask = next(running)
    while True:
        rows = [places[name] for name in order.in_race(ask.questions)]
        for alpha in ask.alphas:
            if alpha not in columns:
                columns[alpha] = grid.column(alpha)
        answered = {
            alpha: Answered(*(values[rows].ravel() for values in values_of(columns[alpha]))) for alpha in ask.alphas
        }
        try:
            ask = running.send(answered)
        except StopIteration as end:
            return end.value


def _answered(course: Course) -> dict[float, int]:
    """α → the questions of the race that it answered."""
    return {alpha: look.questions for look in course.looks for alpha in (*look.means, *look.unscored)}


def _tokens(column: Column, rows: Sequence[int]) -> float:
    return float(np.nansum(column.tokens[rows]))


# --- many replays ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Replays of one kind of grid."""

    name: str
    alphas: int
    prompts: int
    samples: int | None
    """None for all that were recorded."""
    replays: int
    settings: Settings
    permuted: bool = False
    null: bool = False
    folder: Path | None = None
    first_seed: int = 0

    def grid(self, seed: int) -> Grid:
        """The grid of a replay."""
        if self.folder is not None:
            return replayed(recorded(self.folder), self.samples, seed, permuted=self.permuted)
        kind = ({**NULLS, **BEYOND} if self.null else KINDS)[self.name]
        return made(kind, ALPHAS[self.alphas], self.prompts, self.samples or 1, seed, permuted=self.permuted)


def replays(task: Task) -> list[Replay]:
    """All replays of a task, a seed for each."""
    seeds = range(task.first_seed, task.first_seed + task.replays)
    return [replay(task.grid(seed), task.settings, seed) for seed in seeds]


def figures(task: Task, found: Sequence[Replay]) -> dict[str, Any]:
    """A row of the table."""
    regret, of_grid, tokens = (
        np.array([getattr(one, name) for one in found]) for name in ("regret", "of_grid", "tokens")
    )
    ends = Counter(one.ends for one in found)
    return {
        "grid": task.name + (", permuted" if task.permuted else ", refined" if task.settings.refine else ""),
        "null": task.null or task.permuted,
        "alphas": task.alphas,
        "prompts": task.prompts,
        "samples": task.samples or "all",
        "replays": len(found),
        "regret": float(regret.mean()),
        "of grid": float(of_grid.mean()),
        "beyond": float((regret - of_grid).mean()),
        "error of beyond": float((regret - of_grid).std() / np.sqrt(len(found))),
        "tokens": float(tokens.mean()),
        "most tokens": float(tokens.max()),
        "alpha above 0": sum(one.shown for one in found),
        "as grid": float(np.mean([one.agrees for one in found])),
        "best dropped": sum(one.lost_best for one in found),
        "looks": float(np.mean([one.looks for one in found])),
        "ends": dict(ends.most_common()),
        "settings": asdict(task.settings),
    }


def is_met(row: Mapping[str, Any]) -> bool:
    """Whether a row holds what is promised."""
    if row["null"]:
        return bool(row["alpha above 0"] <= OF_NULLS * row["replays"])
    return bool(row["beyond"] <= WORSE_THAN_GRID and row["tokens"] <= OF_TOKENS)


def by_kind(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each kind of grid: the mean of its sizes, and the sum of what is counted."""
    for name in dict.fromkeys(row["grid"] for row in rows if not row["null"]):
        of = [row for row in rows if row["grid"] == name and not row["null"]]
        means = {key: float(np.mean([row[key] for row in of])) for key in MEANS}
        sums = {key: sum(row[key] for row in of) for key in ("replays", "alpha above 0")}
        ends = Counter[str]()
        for row in of:
            ends.update(row["ends"])
        sizes = dict.fromkeys(("alphas", "prompts", "samples"), "")
        most = max(row["most tokens"] for row in of)
        yield {**sizes, **means, **sums, "grid": name, "null": False, "most tokens": most, "ends": ends}


def as_table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, a line per row."""
    yield "| grid | α | prompts | samples | regret | the grid's | tokens | most | α > 0 | as the grid | ends | holds |"
    yield "|" + " --- |" * 12
    for row in rows:
        ends = ", ".join(f"{name} {round(100 * count / row['replays'])} %" for name, count in row["ends"].items())
        yield (
            f"| {row['grid']} | {row['alphas']} | {row['prompts']} | {row['samples']} | {row['regret']:.3f} | "
            f"{row['of grid']:.3f} | {row['tokens']:.0%} | {row['most tokens']:.0%} | {row['alpha above 0']} of "
            f"{row['replays']:,} | {row['as grid']:.0%} | {ends} | {'yes' if is_met(row) else 'NO'} |"
        )


def recorded_tasks(asked: argparse.Namespace, settings: Settings) -> Iterator[Task]:
    """Of each recorded grid, with one, four and all samples."""
    for folder in asked.recorded:
        there = recorded(folder)
        for samples in (1, 4, None):
            size = (folder.name, len(there.alphas), len(there.prompts), samples)
            if "race" in asked.what:
                yield Task(*size, asked.replays, settings, folder=folder)
            if "null" in asked.what:
                yield Task(*size, asked.nulls, settings, permuted=True, folder=folder)


def race_tasks(asked: argparse.Namespace, settings: Settings) -> Iterator[Task]:
    """Of each made grid, where the truth is a curve with --refine too, which begins with few α far apart."""
    refined = replace(settings, refine=True)
    for name, prompts, samples in product(asked.kinds, asked.prompts, SAMPLES):
        for alphas in asked.alphas:
            yield Task(name, alphas, prompts, samples, asked.replays, settings)
        if asked.refine and KINDS[name].is_curve:
            yield Task(name, 3, prompts, samples, asked.replays, refined)


def null_tasks(asked: argparse.Namespace, settings: Settings) -> Iterator[Task]:
    """Of made grids in which no α is better than 0."""
    if asked.beyond:
        for name, prompts, samples in product(BEYOND, asked.prompts, SAMPLES):
            yield Task(name, 4, prompts, samples, asked.nulls, settings, null=True)
        return
    for prompts, samples in product(asked.prompts, SAMPLES):
        yield Task("cliff", 6, prompts, samples, asked.nulls, settings, permuted=True)
        yield Task("one noisy", 4, prompts, samples, asked.nulls, settings, permuted=True)
        for name in NULLS:
            yield Task(name, 4, prompts, samples, asked.nulls, settings, null=True)


def engines(trio: Path, settings: Sequence[str], work: Path) -> int:
    """A grid and a race of a folder with sft, dpo, rm and prompts.jsonl; 1 where the race does not do as it should."""
    rows, taken = dict[str, dict[str, list[str]]](), dict[str, dict[str, Any]]()
    models = [word for side, name in SIDES.items() for word in (f"--{side}", str(trio / name))]
    for search in ("grid", "race"):
        folder = work / search
        shutil.rmtree(folder, ignore_errors=True)
        words = [*models, "--search", search, "--output", str(folder), *settings]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "expo", "sweep", *words], check=True)
        metas = [json.loads(file.read_text()) for file in sorted(folder.glob("outputs_*/*.meta.json"))]
        record = json.loads((folder / "sweep.json").read_text())
        taken[search] = {
            "seconds": round(time.perf_counter() - started, 1),
            "tokens": sum(meta["tokens_out"] for meta in metas),
            "best": record["best_alpha"],
            "verdict": record["verdict"],
        }
        rows[search] = {file.name: file.read_text().splitlines() for file in folder.glob("outputs_*/*.jsonl")}
    same = all(set(lines) <= set(rows["grid"].get(name, lines)) for name, lines in rows["race"].items())
    share = taken["race"]["tokens"] / taken["grid"]["tokens"]
    print(json.dumps({**taken, "share": share, "rows_are_the_grids": same}, indent=2, ensure_ascii=False))
    met = same and share <= OF_TOKENS and taken["race"]["best"] == taken["grid"]["best"]
    return 0 if met else 1


def main() -> int:
    """Replay, append figures, print the tables; 1 where a kind of grid, or a null, does not hold what is promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["race", "null", "engines"])
    parser.add_argument("--recorded", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, default=Path("/tmp/expo-race"))
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--nulls", type=int, default=1000)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompts", type=int, nargs="*", default=[60, 100, 300, 1000])
    parser.add_argument("--alphas", type=int, nargs="*", choices=ALPHAS, default=[6])
    parser.add_argument("--refine", action="store_true", help="with --refine, too")
    parser.add_argument("--beyond", action="store_true", help="of nulls, those for which 5 %% is not promised")
    parser.add_argument("--confirm", type=float, default=CONFIRM)
    parser.add_argument("--confidence", type=float, default=CONFIDENCE)
    parser.add_argument("--indifference", type=float, default=INDIFFERENCE)
    parser.add_argument("--slices", type=int, default=SLICES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--trio", type=Path, default=Path("demo-output"), help="as the demo makes it")
    parser.add_argument("--sweep", type=shlex.split, default=[], help="settings of both sweeps of `engines`")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.what == ["engines"]:
        return engines(asked.trio, asked.sweep, asked.work)
    rows = []
    settings = Settings(asked.confirm, asked.confidence, asked.indifference, asked.slices)
    tasks = list(recorded_tasks(asked, settings))
    tasks += race_tasks(asked, settings) if "race" in asked.what else ()
    tasks += null_tasks(asked, settings) if "null" in asked.what else ()
    with ProcessPoolExecutor(asked.processes) as pool, (asked.work / "race.jsonl").open("a") as file:
        for task, found in zip(tasks, pool.map(replays, tasks), strict=True):
            row = figures(task, found)
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            print(list(as_table(rows))[-1], flush=True)
    print("\n" + "\n".join(as_table(rows)))
    kinds = list(by_kind(rows))
    print("\n" + "\n".join(as_table(kinds)))
    return 0 if all(is_met(row) for row in (*kinds, *(row for row in rows if row["null"]))) else 1


if __name__ == "__main__":
    raise SystemExit(main())
