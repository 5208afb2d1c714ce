"""MT-Bench: questions of two turns, answered in FastChat's model_answer format.

The second turn's prompt contains the model's first answer. A question may have any number of turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby

from expo.errors import InputError
from expo.files import Row
from expo.tasks.task import Answer, Prompt, user

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
"""FastChat's temperature for each category; other categories get 0.7, which is also expo's default."""

ID_LETTERS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
ID_LENGTH = 22
"""The alphabet and length of FastChat's answer ids."""

TIME_STAMP = 0.0
"""Constant, because nothing reads it and a rerun must write the same bytes; the meta file has the times."""


def read(row: Row) -> Prompt:
    """A question: `question_id`, `category`, `turns`, or `prompt_id`, `category`, `prompt` as in some copies."""
    turns = row.get("turns", row.get("prompt"))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise InputError("has no turns (or prompt) column with a list of texts")
    name = row.get("question_id", row.get("prompt_id"))
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise InputError("has no question_id (or prompt_id) that is a number or text")
    first, *further = map(user, turns)
    return Prompt(str(name), (first,), {"question_id": name, "category": row.get("category")}, tuple(further))


def write(answers: Sequence[Answer], generator: str) -> str:
    """One line per question, in ASCII as FastChat writes it: it reads files in the system's encoding."""
    questions = [list(turns) for _, turns in groupby(answers, key=lambda answer: answer.prompt.id)]
    return "".join(json.dumps(_model_answer(turns, generator)) + "\n" for turns in questions)


def _model_answer(answers: Sequence[Answer], generator: str) -> Row:
    question = answers[0].prompt.columns["question_id"]
    turns = [answer.output for answer in answers]
    return {
        "question_id": question,
        "answer_id": answer_id(generator, question, turns),
        "model_id": generator,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": TIME_STAMP,
    }


def answer_id(generator: str, question: int | str, turns: Sequence[str]) -> str:
    """An id like FastChat's, derived from the answer itself, so that a rerun gives the same id."""
    digest = hashlib.sha256(json.dumps([generator, question, turns]).encode()).digest()
    number, letters = int.from_bytes(digest[:16], "big"), ""
    for _ in range(ID_LENGTH):
        number, letter = divmod(number, len(ID_LETTERS))
        letters += ID_LETTERS[letter]
    return letters


def answers(row: Row) -> list[str]:
    """The answers of a line, one per turn."""
    return list(row["choices"][0]["turns"])


def prompt_id(row: Row) -> object:
    """The question that a line answers."""
    return row.get("question_id")
