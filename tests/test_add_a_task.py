"""CONTRIBUTING's recipe "Add a task", carried out from outside of expo: generate and score work with it at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_score import make_reward_model

from expo.config import GenerateConfig, ScoreConfig
from expo.errors import InputError
from expo.tasks import TASKS, Answer, Prompt, Task
from expo.verbs import generate, score


def read(row: dict) -> Prompt:
    if not isinstance(row.get("question"), str):
        raise InputError("has no question")
    return Prompt(str(row.get("key", "")), ({"role": "user", "content": row["question"]},))


def write(answers: Sequence[Answer], generator: str) -> str:
    rows = [{"by": generator, "q": one.prompt.messages[0]["content"], "a": one.output} for one in answers]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def quiz(monkeypatch, tmp_path) -> Path:
    """A task with its own rows and its own output format; the file of its prompts."""
    file = tmp_path / "quiz-rows.jsonl"
    rows = [{"key": f"k{number}", "question": f"w{number} w{2 * number}"} for number in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(
        name="quiz",
        source=file,
        suffix=".jsonl",
        read=read,
        write=write,
        answers=lambda row: [row["a"]],
        asked=lambda row: [{"role": "user", "content": row["q"]}],
    )
    monkeypatch.setitem(TASKS, "quiz", task)
    return file


def run(model: Path, folder: Path, **others) -> generate.Generated:
    settings = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_tokens": 6, "name": "m", **others}
    return generate.run(GenerateConfig(task="quiz", model=str(model), output_dir=str(folder), **settings))


def rate(model: Path, folder: Path, **others) -> score.Scored:
    settings = {"device": "cpu", "dtype": "float32", **others}
    return score.run(ScoreConfig(task="quiz", name="m", reward_model=str(model), output_dir=str(folder), **settings))


def test_a_task_of_ones_own_is_generated_and_scored(llama_pair, tmp_path):
    made = run(llama_pair[1], tmp_path)
    rows = [json.loads(line) for line in made.output.read_text().splitlines()]
    assert made.output == tmp_path / "outputs_quiz" / "m.jsonl"
    assert [(row["by"], row["q"]) for row in rows] == [("m", f"w{number} w{2 * number}") for number in range(5)]
    assert all(row["a"] for row in rows)

    rated = rate(make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2), tmp_path)
    assert (rated.rewards, rated.n, rated.failed) == (tmp_path / "rewards_quiz" / "m.jsonl", 5, 0)
    metas = [json.loads(one.read_text()) for one in (made.meta, rated.meta)]
    assert metas[0]["prompts_sha256"] == metas[1]["prompts_sha256"]
    keys = [json.loads(line)["id"] for line in (tmp_path / "rewards_quiz" / "m.rows.jsonl").read_text().splitlines()]
    assert keys == [f"k{number}" for number in range(5)]


def test_it_goes_on_and_in_parts_as_any_other(llama_pair, tmp_path):
    whole = run(llama_pair[1], tmp_path / "whole").output.read_bytes()
    assert run(llama_pair[1], tmp_path, limit=3).rows == 3
    assert json.loads(run(llama_pair[1], tmp_path).meta.read_text())["rows_this_run"] == 2
    assert run(llama_pair[1], tmp_path).status == "already complete"
    assert (tmp_path / "outputs_quiz" / "m.jsonl").read_bytes() == whole
    for index in range(2):
        run(llama_pair[1], tmp_path / "parts", part=f"{index}/2")
    assert run(llama_pair[1], tmp_path / "parts", join=2).output.read_bytes() == whole


def test_a_format_with_room_for_one_answer_refuses_several(llama_pair, tmp_path):
    with pytest.raises(
        InputError, match="--n above 1 is not supported for quiz: its format holds one answer per prompt"
    ):
        run(llama_pair[1], tmp_path, n=2)


def test_rows_that_are_not_the_tasks_are_named(llama_pair, tmp_path, quiz):
    quiz.write_text('{"question": "w1"}\n{"ask": "w2"}\n')
    with pytest.raises(InputError, match=r"row 1 of .* has no question"):
        run(llama_pair[1], tmp_path)
    (tmp_path / "outputs_quiz").mkdir()
    (tmp_path / "outputs_quiz" / "m.jsonl").write_text('{"q": "w1", "output": "w2"}\n')
    with pytest.raises(InputError, match=r"row 0 of .*m.jsonl lacks a prompt"):
        rate(make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2), tmp_path)
