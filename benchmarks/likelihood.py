"""Whether likelihoods of preference pairs foretell the α that rewards choose, and at what cost.

A trio is swept twice: `expo sweep` with its reward model, and `expo sweep --likelihood` on preference pairs. Shown are
the rewards and the measures of every α, where each is highest, the rank correlation of each measure with the reward
over α ≥ 0, and what both took. Pairs are those of `--pairs`, or `--judged` for the demo's task (two answers to each
held-out prompt, judged by its hidden quality), or `--answers` (two files of AlpacaEval's model outputs, the better
model's first).

`--control` then asks whether a race would need fewer tokens with the pairs' margins as a control variate
(arXiv 2605.10405): y − b (c − c̄), where y is a prompt's reward above that at α = 0, c its margin above that at α = 0,
and c̄ the mean over all prompts, which costs no answer. The correlation of y and c, and what is left of the variance,
1 − ρ², are shown by α, and races are replayed (`race.py`) on rewards with and without it. b is fitted to all of the
rewards that a race would not have, which favours the control.

    python benchmarks/likelihood.py --trio demo-output --judged 8 --alpha 1 --alpha 2 --alpha 4 --alpha 8 --control
    python benchmarks/likelihood.py --trio demo-output --pairs pairs.jsonl --alpha 0.5 --alpha 1 --alpha 2
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from race import Settings, replay
from race_grids import Column, Grid, recorded, replayed
from scipy.stats import spearmanr

from expo.files import json_text
from expo.stats.means import Floats

MEASURES = ("accuracy", "accuracy_per_token", "margin", "margin_per_token")
LETTERS = 400
"""To which prompts and answers of `--answers` are cut: the shared trio was trained on short ones."""
MODELS = {"--sft": "sft", "--dpo": "dpo", "--reward-model": "rm", "--prompts": "prompts.jsonl"}


# --- pairs ----------------------------------------------------------------------------------------------------------


def judged(prompts: Sequence[str], each: int) -> Iterator[dict[str, str]]:
    """Pairs of ordinary answers of the demo's task, which its hidden quality tells apart."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from demo import task

    rng = random.Random(0)
    for prompt in prompts:
        for _ in range(each):
            answers = [task.write_answer(prompt, rng) for _ in range(2)]
            worse, better = sorted(answers, key=lambda answer: task.quality(prompt, answer))
            yield {"prompt": prompt, "chosen": better, "rejected": worse}


def answered(prompts: Sequence[str], better: Path, worse: Path) -> Iterator[dict[str, str]]:
    """Pairs of two models' answers to AlpacaEval's instructions."""
    of = [{row["instruction"]: row["output"] for row in json.loads(file.read_text())} for file in (better, worse)]
    for prompt in prompts:
        chosen, rejected = (answers[prompt][:LETTERS] for answers in of)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_prompts(file: Path) -> list[str]:
    """A list of texts, or a file of rows with a prompt."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return [str(prompt) for prompt in json.loads(text)]
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def write_rows(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    """A file of rows."""
    file.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")
    return file


# --- both sweeps ----------------------------------------------------------------------------------------------------


def swept(words: Sequence[object], folder: Path) -> float:
    """Run `expo sweep`; its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "expo", "sweep", *map(str, words), "--output", str(folder)], check=True)
    return time.perf_counter() - started


def table(rewards: dict[str, Any], pairs: dict[str, Any]) -> Iterator[str]:
    """Markdown, a line per α."""
    yield "| α | reward above α = 0 | accuracy | per token | margin | per token | linear |"
    yield "|" + " --- |" * 7
    of = {one["alpha"]: one for one in rewards["alphas"]}
    for one in pairs["alphas"]:
        reward = of.get(one["alpha"])
        shown = "" if reward is None or reward.get("difference") is None else f"{reward['difference']:+.3f}"
        if shown and reward is not None and reward.get("interval"):
            shown += f" [{', '.join(f'{end:+.3f}' for end in reward['interval'])}]"
        figures = [f"{100 * one[name]['mean']:.1f} %" for name in MEASURES[:2]]
        figures += [f"{one['margin']['mean']:+.2f}", f"{one['margin_per_token']['mean']:+.4f}"]
        linear = "" if one["linear"] is None else f"{one['linear']:.3f}"
        yield f"| {one['alpha']:g} | {shown} | {' | '.join(figures)} | {linear} |"


def foretold(rewards: dict[str, Any], pairs: dict[str, Any]) -> Iterator[str]:
    """Where the reward and each measure are highest, and how they agree over α ≥ 0."""
    means = {one["alpha"]: one["mean"] for one in rewards["alphas"] if one["alpha"] >= 0}
    of = {one["alpha"]: one for one in pairs["alphas"]}
    alphas = sorted(means.keys() & of.keys())
    top = max(alphas, key=lambda alpha: means[alpha])
    yield f"reward: highest at α = {top:g}, chosen: α = {rewards['best_alpha']:g}"
    for name in MEASURES:
        values = [of[alpha][name]["mean"] for alpha in alphas]
        best = alphas[int(np.argmax(values))]
        rank = spearmanr([means[alpha] for alpha in alphas], values).statistic
        lost = means[top] - means[best]
        yield f"{name}: highest at α = {best:g} (reward {lost:.3f} below the highest), rank correlation {rank:+.2f}"
    yield f"linear up to α = {pairs['linear_up_to']:g}"


# --- a control variate ----------------------------------------------------------------------------------------------


