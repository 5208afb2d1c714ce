"""`--space logits` beside weights: reward and length at each α, which space ends higher, and what a token costs.

`expo sweep` is run once for each space, with the same prompts and random numbers. Every other prompt is one of the
search, on which each space's best α is the one of the highest mean; on the others, the confirmation, it is compared
with DPO and with the other space's. Then answers at α = 1 are made again in fresh engines, the spaces in turns in being
first: the time of the engine's steps over the tokens. A sweep that is there is gone on with, and not made again.

    python benchmarks/logit_space.py --sft SFT --dpo DPO --reward-model RM --prompts FILE --work /tmp/expo-logit-space
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extrapolate import ratio

from expo.config import GenerateConfig, SweepConfig
from expo.config.logit_space import Space
from expo.theta.names import theta_name
from expo.verbs import generate, sweep
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.figures import Paired
from expo.verbs.compare.pairing import of_rows
from expo.verbs.compare.reading import read_runs
from expo.verbs.compare.run import Run

SPACES: tuple[Space, ...] = ("weights", "logits")
ALPHAS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
TIMED_ALPHA = 1.0
CHARACTERS = 200


@dataclass(frozen=True)
class Found:
    """The runs of one space, by α."""

    space: Space
    runs: dict[float, Run]

    def best(self, rows: set[Any]) -> float:
        """The α above 0 of the highest mean reward over some rows."""
        return max(
            (alpha for alpha in self.runs if alpha > 0), key=lambda alpha: _mean(of_rows(self.runs[alpha], rows))
        )


def _mean(run: Run) -> float:
    (rewards,) = run.rewards.values()
    return statistics.fmean(reward for reward in rewards if reward is not None)


def questions(file: Path, work: Path) -> Path:
    """The prompts as a task's file: a list of texts becomes one, each cut as the tiny trio's were for its training."""
    if file.suffix != ".json":
        return file
    texts = [text[:CHARACTERS] for text in json.loads(file.read_text())]
    made = work / "prompts.jsonl"
    made.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return made


def decoding(options: argparse.Namespace, space: Space) -> dict[str, Any]:
    """What both commands are told."""
    pair = {"sft": str(options.sft), "dpo": str(options.dpo), "space": space, "engine": "transformers"}
    return {**pair, "n": options.n, "max_tokens": options.max_tokens, "limit": options.limit}


def swept(options: argparse.Namespace, task: Path, space: Space) -> Found:
    """Sweep one space, and read its runs."""
    folder, alphas = options.work / space, tuple(options.alpha or ALPHAS)
    settings = {**decoding(options, space), "task": str(task), "output": str(folder), "any_pair": True}
    sweep.run(SweepConfig(**settings, alpha=alphas, with_sft=True, reward_model=(str(options.reward_model),)))
    names = {alpha: theta_name(options.dpo.name, alpha, space=space) for alpha in (-1.0, 0.0, *sorted(alphas))}
    runs = read_runs(list(names.values()), task=str(task), output_dir=str(folder))
    return Found(space, dict(zip(names, runs, strict=True)))


def difference(base: Run, other: Run) -> Paired:
    """A run's reward less another's over the rows of both, with the 95 % interval of it alone."""
    left, right = (Run(name, one.task, one.rows, one.rewards) for name, one in (("base", base), ("other", other)))
    (table,) = compare([left, right], flips=0).tables
    (model,) = table.others
    assert model.paired is not None
    return model.paired


def shown(paired: Paired) -> str:
    """A difference with its interval."""
    if paired.difference is None or paired.interval is None:
        return "–"
    return f"{paired.difference:+.3f} [{paired.interval[0]:+.3f}, {paired.interval[1]:+.3f}]"


def curve(found: Sequence[Found]) -> Iterator[str]:
    """A row per α: each space's mean reward, difference from DPO, mean length, and share of answers that end."""
    yield "| α | " + " | ".join(f"{one.space}: reward | − DPO (95 %) | tokens | ended" for one in found) + " |"
    yield "|" + " --- |" * (1 + 4 * len(found))
    for alpha in sorted(found[0].runs):
        cells = []
        for one in found:
            run = one.runs[alpha]
            over = "–" if alpha == 0 else shown(difference(one.runs[0.0], run))
            tokens = statistics.fmean(row.tokens or 0 for row in run.rows)
            ended = statistics.fmean(row.finish_reason == "stop" for row in run.rows)
            cells += [f"{_mean(run):.3f}", over, f"{tokens:.1f}", f"{ended:.0%}"]
        yield f"| {alpha:g} | {' | '.join(cells)} |"


def confirmation(found: Sequence[Found]) -> Iterator[str]:
    """What each space's best α on the prompts of the search does on the others."""
    keys = [row.key for row in found[0].runs[0.0].rows]
    order = list(dict.fromkeys(key.prompt for key in keys))
    sought = {key for key in keys if order.index(key.prompt) % 2 == 0}
    others = set(keys) - sought
    best = {one.space: one.best(sought) for one in found}
    yield f"{len(order[::2])} prompts to search, {len(order[1::2])} to confirm, {len(others)} answers there:"
    yield "| | α | reward | − DPO (95 %) | tokens |"
    yield "| --- | --- | --- | --- | --- |"
    confirmed = {one.space: of_rows(one.runs[best[one.space]], others) for one in found}
    dpo = of_rows(found[0].runs[0.0], others)
    for name, alpha, run in (("DPO", 0.0, dpo), *((space, best[space], confirmed[space]) for space in SPACES)):
        tokens = statistics.fmean(row.tokens or 0 for row in run.rows)
        over = "–" if run is dpo else shown(difference(dpo, run))
        yield f"| {name} | {alpha:g} | {_mean(run):.3f} | {over} | {tokens:.1f} |"
    apart = difference(confirmed["weights"], confirmed["logits"])
    yield f"logits − weights on the confirmation: {shown(apart)}"


def cost(options: argparse.Namespace, task: Path) -> Iterator[str]:
    """Seconds of the engine for a token, both spaces in turns."""
    seconds: dict[Space, list[float]] = {space: [] for space in SPACES}
    for number in range(options.rounds + 1):
        for space in SPACES[:: 1 if number % 2 else -1]:
            folder = options.work / "timed"
            shutil.rmtree(folder, ignore_errors=True)
            settings = {**decoding(options, space), "task": str(task), "output_dir": str(folder), "n": 1}
            made = generate.run(GenerateConfig(**settings, alpha=TIMED_ALPHA))
            meta = json.loads(made.meta.read_text())
            if number:  # the first of each warms up
                seconds[space].append(meta["engine_step_seconds"] / meta["tokens_out"])
    each = ", ".join(f"{space} {1e6 * statistics.median(values):.0f} µs" for space, values in seconds.items())
    yield (
        f"A generated token at α = {TIMED_ALPHA:g}, medians of {options.rounds} runs: {each}; logits/weights "
        f"{ratio(seconds['logits'], seconds['weights'])}"
    )


def say(lines: Iterable[str]) -> None:
    """Print a block."""
    print("\n".join(lines), end="\n\n", flush=True)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--sft", "--dpo", "--reward-model", "--prompts", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--alpha", type=float, action="append", help=f"default: {' '.join(f'{a:g}' for a in ALPHAS)}")
    parser.add_argument("--n", type=int, default=2, help="samples per prompt")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    task = questions(options.prompts, options.work)
    found = [swept(options, task, space) for space in SPACES]
    say(curve(found))
    say(confirmation(found))
    say(cost(options, task))


if __name__ == "__main__":
    main()
