"""What a task is: prompts and their source, the answers, and the conversations that both form.

`table.py` lists the tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from expo.checkpoint.hub import explain, fetch_file, is_offline, network_errors, require_usable_environment
from expo.errors import EnvironmentFailure, ExpoError, InputError, first_line
from expo.files import SUFFIXES, Row, is_utf8, read_rows, repeated, shown

log = logging.getLogger(__name__)

Message = dict[str, str]
"""`role` and `content`."""

SUBSETS = ("dataset", "subset", "category", "source")
"""Columns of a row that may say which part of its task it belongs to; the first that is there counts."""


@dataclass(frozen=True)
class Prompt:
    """One row of a task."""

    id: str
    messages: tuple[Message, ...]
    """The conversation to answer; it ends with the user's turn."""
    columns: Row = field(default_factory=dict)
    """Columns repeated in the output row, and the category if the task has categories."""
    followups: tuple[Message, ...] = ()
    """Further user turns, each sent after the answer to the previous one."""
    subset: str | None = field(default=None, kw_only=True)
    """The part of the task that the row belongs to, where it says one."""

    @property
    def turns(self) -> int:
        """The number of answers."""
        return 1 + len(self.followups)

    def asked(self, turn: int) -> object:
        """The user's side of the conversation up to a turn, without the answers."""
        return prompt_item((*self.messages, *self.followups[:turn]))

    @property
    def source(self) -> object:
        """Everything an output uses of the task's row."""
        return {**self.columns, "asked": self.asked(len(self.followups))}


@dataclass(frozen=True)
class Answer:
    """One generated row; a prompt of several turns has one for each, in order."""

    prompt: Prompt
    output: str
    length: int | None
    """Generated tokens, the stop token included; None where that is not known."""
    finish_reason: str
    """stop, length or error."""


@dataclass(frozen=True)
class Conversation:
    """One answer of an output file with the conversation before it, as a reward model reads it."""

    messages: tuple[Message, ...]
    """The prompt's turns and the answer; without the answer if the row failed."""
    asked: object
    """What the prompt is hashed as; independent of earlier answers."""
    failed: bool = False
    id: str | None = None
    """The prompt's id, where the file has one."""
    turn: int | None = None
    """Which of the prompt's turns, where the task has several."""


@dataclass(frozen=True)
class HubSource:
    """The location of a task's rows on the hub."""

    repository: str
    split: str = "train"
    file: str | None = None
    """One file of the repository, if its data set does not load without code."""
    kind: str = "dataset"
    """dataset or space."""


@dataclass(frozen=True)
class Task:
    """A prompt set, and its output format in both directions."""

    name: str
    """Names the folders `outputs_<name>` and `rewards_<name>`."""
    source: HubSource | Path
    suffix: str
    """The output file's: .jsonl, or .json for a list of objects."""
    read: Callable[[Row], Prompt]
    """A row's prompt (with an empty id if the row has none).

    Raises `InputError` if there is none, with a message that continues "row 7 of questions.jsonl".
    """
    write: Callable[[Sequence[Answer], str], str]
    """The output file's text, from the answers and the generator's name."""
    answers: Callable[[Row], list[str]]
    """The answers in a row of the output file, one per turn; raises `KeyError` or similar if it is malformed."""
    asked: Callable[[Row], Sequence[object]] | None = None
    """The messages that a row of the output file answers; None if the file has no prompts, only `prompt_id`.

    Raises as `read` does.
    """
    prompt_id: Callable[[Row], object] = lambda row: row.get("id")
    """The id of the prompt that a row of the output file answers; used if the file has no prompts."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """The category of a row → its temperature, unless the user gives one."""
    samples: bool = False
    """Whether the output format allows several answers to one prompt (`--n`)."""

    @property
    def by_id(self) -> bool:
        """Whether answers are matched with prompts by id, as their file has no prompts: ids must be unique."""
        return self.asked is None


def prompt_item(messages: Sequence[Message]) -> object:
    """What a prompt is hashed as: its text, or the messages if there are several."""
    return messages[0]["content"] if len(messages) == 1 else list(messages)


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": text}


def is_message(value: object) -> bool:
    """Whether a value is a turn of a conversation."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def ends_with_user(value: object) -> bool:
    """Whether a value is a list of turns of which the last is the user's: a conversation to answer."""
    return isinstance(value, list) and bool(value) and isinstance(value[-1], dict) and value[-1].get("role") == "user"


