"""How fast, how small and how exact `expo extrapolate` is, beside the floor, the paper's method and mergekit.

Makes random bfloat16 Llama pairs with different shard layouts on each side (kept in --work), then measures, in turn,

- the floor: reading SFT (`cat`) and copying DPO (`cp`), which any way of doing it must do,
- `expo extrapolate --no-fsync`: its combining phase (first read to last write, as expo.json tells it, all checks
  on) and the whole process,
- with --fsync, the same with fsync,
- with --cold N, both sides read from the disk, not from memory: `expo extrapolate` beside `dd` of the same bytes,
- with --several, four α in one pass, beside reading both sides once and writing four copies in one thread,
- with --paper, the paper's method: both models in memory, d + α(d − s) in bfloat16, `save_pretrained`,
- with --mergekit PROGRAM, the same by a `mergekit-yaml` of another environment,

compares every weight with float64, and prints a Markdown table. A ratio is the median over rounds of two runs side
by side; its interval holds the true median with at least 95 %. A round takes its ways in an order drawn at random.
Memory just set free is cheaper to take again than what a virtual machine gave back to its host in the meantime, and
expo begins to write seconds after its start; so there are two kinds of rounds, in turn: in one the ways come right
after each other, in the other there is a pause before each. Each has its table.

    python benchmarks/extrapolate.py --work /tmp/expo-bench --pair 1b --rounds 11 --fsync --several --paper 3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ALPHA = 0.3
SEVERAL = (0.1, 0.2, 0.3, 0.5)
CHECK_ELEMENTS = 1 << 22
PAUSES_S = (0.0, 5.0)
COLUMNS = (
    "way",
    "runs",
    "wall (range)",
    "× its floor",
    "combining, × its floor",
    "CPU",
    "peak",
    "read",
    "off",
    "violations",
)

TINY_LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
LARGER = {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 34, "num_key_value_heads": 8}
COMMON = {"num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 28, "num_key_value_heads": 32}
PAIRS = {"1b": TINY_LLAMA | COMMON, "2.5b": LARGER | COMMON, "6b": SEVEN | COMMON}
"""2.2, 5 and 12 GB a side; the first has TinyLlama-1.1B's shapes, the last has four layers less than Llama-7B."""

LAUNCHER = """
import os, sys, time
epoch, start = time.time(), time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
wall = time.perf_counter() - start
read = next(int(line.split()[1]) for line in open(f"/proc/{pid}/io") if line.startswith("rchar"))
_, status, used = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, read, epoch)
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

READ_BOTH_WRITE_FOUR = """
import mmap, os, sys
from pathlib import Path
sft, dpo, output = map(Path, sys.argv[1:])
buffer = memoryview(mmap.mmap(-1, 1 << 20))
output.mkdir()
for file in sorted(sft.glob("*.safetensors")):
    source = os.open(file, os.O_RDONLY)
    while os.readv(source, [buffer]):
        pass
for file in sorted(dpo.glob("*.safetensors")):
    source = os.open(file, os.O_RDONLY)
    flags = os.O_WRONLY | os.O_CREAT
    targets = [os.open(output / f"{number}-{file.name}", flags) for number in range(4)]
    while count := os.readv(source, [buffer]):
        for target in targets:
            os.write(target, buffer[:count])
"""

MERGEKIT = """
merge_method: linear
dtype: bfloat16
parameters: {{normalize: false}}
models:
  - {{model: "{dpo}", parameters: {{weight: {plus}}}}}
  - {{model: "{sft}", parameters: {{weight: {minus}}}}}
"""


@dataclass(frozen=True)
class Run:
    """One measured command."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    read_bytes: int
    combine_s: float = math.nan
    """Of expo: from the first read to the last write."""
    start_s: float = math.nan
    """Of expo: from the start of the process to the first read."""
    import_s: float = math.nan
    """Of expo: importing torch, while files are read ahead."""

    @property
    def neither_s(self) -> float:
        """Of expo: what is left of the process, most of it writing what goes with the weights, and ending."""
        return self.wall_s - self.start_s - self.import_s - self.combine_s


def measure(command: list[str], manifest: Path | None = None) -> Run:
    """Run a command through the launcher."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    code, wall, cpu, peak, read, epoch = done.stdout.split()
    if code != "0":
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    run = Run(float(wall), float(cpu), int(peak), int(read))
    if manifest is None:
        return run
    clock = json.loads(manifest.read_text())["clock"]
    start, read = clock["first_read"] - float(epoch), clock["first_read"] - clock["started"]
    combine = clock["combine_seconds"]
    return replace(run, combine_s=combine, start_s=start, import_s=clock["seconds"] - read - combine)


# --- the checkpoints ----------------------------------------------------------------------------------------------


def make_pair(work: Path, pair: str) -> tuple[Path, Path]:
    """Two checkpoints with different layouts; ‖Δ‖/‖θ‖ is 0.035 as zephyr's."""
    sft, dpo, done = work / f"sft-{pair}", work / f"dpo-{pair}", work / f"done-{pair}"
    shapes = parameter_shapes(pair)
    require_room(work, sum(2 * math.prod(shape) for shape in shapes.values()) * (1 if done.exists() else 3))
    if not done.exists():
        generator = torch.Generator().manual_seed(0)
        weights = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
        save(sft, weights, pair, shards=2)
        for weight in weights.values():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.float() + 0.035 * 0.02 * noise)
        save(dpo, weights, pair, shards=5)
        done.touch()
    return sft, dpo


