"""What it costs to make θ(α) while an engine loads, beside loading a written checkpoint of it.

Makes a pair of Llamas with the tokenizer of --model and a large embedding, writes θ(α) of it, and answers one prompt
with each, in turn: `expo generate --model` and `expo generate --sft --dpo --alpha`. Prints peak resident memory of the
process (the model itself included, measured from a small process as time(1) does) and wall time, as Markdown. On a CPU
engines run in this one process, so that their memory is in the figure.

    python benchmarks/loading.py --model MODEL --work /tmp/expo-loading
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
from pathlib import Path

from extrapolate import ALPHA, Run, measure
from switch import make_pair

from expo.cli.program import PROCESS_ENVIRONMENT

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 64_000,
    "tie_word_embeddings": False,
}
ENGINES = ("transformers", "vllm")
DTYPES = ("bfloat16", "float32")


def nbytes(folder: Path) -> int:
    """Of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a small Llama with a chat template")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder with room for 3 GB; removed again")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {name: value for name, value in PROCESS_ENVIRONMENT.items() if name not in os.environ}
    sft, dpo = make_pair(options.model, options.work, **SHAPE)
    written, prompts = options.work / "written", options.work / "prompts.jsonl"
    expo = [sys.executable, "-m", "expo"]
    pair = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", str(ALPHA)]
    measure([*expo, "extrapolate", *pair, "--output", str(written)])
    prompts.write_text('{"prompt": "hello"}\n')
    generate = [*expo, "generate", str(prompts), "--max-tokens", "1", "--overwrite", "--output-dir", str(options.work)]
    ways = {"written": ["--model", str(written), "--name", "written"], "pair": [*pair, "--name", "pair"]}
    cases = [(engine, dtype, way) for engine in ENGINES for dtype in DTYPES for way in ways]
    runs: dict[tuple[str, str, str], list[Run]] = {case: [] for case in cases}
    chance = random.Random(0)
    for _ in range(options.rounds):
        for engine, dtype, way in chance.sample(cases, len(cases)):
            command = [*generate, *ways[way], "--engine", engine, "--dtype", dtype]
            runs[engine, dtype, way].append(measure(command))
    largest = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    print(f"{nbytes(dpo) / 1e6:.0f} MB a side, largest tensor {largest / 1e6:.0f} MB, bfloat16.\n")
    print("| engine | dtype | written: peak, wall | θ(α): peak, wall | more |\n| --- | --- | --- | --- | --- |")
    for engine, dtype in [(engine, dtype) for engine in ENGINES for dtype in DTYPES]:
        plain, made = (runs[engine, dtype, way] for way in ways)
        more = max(run.peak_bytes for run in made) - max(run.peak_bytes for run in plain)
        print(f"| {engine} | {dtype} | {spread(plain)} | {spread(made)} | {more / 1e6:.0f} MB |")
    shutil.rmtree(options.work)


def spread(runs: list[Run]) -> str:
    """The largest peak and the median wall time."""
    return f"{max(run.peak_bytes for run in runs) / 1e6:.0f} MB, {statistics.median(run.wall_s for run in runs):.1f} s"


if __name__ == "__main__":
    main()
