"""Generate and score a whole prompt set with every engine, and print the figures as a Markdown table.

    python benchmarks/pipeline.py --model DPO --reward-model RM --dataset alpaca_eval.json

Each step is a process of its own, as a user would run it; the figures are those of the meta files, and the wall
time of the process. Also printed: the mean reward of released answers, if --outputs names a file of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = ("vllm", "transformers")


def main() -> None:
    """Run both engines over all prompts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--reward-model", required=True, type=Path)
    parser.add_argument("--dataset", required=True, type=Path, help="AlpacaEval's instructions")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    limit = ["--limit", arguments.limit] if arguments.limit else []
    print("| engine | rows | tokens out | generate, s | in engine steps | tokens/s | process, s | reward | score, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            where = ["alpaca", "--name", engine, "--output-dir", folder, *limit]
            wall_s = expo("generate", *where, "--engine", engine, "--model", arguments.model, "--dataset",
                          arguments.dataset, "--max-tokens", arguments.max_tokens)  # fmt: skip
            expo("score", *where, "--reward-model", arguments.reward_model)
            generated = read(Path(folder) / "outputs_alpaca" / f"{engine}.meta.json")
            scored = read(Path(folder) / "rewards_alpaca" / f"{engine}.meta.json")
            print(row(engine, generated, scored, wall_s), flush=True)


def expo(*words: object) -> float:
    """Run an expo command; gives its wall time in seconds."""
    command = [sys.executable, "-m", "expo", *map(str, words)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - started


def read(path: Path) -> dict[str, Any]:
    """A meta file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def row(engine: str, generated: dict[str, Any], scored: dict[str, Any], wall_s: float) -> str:
    """One engine's line of the table."""
    share = generated["engine_step_seconds"] / generated["generate_seconds"]
    cells = [
        f"{engine} {generated['versions'].get(engine, generated['versions'].get(f'{engine}-cpu'))}",
        f"{generated['rows']}",
        f"{generated['tokens_out']}",
        f"{generated['generate_seconds']:.1f}",
        f"{share:.1%}",
        f"{generated['tokens_per_second']:.0f}",
        f"{wall_s:.1f}",
        f"{scored['mean']:.2f} ± {scored['standard_error']:.2f}",
        f"{scored['score_seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
