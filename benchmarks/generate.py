"""How fast `expo generate` is beside bare vLLM, and its transformers engine beside batches of 8 in input order.

Runs whole processes on the instructions of a JSON file, each once a round, in an order drawn at random:

- `expo generate --engine vllm --seed-mode shared`, and with `--ways … vllm-rows` the same with a seed per row,
- bare vLLM: what a user would write, with the engine arguments expo takes, `LLM.generate` with the same sampling
  parameters, and one JSON file at the end,
- `expo generate --engine transformers`,
- transformers in batches of 8 in input order, with its own sampling and the same penalties, in the data type that
  expo takes (float32 where the CPU has no bfloat16 arithmetic); with `--ways eights-own` also in the checkpoint's own,
- with `--against FOLDER` and `--ways … vllm-against transformers-against`, another checkout's expo.

Prints a Markdown table. *Generating* is the time from the loaded engine to the last row; *outside steps* the share of
it that is not spent in the engine's own steps; *same rows* the answers that are bare vLLM's, which on a CPU are all.
A ratio is the median over rounds of two runs side by side; its interval holds the true median with at least 95 %.

    python benchmarks/generate.py --model MODEL --dataset alpaca_eval.json --rounds 6
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extrapolate import measure, ratio

from expo.cli.program import PROCESS_ENVIRONMENT
from expo.config import GenerateConfig
from expo.engines.vllm import engine_arguments
from expo.verbs.generate import plan

WAYS = ("vllm", "bare", "transformers", "eights", "eights-own", "vllm-rows", "vllm-against", "transformers-against")
OWN = "the checkpoint's own type"
SEEDS = {"vllm": "shared", "transformers": "row"}
"""As bare vLLM has them, and as transformers has them anyway."""
SAMPLING = ("temperature", "top_k", "top_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens")

ENVIRONMENT = {
    **PROCESS_ENVIRONMENT,
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of every way alike; what is set already stays."""

BARE_VLLM = """
import json, sys, time

def main():
    model, dataset, limit, arguments, sampling, output = map(json.loads, sys.argv[1:])
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    instructions = [row["instruction"] for row in json.load(open(dataset))][:limit]
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in instructions], add_generation_prompt=True, return_dict=False
    )
    llm = LLM(**arguments)
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in ids], SamplingParams(**sampling), use_tqdm=False
    )
    seconds = time.perf_counter() - started
    tokens = sum(len(one.outputs[0].token_ids) for one in outputs)
    rows = [
        {"dataset": "", "instruction": text, "output": one.outputs[0].text, "generator": "bare"}
        for text, one in zip(instructions, outputs)
    ]
    json.dump(rows, open(output, "w"), ensure_ascii=False)
    json.dump({"tokens_out": tokens, "generate_seconds": seconds}, open(output + ".meta", "w"))

if __name__ == "__main__":
    main()
"""

BATCHES_OF_8 = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from expo.engines.transformers import PenaltyProcessor

model, dataset, limit, dtype, sampling, output = map(json.loads, sys.argv[1:])
instructions = [row["instruction"] for row in json.load(open(dataset))][:limit]
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
device = "cuda" if torch.cuda.is_available() else "cpu"
network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device)
torch.manual_seed(sampling["seed"])
rows, tokens, started = [], 0, time.perf_counter()
for first in range(0, len(instructions), 8):
    texts = instructions[first : first + 8]
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
    ).to(device)
    width = batch["input_ids"].shape[1]
    penalty = PenaltyProcessor(width, sampling["presence_penalty"], sampling["frequency_penalty"])
    with torch.inference_mode():
        found = network.generate(
            **batch, do_sample=True, max_new_tokens=sampling["max_tokens"], temperature=sampling["temperature"],
            top_k=sampling["top_k"], top_p=sampling["top_p"], pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([penalty]),
        )
    for text, ids in zip(texts, found[:, width:].tolist()):
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        tokens += end
        answer = tokenizer.decode(ids[:end], skip_special_tokens=True)
        rows.append({"dataset": "", "instruction": text, "output": answer, "generator": "eights"})
seconds = time.perf_counter() - started
json.dump(rows, open(output, "w"), ensure_ascii=False)
json.dump({"tokens_out": tokens, "generate_seconds": seconds}, open(output + ".meta", "w"))
"""


@dataclass(frozen=True)
class Way:
    """One way of doing it."""

    label: str
    command: list[str]
    output: Path
    meta: Path
    beside: str
    """The way it is compared with."""
    figures: list[Figures] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """One measured process."""

    wall_s: float
    generate_s: float
    tokens: int
    steps_s: float | None
    """None where it is not told."""
    answers: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of generating."""
        return self.tokens / self.generate_s


# --- the ways -----------------------------------------------------------------------------------------------------


