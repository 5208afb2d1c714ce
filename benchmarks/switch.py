"""What a switch to another α costs in a live engine, beside vLLM's own reload of a checkpoint of the same θ(α).

Writes θ(α) of a pair, opens an engine on the pair, and switches it in turn: `load`, which computes θ(α) from the two
sides, and with vLLM `reload_weights` of the written checkpoint, which reads half as many bytes; with transformers,
loading the model anew, as it is done where names are not one to one. Prints medians, as Markdown. The files are in the
page cache. Every switch is followed by the first token of a prompt, which is not timed: some weights are packed then.

    python benchmarks/switch.py --work /tmp/expo-switch --model MODEL          # a random pair of 1.1 billion parameters
    python benchmarks/switch.py --work /tmp/expo-switch --pair SFT DPO
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expo.cli.program import PROCESS_ENVIRONMENT
from expo.config import ExtrapolateConfig, GenerateConfig
from expo.verbs import extrapolate, generate

ALPHAS = (0.5, 0.3)
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
"""TinyLlama's: 1.1 billion parameters."""


def make_pair(model: Path, work: Path, **changes: int) -> tuple[Path, Path]:
    """Two random checkpoints, one a small step from the other.

    Args:
        model: A small Llama, for its tokenizer.
        work: Where they are written.
        changes: What differs from `SHAPE`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(model, **(SHAPE | changes)), dtype=torch.bfloat16
    )
    for name in ("sft", "dpo"):
        network.save_pretrained(work / name)
        AutoTokenizer.from_pretrained(model).save_pretrained(work / name)
        for weight in network.parameters():
            weight.data += 0.001 * torch.randn_like(weight)
    return work / "sft", work / "dpo"


def seconds(switch: Callable[[], None]) -> float:
    """How long it takes."""
    clock = time.perf_counter()
    switch()
    return time.perf_counter() - clock


def reload_written(live: Any, written: Path) -> None:  # noqa: ANN401 - a VllmGenerator
    """What vLLM does by itself with a checkpoint."""
    keys = {"load_format": "auto", "model_loader_extra_config": {}}
    live._llm.collective_rpc("update_config", args=({"load_config": keys},))
    live._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(written)})
    live._llm.reset_prefix_cache()


def measure(engine: str, jobs: list[Any], written: Path, rounds: int) -> dict[str, list[float]]:
    """Way → seconds of each switch."""
    clock = time.perf_counter()
    live = jobs[0].open_engine()
    found: dict[str, list[float]] = {"start": [time.perf_counter() - clock], "switch": [], "other": []}
    prompt = [[5] * 8]
    for _ in range(rounds):
        for number in (1, 0):
            found["switch"].append(seconds(lambda: live.load(jobs[number].setup)))  # noqa: B023
            live.probe(prompt, 1)
        if engine == "vllm":
            found["other"].append(seconds(lambda: reload_written(live, written)))
        else:
            live.close()
            found["other"].append(seconds(live._load_model))
        live.probe(prompt, 1)
    live.close()
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder with room for 7 GB; removed again")
    parser.add_argument("--model", type=Path, help="a small Llama with a chat template, for a random pair")
    parser.add_argument("--pair", type=Path, nargs=2, help="a pair that is there")
    parser.add_argument("--engine", action="append", choices=("vllm", "transformers"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {name: value for name, value in PROCESS_ENVIRONMENT.items() if name not in os.environ}
    options.work.mkdir(parents=True, exist_ok=True)
    sft, dpo = options.pair or make_pair(options.model, options.work)
    written, prompts = options.work / "written", options.work / "prompts.jsonl"
    sides = {"sft": str(sft), "dpo": str(dpo)}
    extrapolate.run(ExtrapolateConfig(**sides, alpha=(ALPHAS[0],), output=str(written), fsync=False))
    prompts.write_text(json.dumps({"prompt": "hello"}) + "\n")
    fixed = {"task": str(prompts), "output_dir": str(options.work), "max_tokens": 8, "dtype": options.dtype}
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    print(f"{size / 1e6:,.0f} MB a side, {options.dtype}, medians of {options.rounds} rounds.\n")
    print("| engine | start | switch | reload of a written checkpoint, loading anew |\n| --- | --- | --- | --- |")
    for engine in options.engine or ("vllm", "transformers"):
        jobs = [generate.plan(GenerateConfig(**fixed, **sides, alpha=alpha, engine=engine)) for alpha in ALPHAS]
        found = measure(engine, jobs, written, options.rounds)
        cells = [f"{statistics.median(found[way]):.3g} s" for way in ("start", "switch", "other")]
        print(f"| {engine} | {' | '.join(cells)} |", flush=True)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
