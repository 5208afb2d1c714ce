"""The words that are added to a command, each with its reason; of an option that is given twice the last counts.

This, with `VARIABLES`, is all by which what is run differs from what is printed. Names need no line here:
`stand_ins.py` makes them resolve. `{judge}` is the address of a judge of this machine, `{data}` a copy of FastChat's
data, and `{engine}` what vLLM is told (`ENGINE`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "enable_chunked_prefill": False,
}
"""What vLLM is told where it is not expo that starts it: a CPU has no room for the defaults of a GPU, and what is
prefilled in chunks ends its engine there."""


@dataclass(frozen=True)
class Added:
    """Words for the commands that begin so and have these words."""

    begin: str
    """The command's first words."""
    words: str
    why: str
    having: str | None = None
    """Only where this option or word is given."""
    lacking: str | None = None
    """Only where this option is not given."""


VARIABLES = {
    "OMP_NUM_THREADS": "1",  # tiny models: more threads only wait for each other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines sit on one core
    "VLLM_CPU_KVCACHE_SPACE": "1",  # in GB; vLLM would take nearly all memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM imports itself anew in each of its processes
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTEST_ADDOPTS": "-k test_parts",  # all tests are a step of their own in tools/full_check.sh
    "STEPS": "damaged headers",  # of tools/full_check.sh, which is what runs these commands
}
"""What the environment of all commands says."""

TWO_CORES = "two cores carry two engines, and a word more of parallelism is the same code"
SIZE = "hours of a benchmark are its counts; one round of the smallest size runs every line of it"
JUDGE = "the paper's judge costs money; one of this machine answers the same requests by a rule"

ADDED = (
    Added("expo", "--data-parallel 2", TWO_CORES, having="--data-parallel"),
    Added("expo", "--tensor-parallel 2", TWO_CORES, having="--tensor-parallel"),
    Added("expo", "--device cpu", "there is no GPU", having="--device"),
    Added("python -m evaluations.alpaca", "--base-url {judge}", JUDGE, lacking="--base-url"),
    Added("python -m evaluations.mt_bench", "--base-url {judge}", JUDGE, lacking="--base-url"),
    Added("python -m evaluations.mt_bench", "--data {data}", "FastChat's repository is on another machine"),
    Added("python -m evaluations.leaderboard", "--model-args {engine}", "a CPU has no room for vLLM's defaults"),
    Added("python benchmarks/extrapolate.py", "--work expo-bench --pair 1b --rounds 1 --paper 0", SIZE),
    Added("python benchmarks/page_offset.py", "--file expo-bench/dpo-1b/model-00001-of-00005.safetensors", SIZE),
    Added("python benchmarks/fuzz_headers.py", "--count 500", SIZE),
    Added("python benchmarks/generate.py", "--rounds 1 --limit 8 --max-tokens 8", SIZE),
    Added("python benchmarks/score.py", "--rounds 1 --limit 8", SIZE),
    Added("python benchmarks/coverage.py", "--simulations 4 --prompts 30", SIZE),
    Added("python benchmarks/report.py", "--prompts 20 --models 2 --rounds 1", SIZE),
    Added("python benchmarks/pipeline.py", "--limit 8 --max-tokens 8", SIZE),
    Added("python benchmarks/race.py race", "--replays 1 --prompts 60 --kinds flat", SIZE),
    Added("python benchmarks/race.py null", "--replays 1 --nulls 2 --prompts 60 --kinds flat", SIZE),
)


def with_engine(model_args: str) -> str:
    """lm-evaluation-harness's `--model_args` for vLLM, with `ENGINE` where they say nothing else."""
    if model_args.lstrip().startswith("{"):
        return json.dumps({**ENGINE, **json.loads(model_args)})
    return ",".join([*(f"{name}={value}" for name, value in ENGINE.items()), model_args])


def added(words: list[str], **places: str) -> list[str]:
    """The words that are added to a command."""
    found: list[str] = []
    for one in ADDED:
        begin = one.begin.split()
        options = {word.partition("=")[0] for word in words}
        fits = words[: len(begin)] == begin or _without_flags(words)[: len(begin)] == begin
        if (
            fits
            and (one.having is None or one.having in options)
            and (one.lacking is None or one.lacking not in options)
        ):
            found += one.words.format(engine=json.dumps(ENGINE, separators=(",", ":")), **places).split()
    return found


def _without_flags(words: list[str]) -> list[str]:
    """A command without the interpreter's own switch (`python -P -m …`)."""
    return [word for word in words if word != "-P"]
