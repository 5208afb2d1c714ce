"""`--ray` on a real cluster of several raylets: the result is one machine's, whatever is killed in the middle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from clusters import WAIT_S, Raylets
from helpers import Pair, environment, expo_command, random_pair, run_expo, tree, without_clock, write, write_checkpoint
from test_orphans import wait_until_gone

from expo.arguments import arguments_of
from expo.config import GenerateConfig, ScoreConfig
from expo.errors import MissingExtra
from expo.verbs import generate, score
from expo.verbs.extrapolate.processes import PARTS_PER_PROCESS

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.fixture
def raylets(cluster: Raylets) -> Iterator[Raylets]:
    """Two machines, and an open gate."""
    cluster.heal()
    yield cluster
    cluster.open()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    sides = random_pair({f"layer.{number}.weight": (7 + number, 5) for number in range(24)})
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    return write_checkpoint(sft, sides[0], shards=2), write_checkpoint(dpo, sides[1], shards=24)


@pytest.fixture
def start(raylets: Raylets, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`expo WORDS --ray …` in a process of its own."""
    made = []

    def run(*words: object) -> subprocess.Popen[str]:
        command = [*expo_command(*words), "--ray", raylets.address]
        made.append(
            subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return made[-1]

    yield run
    for process in made:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def extrapolating(pair: Pair, output: Path) -> tuple[object, ...]:
    return ("extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", "0.5", "--output", output, "--json")


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


# --- extrapolate ------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_machines_share_the_shards(pair: Pair, raylets: Raylets, start: Any, tmp_path: Path) -> None:
    whole = write(pair, tmp_path / "whole")[0].path
    out, _ = ended(start(*extrapolating(pair, tmp_path / "out")))
    assert json.loads(out)["outputs"][0]["status"] == "written"
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(whole))
    clock = json.loads((tmp_path / "out" / "expo.json").read_text())["clock"]
    assert len(clock["parts"]) == 2 * PARTS_PER_PROCESS
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left of the check"


def test_a_machine_that_dies_loses_no_shard(pair: Pair, raylets: Raylets, start: Any, tmp_path: Path) -> None:
    whole = write(pair, tmp_path / "whole")[0].path
    raylets.hold()
    process = start(*extrapolating(pair, tmp_path / "out"))
    victim, _ = raylets.waiting(2)
    staged = {file: file.stat().st_ino for file in (tmp_path / "out").rglob("*.safetensors.partial")}
    raylets.kill_machine_of(victim)
    raylets.open()
    _, err = ended(process)
    assert "its machine, or Ray there, is gone" in err
    assert "another process takes it up" in err
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(whole))
    inodes = {file.stat().st_ino for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(inodes & set(staged.values())) >= 2, "shards that were complete are kept"


@pytest.mark.full
def test_a_process_is_killed_and_then_the_run_itself(pair: Pair, raylets: Raylets, start: Any, tmp_path: Path) -> None:
    whole = write(pair, tmp_path / "whole")[0].path
    raylets.hold()
    process = start(*extrapolating(pair, tmp_path / "out"))
    os.kill(raylets.waiting(2)[0], signal.SIGKILL)
    left = raylets.waiting(3)  # the one that took its place
    process.kill()
    _, err = process.communicate()
    assert "killed by SIGKILL; restarting" in err
    again = start(*extrapolating(pair, tmp_path / "out"))  # at once, while the other's processes may still be there
    for pid in left:
        wait_until_gone(pid)
    raylets.open()
    ended(again)
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(whole))


