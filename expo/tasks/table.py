"""The table of tasks, and the single-turn ones: UltraFeedback, AlpacaEval, and files of prompts.

To add a task, write its functions (in a module of its own, as `mtbench.py`) and add a line to `TASKS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expo.errors import InputError
from expo.files import SUFFIXES, Row, json_line, json_lines
from expo.tasks import mtbench
from expo.tasks.task import Answer, HubSource, Message, Prompt, Task, conversation, ends_with_user, user


def read_ultrafeedback(row: Row) -> Prompt:
    """The user's first message only, as the paper uses the data set."""
    turns = row.get("messages")
    first = next((turn for turn in turns if _role(turn) == "user"), None) if isinstance(turns, list) else None
    if first is not None:
        return Prompt(_id(row, "prompt_id"), conversation([first], "messages"))
    if not isinstance(row.get("prompt"), str):
        raise InputError("has no messages column with a user turn, and no prompt column with text")
    return Prompt(_id(row, "prompt_id"), (user(row["prompt"]),))


def read_alpaca(row: Row) -> Prompt:
    """The instruction; the output row repeats which of AlpacaEval's data sets it comes from."""
    text = row.get("instruction")
    if not isinstance(text, str):
        raise InputError("has no instruction column with text")
    _require_no_input(row, "the instruction")
    return Prompt("", (user(text),), {"dataset": row.get("dataset", "")})


def read_file_row(row: Row) -> Prompt:
    """A row of a prompt file.

    `messages` that end with the user's turn count before `prompt` (text, or a list of messages as TRL has it), and that
    before `instruction`: a row that expo wrote has both, and the messages are the whole conversation. Messages that end
    with an answer, as in UltraFeedback, do not count beside the others.
    """
    name, turns, prompt = _id(row, "id"), _listed(row.get("messages")), row.get("prompt")
    if ends_with_user(turns):
        return Prompt(name, conversation(turns, "messages"))
    if isinstance(prompt, str):
        return Prompt(name, (user(prompt),))
    if isinstance(prompt, list) and prompt:
        return Prompt(name, _answerable(prompt, "prompt"))
    if isinstance(row.get("instruction"), str):
        _require_no_input(row, "a prompt column")
        return Prompt(name, (user(row["instruction"]),))
    if not isinstance(turns, list) or not turns:
        raise InputError("has no prompt, instruction or messages column with text")
    return Prompt(name, _answerable(turns, "messages"))


def _role(turn: object) -> object:
    return turn.get("role") if isinstance(turn, dict) else None


def _listed(value: object) -> Any:  # noqa: ANN401 - any value of a row
    """A list as it is or, since a cell of a .csv file can hold nothing else, as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"has a messages column with text that is not a JSON list ({error}): save it as .jsonl"
        ) from error


def _answerable(turns: list[object], column: str) -> tuple[Message, ...]:
    """A conversation that is known to be answerable only once it is read.

    Raises:
        InputError: It is not.
    """
    if not isinstance(turns[0], dict):
        kind = "token ids" if type(turns[0]) is int else "texts" if isinstance(turns[0], str) else "other values"
        raise InputError(f"has a {column} column with a list of {kind}: give text, or turns with role and content")
    read = conversation(turns, column)
    if read[-1]["role"] != "user":
        what = "messages" if column == "messages" else f"a {column} of messages"
        raise InputError(f"has {what} that end with a turn of role {read[-1]['role']!r}; the last must be the user's")
    return read


def _require_no_input(row: Row, column: str) -> None:
    """An instruction's further text, in the column that Alpaca calls input, would be left out."""
    value = row.get("input")
    if value is not None and value == value and str(value).strip():  # pandas writes NaN for none
        raise InputError(f"has both an instruction and an input: combine them in {column}")


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


def asked(row: Row) -> Sequence[Message]:
    """The messages that a row of a prompt file's output answers; one of UltraFeedback's or AlpacaEval's is read too."""
    return read_file_row(row).messages


def asked_ultrafeedback(row: Row) -> Sequence[Message]:
    """The messages that a row answers, also one with the data set's own columns."""
    return asked(row) if ends_with_user(row.get("messages")) else read_ultrafeedback(row).messages


def asked_alpaca(row: Row) -> Sequence[Message]:
    """The messages that a row answers: its instruction, whatever other columns it has."""
    return read_alpaca(row).messages if isinstance(row.get("instruction"), str) else asked(row)


TASKS = {
    "ultrafeedback": Task(
        "ultrafeedback",
        HubSource("HuggingFaceH4/ultrafeedback_binarized", "test_gen"),
        ".jsonl",
        read_ultrafeedback,
        write_jsonl,
        answer,
        asked_ultrafeedback,
        samples=True,
    ),
    "alpaca": Task(
        "alpaca",
        HubSource("tatsu-lab/alpaca_eval", "eval", file="alpaca_eval.json"),
        ".json",
        read_alpaca,
        write_alpaca,
        answer,
        asked_alpaca,
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
