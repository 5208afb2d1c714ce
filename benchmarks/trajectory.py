"""How fast and how small `expo extrapolate --checkpoint` is: a training run's checkpoints to a later step.

Makes a random bfloat16 run of Llama's shapes (kept in --work), whose weights move along lines and beside them, and
measures for two, three and four checkpoints, in turn,

- the floor: one thread that reads θ_0 and every checkpoint twice, in blocks of 1 MiB, and writes one copy of the last,
- `expo extrapolate --no-fsync` to one step: its combining phase (first read to last write, all checks on), with its
  usual number of threads, and with one,

and compares some tensors with a float64 SVD. A ratio is the median over rounds of two runs side by side, with the
range of these.

    python benchmarks/trajectory.py --work /tmp/expo-bench --pair 1b --rounds 5
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from extrapolate import PAIRS, Run, measure, open_all, parameter_shapes, require_room, save, to_bfloat16

STEPS = (100, 200, 300, 400)
TARGET = 2000
CHECKED = 6
"""Tensors that are compared with float64."""

READ_TWICE_WRITE_ONCE = """
import mmap, os, sys
from pathlib import Path
output, *models = map(Path, sys.argv[1:])
buffer = memoryview(mmap.mmap(-1, 1 << 20))
output.mkdir()
for again in range(2):
    for number, model in enumerate(models, start=1):
        for file in sorted(model.glob("*.safetensors")):
            source = os.open(file, os.O_RDONLY)
            last = again and number == len(models)
            target = os.open(output / file.name, os.O_WRONLY | os.O_CREAT) if last else None
            while count := os.readv(source, [buffer]):
                if target is not None:
                    os.write(target, buffer[:count])
"""


def make_run(work: Path, pair: str) -> list[Path]:
    """θ_0 and its checkpoints; at the last one ‖Δ‖/‖θ‖ is 0.03, of which a fifth is beside the line."""
    folders, done = [work / f"run-{pair}-{step}" for step in (0, *STEPS)], work / f"run-{pair}-done"
    shapes = parameter_shapes(pair)
    nbytes = sum(2 * math.prod(shape) for shape in shapes.values())
    require_room(work, nbytes * (1 if done.exists() else 2 + len(STEPS)))
    if not done.exists():
        for number, (step, folder) in enumerate(zip((0, *STEPS), folders, strict=True)):
            save(folder, dict(_weights(shapes, step)), pair, shards=1 + number)
        done.touch()
    return folders


def _weights(shapes: dict[str, tuple[int, ...]], step: int):  # noqa: ANN202 - names and tensors
    for number, (name, shape) in enumerate(shapes.items()):
        start, direction, beside = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in (3 * number, 3 * number + 1, 1_000_000 * step + number)
        )
        moved = 0.03 * step / STEPS[-1] * direction + (0.006 * beside if step else 0.0)
        yield name, (0.02 * (start + moved)).bfloat16()


def check(folders: list[Path], output: Path) -> str:
    """Compare some tensors with a float64 SVD, and say how many weights are not its correct rounding.

    A violation is not even the rounding of a number within 2⁻²⁰(|θ_0| + Σ|w_t Δ_t|) of it.
    """
    opened = [open_all(folder) for folder in (*folders, output)]
    names = [name for name in opened[0] if "layers" in name][:: max(len(opened[0]) // CHECKED, 1)]
    off = violations = count = 0
    for name in names:
        start, *changed, found = (one[name].get_tensor(name).double().numpy().ravel() for one in opened)
        changes, steps = np.stack(changed) - start, np.array(STEPS[: len(changed)], float)
        left, sizes, _ = np.linalg.svd(changes, full_matrices=False)
        direction = left[:, 0] / sizes[0]  # v as a combination of the changes
        weights = np.polyval(np.polyfit(steps, left[:, 0] * sizes[0], 1), TARGET) * direction
        right = start + weights @ changes
        bound = 2.0**-20 * (np.abs(start) + np.abs(weights) @ np.abs(changes))
        off += int((found != to_bfloat16(right)).sum())
        violations += int(((found < to_bfloat16(right - bound)) | (found > to_bfloat16(right + bound))).sum())
        count += right.size
    return f"{count:,} weights of {len(names)} tensors checked: {off / count:.4%} off, {violations} violations"


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and outputs")
    parser.add_argument("--pair", choices=PAIRS, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folders, out = make_run(options.work, options.pair), options.work / "out"
    print("| checkpoints | way | wall (range) | combining, × the floor (range) | peak |")
    print("| --- | --- | --- | --- | --- |")
    for count in range(2, len(STEPS) + 1):
        models, runs = folders[: 1 + count], {}
        words = [
            word for step, one in zip(STEPS, models[1:], strict=False) for word in ("--checkpoint", f"{step}={one}")
        ]
        expo = [
            sys.executable,
            "-m",
            "expo",
            "extrapolate",
            "--sft",
            str(models[0]),
            *words,
            "--target-step",
            str(TARGET),
        ]
        expo += ["--output", str(out), "--no-fsync"]
        for _ in range(options.rounds):
            for label, command in {
                "the floor": [sys.executable, "-S", "-c", READ_TWICE_WRITE_ONCE, str(out), *map(str, models)],
                "`expo extrapolate --no-fsync`": expo,
                "the same with `--workers 1`": [*expo, "--workers", "1"],
            }.items():
                shutil.rmtree(out, ignore_errors=True)
                manifest = None if label == "the floor" else out / "expo.json"
                runs.setdefault(label, []).append(measure(command, manifest))
        checked = check(models, out)
        shutil.rmtree(out)
        for label, own in runs.items():
            print(row(count, label, own, runs["the floor"]))
        print(f"<!-- {count} checkpoints, {checked} -->", flush=True)


def row(count: int, label: str, runs: list[Run], floor: list[Run]) -> str:
    """A row of the table."""
    walls = [run.wall_s for run in runs]
    combining = "–"
    if not math.isnan(runs[0].combine_s):
        ratios = [run.combine_s / beside.wall_s for run, beside in zip(runs, floor, strict=True)]
        seconds = statistics.median(run.combine_s for run in runs)
        combining = f"{seconds:.2f} s = {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    wall = f"{statistics.median(walls):.2f} s ({min(walls):.2f}–{max(walls):.2f})"
    return f"| {count} | {label} | {wall} | {combining} | {max(run.peak_bytes for run in runs) / 1e6:.0f} MB |"


if __name__ == "__main__":
    main()