@pytest.mark.full
def test_a_run_that_is_stopped_ends_its_processes(pair: Pair, raylets: Raylets, start: Any, tmp_path: Path) -> None:
    raylets.hold()
    process = start(*extrapolating(pair, tmp_path / "out"))
    left = raylets.waiting(2)
    process.send_signal(signal.SIGTERM)
    ended(process, 143)
    for pid in left:
        wait_until_gone(pid)
    assert not (tmp_path / "out" / "config.json").exists()


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    rows = [
        {"prompt": " ".join(f"w{(number * 7 + word) % 58}" for word in range(3 + number % 5))} for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.full
def test_rows_survive_a_machine(llama_pair: Pair, prompts: Path, raylets: Raylets, start: Any, tmp_path: Path) -> None:
    how = {"engine": "transformers", "dtype": "float32", "max_tokens": 12, "batch_tokens": 64, "name": "mine"}

    def config(folder: str, **more: str) -> GenerateConfig:
        return GenerateConfig(
            task=str(prompts), model=str(llama_pair[1]), output_dir=str(tmp_path / folder), **how, **more
        )

    raylets.hold()
    process = start("generate", *arguments_of(config("out")))
    whole = Path(generate.run(config("one")).output).read_bytes()
    victim, _ = raylets.waiting(2)
    folder = tmp_path / "out" / "outputs_q"
    journals = list((folder / "mine.parts").glob(".*.journal.jsonl"))
    assert any(len(file.read_text().splitlines()) > 1 for file in journals), "rows are durable before the kill"
    raylets.kill_machine_of(victim)
    raylets.open()
    _, err = ended(process)
    assert "another process takes it up" in err
    assert (folder / "mine.jsonl").read_bytes() == whole
    assert json.loads((folder / "mine.meta.json").read_text())["repeatable"]
    assert not (folder / "mine.parts").exists()
    assert generate.run(config("out", ray="127.0.0.1:9")).status == "already complete", "for which no cluster is needed"


@pytest.mark.full
def test_rewards_are_those_of_one_machine(llama_pair: Pair, raylets: Raylets, start: Any, tmp_path: Path) -> None:
    sft, dpo = map(str, llama_pair)
    for folder in ("one", "out"):
        answers = tmp_path / folder / "outputs_q" / "mine.jsonl"
        answers.parent.mkdir(parents=True)
        rows = [{"prompt": f"w{number}", "output": f"w{number + 1} w{number % 7}"} for number in range(20)]
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(folder: str) -> ScoreConfig:
        how = {"task": str(tmp_path / "q.jsonl"), "name": "mine", "dtype": "float32", "engine": "transformers"}
        return ScoreConfig(output_dir=str(tmp_path / folder), implicit_reward=True, sft=sft, dpo=dpo, **how)

    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"w{number}"}) + "\n" for number in range(20)))
    process = start("score", *arguments_of(config("out")), "--data-parallel", 1)
    score.run(config("one"))
    ended(process)
    for name in ("mine.jsonl", "mine.rows.jsonl"):
        assert (tmp_path / "out/rewards_q" / name).read_bytes() == (tmp_path / "one/rewards_q" / name).read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_folder_that_is_not_shared_is_noticed_before_any_work(
    pair: Pair, raylets: Raylets, start: Any, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount that others do not see needs root")
    own = tmp_path / "own"
    own.mkdir()
    ray = Path(sys.executable).with_name("ray")
    script = f"mount -t tmpfs none {own} && exec {ray} start --address={raylets.address} --num-cpus=1 --block"
    machine = subprocess.Popen(
        ["unshare", "-m", "bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert raylets.ask("wait_for", 4)
        _, err = ended(start(*extrapolating(pair, own / "out")), 2)
        assert re.search(r"does not have .*/own.* as it is here: .* that all machines share\n", err)
        assert not (own / "out").exists()
        sft = shutil.copytree(pair[0], own / "sft")
        _, err = ended(start(*extrapolating((sft, pair[1]), tmp_path / "out")), 2)
        assert re.search(r"does not have .*/own/sft as it is here", err)
    finally:
        os.killpg(machine.pid, signal.SIGTERM)
        machine.wait()


def test_no_cluster_answers(pair: Pair, tmp_path: Path) -> None:
    found = run_expo(*extrapolating(pair, tmp_path / "out"), "--ray", "127.0.0.1:9")
    assert found.code == 1
    assert re.fullmatch(r"expo: error: --ray 127\.0\.0\.1:9: no cluster answers \(.*refused\).*\n", found.stderr)


def test_without_ray_its_install_command_is_said(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'llm-expo\[ray\]'"):
        write(pair, tmp_path / "out", ray="auto")
