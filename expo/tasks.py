"""Prompt sets: where their rows come from, how a row becomes a conversation, and how answers are written.

To add a task, write its `read` function and add one line to `TASKS`. A file of prompts is a task too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from expo.errors import EnvironmentFailure, ExpoError, InputError, first_line
from expo.hub import explain, fetch_file, is_offline, network_errors, require_usable_token
from expo.store import Row, json_line, json_lines

Message = dict[str, str]
"""`role` and `content`."""

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Prompt:
    """One row of a task."""

    id: str
    messages: tuple[Message, ...]
    """The conversation to answer; it ends with the user's turn."""
    columns: Row = field(default_factory=dict)
    """What the output row repeats of the task's row."""

    @property
    def item(self) -> object:
        """What the answer is made from."""
        return prompt_item(self.messages)


@dataclass(frozen=True)
class Answer:
    """One generated row."""

    prompt: Prompt
    output: str
    length: int
    """Generated tokens, the stop token included."""
    finish_reason: str
    """stop, length or error."""


@dataclass(frozen=True)
class Conversation:
    """One row of an output file, as a reward model reads it."""

    messages: tuple[Message, ...]
    """The prompt's turns and the answer; no answer where the row failed."""
    failed: bool = False


@dataclass(frozen=True)
class Source:
    """Where a task's rows are on the hub."""

    repository: str
    split: str
    file: str | None = None
    """One JSON file of the repository, where it has no data set that loads without code."""


@dataclass(frozen=True)
class Task:
    """A prompt set and its output format."""

    name: str
    """Names the folders `outputs_<name>` and `rewards_<name>`."""
    source: Source | Path
    suffix: str
    read: Callable[[Row], Prompt | None]
    """A row's prompt (its id empty where the row has none); None where a column is missing."""
    write: Callable[[Sequence[Answer], str], str]
    """The output file's text, from the answers and the generator's name."""
    columns: str
    """The columns `read` looks for, for error messages."""


def prompt_item(messages: Sequence[Message]) -> object:
    """What a prompt is hashed as: its text, or the messages where there are several."""
    return messages[0]["content"] if len(messages) == 1 else list(messages)


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text}


def _read_ultrafeedback(row: Row) -> Prompt | None:
    """The first message only, as the paper uses the data set."""
    messages = row.get("messages")
    text = messages[0].get("content") if isinstance(messages, list) and messages else row.get("prompt")
    return Prompt(str(row.get("prompt_id", "")), (user(text),)) if isinstance(text, str) else None


def _read_alpaca(row: Row) -> Prompt | None:
    text = row.get("instruction")
    columns = {"dataset": row.get("dataset", "")}
    return Prompt("", (user(text),), columns) if isinstance(text, str) else None


def _read_file_row(row: Row) -> Prompt | None:
    name = str(row.get("id", ""))
    for column in ("prompt", "instruction"):
        if isinstance(row.get(column), str):
            return Prompt(name, (user(row[column]),))
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        return None
    turns = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Prompt(name, turns) if turns[-1]["role"] == "user" else None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _write_jsonl(answers: Sequence[Answer], _generator: str) -> str:
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


def _write_alpaca(answers: Sequence[Answer], generator: str) -> str:
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


TASKS = {
    "ultrafeedback": Task(
        "ultrafeedback",
        Source("HuggingFaceH4/ultrafeedback_binarized", "test_gen"),
        ".jsonl",
        _read_ultrafeedback,
        _write_jsonl,
        "messages or prompt",
    ),
    "alpaca": Task(
        "alpaca",
        Source("tatsu-lab/alpaca_eval", "eval", file="alpaca_eval.json"),
        ".json",
        _read_alpaca,
        _write_alpaca,
        "instruction",
    ),
}


