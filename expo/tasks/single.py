"""The tasks of one answer per prompt: UltraFeedback, AlpacaEval, and files of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from expo.durable import Row, json_line, json_lines
from expo.errors import InputError
from expo.tasks.prompts import Answer, Prompt, is_message, user


def read_ultrafeedback(row: Row) -> Prompt:
    """The first message only, as the paper uses the data set."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    text = first.get("content") if isinstance(first, dict) else row.get("prompt")
    if not isinstance(text, str):
        raise InputError("has no messages or prompt column that holds text")
    return Prompt(_id(row, "prompt_id"), (user(text),))


def read_alpaca(row: Row) -> Prompt:
    """The instruction; the output row repeats which of AlpacaEval's data sets it is from."""
    text = row.get("instruction")
    if not isinstance(text, str):
        raise InputError("has no instruction column that holds text")
    return Prompt("", (user(text),), {"dataset": row.get("dataset", "")})


def read_file_row(row: Row) -> Prompt:
    """A row of a prompt file: `prompt` or `instruction`, else `messages` that end with the user's turn."""
    name = _id(row, "id")
    if row.get("instruction") and row.get("input") and not row.get("prompt"):
        raise InputError("has an input beside its instruction: join both in a prompt column")
    for column in ("prompt", "instruction"):
        if isinstance(row.get(column), str):
            return Prompt(name, (user(row[column]),))
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise InputError("has no prompt, instruction or messages column that holds text")
    turns = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    if turns[-1]["role"] != "user":
        raise InputError(f"has messages that end with a turn of role {turns[-1]['role']!r}; the last is the user's")
    return Prompt(name, turns)


def _id(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value)


def write_jsonl(answers: Sequence[Answer], _generator: str) -> str:
    """The paper's format, and the earlier messages where there are some."""
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
    """What `alpaca_eval evaluate --model_outputs` takes: a list, so that its `pandas.read_json` reads it."""
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


def outputs(row: Row) -> list[str]:
    """A row's one answer."""
    return [row["output"]]
