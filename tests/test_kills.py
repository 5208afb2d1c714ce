"""A generation that is stopped at random moments goes on and ends as if it had not been; `kills.py` does the work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

KILLS = 3
"""In the suite; `python tests/kills.py SETTINGS FOLDER SEED COUNT` does any number."""

ENGINES = [
    ("transformers", {"batch_tokens": 400}),
    pytest.param("vllm", {"engine_arg": ["max_num_seqs=4"]}, marks=pytest.mark.vllm),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "others"), ENGINES, ids=["transformers", "vllm"])
def test_a_stopped_run_loses_no_row_and_ends_as_one_that_was_not(trained, alpaca_data, tmp_path, engine, others):
    rows = json.loads((alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json").read_text())[:40]
    task = tmp_path / "prompts.jsonl"
    task.write_text("".join(json.dumps({"prompt": row["instruction"]}) + "\n" for row in rows))
    settings = {"task": str(task), "model": str(trained / "tiny-dpo"), "engine": engine, "max_tokens": 24, **others}
    program = [sys.executable, Path(__file__).with_name("kills.py"), json.dumps({**settings, "dtype": "float32"})]
    done = subprocess.run(
        [*program, tmp_path / "runs", "7", str(KILLS)], env=helpers.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result for result in results if result["trouble"]] == []
    stopped = [result for result in results if result["code"]]
    assert len(stopped) == KILLS + 2
    assert any(result["seen"] for result in stopped), "some were stopped with rows on the disk"
