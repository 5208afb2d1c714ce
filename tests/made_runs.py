"""Runs of any size with plausible texts, lengths, finish reasons and rewards, made without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expo.files import json_lines
from expo.verbs.compare.run import RowKey, Run, RunRow

SUBSETS = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna")
WORDS = 6000
RM = "org/reward-model"


def vocabulary(rng: np.random.Generator) -> np.ndarray:
    """Made-up words, the common ones short."""
    parts = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "st", "ing")]
    sizes = 1 + np.minimum(np.arange(WORDS) ** 0.5 / 25, 4).astype(int)
    return np.array(["".join(rng.choice(parts, size)) for size in sizes])


def made_runs(
    prompts: int = 805,
    names: Sequence[str] = ("dpo", "expo-a0.5"),
    *,
    samples: int = 1,
    characters: int = 2200,
    reward_models: Sequence[str] = (RM,),
    alphas: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Run]:
    """Runs in which each model is better than the one before, and longer."""
    rng = np.random.default_rng(seed)
    words = vocabulary(rng)
    share = 1 / (np.arange(WORDS) + 2.7)
    share /= share.sum()

    def text(size: int) -> str:
        chosen = words[rng.choice(WORDS, max(size, 1), p=share)]
        lines = [" ".join(chosen[at : at + 60]).capitalize() + "." for at in range(0, len(chosen), 60)]
        return "\n\n".join(lines)

    asked = [f"{text(int(rng.integers(4, 40)))[:-1]}? ({number})" for number in range(prompts)]
    quality = rng.normal(0, 1, prompts)
    keys = [(number, sample) for number in range(prompts) for sample in range(samples)]
    runs = []
    for place, name in enumerate(names):
        sizes = np.maximum(1, rng.gamma(4, characters * (1 + 0.1 * place) / 24, len(keys))).astype(int)
        rows = tuple(
            RunRow(
                RowKey(f"key of {number}", sample),
                str(number),
                asked[number],
                (),
                text(size),
                SUBSETS[number % 5],
                int(1.3 * size),
                "length" if size > characters / 3.2 else "stop",
            )
            for (number, sample), size in zip(keys, sizes, strict=True)
        )
        rewards = {}
        for model in reward_models:
            noise = rng.normal(0.15 * place, 0.8, len(keys))
            values = quality[[number for number, _ in keys]] + noise + 0.0005 * sizes
            rewards[model] = tuple(float(np.float32(value)) for value in values)
        alpha = None if alphas is None else alphas[place]
        runs.append(Run(name, "alpaca", rows, rewards, alpha))
    return runs


def write_files(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """The runs as files of a task `made`: outputs, and rewards as the paper's code writes them."""
    files = []
    for run in runs:
        outputs, rewards = folder / "outputs_made" / f"{run.name}.jsonl", folder / "rewards_made" / f"{run.name}.jsonl"
        for file in (outputs, rewards):
            file.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "prompt": row.prompt,
                "output": row.output,
                "length": row.tokens,
                "finish_reason": row.finish_reason,
                "dataset": row.subset,
            }
            for row in run.rows
        ]
        outputs.write_text(json_lines(rows))
        rewards.write_text("".join(f"{reward}\n" for reward in next(iter(run.rewards.values()))))
        files.append(outputs)
    return files
