"""The words that are added to a command, each with its reason; of an option that is given twice the last counts.

This, with `VARIABLES`, is all by which what is run differs from what is printed. Names need no line here:
`stand_ins.py` makes them resolve. `{judge}` is the address of a judge of this machine, `{data}` a copy of FastChat's
data, `{models}` the folder of the tiny trio, and `{engine}` what vLLM is told (`ENGINE`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
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
    without: str | None = None
    """A word that is taken away."""


VARIABLES = {
    "OMP_NUM_THREADS": "1",  # tiny models: more threads only wait for each other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines sit on one core
    "VLLM_CPU_KVCACHE_SPACE": "1",  # in GB; vLLM would take nearly all memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM imports itself anew in each of its processes
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # tiny models were made for 2,048 tokens, the size of an answer
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTEST_ADDOPTS": "-k 'test_parts or test_gpu'",  # all tests are a step of their own in tools/full_check.sh
    "STEPS": "damaged headers",  # of tools/full_check.sh, which is what runs these commands
}
"""What the environment of all commands says."""

TWO_CORES = "two cores carry two engines, and a word more of parallelism is the same code"
SIZE = "hours of a benchmark are its counts; one round of the smallest size runs every line of it"
PAIR = "--pair {models}/tiny-sft {models}/tiny-dpo"
REWARDS = "--reward-model {models}/tiny-rm --prompts {models}/held_out_prompts.json"
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
    Added("python benchmarks/extrapolate.py", "--cold 1", SIZE, having="--cold"),
    Added("python benchmarks/page_offset.py", "--file {models}/tiny-dpo/model.safetensors", SIZE),
    Added("python benchmarks/memory.py", "--work expo-memory --largest 0.3", SIZE),
    Added("python benchmarks/dequantize.py", "--work expo-dequantize --rounds 1", SIZE, having="--work"),
    Added("python benchmarks/dequantize.py", "--models {models}", "the trio is there", having="--models"),
    Added("python benchmarks/dequantize.py", "--limit 8", SIZE, having="--trio"),
    Added(
        "python benchmarks/likelihood.py",
        "--sft {models}/tiny-sft --dpo {models}/tiny-dpo --reward-model {models}/tiny-rm --judged 1"
        " --prompts {models}/held_out_prompts.json --work expo-likelihood --limit 40 --n 1 --max-tokens 8 --replays 2",
        SIZE,
    ),
    Added(
        "python benchmarks/modules.py",
        "--sft {models}/tiny-sft --dpo {models}/tiny-dpo --reward-model {models}/tiny-rm"
        " --prompts {models}/held_out_prompts.json --work expo-modules --limit 60 --n 1 --max-tokens 8 --seeds 1",
        SIZE,
    ),
    Added("python benchmarks/remote.py", "--work expo-remote --rounds 1", SIZE),
    Added("python benchmarks/gpu.py", "--work expo-gpu", SIZE),
    Added("python benchmarks/fuzz_headers.py", "--count 500", SIZE),
    Added("python benchmarks/generate.py", "--rounds 1 --limit 8 --max-tokens 8", SIZE),
    Added("python benchmarks/loading.py", "--work expo-loading --rounds 1", SIZE),
    Added("python benchmarks/score.py", "--rounds 1 --limit 8", SIZE),
    Added("python benchmarks/coverage.py", "--simulations 4 --prompts 30", SIZE),
    Added("python benchmarks/failures.py", "--replays 2", SIZE),
    Added(
        "python benchmarks/lora_engine.py",
        "--model {models}/tiny-sft --work expo-lora-engine --rounds 1 --prompts 2 --tokens 4",
        SIZE,
    ),
    Added(
        "python benchmarks/lora_sweep.py",
        "--model {models}/tiny-sft --reward-model {models}/tiny-rm"
        " --work expo-lora-sweep --rounds 1 --prompts 4 --tokens 4",
        SIZE,
    ),
    Added(
        "python benchmarks/logit_space.py",
        "--sft {models}/tiny-sft --dpo {models}/tiny-dpo --reward-model {models}/tiny-rm"
        " --prompts {models}/held_out_prompts.json --work expo-logit-space --rounds 1 --limit 6 --n 2 --max-tokens 8",
        SIZE,
    ),
    Added("python benchmarks/report.py", "--prompts 20 --models 2 --rounds 1", SIZE),
    Added("python benchmarks/pipeline.py", "--limit 8 --max-tokens 8", SIZE),
    Added("python benchmarks/switch.py", f"--work expo-switch --rounds 1 {PAIR}", SIZE),
    Added("python benchmarks/sweep.py", f"--work expo-sweep --rounds 1 --limit 4 --n 1 --max-tokens 8 {PAIR}", SIZE),
    Added("python benchmarks/sweep.py", f"--alpha 0.5 {REWARDS}", SIZE, without="large"),
    Added("python benchmarks/race.py", "--work expo-race --replays 1 --nulls 2 --prompts 60 --kinds flat", SIZE),
)


def with_engine(model_args: str) -> str:
    """lm-evaluation-harness's `--model_args` for vLLM, with `ENGINE` where they say nothing else."""
    if model_args.lstrip().startswith("{"):
        return json.dumps({**ENGINE, **json.loads(model_args)})
    return ",".join([*(f"{name}={value}" for name, value in ENGINE.items()), model_args])


def changed(words: list[str], **places: str) -> tuple[list[str], list[str]]:
    """The words of a command that stay, and those that are added."""
    added, gone = [], []
    plain, options = [word for word in words if word != "-P"], {word.partition("=")[0] for word in words}
    for one in ADDED:
        begin = one.begin.split()
        fits = plain[: len(begin)] == begin and (one.having is None or one.having in options)
        if fits and (one.lacking is None or one.lacking not in options):
            added += one.words.format(engine=json.dumps(ENGINE, separators=(",", ":")), **places).split()
            gone.append(one.without)
    return [word for word in words if word not in gone], added