def conversation(value: Sequence[object], column: str) -> tuple[Message, ...]:
    """The turns in a row's column; content that is a list of text parts is joined.

    Args:
        value: The column's value.
        column: Its name.

    Raises:
        InputError: A turn is not one, or has other content than text; the message continues "row 7 of questions.jsonl".
    """
    return tuple(_turn(number, turn, column) for number, turn in enumerate(value))


def _turn(number: int, turn: object, column: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise InputError(f"has a {column} column whose item {number} is not a turn with role and content")
    content = turn.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None:
        raise InputError(
            f"has a {column} column whose turn {number} contains {shown(other)}: only text is supported; leave the row "
            "out"
        )
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"has a {column} column whose turn {number} has no text: give every turn a content of text")
    return {"role": turn["role"], "content": "".join(map(str, texts))}


# --- prompts ------------------------------------------------------------------------------------------------------


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
    rows = read_rows(source) if isinstance(source, Path) else load_from_hub(source)
    prompts = list(_prompts(task, rows, name))
    if not prompts:
        raise InputError(f"{name} contains no prompts")
    return _with_ids(task, prompts, name)


def _prompts(task: Task, rows: Sequence[Row], name: str) -> Iterator[Prompt]:
    for number, row in enumerate(rows):
        try:
            prompt = task.read(row)
        except InputError as error:
            raise InputError(f"row {number} of {name} {error}") from error
        turns = (*prompt.messages, *prompt.followups)
        require_utf8((prompt.id, *(turn["content"] for turn in turns)), f"row {number} of {name}")
        yield replace(prompt, subset=subset_of(row))


def subset_of(row: Row) -> str | None:
    """The part of a task that a row belongs to, where a column says it."""
    return next((row[name] for name in SUBSETS if isinstance(row.get(name), str) and row[name].strip()), None)


def require_utf8(texts: Iterable[str], where: str) -> None:
    """Refuse text that no file can hold.

    Raises:
        InputError: There is some; the message begins with where it is.
    """
    if not all(map(is_utf8, texts)):
        raise InputError(
            f"{where} holds half of a surrogate pair, which is not valid text: put another character in its place, "
            "such as U+FFFD"
        )


def _source(task: Task, dataset: str | None) -> tuple[HubSource | Path, str]:
    if dataset is None:
        return task.source, task.name if isinstance(task.source, HubSource) else str(task.source)
    path = Path(dataset).expanduser()
    if path.is_file():
        return path, dataset
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or path.is_dir():
        raise InputError(f"no such prompt file: {dataset}")
    if not isinstance(task.source, HubSource):
        return HubSource(dataset), dataset
    if dataset.partition("@")[0] == task.source.repository:  # another revision of the task's own
        return replace(task.source, repository=dataset), dataset
    return HubSource(dataset, task.source.split), dataset


def _with_ids(task: Task, prompts: list[Prompt], name: str) -> list[Prompt]:
    """Prompts with the rows' own ids if all are present and unique, otherwise with row numbers."""
    again = repeated(prompt.id for prompt in prompts)
    if again is None and all(prompt.id for prompt in prompts):
        return prompts
    if task.by_id:
        raise InputError(f"{name} has two rows with the id {again}; answers are matched by id")
    if again:
        log.warning("%s has two rows with the id %s: rows are numbered instead", name, again)
    return [replace(prompt, id=str(number)) for number, prompt in enumerate(prompts)]


def load_from_hub(source: HubSource, flag: str = "--dataset") -> list[Row]:
    """The rows of a data set.

    Args:
        source: Where they are.
        flag: What takes a local copy instead, for messages.

    Raises:
        InputError: There is no such data set, or it cannot be loaded.
        EnvironmentFailure: The hub cannot be reached.
    """
    repository, _, revision = source.repository.partition("@")
    try:
        if source.file is not None:
            return read_rows(fetch_file(repository, source.file, revision or None, kind=source.kind))
        return _load_dataset(repository, source.split, revision or None)
    except ExpoError as error:
        raise type(error)(f"the data set cannot be loaded: {error}; {flag} FILE reads a copy") from error


