"""That the memory of `expo extrapolate` grows with nothing: not the model, nor a tensor, nor the number of α.

Makes pairs of sparse files (random values at the start of each tensor, zeros after), runs the program on each, and
prints its peak resident memory, measured from a small process as time(1) does.

    python benchmarks/memory.py --work /tmp/expo-memory
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from extrapolate import measure

SEEDED_BYTES = 1 << 20
GB = 10**9


@dataclass(frozen=True)
class Case:
    """A pair and how many α of it are made."""

    label: str
    tensors: tuple[tuple[int, ...], ...]
    alphas: int = 1

    @property
    def nbytes(self) -> int:
        """Of one side, in bfloat16."""
        return sum(2 * torch.Size(shape).numel() for shape in self.tensors)


SQUARE = (5000, 5000)
CASES = (
    Case("0.5 GB, tensors of 50 MB", (SQUARE,) * 10),
    Case("8 GB, tensors of 50 MB", (SQUARE,) * 160),
    Case("one tensor of 4 GB (64 fused experts)", ((64, 4096, 7630),)),
    Case("an embedding of 256,000 rows", ((256_000, 4096),)),
    Case("0.1 GB, 4 α", ((5000, 5000),) * 2, 4),
    Case("0.1 GB, 40 α", ((5000, 5000),) * 2, 40),
)


def make_side(folder: Path, case: Case, seed: int) -> Path:
    """A checkpoint whose tensors are random at their start and zero after it, which takes hardly any disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    header, end = {}, 0
    for number, shape in enumerate(case.tensors):
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[f"layers.{number}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(seed)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        for entry in header.values():
            stream.seek(start + entry["data_offsets"][0])
            values = torch.randn(SEEDED_BYTES // 2, generator=generator).bfloat16()
            stream.write(values.view(torch.uint8).numpy().tobytes())
        stream.truncate(start + end)
    return folder


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder with room for 9 GB; removed again")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--largest", type=float, default=9.0, metavar="GB", help="leave out pairs with more a side")
    options = parser.parse_args()
    print("| pair | bytes a side | α | peak RSS |\n| --- | --- | --- | --- |")
    for case in (one for one in CASES if one.nbytes <= options.largest * GB):
        sides = [make_side(options.work / name, case, seed) for seed, name in enumerate(("sft", "dpo"))]
        alphas = [word for number in range(case.alphas) for word in ("--alpha", str(0.1 + number / 100))]
        paths = ["--sft", str(sides[0]), "--dpo", str(sides[1]), "--output", str(options.work / "out")]
        command = [sys.executable, "-m", "expo", "extrapolate", *paths, *alphas]
        run = measure([*command, "--no-fsync", "--device", options.device])
        label = f"{case.label} | {case.nbytes / GB:.1f} GB | {case.alphas}"
        print(f"| {label} | {run.peak_bytes / 1e6:.0f} MB |", flush=True)
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
