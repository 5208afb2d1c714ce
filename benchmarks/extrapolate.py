"""How fast, how small and how exact `expo extrapolate` is, beside the floor and the paper's method.

Makes two random bfloat16 Llama checkpoints of 2.2 GB with different shard layouts (kept in --work), then measures

- the floor: reading SFT (`cat`) and copying DPO (`cp`), which any way of doing it must do,
- `expo extrapolate --no-fsync`, interleaved with the floor, and the same with fsync,
- the paper's method: both models in memory, d + α(d − s) in bfloat16, `save_pretrained`,

and compares every weight with float64. Prints a Markdown table.

    python benchmarks/extrapolate.py --work /tmp/expo-bench --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ALPHA = 0.3
CHECK_ELEMENTS = 1 << 22

SHAPES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
CONFIG = {**SHAPES, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}
"""TinyLlama-1.1B's."""

LAUNCHER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(pid, 0)
wall = time.perf_counter() - start
print(os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""
"""A small process in between: a child would count the peak memory of the process that forked it as its own."""

PAPER = """
import sys, torch
from transformers import AutoModelForCausalLM
sft, dpo, alpha, output = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
s = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.bfloat16)
d = AutoModelForCausalLM.from_pretrained(dpo, dtype=torch.bfloat16)
other = s.state_dict()
for name, weight in d.state_dict().items():
    weight.copy_(weight + alpha * (weight - other[name]))
d.save_pretrained(output)
"""


@dataclass(frozen=True)
class Run:
    """One measured command."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def measure(command: list[str]) -> Run:
    """Run a command through the launcher."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    code, wall, cpu, peak = done.stdout.split()
    if code != "0":
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return Run(float(wall), float(cpu), int(peak))


# --- the checkpoints ----------------------------------------------------------------------------------------------


def make_pair(work: Path) -> tuple[Path, Path]:
    """Two checkpoints with different layouts; ‖Δ‖/‖θ‖ is 0.035 as zephyr's."""
    sft, dpo = work / "sft", work / "dpo"
    if not (work / "done").exists():
        shapes, generator = parameter_shapes(), torch.Generator().manual_seed(0)
        weights = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
        save(sft, weights, shards=2)
        for weight in weights.values():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.float() + 0.035 * 0.02 * noise)
        save(dpo, weights, shards=5)
        (work / "done").touch()
    return sft, dpo


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LlamaForCausalLM(LlamaConfig(**CONFIG)).named_parameters()}


def save(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """Write a sharded checkpoint with its config."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**CONFIG, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    names, weight_map = list(weights), {}
    step = -(-len(names) // shards)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * step : (number + 1) * step]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- exactness ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exactness:
    """How many weights are what they should be."""

    weights: int
    off: int
    """Not the correctly rounded float64 result."""
    violations: int
    """Not even the rounding of a number within 2⁻²²(|d| + |α(d − s)|) of it."""


def check(sft: Path, dpo: Path, output: Path) -> Exactness:
    """Compare every weight of `output` with float64."""
    count, off, violations = 0, 0, 0
    sides = [open_all(folder) for folder in (sft, dpo, output)]
    for name in sides[1]:
        parts = (side[name].get_tensor(name).flatten().split(CHECK_ELEMENTS) for side in sides)
        for s, d, out in zip(*parts, strict=True):
            one_off, one_violation = compare(*(part.double().numpy() for part in (s, d, out)))
            count, off, violations = count + out.numel(), off + one_off, violations + one_violation
    return Exactness(count, off, violations)


def open_all(folder: Path) -> dict[str, safe_open]:
    """Tensor name → its open file."""
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping


def compare(s: np.ndarray, d: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Values that are off, and values that are wrong."""
    step = ALPHA * (d - s)
    right, bound = d + step, 2.0**-22 * (np.abs(d) + np.abs(step))
    wrong = (out < to_bfloat16(right - bound)) | (out > to_bfloat16(right + bound))
    return int((out != to_bfloat16(right)).sum()), int(wrong.sum())


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float64 once, ties to even; torch would round to float32 in between."""
    _, exponents = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponents - 1, -126) - 7)
    return np.rint(values / step) * step


# --- the table ----------------------------------------------------------------------------------------------------


def row(name: str, runs: list[Run], floor: list[Run], exactness: Exactness | None) -> str:
    """One line of the table; ratios are medians over the rounds that ran side by side."""
    wall, cpu = statistics.median(run.wall_s for run in runs), statistics.median(run.cpu_s for run in runs)
    base = floor if len(runs) == len(floor) else [Run(statistics.median(r.wall_s for r in floor), 0, 0)] * len(runs)
    ratio = statistics.median(run.wall_s / other.wall_s for run, other in zip(runs, base, strict=True))
    spread = f"{min(run.wall_s for run in runs):.2f}–{max(run.wall_s for run in runs):.2f}"
    peak = f"{max(run.peak_bytes for run in runs) / 1e9:.2f} GB"
    exact = "–" if exactness is None else f"{exactness.off / exactness.weights:.4%} | {exactness.violations}"
    exact = exact if exactness else "– | –"
    return f"| {name} | {len(runs)} | {wall:.2f} s ({spread}) | {ratio:.2f} | {cpu:.2f} s | {peak} | {exact} |"


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for 9 GB of checkpoints; they are kept")
    parser.add_argument("--rounds", type=int, default=5, help="floor, expo without and with fsync: this often each")
    parser.add_argument("--paper-rounds", type=int, default=1, help="the paper's method: this often")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    sft, dpo = make_pair(options.work)
    copy, out, paper = (options.work / name for name in ("copy", "out", "paper"))
    floor = ["sh", "-c", f'cat "{sft}"/*.safetensors > /dev/null && cp -r --reflink=never "{dpo}" "{copy}"']
    expo = [sys.executable, "-m", "expo", "extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--alpha", str(ALPHA)]
    expo += ["--output", str(out)]
    by_paper = [sys.executable, "-c", PAPER, str(sft), str(dpo), str(ALPHA), str(paper)]
    ways = {
        "floor": (floor, copy, options.rounds),
        "no-fsync": ([*expo, "--no-fsync"], out, options.rounds),
        "fsync": (expo, out, options.rounds),
        "paper": (by_paper, paper, options.paper_rounds),
    }
    measure(floor)  # warms the page cache
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    exact: dict[str, Exactness] = {}
    shutil.rmtree(copy)
    for number in range(max(options.rounds, options.paper_rounds)):
        for name, (command, folder, rounds) in ways.items():
            if number < rounds:
                runs[name].append(measure(command))
                if name in ("fsync", "paper") and name not in exact:
                    exact[name] = check(sft, dpo, folder)
                shutil.rmtree(folder)
                os.sync()
    print("| way | runs | wall (range) | × floor | CPU | peak RSS | weights off | violations |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(row("the floor: `cat` SFT + `cp` DPO", runs["floor"], runs["floor"], None))
    print(row("`expo extrapolate --no-fsync`", runs["no-fsync"], runs["floor"], exact["fsync"]))
    print(row("`expo extrapolate`", runs["fsync"], runs["floor"], exact["fsync"]))
    print(row("the paper's method (two models in memory, bfloat16)", runs["paper"], runs["floor"], exact["paper"]))
    print(f"\n{exact['fsync'].weights:,} weights checked against float64; α = {ALPHA}.")
    if exact["fsync"].violations:
        raise SystemExit("expo's output breaks the bound")


if __name__ == "__main__":
    main()