def _load_dataset(repository: str, split: str, revision: str | None) -> list[Row]:
    from datasets import exceptions, load_dataset

    require_usable_environment()
    try:
        return list(load_dataset(repository, split=split, revision=revision))
    except (exceptions.DatasetsError, ValueError, *network_errors()) as error:
        # A repository that needs its own loading script is refused with a RuntimeError.
        if isinstance(error, (exceptions.DatasetsError, ValueError)) or "scripts" in str(error):
            raise InputError(f"{repository}: {first_line(error)}") from error
        if isinstance(error, FileNotFoundError) and not is_offline():
            raise EnvironmentFailure(f"{repository} is not in the hub cache, and the hub cannot be reached") from error
        raise explain(error, repository, revision) from error


# --- answers ------------------------------------------------------------------------------------------------------


def read_outputs(path: Path, task: Task) -> list[str]:
    """Every answer of a generated file, in order, turn by turn."""
    return [text for row in read_rows(path) for text in task.answers(row)]


def read_conversations(
    path: Path,
    task: Task,
    *,
    dataset: str | None = None,
    limit: int | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> list[Conversation]:
    """The answers of a generated file, in its order, each with the conversation before it.

    Args:
        path: The file.
        task: Its task.
        dataset: The questions, for a file that contains only answers.
        limit: Take only the file's first rows.
        prompts: The questions, if they have been loaded.

    Raises:
        InputError: The file is missing or not in a format that `expo generate` writes, or its questions are missing.
        EnvironmentFailure: The hub cannot be reached.
    """
    rows = read_rows(path)[:limit]
    if task.asked is not None:
        return [_conversation(number, row, path, task) for number, row in enumerate(rows)]
    asked = {prompt.id: prompt for prompt in (load_prompts(task, dataset) if prompts is None else prompts)}
    return [one for number, row in enumerate(rows) for one in _turns(number, row, path, task, asked)]


def _conversation(number: int, row: Row, path: Path, task: Task) -> Conversation:
    where = f"row {number} of {path}"
    try:
        asked: tuple[Any, ...] = tuple(task.asked(row)) if task.asked is not None else ()
        answers = tuple(assistant(text) for text in task.answers(row))
    except InputError as error:
        raise InputError(f"{where} {error}") from error
    except (KeyError, IndexError, TypeError):
        asked, answers = (), ()
    if not asked or not answers or not all(map(is_message, (*asked, *answers))):
        raise InputError(f"{where} lacks a prompt (or instruction) or an output")
    require_utf8((turn["content"] for turn in (*asked, *answers)), where)
    return Conversation((*asked, *answers), prompt_item(asked), failed=row.get("finish_reason") == "error")


def _turns(number: int, row: Row, path: Path, task: Task, prompts: dict[str, Prompt]) -> Iterator[Conversation]:
    prompt = prompts.get(str(task.prompt_id(row)))
    if prompt is None:
        raise InputError(f"row {number} of {path} answers no question of {task.name}: {row.get('question_id')!r}")
    answers = answers_of(number, row, path, task)
    if len(answers) != prompt.turns:
        raise InputError(f"row {number} of {path} has {len(answers)} answers to a question of {prompt.turns} turns")
    messages = prompt.messages
    for turn, text in enumerate(answers):
        messages = (*messages, assistant(text))
        yield Conversation(messages, prompt.asked(turn), id=prompt.id, turn=turn)
        messages = (*messages, *prompt.followups[turn : turn + 1])


def answers_of(number: int, row: Row, path: Path, task: Task) -> Sequence[str]:
    """The answers in a row of a generated file, one per turn.

    Raises:
        InputError: It is malformed.
    """
    try:
        answers = task.answers(row)
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"row {number} of {path} is not a valid {task.name} answer: no choices with turns") from error
    if not all(isinstance(text, str) for text in answers):
        raise InputError(f"row {number} of {path} is not a valid {task.name} answer: its turns are not all text")
    require_utf8(answers, f"row {number} of {path}")
    return answers
