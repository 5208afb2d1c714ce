"""The inputs of the tests that want a trained model: made here, by the demo's trainer and from the demo's task.

A trio (`tiny-sft`, `tiny-dpo`, `tiny-rm`), held-out prompts, and files as AlpacaEval and FastChat publish them. They
lie as the real ones do that some checkouts have beside them, under the same names, so that a test takes either.

`python -m tests.made_inputs` makes them, which `tests/run.sh` does while other checks run; else the first test that
asks for them does, and the others wait. They are made again where what makes them has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
PLACE = "EXPO_TEST_INPUTS"
"""Names another folder than `build/` for what is made."""

STEPS = {"SFT": 120, "REWARD": 100}
"""Of the demo's schedules; fewer than there, and enough for θ(α) to gain."""
MODELS = {"sft": "tiny-sft", "dpo": "tiny-dpo", "rm": "tiny-rm"}
ALPACA = ("zephyr-7b-dpo-full", "Starling-LM-7B-beta")
MT_BENCH = ("zephyr-7b-beta", "zephyr-7b-beta-ExPO")
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
LETTERS = "0123456789abcdefghijABCDEFGHIJ"
AWKWARD = (
    "",
    '"quoted" and \\ back\n\n\tindented',
    "naïve café, 10² °C, α ≤ 0.5 …",
    "日本語 👩\u200d🚀 \u2028 end",
    "</s> <s> {{ x }}",
)
"""Texts that an encoder may get wrong; every ninth answer ends with one."""


@dataclass(frozen=True)
class Inputs:
    """Where models and data lie."""

    models: Path
    data: Path


def real() -> Inputs | None:
    """The real ones, where this machine has them: another trio, published outputs and questions."""
    models = Path(os.environ.get("EXPO_TEST_MODELS", SHARED / "models"))
    data = Path(os.environ.get("EXPO_TEST_DATA", SHARED / "data"))
    return Inputs(models, data) if (models / "tiny-rm").exists() and (data / "alpaca_eval").exists() else None


_REAL = [pytest.param("real", marks=pytest.mark.full)] if real() else []
on_real_inputs_too = pytest.mark.parametrize("inputs", ["made", *_REAL], indirect=True)
"""For tests whose law is worth a look on real inputs, too, in the full check and where there are any."""


def made() -> Inputs:
    """The inputs; made by whoever comes first."""
    root = Path(os.environ.get(PLACE, ROOT / "build"))
    folder = root / f"test-inputs-{_source()}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "test-inputs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in root.glob("test-inputs-*"):
                shutil.rmtree(old)
            _make(root / "test-inputs-unfinished", folder)
    return Inputs(folder / "models", folder / "data")


def _source() -> str:
    """Names what makes the inputs: the sources, and the versions of the libraries."""
    digest = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    for file in (ROOT / "demo" / "train.py", ROOT / "demo" / "task.py", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _make(work: Path, folder: Path) -> None:
    """In a process of its own: the number of threads, which weights depend on, is fixed when torch is loaded."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.made_inputs", work], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    work.rename(folder)


def _write_all(folder: Path) -> None:
    from dataclasses import replace

    from demo import task, train

    for name, steps in STEPS.items():
        setattr(train, name, replace(getattr(train, name), steps=steps))
    models = folder / "models"
    train.train_trio(models)
    for name, known in MODELS.items():
        (models / name).rename(models / known)
    held_out = task.prompts(105, 0, held_out=True)
    (models / "held_out_prompts.json").write_text(json.dumps(held_out))
    rng = random.Random(0)
    _write_alpaca(folder / "data" / "alpaca_eval", [*held_out, *task.prompts(640, 0)], rng)
    _write_mt_bench(folder / "data" / "mt_bench", task.prompts(160, 1, held_out=True), rng)


def _write_alpaca(folder: Path, prompts: list[str], rng: random.Random) -> None:
    """Outputs of two models for the same instructions, of one to four questions each."""
    folder.mkdir(parents=True)
    instructions = [" ".join([prompt, *rng.sample(prompts, number % 4)]) for number, prompt in enumerate(prompts)]
    for name in ALPACA:
        rows = [
            {"dataset": "made", "instruction": one, "output": _answer(one, number, rng), "generator": name}
            for number, one in enumerate(instructions)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False))


def _write_mt_bench(folder: Path, prompts: list[str], rng: random.Random) -> None:
    """Questions of two turns, and two models' answers as FastChat writes them."""
    (folder / "model_answer").mkdir(parents=True)
    questions = [
        {"question_id": 81 + row, "category": CATEGORIES[row // 10], "turns": prompts[2 * row : 2 * row + 2]}
        for row in range(80)
    ]
    _write_lines(folder / "question.jsonl", questions)
    for name in MT_BENCH:
        answers = [
            {
                "question_id": row["question_id"],
                "answer_id": "".join(rng.choices(LETTERS, k=22)),
                "model_id": name,
                "choices": [{"index": 0, "turns": [_answer(turn, number, rng) for turn in row["turns"]]}],
                "tstamp": 1700000000.5 + number,
            }
            for number, row in enumerate(questions)
        ]
        _write_lines(folder / "model_answer" / f"{name}.jsonl", answers)


def _answer(prompt: str, number: int, rng: random.Random) -> str:
    from demo import task

    text = task.write_answer(prompt.split(" . ")[0], rng)
    return text if number % 9 else f"{text} {AWKWARD[number // 9 % len(AWKWARD)]}"


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _write_all(Path(sys.argv[1]))
    else:
        made()
