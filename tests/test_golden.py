"""What an earlier expo made stays made: finished outputs are left alone, unfinished ones end as they would have."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from golden.cases import FINISHED, UNFINISHED, Finished, Unfinished, words
from helpers import tree

from expo.cli import program as cli

GOLDEN = Path(__file__).with_name("golden")
NOBODY = "http://127.0.0.1:9/v1"
"""Where no server is."""
DESCRIPTIONS = ("README.md", "expo.json", ".meta.json")
"""Files that say how an output was made: when, with which versions, in today's words."""
REFUSED = {
    "data type": ("alpha", "--dtype float16", "a different dtype ('auto' then, 'float16' now)"),
    "seed": ("limited", "--seed 8", "a different seed (42 then, 8 now)"),
    "theta": ("theta", "--alpha 0.2 --name dpo-ExPO-a0.3", "a different alpha (0.3 then, 0.2 now)"),
    "engine argument": ("vllm", "--engine-arg max_num_seqs=5", "a different engine-arg"),
    "length": ("mtbench", "--max-length 9", "a different max-length (None then, 9 now)"),
}
"""Output, what is given otherwise, and what the refusal says."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: the inputs, as old as they were."""
    shutil.copytree(GOLDEN / "inputs", tmp_path / "inputs")
    for file, time_ns in json.loads((GOLDEN / "times.json").read_text()).items():
        os.utime(tmp_path / file, ns=(time_ns, time_ns))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setitem(sys.modules, "vllm", None)  # a finished output is known without its engine
    return tmp_path


def run(command: str, kind: str, name: str) -> int:
    return cli.run(words(command, f"{kind}/{name}", NOBODY))


@pytest.mark.parametrize(("name", "case"), FINISHED.items(), ids=FINISHED)
def test_what_was_finished_is_left_alone(name: str, case: Finished, folder, capsys):
    shutil.copytree(GOLDEN / "finished" / name, folder / "finished" / name)
    before = tree(folder)
    for command in case.commands:
        assert run(f"{command} --json {case.now}", "finished", name) == case.code
        result = json.loads(capsys.readouterr().out)
        assert {one["status"] for one in result.get("outputs", [result])} == {"already complete"}
    assert tree(folder) == before


@pytest.mark.parametrize(("name", "otherwise", "message"), REFUSED.values(), ids=REFUSED)
def test_what_was_made_otherwise_is_refused(name: str, otherwise: str, message: str, folder, capsys):
    shutil.copytree(GOLDEN / "finished" / name, folder / "finished" / name)
    before, case = tree(folder), FINISHED[name]
    assert run(f"{case.commands[-1]} {otherwise} {case.now}", "finished", name) == 2
    assert message in capsys.readouterr().err
    assert tree(folder) == before


@pytest.mark.parametrize("name", [name for name, case in FINISHED.items() if case.now])
def test_rows_of_shared_seeds_are_no_rows_of_their_own_seeds(name: str, folder, capsys):
    shutil.copytree(GOLDEN / "finished" / name, folder / "finished" / name)
    before = tree(folder)
    assert run(FINISHED[name].commands[-1], "finished", name) == 2
    assert "a different seed-mode ('shared' then, 'row' now)" in capsys.readouterr().err
    assert tree(folder) == before


def test_inputs_written_since_are_others(folder, capsys):
    shutil.copytree(GOLDEN / "finished" / "alpha", folder / "finished" / "alpha")
    os.utime(folder / "inputs" / "sft" / "model.safetensors")
    assert run(FINISHED["alpha"].commands[0], "finished", "alpha") == 2
    assert "a different sft" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(("name", "case"), UNFINISHED.items(), ids=UNFINISHED)
def test_what_was_begun_ends_as_it_would_have(name: str, case: Unfinished, folder):
    left = shutil.copytree(GOLDEN / "unfinished" / name, folder / "unfinished" / name)
    kept, parts = kept_shards(left), [json.loads(file.read_text()) for file in left.rglob("*-of-*.meta.json")]
    assert run(f"{case.command} {case.now}", "unfinished", name) == 0
    made, whole = tree(left), tree(GOLDEN / "whole" / name)
    assert made.keys() == whole.keys()
    for file in made:
        if not file.endswith(DESCRIPTIONS):
            assert readable(file, made[file]) == readable(file, whole[file]), file
    if case.command.startswith("extrapolate"):
        assert {(left / shard).stat().st_ino for shard in kept} == set(kept.values())
        assert len(kept) + case.left == len(json.loads(made["expo.json"])["shards"])
    elif case.command.startswith("generate"):
        (meta,) = (json.loads(content) for file, content in made.items() if file.endswith(".meta.json"))
        assert meta["rows_this_run"] - sum(part["rows"] for part in parts) == case.left
        seconds = {part["part"]: part["generate_seconds"] for part in meta.get("parts", [])}
        assert [seconds[part["part"]] for part in parts] == [part["generate_seconds"] for part in parts]


def test_what_was_begun_otherwise_is_refused(folder, capsys):
    shutil.copytree(GOLDEN / "unfinished" / "generate", folder / "unfinished" / "generate")
    before, case = tree(folder), UNFINISHED["generate"]
    assert run(f"{case.command} --top-p 0.8 {case.now}", "unfinished", "generate") == 2
    assert "a different top-p (0.9 then, 0.8 now)" in capsys.readouterr().err
    assert tree(folder) == before


def test_rewards_that_were_there_are_kept(folder):
    case = UNFINISHED["score"]
    left = shutil.copytree(GOLDEN / "unfinished" / "score", folder / "unfinished" / "score")
    (journal,) = left.rglob("*.jsonl")
    header, *rows = map(json.loads, journal.read_text().splitlines())
    lines = [header, *({**row, "reward": 7.0} for row in rows)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(f"{case.command} {case.now}", "unfinished", "score") == 0
    rewards = (left / "rewards_prompts" / "given.jsonl").read_text().split()
    assert [number for number, reward in enumerate(rewards) if reward == "7.0"] == sorted(row["row"] for row in rows)
    assert len(rewards) - len(rows) == case.left


def kept_shards(folder: Path) -> dict[str, int]:
    """Shard → inode of those that are recorded as whole."""
    journal = folder / ".expo-partial" / "journal.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    shards = [row["shard"] for row in rows if "shard" in row]
    return {shard: (journal.parent / f"{shard}.partial").stat().st_ino for shard in shards}


def readable(file: str, content: bytes) -> object:
    """A file's bytes; of rewards, whose last digits are the processor's, the numbers about."""
    if not file.startswith("rewards_"):
        return content
    rows = [json.loads(line) for line in content.splitlines()]
    return [
        {**row, "reward": pytest.approx(row["reward"])} if isinstance(row, dict) else pytest.approx(row) for row in rows
    ]