def require_room(work: Path, nbytes: int) -> None:
    """End where the disk has no room for what is to be made."""
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < 1.05 * nbytes:
        raise SystemExit(f"SKIPPED: {work} has {free / 1e9:.1f} GB free, and {1.05 * nbytes / 1e9:.1f} GB are needed")


def parameter_shapes(pair: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LlamaForCausalLM(LlamaConfig(**PAIRS[pair])).named_parameters()}


def save(folder: Path, weights: dict[str, torch.Tensor], pair: str, shards: int) -> None:
    """Write a sharded checkpoint with its config."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**PAIRS[pair], dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
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


# --- the ways -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way of doing it."""

    label: str
    command: list[str]
    folder: Path
    """What it writes; removed after each run."""
    rounds: int
    beside: str = "floor"
    """The way it is compared with."""
    manifest: Path | None = None
    exact: bool = False
    """Whether its weights are compared with float64."""
    cold: bool = False
    """Whether its inputs are taken out of memory before each run."""


def ways(options: argparse.Namespace, sft: Path, dpo: Path) -> dict[str, Way]:
    """What to measure."""
    copy, out, four, paper, merged = (options.work / name for name in ("copy", "out", "four", "paper", "merged"))
    floor = f'cat "{sft}"/*.safetensors > /dev/null && cp -r --reflink=never "{dpo}" "{copy}"'
    expo = [sys.executable, "-m", "expo", "extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--output", str(out)]
    one = [*expo, "--alpha", str(ALPHA)]
    several = [*expo, *(word for alpha in SEVERAL for word in ("--alpha", str(alpha))), "--no-fsync"]
    found = {
        "floor": Way("the floor: `cat` SFT + `cp` DPO", ["sh", "-c", floor], copy, options.rounds),
        "expo": Way(
            "`expo extrapolate --no-fsync`", [*one, "--no-fsync"], out, options.rounds, "floor", out / "expo.json", True
        ),
    }
    if options.against:
        other = ["env", f"PYTHONPATH={options.against}", *one, "--no-fsync"]
        label = "the same by the other checkout"
        found["against"] = Way(label, other, out, options.rounds, "floor", out / "expo.json", True)
    if options.fsync:
        found["fsync"] = Way("`expo extrapolate`", one, out, options.rounds, "floor", out / "expo.json")
    if options.cold:
        read = f'for f in "{sft}"/*.safetensors; do dd if="$f" of=/dev/null bs=4M || exit 1; done'
        write = f'for f in "{dpo}"/*.safetensors; do dd if="$f" of="{copy}/${{f##*/}}" bs=4M conv=fsync || exit 1; done'
        command = ["sh", "-c", f'mkdir "{copy}" && {read} && {write}']
        found["dd"] = Way("`dd` of SFT, and of DPO to a copy, cold", command, copy, options.cold, "dd", cold=True)
        found["cold"] = Way("`expo extrapolate`, cold", one, out, options.cold, "dd", out / "expo.json", cold=True)
    if options.several:
        script = [sys.executable, "-S", "-c", READ_BOTH_WRITE_FOUR, str(sft), str(dpo), str(four)]
        found["four"] = Way("read both sides, write four copies, one thread", script, four, options.rounds, "four")
        label, manifest = "`expo extrapolate --no-fsync`, four α", out / f"alpha-{SEVERAL[0]}" / "expo.json"
        found["several"] = Way(label, several, out, options.rounds, "four", manifest)
    if options.paper:
        command = [sys.executable, "-c", PAPER, str(sft), str(dpo), str(ALPHA), str(paper)]
        label = "the paper's method (two models in memory, bfloat16)"
        found["paper"] = Way(label, command, paper, options.paper, "floor", None, True)
    if options.mergekit:
        recipe = options.work / "mergekit.yaml"
        recipe.write_text(MERGEKIT.format(sft=sft, dpo=dpo, plus=1 + ALPHA, minus=-ALPHA))
        found["mergekit"] = Way(
            "mergekit `linear`",
            [options.mergekit, str(recipe), str(merged)],
            merged,
            options.paper or 3,
            "floor",
            None,
            True,
        )
    return found


def forget(*folders: Path) -> None:
    """Take weight files out of the page cache."""
    os.sync()
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


Runs = dict[tuple[float, str], list[Run]]
"""By the pause before each, and the way's name."""


