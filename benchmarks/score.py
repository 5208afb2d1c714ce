"""How fast `expo score` is beside the paper's way, and whether all ways give the same rewards.

Runs whole processes on AlpacaEval output files with a reward model, each way once a round, in an order drawn at random:

- `paper`: a plain script: padded batches of 8 in input order, with the attention mask, float32,
- `transformers`, `vllm`: `expo score --engine …`, float32,
- `alone` (once, with `--check`): a plain float32 loop, one row at a time, to compare with.

Prints Markdown: medians of the scoring phase (from the loaded model to the last row) and of the whole process, their
ratios to the paper's way, what its padding alone is worth (padded tokens of batches of 8 in input order over real
tokens), the padding that expo computes, and the largest difference of any row's reward between two ways.

    python benchmarks/score.py OUTPUTS.json … --reward-model MODEL --rounds 5
    python benchmarks/score.py OUTPUTS.json … --reward-model MODEL --large --dtype bfloat16 --ways paper transformers

With `--in-process` one process loads the model once and runs the paper's loop and expo's transformers engine in turn:
the scoring phases alone. With `--large` a random Llama of 1.1 billion parameters scores, with the tokenizer of MODEL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from expo.cli.program import PROCESS_ENVIRONMENT
from expo.config import ScoreConfig
from expo.engines.batches import tight_batches
from expo.engines.transformers_reward import CPU_BATCH_TOKENS, TransformersScorer
from expo.verbs.score import plan

ENVIRONMENT = {**PROCESS_ENVIRONMENT, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}

PLAIN = """
import json, sys, time

def main():
    model_name, outputs, limit, batch, longest, dtype, result = sys.argv[1:]
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = json.load(open(outputs))[: int(limit) or None]
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, dtype=dtype).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    pad = model.config.pad_token_id or 0
    roles = ("user", "instruction"), ("assistant", "output")
    chats = [[{"role": role, "content": row[column]} for role, column in roles] for row in rows]
    ids = [one[: int(longest)] for one in tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False)]
    rewards, started = [], time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(ids), int(batch)):
            some = ids[first : first + int(batch)]
            width = max(map(len, some))
            padded = torch.tensor([one + [pad] * (width - len(one)) for one in some], device=device)
            mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in some], device=device)
            rewards += model(input_ids=padded, attention_mask=mask).logits[:, 0].tolist()
    json.dump({"seconds": time.perf_counter() - started, "rewards": rewards}, open(result, "w"))

if __name__ == "__main__":
    main()
"""


def run(way: str, outputs: Path, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One process: seconds of the scoring phase, of the whole, and the rewards."""
    model, limit = asked.reward_model, asked.limit or 0
    result = folder / "result.json"
    if way in ("paper", "alone"):
        script = folder / "plain.py"
        script.write_text(PLAIN)
        words = [script, model, outputs, limit, 8 if way == "paper" else 1, asked.longest, asked.dtype, result]
    else:
        words = ["-m", "expo", "score", "alpaca", "--name", "x", "--outputs", outputs, "--reward-model", model]
        words += ["--engine", way, "--dtype", asked.dtype, "--output-dir", folder / "out", "--overwrite"]
        words += ["--limit", limit] if limit else []
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{way} failed: {done.stderr}")
    if way in ("paper", "alone"):
        found = json.loads(result.read_text())
        return {"whole": whole, "scoring": found["seconds"], "rewards": found["rewards"]}
    written = folder / "out" / "rewards_alpaca"
    meta = json.loads((written / "x.meta.json").read_text())
    rewards = [json.loads(line) for line in (written / "x.jsonl").read_text().splitlines()]
    return {"whole": whole, "scoring": meta["score_seconds"], "rewards": rewards}


def padding(outputs: Path, asked: argparse.Namespace) -> tuple[int, float, float]:
    """Real tokens; padded over real tokens of batches of 8 in input order, and of expo's."""
    config = ScoreConfig(
        task="alpaca", name="x", outputs=str(outputs), reward_model=asked.reward_model, limit=asked.limit
    )
    job = plan(config)
    lengths = [len(row.token_ids) for row in job.rows]
    eights = [range(first, min(first + 8, len(lengths))) for first in range(0, len(lengths), 8)]
    own = tight_batches(lengths, config.batch_tokens if torch.cuda.is_available() else CPU_BATCH_TOKENS)
    padded = [sum(max(lengths[n] for n in batch) * len(batch) for batch in way) for way in (eights, own)]
    return sum(lengths), padded[0] / sum(lengths), padded[1] / sum(lengths)


