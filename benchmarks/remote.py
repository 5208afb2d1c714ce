"""How fast `expo extrapolate --stream-sft` is beside the raw transfer of the same bytes, and how many bytes it fetches.

Makes a random bfloat16 Llama pair (kept in --work), serves SFT from a process of its own with the tests' hub, and
measures, in turn,

- `curl`, eight at a time, each an eighth of every file of SFT, thrown away,
- `expo extrapolate --stream-sft --no-fsync`: its combining phase, as expo.json tells it, and the whole process,
- the same with SFT on the disk.

With --megabytes-per-second, each connection is slowed to that, and each answer begins --latency-ms later, as those of a
distant server do. Prints a Markdown table with medians; a ratio is that of two runs of one round.

    python benchmarks/remote.py --work /tmp/expo-remote --rounds 5
    python benchmarks/remote.py --work /tmp/expo-remote --rounds 5 --megabytes-per-second 40 --latency-ms 60
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from extrapolate import ALPHA, PAIRS, Run, make_pair, measure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hub_server
from hub_server import FakeHub

from expo.checkpoint.folder import read_checkpoint
from expo.checkpoint.read_ahead import CONNECTIONS

STEP_BYTES = 1 << 18
PAUSE_S = 2.0


class Slow:
    """A connection's stream that keeps to a speed, after a wait."""

    def __init__(self, stream: IO[bytes], bytes_per_s: float, latency_s: float) -> None:
        self._stream, self._bytes_per_s, self._latency_s = stream, bytes_per_s, latency_s

    def write(self, data: bytes) -> None:
        """Send data; an answer's header is one, its body another."""
        if len(data) < STEP_BYTES:
            time.sleep(self._latency_s)
        begun = time.perf_counter()
        for done in range(0, len(data), STEP_BYTES):
            self._stream.write(data[done : done + STEP_BYTES])
            time.sleep(max(begun + (done + STEP_BYTES) / self._bytes_per_s - time.perf_counter(), 0))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def serve(sft: Path, pipe: Connection, megabytes_per_s: float | None, latency_ms: float) -> None:
    """Serve SFT; say where, and what was sent since the last question."""
    if megabytes_per_s is not None:
        setup = hub_server._Handler.setup

        def slow(handler: hub_server._Handler) -> None:
            setup(handler)
            handler.wfile = Slow(handler.wfile, megabytes_per_s * 1e6, latency_ms / 1e3)

        hub_server._Handler.setup = slow
    with FakeHub().serve() as hub:
        commit = hub.add("org/sft", sft).refs["main"]
        hub.sent_of("org/sft")
        for content in hub.model("org/sft").files.values():
            hub_server._git_id(content)  # reckoned now, and not while somebody waits
        pipe.send((commit, hub.environment(Path("unused"))))
        while pipe.recv():
            pipe.send(hub.sent_of("org/sft"))
            hub.forget_requests()


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[Connection, str, dict[str, str]]]:
    """A hub in a process of its own: a pipe to it, SFT's commit, and what a process needs to talk to it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(arguments[0], theirs, *arguments[1:]))
    process.start()
    commit, environment = ours.recv()
    try:
        yield ours, commit, environment
    finally:
        ours.send(False)
        process.join()


def curl(sft: Path, address: str) -> Run:
    """Every file by ranges, a connection each."""
    lines = []
    for shard in read_checkpoint(sft).shards:
        step = -(-shard.nbytes // CONNECTIONS)
        for first in range(0, shard.nbytes, step):
            part = f"{first}-{min(first + step, shard.nbytes) - 1}"
            lines.append(f"curl -sfL -r {part} -o /dev/null {address}/{shard.file.name} &")
        lines.append("wait")
    return measure(["sh", "-c", "\n".join(lines)])


def expo(sft: str, dpo: Path, work: Path, *flags: str) -> Run:
    """One output, which is removed."""
    command = [sys.executable, "-m", "expo", "extrapolate", "--sft", sft, "--dpo", str(dpo), "--alpha", str(ALPHA)]
    run = measure([*command, "--output", str(work / "out"), "--no-fsync", *flags], work / "out" / "expo.json")
    shutil.rmtree(work / "out")
    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for 7 GB")
    parser.add_argument("--pair", choices=PAIRS, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes-per-second", type=float, help="of each connection")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    sft, dpo = make_pair(given.work, given.pair)
    runs: dict[str, list[Run]] = {"curl": [], "streamed": [], "local": []}
    sent: list[int] = []
    with serving(sft, given.megabytes_per_second, given.latency_ms) as (pipe, commit, environment):
        os.environ.update(environment)
        address = f"{environment['HF_ENDPOINT']}/org/sft/resolve/{commit}"
        for _ in range(given.rounds):
            for way in random.sample(list(runs), len(runs)):
                time.sleep(PAUSE_S)
                pipe.send(True)
                pipe.recv()
                with tempfile.TemporaryDirectory() as home:
                    os.environ["HF_HOME"] = home
                    if way == "curl":
                        runs[way].append(curl(sft, address))
                    elif way == "local":
                        runs[way].append(expo(str(sft), dpo, given.work))
                    else:
                        runs[way].append(expo("org/sft", dpo, given.work, "--stream-sft"))
                        pipe.send(True)
                        sent.append(pipe.recv())
    report(runs, sent, sum(tensor.nbytes for tensor in read_checkpoint(sft).tensors.values()))


def report(runs: dict[str, list[Run]], sent: list[int], nbytes: int) -> None:
    """Print the table."""
    print("| way | wall | combining | × curl | SFT per second | CPU | peak | fetched ÷ tensors |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for way, done in runs.items():
        phase = [run.wall_s if way == "curl" else run.combine_s for run in done]
        ratio = statistics.median(mine / raw.wall_s for mine, raw in zip(phase, runs["curl"], strict=True))
        low, high = min(run.wall_s for run in done), max(run.wall_s for run in done)
        wall, seconds = statistics.median(run.wall_s for run in done), statistics.median(phase)
        cells = (
            f"{wall:.2f} s ({low:.2f}–{high:.2f})",
            "–" if way == "curl" else f"{seconds:.2f} s",
            f"{ratio:.2f}",
            f"{nbytes / seconds / 1e9:.2f} GB",
            f"{statistics.median(run.cpu_s for run in done):.2f} s",
            f"{max(run.peak_bytes for run in done) / 1e6:.0f} MB",
            f"{max(sent) / nbytes:.5f}" if way == "streamed" else "–",
        )
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