def run_all(found: dict[str, Way], sft: Path, dpo: Path, pauses: Sequence[float]) -> tuple[Runs, dict[str, Exactness]]:
    """Every way once a round, in an order of its own, with each pause."""
    runs: Runs = {(pause, name): [] for pause in pauses for name in found}
    exact: dict[str, Exactness] = {}
    chance = random.Random(0)
    for number in range(-1, max(way.rounds for way in found.values())):
        for pause in pauses:
            for name, way in chance.sample(list(found.items()), len(found)):
                if number >= way.rounds or (number < 0 and name not in ("floor", "expo")):
                    continue
                if way.cold:
                    forget(sft, dpo)
                time.sleep(pause)
                run = measure(way.command, way.manifest)
                if number >= 0:  # the round before the first warms the page cache
                    runs[pause, name].append(run)
                if way.exact and name not in exact:
                    exact[name] = check(sft, dpo, way.folder)
                shutil.rmtree(way.folder)
                os.sync()
    return runs, exact


# --- the table ----------------------------------------------------------------------------------------------------


def ratio(runs: list[float], base: list[float]) -> str:
    """Median of the ratios side by side, with an interval from their order that holds the median with ≥ 95 %."""
    count = min(len(runs), len(base))
    ratios = sorted(a / b for a, b in zip(runs, base, strict=False))
    outside = next((k for k in range(count // 2, 0, -1) if 2 * below(count, k) <= 0.05), 0)
    interval = f" ({ratios[outside - 1]:.2f}–{ratios[count - outside]:.2f})" if outside else ""
    return f"{statistics.median(ratios):.2f}{interval}"


def below(count: int, rank: int) -> float:
    """Chance that fewer than `rank` of `count` values lie below the true median."""
    return sum(math.comb(count, k) for k in range(rank)) / 2**count


def row(way: Way, runs: list[Run], base: list[Run], exactness: Exactness | None) -> str:
    """One line of the table."""
    wall, cpu = statistics.median(run.wall_s for run in runs), statistics.median(run.cpu_s for run in runs)
    spread = f"{min(run.wall_s for run in runs):.2f}–{max(run.wall_s for run in runs):.2f}"
    floors = [run.wall_s for run in base]
    combine = "–"
    if way.manifest:
        phase = [run.combine_s for run in runs]
        combine = f"{statistics.median(phase):.2f} s = {ratio(phase, floors)}"
    exact = f"{exactness.off / exactness.weights:.4%} | {exactness.violations}" if exactness else "– | –"
    peak, read = max(run.peak_bytes for run in runs) / 1e6, statistics.median(run.read_bytes for run in runs) / 1e9
    cells = [way.label, len(runs), f"{wall:.2f} s ({spread})", ratio([run.wall_s for run in runs], floors), combine]
    return "| " + " | ".join(map(str, [*cells, f"{cpu:.2f} s", f"{peak:.0f} MB", f"{read:.2f} GB", exact])) + " |"


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints, which are kept")
    parser.add_argument("--pair", choices=PAIRS, default="1b", help="2.2, 5 or 12 GB a side")
    parser.add_argument("--rounds", type=int, default=11, help="how often the floor and expo")
    parser.add_argument("--pause", type=float, nargs="*", default=PAUSES_S, metavar="S", help="before each run")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="measure another checkout of expo too")
    parser.add_argument("--fsync", action="store_true", help="measure it with fsync too")
    parser.add_argument("--cold", type=int, default=0, metavar="N", help="measure it N times from the disk, too")
    parser.add_argument("--several", action="store_true", help="measure four α in one pass too")
    parser.add_argument("--paper", type=int, default=0, metavar="N", help="measure the paper's method N times")
    parser.add_argument("--skip-check", action="store_true", help="do not compare the weights with float64")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="measure this mergekit-yaml too")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    sft, dpo = make_pair(options.work, options.pair)
    found = ways(options, sft, dpo)
    if options.skip_check:
        found = {name: replace(way, exact=False) for name, way in found.items()}
    runs, exact = run_all(found, sft, dpo, options.pause)
    for pause in options.pause:
        print(f"\n{'Right after each other' if not pause else f'With {pause:g} s before each'}:\n")
        print(f"| {' | '.join(COLUMNS)} |")
        print(f"|{' --- |' * len(COLUMNS)}")
        for name, way in found.items():
            print(row(way, runs[pause, name], runs[pause, way.beside], exact.get(name)))
    torch_s = statistics.median(measure([sys.executable, "-c", "import torch"]).wall_s for _ in range(5))
    own = [run for pause in options.pause for run in runs[pause, "expo"]]
    start_s, neither_s = (statistics.median(getattr(run, name) for run in own) for name in ("start_s", "neither_s"))
    if exact:
        print(f"\n{exact['expo'].weights:,} weights checked against float64; α = {ALPHA}.")
    print(f"From expo's start to its first read: {start_s:.2f} s; `python -c 'import torch'`: {torch_s:.2f} s.")
    print(f"Neither before the first read, nor importing torch, nor combining: {neither_s:.2f} s.")
    if exact and exact["expo"].violations:
        raise SystemExit("expo's output breaks the bound")


if __name__ == "__main__":
    main()