def controls(folder: Path, name: str, pairs: Sequence[dict[str, str]], prompts: Sequence[str]) -> dict[float, Floats]:
    """α → the mean margin above α = 0 of each prompt's pairs, in the order of the prompts."""
    margins: dict[float, Floats] = {}
    for one in json.loads((folder / "likelihood.json").read_text())["alphas"]:
        rows = (folder / f"likelihood_{name}" / f"{one['name']}.jsonl").read_text().splitlines()
        by_prompt = defaultdict(list)
        for line in rows:
            row = json.loads(line)
            by_prompt[pairs[int(row["id"])]["prompt"]].append(row["chosen"] - row["rejected"])
        margins[one["alpha"]] = np.array([np.mean(by_prompt[prompt]) for prompt in prompts])
    return {alpha: own - margins[0.0] for alpha, own in margins.items()}


def controlled(grid: Grid, by_alpha: dict[float, Floats], slopes: dict[float, float]) -> Grid:
    """The grid with each prompt's control taken off its rewards."""

    def column(alpha: float) -> Column:
        own = grid.column(alpha)
        off = slopes.get(alpha, 0.0) * (by_alpha[alpha] - by_alpha[alpha].mean())  # (prompts,)
        return replace(own, rewards=own.rewards - off[:, None])

    return replace(grid, column=column)


def control(folder: Path, by_alpha: dict[float, Floats], count: int) -> Iterator[str]:
    """How much of the rewards' variance the control takes, and what races need with it."""
    there, slopes = recorded(folder), dict[float, float]()
    differences = there.values[0] - there.values[0][..., :1]  # (prompts, samples, α)
    for place, alpha in enumerate(there.alphas):
        if alpha:
            y, c = np.nanmean(differences[..., place], axis=1), by_alpha[alpha]
            rho = float(np.corrcoef(y, c)[0, 1])
            slopes[alpha] = rho * float(y.std() / c.std())
            yield f"α = {alpha:g}: correlation {rho:+.3f}, {1 - rho**2:.3f} of the variance of a prompt's mean is left"
    for samples in (1, None):
        for name, made in (("without", None), ("with", slopes)):
            found = []
            for seed in range(count):
                grid = replayed(there, samples, seed)
                found.append(replay(grid if made is None else controlled(grid, by_alpha, made), Settings(), seed))
            tokens, regret = (float(np.mean([getattr(one, what) for one in found])) for what in ("tokens", "regret"))
            shown = sum(one.shown for one in found)
            yield (
                f"races {name} the control, {samples or 'all'} samples: {tokens:.1%} of the grid's tokens, "
                f"regret {regret:.3f}, α > 0 in {shown} of {count}"
            )


def main() -> None:
    """Sweep twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trio", type=Path, help="a folder with sft, dpo, rm and prompts.jsonl, as the demo writes")
    for name in MODELS:
        parser.add_argument(name, type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--judged", type=int, metavar="N", help="pairs of the demo's task for each prompt")
    parser.add_argument("--answers", type=Path, nargs=2, metavar=("BETTER", "WORSE"))
    parser.add_argument("--alpha", action="append", required=True)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("/tmp/expo-likelihood"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    sft, dpo, reward, prompts_file = (
        getattr(asked, flag[2:].replace("-", "_")) or asked.trio / name for flag, name in MODELS.items()
    )
    prompts = read_prompts(prompts_file)[: asked.limit]
    if asked.judged:
        pairs = list(judged(prompts, asked.judged))
    elif asked.answers:
        pairs = list(answered(prompts, *asked.answers))
    else:
        pairs = [json.loads(line) for line in asked.pairs.read_text(encoding="utf-8").splitlines()]
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    task = write_rows(asked.work / "prompts.jsonl", [{"prompt": prompt[:LETTERS]} for prompt in prompts])
    rows = [{**pair, "prompt": pair["prompt"][:LETTERS]} for pair in pairs]
    file = write_rows(asked.work / "pairs.jsonl", rows)
    both = ["--sft", sft, "--dpo", dpo, *(word for alpha in asked.alpha for word in ("--alpha", alpha)), "--overwrite"]
    sampling = ["--task", task, "--n", asked.n, "--max-tokens", asked.max_tokens, "--engine", "transformers"]
    folder = asked.work / "sweep"
    seconds = swept([*both, *sampling, "--reward-model", reward, "--any-pair"], folder)
    quick = swept([*both, "--likelihood", file], folder)
    rewards, found = (json.loads((folder / name).read_text()) for name in ("sweep.json", "likelihood.json"))
    print(f"\n{len(prompts)} prompts × {asked.n} answers per α; {found['pairs']['read']} pairs\n")
    print("\n".join(table(rewards, found)), "\n")
    print("\n".join(foretold(rewards, found)))
    metas = [json.loads(one.read_text()) for one in folder.glob("outputs_*/*.meta.json")]
    tokens = sum(meta["tokens_out"] for meta in metas) / len(metas)
    read = found["clock"]["tokens"] / len(found["alphas"])
    print(f"an α took {tokens:,.0f} generated tokens, and {read:,.0f} read ones")
    print(f"the sweep took {seconds:.1f} s, that of likelihoods {quick:.1f} s ({quick / seconds:.2f} of it)")
    if asked.control:
        short = [prompt[:LETTERS] for prompt in prompts]
        print("\n".join(control(folder, controls(folder, "pairs", rows, short), asked.replays)))


if __name__ == "__main__":
    main()
