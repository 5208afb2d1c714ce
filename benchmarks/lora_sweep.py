"""A sweep of a LoRA pair with all α in one vLLM batch, beside one that loads each α.

Makes a Llama in float32 with the tokenizer of --model and a LoRA adapter of random values on all its linear layers. In
each round `expo sweep` is run with `--switch adapter` and with `--switch reload`, in turns in being first, each into an
empty folder; a first run of each, which is not counted, keeps what it proves. Prints the time of the whole command and
of the answers in it, and how many answers are the same.

    python benchmarks/lora_sweep.py --model SFT --reward-model RM --work /tmp/expo-lora-sweep
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from extrapolate import ratio
from lora_engine import HEADS, SHAPE, write_adapter
from switch import make_pair

WAYS = ("adapter", "reload")
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Round:
    """What one sweep took."""

    whole_s: float
    answers_s: float
    """The engine's, of all α."""


def sweep(options: argparse.Namespace, base: Path, adapter: Path, questions: Path, way: str) -> Round:
    """One command, from an empty folder."""
    folder = options.work / way
    shutil.rmtree(folder, ignore_errors=True)
    words = ["--sft", base, "--dpo", adapter, "--task", questions, "--reward-model", options.reward_model]
    words += [
        "--switch",
        way,
        "--output",
        folder,
        "--engine",
        "vllm",
        "--dtype",
        "float32",
        "--any-pair",
        "--top-k",
        -1,
    ]
    words += ["--max-tokens", options.tokens, *(word for alpha in ALPHAS for word in ("--alpha", alpha))]
    environment = {**os.environ, "EXPO_CACHE": str(options.work / "cache")}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "expo", "sweep", *map(str, words)], check=True, env=environment)
    whole = time.perf_counter() - began
    record = json.loads((folder / "sweep.json").read_text())
    assert record["switch"]["way"] == way, record["switch"]
    return Round(whole, record["clock"]["generate_seconds"])


def answers(folder: Path) -> dict[str, list[str]]:
    """The answers of each α."""
    files = sorted(folder.glob("outputs_*/*.jsonl"))
    return {file.name: [json.loads(line)["output"] for line in file.read_text().splitlines()] for file in files}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer the made model has")
    parser.add_argument("--reward-model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made; it is emptied")
    parser.add_argument("--prompts", type=int, default=48, help="of each α")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    made, _ = make_pair(options.model, options.work / "made", **SHAPE, **HEADS, vocab_size=vocabulary)
    base, adapter = in_float32(made, options.work / "sft"), write_adapter(made, options.work / "lora")
    questions = options.work / "questions.jsonl"
    rows = (json.dumps({"prompt": f"what is {number} and {number * 7 % 50} ?"}) for number in range(options.prompts))
    questions.write_text("\n".join(rows) + "\n")
    rounds: dict[str, list[Round]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            seen = sweep(options, base, adapter, questions, way)
            if number:
                rounds[way].append(seen)
    one, other = (answers(options.work / way) for way in WAYS)
    pairs = [pair for name in one for pair in zip(one[name], other[name], strict=True)]
    print("| --switch | rounds | command (range) | × reload | answers (range) | × reload |")
    print("|" + " --- |" * 6)
    for way, seen_of_way in rounds.items():
        cells = [way, str(len(seen_of_way))]
        for column in ("whole_s", "answers_s"):
            own, base_s = ([getattr(one, column) for one in rounds[which]] for which in (way, "reload"))
            cells += [f"{statistics.median(own):.1f} s ({min(own):.1f}–{max(own):.1f})", ratio(own, base_s)]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{sum(a == b for a, b in pairs)} of {len(pairs)} answers are the same")


def in_float32(folder: Path, to: Path) -> Path:
    """A model with its weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


if __name__ == "__main__":
    main()
