"""expo sweep with processes: killed anywhere it ends as if it had not been, and vLLM's rows are those of generate."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crashes import ended, forked
from sizes import FULL, sized
from test_orphans import wait_until_gone
from test_sweep import (  # fixtures, too
    ALPHAS,
    assert_same_rows,
    cache,  # noqa: F401
    drawn,  # noqa: F401
    pictures,  # noqa: F401
    processes,  # noqa: F401
    record_of,
    reward_model,  # noqa: F401
    swept,  # noqa: F401
    task,  # noqa: F401
    verdicts,  # noqa: F401
)

from expo.arguments import arguments_of
from expo.cli import program as cli
from expo.config import ExtrapolateConfig
from expo.verbs import extrapolate, sweep as verb

STOPS = sized(ci=4, full=12)


def test_a_sweep_that_is_killed_again_and_again_ends_as_if_it_had_not_been(swept, tmp_path):  # noqa: F811
    whole, config = swept(n=3, output=str(tmp_path / "whole")), swept(n=3)
    started = time.monotonic()
    verb.run(whole)
    usual, chance, stops = time.monotonic() - started, random.Random(3), 0
    words, folder = ["sweep", *arguments_of(config)], Path(config.output)
    for attempt in range(STOPS):
        child = forked(lambda: cli.run(words))
        sent = chance.choice((signal.SIGKILL, signal.SIGTERM)) if attempt < STOPS - 1 else None
        if sent is not None:
            time.sleep(chance.uniform(0.05, 0.5) * usual)
            os.kill(child, sent)
        code = ended(child)
        wait_until_no_row_is_written(folder)
        stops += code != 0
        if code == 0:
            break
    assert code == 0
    assert stops > 1
    assert_same_rows(folder, Path(whole.output))
    ours, theirs = (record_of(Path(one.output)) for one in (config, whole))
    assert (ours["best_alpha"], ours["n"]) == (theirs["best_alpha"], theirs["n"])
    assert [file.name for file in folder.rglob(".*")] == []


def wait_until_no_row_is_written(folder: Path) -> None:
    """A worker ends soon after its parent is gone; until then its output is its own.

    It takes back a folder that it made and wrote nothing to, so that one may go while this looks into it.
    """
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    for lock in (file for file in files if file.suffix == ".lock"):
        try:
            holder = int(json.loads(str(lock.readlink()))["pid"])
        except (OSError, ValueError):
            continue
        wait_until_gone(holder)


FORKED = """
import subprocess
from types import SimpleNamespace
from forks import Fork
from expo.cli.program import main
from expo.rows import process

process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
main()
"""
"""The program, with processes that are forked from it, where it has imported vLLM."""


@pytest.fixture
def run_sweep(run_expo, run_warm, tmp_path):
    """`expo sweep WORDS`; in the full check its processes import vLLM themselves, as those of `test_pipeline.py` do."""
    if FULL:
        return lambda *words, **more: run_expo("sweep", *words, timeout=400, **more)
    (tmp_path / "forked.py").write_text(FORKED)
    return lambda *words, **more: run_warm(tmp_path / "forked.py", "sweep", *words, **more)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_rows_are_those_of_a_fresh_engine_on_the_written_checkpoint(
    swept,  # noqa: F811
    trained,
    run_sweep,
    run_warm,
    tmp_path,
):
    """One live engine for three α, proved first; prompts share a start that fills a block of the prefix cache."""
    long = "what is the teapot in the kitchen like ? " * 20
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{long}{'?' * number}"}) + "\n" for number in range(8)))
    trio = {
        "sft": str(trained / "tiny-sft"),
        "dpo": str(trained / "tiny-dpo"),
        "reward_model": (str(trained / "tiny-rm"),),
    }
    config = swept(task=str(prompts), engine="vllm", dtype="bfloat16", alpha=ALPHAS, **trio)
    done = run_sweep(*arguments_of(config), "--json", env={"EXPO_CACHE": str(tmp_path / "cache")})
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["switch"]["proved"], said["switch"]
    assert "equal tokens and log probabilities" in said["switch"]["reason"]
    [written] = extrapolate.run(
        ExtrapolateConfig(sft=config.sft, dpo=config.dpo, alpha=ALPHAS[-1:], output=str(tmp_path / "written"))
    )
    words: list[Any] = ["-m", "expo", "generate", prompts, "--model", written.path, "--name", "fresh"]
    words += ["--engine", "vllm", "--output-dir", tmp_path]
    words += ["--dtype", "bfloat16", "--max-tokens", config.max_tokens]
    fresh = run_warm(*words)
    assert fresh.code == 0, fresh.stderr
    ours = Path(config.output) / "outputs_long" / f"tiny-dpo-ExPO-a{ALPHAS[-1]!r}.jsonl"
    assert ours.read_bytes() == (tmp_path / "outputs_long" / "fresh.jsonl").read_bytes()