def find_task(name: str) -> Task:
    """The task of that name, or the one a prompt file makes.

    Raises:
        InputError: Neither.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix not in FILE_SUFFIXES:
        raise InputError(f"no task {name!r}: give {', '.join(TASKS)}, or a {'/'.join(FILE_SUFFIXES)} file of prompts")
    return Task(path.stem, path, ".jsonl", _read_file_row, _write_jsonl, "prompt, instruction or messages")


def load_prompts(task: Task, dataset: str | None = None) -> list[Prompt]:
    """All of a task's prompts.

    Args:
        task: The task.
        dataset: A local file, or a hub data set (`id` or `id@revision`), to read instead of the task's own.

    Raises:
        InputError: No such file, or a row without a prompt.
        EnvironmentFailure: The hub cannot be reached.
    """
    source, name = _source(task, dataset)
    rows = read_rows(source) if isinstance(source, Path) else _load_from_hub(source)
    prompts = [task.read(row) for row in rows]
    for number, prompt in enumerate(prompts):
        if prompt is None:
            raise InputError(f"row {number} of {name} has no {task.columns} column that holds text")
    if not prompts:
        raise InputError(f"{name} holds no prompts")
    return _with_ids([prompt for prompt in prompts if prompt is not None])


def _source(task: Task, dataset: str | None) -> tuple[Source | Path, str]:
    if dataset is None:
        return task.source, task.name
    path = Path(dataset).expanduser()
    if path.is_file():
        return path, dataset
    if path.suffix in FILE_SUFFIXES or path.is_absolute() or path.is_dir():
        raise InputError(f"no such prompt file: {dataset}")
    if not isinstance(task.source, Source):
        return Source(dataset, "train"), dataset
    same = dataset.partition("@")[0] == task.source.repository  # another revision of the task's own
    return replace(task.source, repository=dataset, file=task.source.file if same else None), dataset


def _with_ids(prompts: list[Prompt]) -> list[Prompt]:
    """The rows' own ids where all have one of their own, else their numbers."""
    ids = {prompt.id for prompt in prompts}
    if "" not in ids and len(ids) == len(prompts):
        return prompts
    return [Prompt(str(number), prompt.messages, prompt.columns) for number, prompt in enumerate(prompts)]


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .json (a list of objects), .parquet or .csv file.

    Raises:
        InputError: The file is missing, of another kind, or damaged.
    """
    readers: dict[str, Callable[[Path], list[Any]]] = {
        ".jsonl": _read_jsonl,
        ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: a file of rows ends in {', '.join(readers)}")
    try:
        rows = readers[path.suffix](path)
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a valid {path.suffix[1:]} file: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} does not hold a list of objects")
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def _read_csv(path: Path) -> list[Any]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream))


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(path).to_pylist())


def _load_from_hub(source: Source) -> list[Row]:
    repository, _, revision = source.repository.partition("@")
    try:
        if source.file is not None:
            return read_rows(fetch_file(repository, source.file, revision or None, kind="dataset"))
        return _load_dataset(repository, source.split, revision or None)
    except ExpoError as error:
        raise type(error)(f"the data set cannot be loaded: {error}; --dataset FILE reads a copy") from error


def _load_dataset(repository: str, split: str, revision: str | None) -> list[Row]:
    from datasets import exceptions, load_dataset

    require_usable_token()
    try:
        return list(load_dataset(repository, split=split, revision=revision))
    except (exceptions.DatasetsError, ValueError, *network_errors()) as error:
        # A repository that needs its own loading script is refused with a RuntimeError.
        if isinstance(error, (exceptions.DatasetsError, ValueError)) or "scripts" in str(error):
            raise InputError(f"{repository}: {first_line(error)}") from error
        if isinstance(error, FileNotFoundError) and not is_offline():
            raise EnvironmentFailure(f"{repository} is not in the hub cache, and the hub cannot be reached") from error
        raise explain(error, repository, revision) from error


def read_conversations(path: Path) -> list[Conversation]:
    """The rows of a generated file, in its order, as conversations.

    Raises:
        InputError: The file is missing or not in a format `expo generate` writes.
    """
    conversations = []
    for number, row in enumerate(read_rows(path)):
        question = {"role": "user", "content": row.get("prompt", row.get("instruction"))}
        answer = {"role": "assistant", "content": row.get("output")}
        messages = (*(row.get("messages") or [question]), answer)
        if not all(map(_is_message, messages)):
            raise InputError(f"row {number} of {path} lacks a prompt (or instruction) or an output")
        conversations.append(Conversation(messages, failed=row.get("finish_reason") == "error"))
    return conversations
