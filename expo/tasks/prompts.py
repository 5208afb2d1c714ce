"""What a task is made of: prompts, the answers to them, and the conversations that both together are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expo.durable import Row

Message = dict[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class Prompt:
    """One row of a task."""

    id: str
    messages: tuple[Message, ...]
    """The conversation to answer; it ends with the user's turn."""
    columns: Row = field(default_factory=dict)
    """What the output row repeats of the task's row, and its category where the task has some."""
    followups: tuple[Message, ...] = ()
    """Further turns of the user, each asked after the answer to the one before."""

    @property
    def turns(self) -> int:
        """How many answers it takes."""
        return 1 + len(self.followups)

    def asked(self, turn: int) -> object:
        """What the answer of a turn is made from, the answers before it left out."""
        return prompt_item((*self.messages, *self.followups[:turn]))

    @property
    def source(self) -> object:
        """All that an output takes from the task's row."""
        return {**self.columns, "asked": self.asked(len(self.followups))}


@dataclass(frozen=True)
class Answer:
    """One generated row; a prompt of several turns has one for each, in order."""

    prompt: Prompt
    output: str
    length: int
    """Generated tokens, the stop token included."""
    finish_reason: str
    """stop, length or error."""


@dataclass(frozen=True)
class Conversation:
    """One answer of an output file with what came before it, as a reward model reads it."""

    messages: tuple[Message, ...]
    """The prompt's turns and the answer; no answer where the row failed."""
    asked: object
    """What the prompt is hashed as; equal for equal prompts, whatever was answered before."""
    failed: bool = False
    id: str | None = None
    """The prompt's id, where the file has one."""
    turn: int | None = None
    """Which of the prompt's turns, where the task has several."""


@dataclass(frozen=True)
class Source:
    """Where a task's rows are on the hub."""

    repository: str
    split: str = "train"
    file: str | None = None
    """One file of the repository, where it has no data set that loads without code."""
    kind: str = "dataset"
    """dataset or space."""


@dataclass(frozen=True)
class Task:
    """A prompt set and its output format."""

    name: str
    """Names the folders `outputs_<name>` and `rewards_<name>`."""
    source: Source | Path
    suffix: str
    read: Callable[[Row], Prompt]
    """A row's prompt (its id empty where the row has none).

    Raises `InputError` where it has none, with the rest of a sentence that begins "row 7 of questions.jsonl".
    """
    write: Callable[[Sequence[Answer], str], str]
    """The output file's text, from the answers and the generator's name."""
    outputs: Callable[[Row], list[str]]
    """The answers in a row of the output file, one per turn; `KeyError` or the like where it has another shape."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """The category of a row → its temperature, unless the user gives one."""
    by_id: bool = False
    """Whether answers are matched with prompts by id, because their file has no prompts: ids must differ."""


def prompt_item(messages: Sequence[Message]) -> object:
    """What a prompt is hashed as: its text, or the messages where there are several."""
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
