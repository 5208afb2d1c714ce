"""One command for a machine with a GPU: is θ(α) computed there right, fast, and in little memory?

Writes a pair, makes θ(α) on the CPU and on the GPU, and prints how many weights differ and by how much, the
throughput beside that of the disk (or page cache) and of the bus, and the most device memory that a run took (its CUDA
context included; anything else that runs on the device counts too). The disk alone is measured with as many threads and
pieces of the same size: they read both sides and write one.

    python benchmarks/gpu.py --work /tmp/expo-gpu --pair 2.5b
    pytest -m gpu
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import torch
from extrapolate import ALPHA, PAIRS, make_pair, measure, open_all

from expo.theta.stream import CUDA_PIECE_BYTES, default_workers

BLOCK_BYTES = 16 << 20
BUS_ROUNDS = 64
SAMPLE_S = 0.01


class DeviceMemory:
    """The most device memory that is taken beyond the start while the body runs; 0 on a CPU."""

    def __init__(self, device: str) -> None:
        self.most_bytes = 0
        self._device = torch.device(device)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DeviceMemory:
        if self._device.type == "cuda":
            self._free_before = self._free()
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._device.type == "cuda":
            self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.most_bytes = max(self.most_bytes, self._free_before - self._free())

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


def combine_seconds(sft: Path, dpo: Path, output: Path, device: str, workers: int | None) -> float:
    """One run's seconds from the first read to the last write."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "expo", "extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--no-fsync"]
    command += ["--alpha", str(ALPHA), "--output", str(output), "--device", device]
    command += ["--workers", str(workers)] if workers else []
    return measure(command, output / "expo.json").combine_s


def compare(one: Path, other: Path) -> tuple[int, int, int]:
    """Weights, those that differ, and the largest difference in steps of their type."""
    count = differ = steps = 0
    sides = open_all(one), open_all(other)
    for name in sides[0]:
        first, second = (side[name].get_tensor(name).flatten().view(torch.int16) for side in sides)
        apart = (ordered(first) - ordered(second)).abs()
        count, differ, steps = count + apart.numel(), differ + int((apart > 0).sum()), max(steps, int(apart.max()))
    return count, differ, steps


def ordered(bits: torch.Tensor) -> torch.Tensor:
    """bfloat16 bit patterns as integers in the order of the values."""
    wide = bits.int()
    return torch.where(wide < 0, -(wide & 0x7FFF), wide)


def bus_bytes_per_second(device: torch.device) -> float:
    """Pinned copies to the device; θ(α) of one pair sends two bytes there for each that comes back."""
    host = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(BUS_ROUNDS):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    return BLOCK_BYTES * BUS_ROUNDS / (time.perf_counter() - start)


def floor_seconds(sft: Path, dpo: Path, copy: Path) -> float:
    """Reading SFT and copying DPO, as `cat` and `cp` do."""
    script = f'cat "{sft}"/*.safetensors > /dev/null && cp -r --reflink=never "{dpo}" "{copy}"'
    seconds = measure(["sh", "-c", script]).wall_s
    shutil.rmtree(copy)
    return seconds


def disk_seconds(sft: Path, dpo: Path, copy: Path, threads: int) -> float:
    """Reading both sides and writing one in pieces, with nothing in between."""
    copy.mkdir()
    own = threading.local()

    def move(source: int, offset: int, target: int | None) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(CUDA_PIECE_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        view = own.buffer.numpy().data
        count = os.preadv(source, [view], offset)
        if target is not None:
            os.pwrite(target, view[:count], offset)

    with ExitStack() as stack:
        sides: list[list[tuple[int, int, int | None]]] = [[], []]
        for side, folder in zip(sides, (sft, dpo), strict=True):
            for file in sorted(folder.glob("*.safetensors")):
                source = stack.enter_context(file.open("rb")).fileno()
                target = stack.enter_context((copy / file.name).open("wb")).fileno() if folder == dpo else None
                side += [(source, offset, target) for offset in range(0, file.stat().st_size, CUDA_PIECE_BYTES)]
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for moved in [pool.submit(move, *one) for both in zip_longest(*sides) for one in both if one]:
                moved.result()
        seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; they are kept")
    parser.add_argument("--pair", choices=sorted(PAIRS), default="1b", help="2.2 GB or 5 GB a side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, help="threads, each with a stream of its own")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"torch sees no CUDA device for --device {options.device}; --device cpu tries the script")
    sft, dpo = make_pair(options.work, options.pair)
    cpu, gpu = options.work / "cpu", options.work / "gpu"
    combine_seconds(sft, dpo, cpu, "cpu", options.workers)
    threads, copy = options.workers or default_workers(), options.work / "copy"
    floors, disks, seconds, taken = [], [], [], []
    for _ in range(options.rounds):
        floors.append(floor_seconds(sft, dpo, copy))
        disks.append(disk_seconds(sft, dpo, copy, threads))
        with DeviceMemory(options.device) as memory:
            seconds.append(combine_seconds(sft, dpo, gpu, options.device, options.workers))
        taken.append(memory.most_bytes)
    count, differ, steps = compare(cpu, gpu)
    nbytes = sum(file.stat().st_size for side in (sft, dpo) for file in side.glob("*.safetensors"))
    figures = {
        "weights": count,
        "differ from the CPU's": differ,
        "largest difference, steps": steps,
        "combining, s": spread(seconds),
        "floor (cat + cp), s": spread(floors),
        "× the floor": median_ratio(seconds, floors),
        "disk alone, s": spread(disks),
        "throughput, × the disk's": median_ratio(disks, seconds),
    }
    if options.device.startswith("cuda"):
        bus = bus_bytes_per_second(torch.device(options.device))
        figures |= {"device": torch.cuda.get_device_name(), "bus, GB/s": round(bus / 1e9, 1)}
        figures |= {"bus alone, s": round(nbytes / bus, 3), "device memory, MB": round(max(taken) / 1e6)}
    print(json.dumps(figures, indent=2, ensure_ascii=False))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over the rounds of two figures' ratio."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


if __name__ == "__main__":
    main()
