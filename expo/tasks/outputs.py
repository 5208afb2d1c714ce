"""Generated files, read back: their answers, and the conversations that a reward model rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from expo.durable import Row
from expo.errors import InputError
from expo.tasks.files import read_rows
from expo.tasks.load import load_prompts
from expo.tasks.prompts import Conversation, Prompt, Task, assistant, is_message, prompt_item


def read_outputs(path: Path, task: Task) -> list[str]:
    """Every answer of a generated file, in order, turn by turn."""
    return [text for row in read_rows(path) for text in task.outputs(row)]


def read_conversations(
    path: Path, task: Task, *, dataset: str | None = None, limit: int | None = None
) -> list[Conversation]:
    """The answers of a generated file, in its order, each with the conversation before it.

    Args:
        path: The file.
        task: Its task.
        dataset: Where the questions are, for a file that holds answers only.
        limit: Take only the file's first rows.

    Raises:
        InputError: The file is missing or not in a format `expo generate` writes, or its questions are elsewhere.
        EnvironmentFailure: The hub cannot be reached.
    """
    rows = read_rows(path)[:limit]
    if not task.by_id:
        return [_conversation(number, row, path) for number, row in enumerate(rows)]
    prompts = {prompt.id: prompt for prompt in load_prompts(task, dataset)}
    return [one for number, row in enumerate(rows) for one in _turns(number, row, path, task, prompts)]


def _conversation(number: int, row: Row, path: Path) -> Conversation:
    question = {"role": "user", "content": row.get("prompt", row.get("instruction"))}
    asked = tuple(row.get("messages") or [question])
    messages = (*asked, {"role": "assistant", "content": row.get("output")})
    if not all(map(is_message, messages)):
        raise InputError(f"row {number} of {path} lacks a prompt (or instruction) or an output")
    return Conversation(messages, prompt_item(asked), failed=row.get("finish_reason") == "error")


def _turns(number: int, row: Row, path: Path, task: Task, prompts: dict[str, Prompt]) -> Iterator[Conversation]:
    prompt = prompts.get(str(row.get("question_id")))
    if prompt is None:
        raise InputError(f"row {number} of {path} answers no question of {task.name}: {row.get('question_id')!r}")
    answers = _answers(number, row, path, task)
    if len(answers) != prompt.turns:
        raise InputError(f"row {number} of {path} has {len(answers)} answers to a question of {prompt.turns} turns")
    messages = prompt.messages
    for turn, text in enumerate(answers):
        messages = (*messages, assistant(text))
        yield Conversation(messages, prompt.asked(turn), id=prompt.id, turn=turn)
        messages = (*messages, *prompt.followups[turn : turn + 1])


def _answers(number: int, row: Row, path: Path, task: Task) -> Sequence[str]:
    try:
        answers = task.outputs(row)
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"row {number} of {path} is no {task.name} answer: it has no choices with turns") from error
    if not all(isinstance(text, str) for text in answers):
        raise InputError(f"row {number} of {path} is no {task.name} answer: its turns are not all text")
    return answers
