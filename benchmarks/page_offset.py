"""How fast a file in the page cache is read, by where the buffer lies within a page.

The rows are file offsets, the columns what the buffer's place within a page is beyond the file's, in bytes.

    python benchmarks/page_offset.py --file model.safetensors
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from pathlib import Path

PIECE_BYTES = 1 << 20
FILE_OFFSETS = (0, 8, 280)
BEYOND = (-64, -8, 0, 8, 16, 24, 32, 64)
ROUNDS = 2


def gigabytes_per_second(file: Path, offset: int, place: int) -> float:
    """The best of some readings of the whole file in pieces of 1 MiB."""
    memory = mmap.mmap(-1, PIECE_BYTES + 2 * mmap.PAGESIZE)
    buffer = memoryview(memory)[place : place + PIECE_BYTES]
    descriptor, best = os.open(file, os.O_RDONLY), 0.0
    for _ in range(ROUNDS):
        position, start = offset, time.perf_counter()
        while count := os.preadv(descriptor, [buffer], position):
            position += count
        best = max(best, (position - offset) / (time.perf_counter() - start) / 1e9)
    os.close(descriptor)
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="a file of some hundred MB, read before")
    file = parser.parse_args().file
    gigabytes_per_second(file, 0, 0)
    print("| file offset | " + " | ".join(f"{beyond:+d}" for beyond in BEYOND) + " |")
    print("| --- " * (len(BEYOND) + 1) + "|")
    for offset in FILE_OFFSETS:
        places = [(offset + beyond) % mmap.PAGESIZE for beyond in BEYOND]
        print(f"| {offset} | " + " | ".join(f"{gigabytes_per_second(file, offset, at):.1f}" for at in places) + " |")


if __name__ == "__main__":
    main()
