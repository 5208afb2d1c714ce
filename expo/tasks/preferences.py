"""Preference pairs: a prompt with a chosen and a rejected answer, from a file or a data set of the hub.

The columns are those of TRL and of UltraFeedback: `prompt`, `chosen` and `rejected`, where an answer is text, or a list
of messages that ends with it and may begin with the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expo.errors import InputError
from expo.files import SUFFIXES, Row, json_text, read_rows, repeated
from expo.tasks.table import read_file_row
from expo.tasks.task import HubSource, Message, conversation, ends_with_user, load_from_hub, require_utf8

SPLIT = "test_prefs"
"""Of a data set, where none is named; UltraFeedback's name for it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt."""

    id: str
    messages: tuple[Message, ...]
    """The conversation before the answer; it ends with the user's turn."""
    chosen: str
    rejected: str

    @property
    def source(self) -> object:
        """All that is used of the row."""
        return [list(self.messages), self.chosen, self.rejected]


def read_preference(row: Row) -> Preference:
    """A row's pair, with an empty id where it has none.

    Raises:
        InputError: It has none; the message continues "row 7 of pairs.jsonl".
    """
    chosen, rejected = (_answer(row, side) for side in ("chosen", "rejected"))
    if chosen[0] != rejected[0]:
        raise InputError("has chosen and rejected answers to different prompts")
    messages = chosen[0] or read_file_row({key: row.get(key) for key in ("prompt", "instruction", "input")}).messages
    if not ends_with_user(list(messages)):
        raise InputError("has a conversation in which the turn before the answer is not the user's")
    name = next((row[key] for key in ("id", "prompt_id") if row.get(key) is not None), "")
    return Preference(str(name), messages, chosen[1], rejected[1])


def _answer(row: Row, side: str) -> tuple[tuple[Message, ...], str]:
    """The turns before an answer, as far as its column has them, and the answer."""
    value = row.get(side)
    if isinstance(value, str):
        return (), value
    if not isinstance(value, list) or not value:
        raise InputError(f"has no {side} column with text or messages")
    *before, last = conversation(value, side)
    if last["role"] != "assistant":
        raise InputError(f"has a {side} column that ends with a turn of role {last['role']!r}; the last is the answer")
    return tuple(before), last["content"]


def load_preferences(place: str, flag: str) -> tuple[str, list[Preference]]:
    """The name of a set of pairs, and the pairs, those with two equal answers left out.

    Args:
        place: A file, or a data set of the hub, as `id[@revision][:split]`.
        flag: What names it, for messages.

    Raises:
        InputError: There is no such file or data set, or a row is no pair.
        EnvironmentFailure: The hub cannot be reached.
    """
    path = Path(place).expanduser()
    if path.is_file():
        name, rows = path.stem, read_rows(path)
    elif path.suffix.lower() in SUFFIXES or path.is_absolute() or path.is_dir():
        raise InputError(f"{flag}: no such file of preference pairs: {place}")
    else:
        repository, _, split = place.partition(":")
        name = repository.partition("@")[0].rpartition("/")[2]
        rows = load_from_hub(HubSource(repository, split or SPLIT), flag)
    pairs = [_pair(number, row, place) for number, row in enumerate(rows)]
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not different:
        raise InputError(f"{place} has no pair of different answers" if pairs else f"{place} contains no rows")
    if len(different) < len(pairs):
        log.warning("%d of %d pairs have two equal answers and are left out", len(pairs) - len(different), len(pairs))
    return name, _with_ids(different)


def _pair(number: int, row: Row, place: str) -> Preference:
    where = f"row {number} of {place}"
    try:
        pair = read_preference(row)
    except InputError as error:
        raise InputError(f"{where} {error}") from error
    require_utf8((pair.id, pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages)), where)
    return replace(pair, id=pair.id or str(number))


def _with_ids(pairs: Sequence[Preference]) -> list[Preference]:
    """With ids that name one pair each: several of a prompt that has one are numbered."""
    if repeated(pair.id for pair in pairs) is None:
        return list(pairs)
    seen: dict[str, int] = {}
    named = []
    for pair in pairs:
        count = seen[pair.id] = seen.get(pair.id, 0) + 1
        named.append(pair if count == 1 else replace(pair, id=f"{pair.id}#{count}"))
    return named if repeated(pair.id for pair in named) is None else _numbered(pairs)


def _numbered(pairs: Sequence[Preference]) -> list[Preference]:
    return [replace(pair, id=str(number)) for number, pair in enumerate(pairs)]


def clusters_of(pairs: Sequence[Preference]) -> list[int]:
    """The number of each pair's prompt: pairs of one prompt are not independent."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(json_text(list(pair.messages)), len(numbers)) for pair in pairs]