def make_large(like: Path, folder: Path) -> Path:
    """A random reward model of 1.1 billion parameters in bfloat16, 2.2 GB, with the tokenizer of another."""
    shape = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig.from_pretrained(like, **shape, intermediate_size=5632, head_dim=64, num_labels=1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForSequenceClassification(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def in_process(outputs: Path, asked: argparse.Namespace) -> None:
    """The scoring phases of the paper's loop and of the engine, in turn, with one model each in this process."""
    config = ScoreConfig(task="alpaca", name="x", outputs=str(outputs), reward_model=asked.reward_model)
    job = plan(replace(config, dtype=asked.dtype, limit=asked.limit))
    rows = [row.token_ids for row in job.rows]
    scorer = TransformersScorer(job.setup)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(asked.reward_model, dtype=asked.dtype).to(device).eval()

    def paper() -> list[float]:
        pad, rewards = model.config.pad_token_id or 0, []
        with torch.inference_mode():
            for first in range(0, len(rows), 8):
                some = rows[first : first + 8]
                width = max(map(len, some))
                padded = torch.tensor([[*one, *[pad] * (width - len(one))] for one in some], device=device)
                mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in some], device=device)
                rewards += model(input_ids=padded, attention_mask=mask).logits[:, 0].tolist()
        return rewards

    def expo() -> list[float]:
        found = dict(pair for batch in scorer.score(rows) for pair in batch)
        return [found[number] for number in range(len(rows))]

    tokens, worth, own = padding(outputs, asked)
    seconds: dict[str, list[float]] = {"paper": [], "expo": []}
    for way in (paper, expo):  # once for the caches, not timed, on a part
        rows, whole = rows[:64], rows
        way()
        rows = whole
    for _ in range(asked.rounds):
        rewards = {}
        for way in (paper, expo):
            started = time.perf_counter()
            rewards[way.__name__] = way()
            seconds[way.__name__].append(time.perf_counter() - started)
    print(f"\n{outputs.stem}, {asked.dtype}: {tokens:,} tokens; padding is worth {worth:.2f}, expo's {own:.3f}\n")
    for way, times in seconds.items():
        median = statistics.median(times)
        print(f"{way}: {median:.2f} s ({min(times):.2f}–{max(times):.2f}), {tokens / median:,.0f} tokens/s")
    ratios = [one / other for one, other in zip(seconds["paper"], seconds["expo"], strict=True)]
    apart = max(abs(one - other) for one, other in zip(rewards["paper"], rewards["expo"], strict=True))
    print(f"paper / expo: {statistics.median(ratios):.2f}; largest difference of a row: {apart:.1e}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("outputs", nargs="+", type=Path)
    parser.add_argument("--reward-model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--ways", nargs="+", default=["paper", "transformers", "vllm"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--large", action="store_true", help="a random model of 1.1 billion parameters")
    parser.add_argument("--in-process", action="store_true", help="the scoring phases alone")
    parser.add_argument("--check", action="store_true", help="also compare with a loop over single rows")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as large:
        if asked.large:
            asked.reward_model = str(make_large(Path(asked.reward_model), Path(large)))
        for outputs in asked.outputs:
            if asked.in_process:
                in_process(outputs, asked)
                continue
            with tempfile.TemporaryDirectory() as folder:
                measure(outputs, asked, Path(folder))


def measure(outputs: Path, asked: argparse.Namespace, folder: Path) -> None:
    """The table of one file."""
    tokens, worth, own = padding(outputs, asked)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in asked.ways}
    for _ in range(asked.rounds):
        for way in random.sample(asked.ways, len(asked.ways)):
            runs[way].append(run(way, outputs, asked, folder))
    if asked.check:
        runs["alone"] = [run("alone", outputs, asked, folder)]
    print(f"\n{outputs.stem}: {tokens:,} tokens; the padding of batches of 8 is worth {worth:.2f}, expo's {own:.3f}\n")
    print("| way | scoring, s | tokens/s | whole process, s | scoring: paper / way |\n| --- | --- | --- | --- | --- |")
    medians = {way: [statistics.median(one[key] for one in runs[way]) for key in ("scoring", "whole")] for way in runs}
    for way, (scoring, whole) in medians.items():
        ratio = f"{medians['paper'][0] / scoring:.2f}" if "paper" in medians else ""
        print(f"| {way} | {scoring:.2f} | {tokens / scoring:,.0f} | {whole:.1f} | {ratio} |")
    print()
    for one, other in itertools.combinations(runs, 2):
        pairs = zip(runs[one][0]["rewards"], runs[other][0]["rewards"], strict=True)
        print(f"largest difference of a row, {one} and {other}: {max(abs(a - b) for a, b in pairs):.1e}", flush=True)


if __name__ == "__main__":
    main()
