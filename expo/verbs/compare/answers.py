"""The answers in an output file, expo's or others', each with its names and with what identifies the question."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from expo.config.logit_space import LOGITS, Space
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, json_line, read_rows, texts_sha256
from expo.tasks import Conversation, Prompt, Task, answers_of, load_prompts, read_conversations, subset_of
from expo.theta.names import is_of_modules
from expo.verbs.compare.finding import meta_beside

log = logging.getLogger(__name__)


class Names(NamedTuple):
    """A row as expo's files name it."""

    id: str
    sample: int
    turn: int


@dataclass(frozen=True)
class Answer:
    """One answer of an output file."""

    names: Names
    asked: str
    """Identifies what was asked, in all its turns."""
    turns: tuple[tuple[str, str], ...]
    """The conversation before the answer, as (role, content); empty where the questions are not known."""
    text: str
    subset: str | None
    tokens: int | None
    finish_reason: str | None
    why: str | None
    """Why there is no answer; None if there is one."""


@dataclass(frozen=True)
class Answers:
    """An output file."""

    rows: tuple[Answer, ...]
    alpha: float | None
    space: Space
    """Where that α acts."""
    prompts_sha256: str | None
    """As in the meta files; None where the questions are not known."""
    conversations: tuple[object, ...] | None
    """What reward models are given, row by row; None where the questions are not known."""

    def sha256(self, rows: Sequence[int]) -> str | None:
        """What rewards of these rows have as `outputs_sha256`; None where the questions are not known."""
        return None if self.conversations is None else texts_sha256(self.conversations[row] for row in rows)


def load_questions(task: Task, dataset: str | None) -> list[Prompt] | None:
    """The prompts of a task whose output files hold only answers; None if the hub cannot be reached.

    Raises:
        InputError: The file of questions is missing or damaged.
    """
    try:
        return load_prompts(task, dataset)
    except EnvironmentFailure as error:
        log.warning("%s; without it, rows are paired by the ids of the questions and have no categories", error)
        return None


def read_answers(path: Path, task: Task, prompts: Sequence[Prompt] | None) -> Answers:
    """The answers of an output file, in its order.

    Args:
        path: The file.
        task: Its task.
        prompts: The questions of a task whose files hold only answers; None where they are not at hand.

    Raises:
        InputError: It is missing, empty or damaged, or its meta file is.
    """
    meta = meta_beside(path)
    meta = meta if meta.get("command") == "generate" else {}
    known = prompts is not None or not task.by_id
    conversations = read_conversations(path, task, prompts=prompts) if known else None
    rows = list(_bare(path, task) if conversations is None else _known(path, task, conversations, prompts or ()))
    if not rows:
        raise InputError(f"{path} contains no rows")
    said = _said(meta, path, len(rows))
    return Answers(
        tuple(_answer(row, said_of) for row, said_of in zip(rows, said, strict=True)),
        None if is_of_modules(path.stem) else _alpha(meta),
        LOGITS if meta.get("space") == LOGITS else "weights",
        None if conversations is None else texts_sha256(one.asked for one in conversations),
        None if conversations is None else tuple(list(one.messages) for one in conversations),
    )


def _answer(row: Row, said: Row) -> Answer:
    """A row of the output file with what the meta file says of it."""
    names = Names(
        str(said.get("id", row["id"])), _whole(said.get("sample")) or 0, _whole(said.get("turn", row["turn"])) or 0
    )
    tokens, finish = said.get("length", row["tokens"]), said.get("finish_reason", row["finish_reason"])
    why = said.get("reason") or ("generating it failed" if row["failed"] or finish == "error" else None)
    return Answer(names, row["asked"], row["turns"], row["text"], row["subset"], _whole(tokens), _text(finish), why)


def _known(path: Path, task: Task, conversations: Sequence[Conversation], prompts: Sequence[Prompt]) -> Iterator[Row]:
    """The rows of a file whose questions are known."""
    by_id = {prompt.id: prompt for prompt in prompts}
    columns = [{}] * len(conversations) if task.by_id else read_rows(path)
    for number, (one, row) in enumerate(zip(conversations, columns, strict=True)):
        prompt = by_id.get(one.id or "")
        yield {
            "id": one.id or number,
            "turn": one.turn,
            "asked": _digest(one.asked if prompt is None else prompt.asked(len(prompt.followups))),
            "turns": tuple((turn["role"], turn["content"]) for turn in one.messages[:-1]),
            "text": one.messages[-1]["content"],
            "subset": subset_of(row if prompt is None else prompt.columns),
            "tokens": row.get("length"),
            "finish_reason": row.get("finish_reason"),
            "failed": one.failed,
        }


def _bare(path: Path, task: Task) -> Iterator[Row]:
    """The rows of a file of answers alone."""
    for number, row in enumerate(read_rows(path)):
        name = task.prompt_id(row)
        if name is None:
            raise InputError(f"row {number} of {path} does not say which question it answers")
        for turn, text in enumerate(answers_of(number, row, path, task)):
            unknown: Row = dict.fromkeys(("subset", "tokens", "finish_reason"))
            known = {"id": name, "turn": turn, "asked": f"id {name}", "turns": (), "text": text, "failed": False}
            yield {**unknown, **known}


def _digest(asked: object) -> str:
    return sha256(json_line(asked).encode()).hexdigest()[:32]


def _whole(value: object) -> int | None:
    """A count from a file that others may have made."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _said(meta: Row, path: Path, rows: int) -> list[Row]:
    """What generate's meta file says of each row.

    Raises:
        InputError: It is damaged, or belongs to another file.
    """
    said: list[Row] = [{} for _ in range(rows)]
    if not meta:
        return said
    try:
        columns: dict[str, list[Any]] = meta["per_row"]
        for row, values in zip(said, zip(*columns.values(), strict=True), strict=True):
            row |= dict(zip(columns, values, strict=True))
        for error in meta["errors"]:
            said[error["row"]] |= {"reason": f"generating it failed: {error.get('reason', 'no reason is recorded')}"}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        name = f"{path.stem}.meta.json"
        raise InputError(f"{path.with_name(name)} does not belong to {path.name}: move one of them away") from error
    return said


def _alpha(meta: Row) -> float | None:
    config = meta.get("config")
    for place in (meta, config if isinstance(config, dict) else {}):
        alpha = place.get("alpha")
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            return float(alpha)
    return None
