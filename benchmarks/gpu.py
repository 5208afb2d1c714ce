"""One command for a machine with a GPU: is θ(α) computed there right, fast, and in little memory?

Writes a pair, makes θ(α) on the CPU and on the GPU, and prints how many weights differ and by how much, the
throughput beside that of the disk (or page cache) and of the bus, and the most device memory that a run took (its CUDA
context included; anything else that runs on the device counts too).

    python benchmarks/gpu.py --work /tmp/expo-gpu
    pytest -m gpu
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from extrapolate import ALPHA, make_pair, measure, open_all

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


def disk_seconds(sft: Path, dpo: Path, copy: Path) -> float:
    """Reading SFT and copying DPO."""
    script = f'cat "{sft}"/*.safetensors > /dev/null && cp -r --reflink=never "{dpo}" "{copy}"'
    seconds = measure(["sh", "-c", script]).wall_s
    shutil.rmtree(copy)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for 9 GB of checkpoints; they are kept")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, help="threads, each with a stream of its own")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"torch sees no CUDA device for --device {options.device}; --device cpu tries the script")
    sft, dpo = make_pair(options.work, "1b")
    cpu, gpu = options.work / "cpu", options.work / "gpu"
    combine_seconds(sft, dpo, cpu, "cpu", options.workers)
    floors, seconds, taken = [], [], []
    for _ in range(options.rounds):
        floors.append(disk_seconds(sft, dpo, options.work / "copy"))
        with DeviceMemory(options.device) as memory:
            seconds.append(combine_seconds(sft, dpo, gpu, options.device, options.workers))
        taken.append(memory.most_bytes)
    count, differ, steps = compare(cpu, gpu)
    nbytes = sum(file.stat().st_size for side in (sft, dpo) for file in side.glob("*.safetensors"))
    figures = {
        "weights": count,
        "differ from the CPU's": differ,
        "largest difference, steps": steps,
        "combining, s": round(statistics.median(seconds), 3),
        "floor (cat + cp), s": round(statistics.median(floors), 3),
        "ratio": round(statistics.median(a / b for a, b in zip(seconds, floors, strict=True)), 3),
    }
    if options.device.startswith("cuda"):
        bus = bus_bytes_per_second(torch.device(options.device))
        figures |= {"device": torch.cuda.get_device_name(), "bus, GB/s": round(bus / 1e9, 1)}
        figures |= {"bus alone, s": round(nbytes / bus, 3), "device memory, MB": round(max(taken) / 1e6)}
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
