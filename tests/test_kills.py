"""Both engines stopped at random moments of their work, by `kills.py`: no row in the journal is lost or made again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import Run, run_python
from sizes import sized

KILLED = sized(ci=4, full=10)
KILLS = Path(__file__).with_name("kills.py")
ENGINES = {
    "transformers": {"batch_tokens": 150},  # five batches
    "vllm": {"engine_arg": ["max_num_seqs=4"]},
}


AFTER_A_KILL = """
import os, signal, sys, time
from crashes import ended, forked, tqdm

read, write = os.pipe()
tqdm.get_lock()

def hold():
    tqdm.get_lock().acquire()
    os.write(write, b".")
    time.sleep(60)

child = forked(hold)
os.read(read, 1)
os.kill(child, signal.SIGKILL)
ended(child)
sys.exit(ended(forked(lambda: len(list(tqdm(range(2)))) - 2)))
"""


def test_a_child_killed_while_it_draws_does_not_stop_the_next():
    done = run_python(AFTER_A_KILL, env={"PYTHONPATH": str(KILLS.parent)}, timeout=60)
    assert done.code == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_kills_at_random_moments_lose_no_row(trained, alpaca_data, tmp_path, request, engine):
    instructions = [row["instruction"][:200] for row in json.loads(
        (alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json").read_text())[:18]]  # fmt: skip
    task = tmp_path / "q.jsonl"
    task.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in instructions))
    settings = {"task": str(task), "model": str(trained / "tiny-dpo"), "engine": engine, "max_tokens": 12}
    run = request.getfixturevalue("run_warm" if engine == "vllm" else "run_forked")
    results = stops(run, {**settings, **ENGINES[engine]}, tmp_path, seed=1, count=KILLED)
    counts = Counter(result["signal"] for result in results)
    assert {name: count for name, count in counts.items() if name != "none"} == {
        "SIGKILL": KILLED,
        "SIGTERM": 1,
        "SIGINT": 1,
    }
    assert len({result["left"] for result in results}) > sized(ci=1, full=2), "the stops came all at one moment"


def stops(run: Run, settings: dict[str, object], folder: Path, *, seed: int, count: int) -> list[dict[str, object]]:
    """All results of `kills.py`, which are shown where one is wrong."""
    done = run(KILLS, json.dumps(settings), folder, seed, count)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    report = "\n".join([*done.stdout.splitlines(), done.stderr])
    assert done.code == 0, report
    assert [result["trouble"] for result in results if result["trouble"]] == [], report
    return results
