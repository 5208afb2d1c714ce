"""The table of tasks, and the single-turn ones: UltraFeedback, AlpacaEval, and files of prompts.

To add a task, write its functions (in a module of its own, as `mtbench.py`) and add a line to `TASKS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expo.errors import InputError
from expo.files import SUFFIXES, Row, json_line, json_lines
from expo.tasks import mtbench
from expo.tasks.task import Answer, HubSource, Prompt, Task, is_message, user


def read_ultrafeedback(row: Row) -> Prompt:
    """The first message only, as the paper uses the data set."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    text = first.get("content") if isinstance(first, dict) else row.get("prompt")
    if not isinstance(text, str):
        raise InputError("has no messages or prompt column with text")
    return Prompt(_id(row, "prompt_id"), (user(text),))


def read_alpaca(row: Row) -> Prompt:
    """The instruction; the output row repeats which of AlpacaEval's data sets it comes from."""
    text = row.get("instruction")
    if not isinstance(text, str):
        raise InputError("has no instruction column with text")
    return Prompt("", (user(text),), {"dataset": row.get("dataset", "")})


def read_file_row(row: Row) -> Prompt:
    """A row of a prompt file: `prompt` or `instruction`, otherwise `messages` that end with a user turn."""
    name = _id(row, "id")
    if row.get("instruction") and row.get("input") and not row.get("prompt"):
        raise InputError("has both an instruction and an input: combine them in a prompt column")
    for column in ("prompt", "instruction"):
        if isinstance(row.get(column), str):
            return Prompt(name, (user(row[column]),))
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise InputError("has no prompt, instruction or messages column with text")
    turns = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    if turns[-1]["role"] != "user":
        raise InputError(f"has messages that end with a turn of role {turns[-1]['role']!r}; the last is the user's")
    return Prompt(name, turns)


def _id(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value)


def write_jsonl(answers: Sequence[Answer], _generator: str) -> str:
    """The paper's format, plus the earlier messages, if any."""
    return json_lines(
        {
            "prompt": answer.prompt.messages[-1]["content"],
            **({"messages": list(answer.prompt.messages)} if len(answer.prompt.messages) > 1 else {}),
            "output": answer.output,
            "length": answer.length,
            "finish_reason": answer.finish_reason,
        }
        for answer in answers
    )


def write_alpaca(answers: Sequence[Answer], generator: str) -> str:
    """The format of `alpaca_eval evaluate --model_outputs`: a list, which its `pandas.read_json` reads."""
    rows = [
        {
            "dataset": answer.prompt.columns["dataset"],
            "instruction": answer.prompt.messages[-1]["content"],
            "output": answer.output,
            "generator": generator,
        }
        for answer in answers
    ]
    return "[\n" + ",\n".join("  " + json_line(row).rstrip("\n") for row in rows) + "\n]\n"


def answer(row: Row) -> list[str]:
    """A row's one answer."""
    return [row["output"]]


def asked(row: Row) -> list[object]:
    """The messages that a row answers, in the format of any of these tasks."""
    return row.get("messages") or [user(row["prompt"] if "prompt" in row else row["instruction"])]


TASKS = {
    "ultrafeedback": Task(
        "ultrafeedback",
        HubSource("HuggingFaceH4/ultrafeedback_binarized", "test_gen"),
        ".jsonl",
        read_ultrafeedback,
        write_jsonl,
        answer,
        asked,
        samples=True,
    ),
    "alpaca": Task(
        "alpaca",
        HubSource("tatsu-lab/alpaca_eval", "eval", file="alpaca_eval.json"),
        ".json",
        read_alpaca,
        write_alpaca,
        answer,
        asked,
    ),
    "mtbench": Task(
        "mtbench",
        # FastChat's own copy: FastChat's judge finds questions by the ids in this file.
        HubSource("lmsys/mt-bench", file="data/mt_bench/question.jsonl", kind="space"),
        ".jsonl",
        mtbench.read,
        mtbench.write,
        mtbench.answers,
        temperatures=mtbench.TEMPERATURES,
        prompt_id=mtbench.prompt_id,
    ),
}


def find_task(name: str) -> Task:
    """The task of that name, or a task made from a prompt file.

    Raises:
        InputError: Neither, or a file whose outputs would be mixed with those of a task.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"no task {name!r}: use {', '.join(TASKS)}, or a {'/'.join(SUFFIXES)} file of prompts")
    if path.stem in TASKS:
        raise InputError(
            f"outputs of {name} would be mixed with those of the task {path.stem}: rename the file, or use "
            f"`{path.stem} --dataset {name}`"
        )
    return Task(path.stem, path, ".jsonl", read_file_row, write_jsonl, answer, asked, samples=True)
