"""One vLLM engine with several α as LoRA adapters beside an engine for the checkpoint of each α.

Makes a Llama with the tokenizer of --model and a LoRA adapter of random values on all its linear layers, and writes
θ(α) both ways. In each round the same prompts are answered greedily by an engine of the base with an adapter per α, all
in one call, and by an engine of each checkpoint, one after the other; the two ways take turns in being first. Engines
are started anew in one process, which has imported vLLM. Prints the time of starts and of answers, and how many answers
are the same; and how large the folders are, beside those of a 7B, which are computed from its shapes.

    python benchmarks/lora_engine.py --model MODEL --work /tmp/expo-lora-engine
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from extrapolate import ratio
from safetensors import safe_open
from safetensors.torch import save_file
from switch import make_pair

from expo.cli.program import PROCESS_ENVIRONMENT
from expo.config import ExtrapolateConfig
from expo.engines.vllm_tools import prepare_environment
from expo.verbs import extrapolate

ALPHAS = (0.0, 0.3, 0.5)
RANK = 16
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "head_dim": 64}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
PROMPT = 32
"""Tokens of a prompt."""

LAYERS_7B = 32
LINEAR_7B = (*((4096, 4096),) * 2, *((1024, 4096),) * 2, *((14336, 4096),) * 2, (4096, 14336))
WEIGHTS_7B = LAYERS_7B * (sum(rows * columns for rows, columns in LINEAR_7B) + 2 * 4096) + 2 * 32_000 * 4096 + 4096
"""Of Mistral-7B: its linear layers and norms, embedding and head, and the last norm."""

Prompts = list[list[int]]


@dataclass(frozen=True)
class Round:
    """What one way took, and what it answered."""

    start_s: float
    answer_s: float
    answers: Prompts


def write_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of random values in float32, on all linear layers of a base but its head, as by PEFT."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors, targets = {}, set()
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            shape = file.get_slice(name).get_shape()
            if "_proj." in name:
                module = name.removesuffix(".weight")
                targets.add(module.rpartition(".")[2])
                for side, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
                    tensors[f"base_model.model.{module}.lora_{side}.weight"] = 0.05 * torch.randn(size)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    settings = {**about, "target_modules": sorted(targets), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_all(base: Path, adapter: Path, work: Path) -> None:
    """θ(α) of each α: an adapter `aα`, and a checkpoint `checkpoint-aα`."""
    pair = ExtrapolateConfig(sft=str(base), dpo=str(adapter), alpha=ALPHAS, fsync=False)
    extrapolate.run(replace(pair, output=str(work / "a{alpha}"), as_adapter=True))
    extrapolate.run(replace(pair, output=str(work / "checkpoint-a{alpha}"), dtype="float32"))


# --- engines ------------------------------------------------------------------------------------------------------


def start(model: Path, **settings: object) -> tuple[Any, float]:
    """An engine, and the seconds until it was there."""
    from vllm import LLM

    began = time.perf_counter()
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "skip_tokenizer_init": True, "seed": 0}
    return LLM(str(model), kv_cache_memory_bytes=256 << 20, **usual, **settings), time.perf_counter() - began


def ask(engine: Any, prompts: Prompts, tokens: int, **settings: object) -> tuple[Prompts, float]:  # noqa: ANN401 - LLM
    """The answers, and the seconds that they took."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    began = time.perf_counter()
    found = engine.generate(given, greedy, use_tqdm=False, **settings)
    return [list(one.outputs[0].token_ids) for one in found], time.perf_counter() - began


def together(options: argparse.Namespace, base: Path, prompts: Prompts) -> Round:
    """One engine with all α."""
    from vllm.lora.request import LoRARequest

    engine, begun = start(base, enable_lora=True, max_lora_rank=RANK, max_loras=len(ALPHAS))
    adapters = [LoRARequest(f"a{alpha}", number, f"{options.work}/a{alpha}") for number, alpha in enumerate(ALPHAS, 1)]
    of_each = [one for one in adapters for _ in prompts]
    ask(engine, prompts[:1] * len(adapters), 1, lora_request=adapters)  # reads them
    found, seconds = ask(engine, prompts * len(ALPHAS), options.tokens, lora_request=of_each)
    return Round(begun, seconds, found)


def apart(options: argparse.Namespace, prompts: Prompts) -> Round:
    """An engine for each checkpoint."""
    begun, seconds = 0.0, 0.0
    answers: Prompts = []
    for alpha in ALPHAS:
        engine, more = start(options.work / f"checkpoint-a{alpha}")
        ask(engine, prompts[:1], 1)
        found, took = ask(engine, prompts, options.tokens)
        begun, seconds, answers = begun + more, seconds + took, answers + found
        del engine
        gc.collect()
    return Round(begun, seconds, answers)


# --- figures ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, base: Path) -> None:
    """Run the rounds, and print the table."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 80, (options.prompts, PROMPT), generator=generator).tolist()
    ways = {"one": lambda: together(options, base, prompts), "own": lambda: apart(options, prompts)}
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            rounds[name].append(ways[name]())
            gc.collect()
    one, own = rounds["one"][0].answers, rounds["own"][0].answers
    same = f"{sum(a == b for a, b in zip(one, own, strict=True))} of {len(own)}"
    tokens = len(own) * options.tokens
    print("| way | rounds | starting (range) | answering (range) | tokens/s | × the checkpoints' time | same answers |")
    print("|" + " --- |" * 7)
    labels = {"one": f"one engine, {len(ALPHAS)} α at once", "own": f"{len(ALPHAS)} engines of checkpoints in turn"}
    for name, label in labels.items():
        begun, seconds = [one.start_s for one in rounds[name]], [one.answer_s for one in rounds[name]]
        beside = ratio(seconds, [one.answer_s for one in rounds["own"]])
        speed = f"{tokens / statistics.median(seconds):.0f}"
        cells = [
            label,
            str(len(seconds)),
            spread(begun),
            spread(seconds),
            speed,
            beside,
            same if name == "one" else "–",
        ]
        print(f"| {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} s ({min(values):.2f}–{max(values):.2f})"


def sizes(work: Path) -> None:
    """Print how large an adapter and a checkpoint are, here and for a 7B."""
    here = [folder_size(work / name) for name in (f"a{ALPHAS[1]}", f"checkpoint-a{ALPHAS[1]}")]
    factors = LAYERS_7B * sum(RANK * (rows + columns) for rows, columns in LINEAR_7B)
    print("\n| model | adapter of rank 16 | checkpoint | checkpoints to one adapter |")
    print("| --- | --- | --- | --- |")
    for label, (adapter, whole) in (
        ("this one, float32, on the disk", here),
        ("Mistral-7B, bfloat16, computed from its shapes", (2 * factors, 2 * WEIGHTS_7B)),
    ):
        print(f"| {label} | {adapter / 1e6:.1f} MB | {whole / 1e6:,.1f} MB | {whole / adapter:.0f} |")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer the made model has")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made; it is emptied")
    parser.add_argument("--prompts", type=int, default=16, help="of each α")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    os.environ |= {**PROCESS_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    prepare_environment()
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    base, _ = make_pair(options.model, options.work, **SHAPE, **HEADS, vocab_size=vocabulary)
    write_all(base, write_adapter(base, options.work / "lora"), options.work)
    measure(options, base)
    sizes(options.work)


if __name__ == "__main__":
    main()