def ways(options: argparse.Namespace, folder: Path) -> dict[str, Way]:
    """What to measure, in the order of one round."""
    found = {engine: expo_way(options, folder, engine, seeds=SEEDS[engine]) for engine in ("vllm", "transformers")}
    job, embedded = (plan(GenerateConfig(engine=engine, **shared_settings(options))) for engine in found)
    sampling = {key: getattr(job.config, key) for key in SAMPLING}
    arguments = engine_arguments(job.setup)
    found["bare"] = script_way("bare vLLM", BARE_VLLM, options, folder / "bare.json", arguments, sampling, "bare")
    for name, kind in (("eights", embedded.config.dtype), ("eights-own", "auto")):
        label = f"transformers, batches of 8 in input order, {OWN if kind == 'auto' else kind}"
        found[name] = script_way(label, BATCHES_OF_8, options, folder / f"{name}.json", kind, sampling, "eights")
    found["vllm-rows"] = expo_way(options, folder, "vllm", seeds="row")
    if options.against:
        for engine in ("vllm", "transformers"):
            found[f"{engine}-against"] = expo_way(options, folder, engine, seeds=None, checkout=options.against)
    return {name: found[name] for name in WAYS if name in options.ways and name in found}


def shared_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of the run, as `GenerateConfig` takes them."""
    return {
        "task": "alpaca",
        "model": str(options.model),
        "dataset": str(options.dataset),
        "limit": options.limit,
        "max_tokens": options.max_tokens,
    }


def expo_way(
    options: argparse.Namespace, folder: Path, engine: str, *, seeds: str | None, checkout: Path | None = None
) -> Way:
    """`expo generate` with one engine.

    Args:
        options: The benchmark's.
        folder: Where it writes.
        engine: The engine.
        seeds: Its `--seed-mode`; None leaves it out, for a checkout without it.
        checkout: Another folder of expo's.
    """
    name = "-".join(filter(None, [engine, seeds, checkout and "against"]))
    command = ["env", f"PYTHONPATH={checkout}"] if checkout else []
    command += [sys.executable, "-m", "expo", "generate", "alpaca", "--engine", engine, "--name", name]
    command += ["--seed-mode", seeds] if seeds else []
    command += ["--output-dir", str(folder), "--model", str(options.model), "--dataset", str(options.dataset)]
    command += ["--max-tokens", str(options.max_tokens), "--overwrite"]
    command += ["--limit", str(options.limit)] if options.limit else []
    output = folder / "outputs_alpaca" / f"{name}.json"
    beside = {"vllm": "bare", "transformers": "eights"}[engine]
    label = f"`expo generate --engine {engine}{f' --seed-mode {seeds}' if seeds else ''}`"
    label += " by the other checkout" if checkout else ""
    return Way(label, command, output, output.with_suffix(".meta.json"), beside)


def script_way(
    label: str, script: str, options: argparse.Namespace, output: Path, arguments: object, sampling: object, beside: str
) -> Way:
    """A script that is given its settings as JSON."""
    file = output.with_suffix(".py")
    file.write_text(script)
    words = [str(options.model), str(options.dataset), options.limit, arguments, sampling, str(output)]
    command = [sys.executable, str(file), *map(json.dumps, words)]
    return Way(label, command, output, output.with_name(output.name + ".meta"), beside)


def run_once(way: Way) -> Figures:
    """One process, and what it says of itself."""
    for file in (way.output, way.meta):
        file.unlink(missing_ok=True)
    wall_s = measure(way.command).wall_s
    meta = json.loads(way.meta.read_text())
    answers = tuple(row["output"] for row in json.loads(way.output.read_text()))
    steps_s = meta.get("engine_step_seconds")
    return Figures(wall_s, meta["generate_seconds"], meta["tokens_out"], steps_s, answers)


# --- the table ----------------------------------------------------------------------------------------------------


def row(way: Way, base: Way, bare: Way | None) -> str:
    """One line of the table."""
    runs = way.figures
    walls = [run.wall_s for run in runs]
    speeds = [run.tokens_per_s for run in runs]
    outside = [100 * (1 - run.steps_s / run.generate_s) for run in runs if run.steps_s is not None]
    cells = [
        way.label,
        len(runs),
        f"{statistics.median(walls):.1f} s ({min(walls):.1f}–{max(walls):.1f})",
        ratio(walls, [run.wall_s for run in base.figures]),
        f"{statistics.median(run.generate_s for run in runs):.1f} s",
        ratio([run.generate_s for run in runs], [run.generate_s for run in base.figures]),
        f"{statistics.median(speeds):.0f}",
        ratio(speeds, [run.tokens_per_s for run in base.figures]),
        f"{statistics.median(outside):.2f} % (≤ {max(outside):.2f} %)" if outside else "–",
        same_rows(runs[0], bare.figures[0]) if bare else "–",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def same_rows(run: Figures, bare: Figures) -> str:
    """How many answers are those of the other run."""
    same = sum(a == b for a, b in zip(run.answers, bare.answers, strict=True))
    return f"{same} of {len(bare.answers)}"


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True, help="AlpacaEval's instructions, a JSON file")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="measure another checkout of expo too")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:4], help="only these")
    options = parser.parse_args()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as expo sets it
    with tempfile.TemporaryDirectory() as folder:
        found = ways(options, Path(folder))
        chance = random.Random(0)
        for _ in range(options.rounds):
            for way in chance.sample(list(found.values()), len(found)):
                way.figures.append(run_once(way))
    print(
        "| way | runs | wall (range) | × its base | generating | × its base | tokens/s | × its base | outside steps |"
        " same rows |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for way in found.values():
        print(
            row(
                way,
                found.get(way.beside, way),
                found.get("bare") if "vllm" in way.command and "row" not in way.command else None,
            )
        )


if __name__ == "__main__":
    main()
