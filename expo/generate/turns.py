"""Which answers a turn asks for: the first turn's from the prompts alone, later ones from the answers before them.

A later turn's prompt is `apply_chat_template` of the conversation so far. What it asks for depends on its own earlier
answers only, so that a run may be stopped between any two rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expo.config import DEFAULT_TEMPERATURE, GenerateConfig
from expo.durable import Row
from expo.engines import Key, Request
from expo.errors import InputError
from expo.generate.models import Model
from expo.tasks import Message, Prompt, Task, assistant

if TYPE_CHECKING:
    from expo.generate.decide import Plan

ANSWER = assistant(".")
"""Stands for an answer that is not there yet, where the length of a conversation is estimated."""

FAILED = {"finish_reason": "error"}
NO_ANSWER_BEFORE = "the turn before it has no answer"


@dataclass(frozen=True)
class Turn:
    """One turn of all rows."""

    requests: tuple[Request, ...] = ()
    """Prompt-major, one per sample; rows without one do not fit the context."""
    too_long: dict[Key, str] = field(default_factory=dict)
    """Row key → why it has no request: its prompt is too long, or the chat template refuses it."""

    def of(self, ids: Container[str]) -> Turn:
        """The same turn of some prompts only."""
        return Turn(
            tuple(request for request in self.requests if request.id in ids),
            {key: reason for key, reason in self.too_long.items() if key[0] in ids},
        )


@dataclass(frozen=True)
class Asking:
    """What requests are made with."""

    config: GenerateConfig
    task: Task
    model: Model
    rooms: Mapping[str, int] = field(default_factory=dict)
    """Prompt id → the tokens its whole conversation may take; a function of that prompt alone."""

    def opening(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation to answer first."""
        if self.config.system is None:
            return prompt.messages
        return ({"role": "system", "content": self.config.system}, *prompt.messages)

    def temperature(self, prompt: Prompt) -> float:
        """The user's temperature, else that of the row's category, else the paper's."""
        if self.config.temperature is not None:
            return self.config.temperature
        return self.task.temperatures.get(str(prompt.columns.get("category")), DEFAULT_TEMPERATURE)


def require_one_system_message(prompts: Sequence[Prompt], config: GenerateConfig) -> None:
    """Refuse `--system` for conversations that begin with a system message: templates differ in what they do of two.

    Raises:
        InputError: A row has a system message of its own.
    """
    if config.system is None:
        return
    for number, prompt in enumerate(prompts):
        if any(message["role"] == "system" for message in prompt.messages):
            raise InputError(f"row {number} has a system message of its own: leave --system out, or take it from there")


def rooms_of(asking: Asking, prompts: Sequence[Prompt], ids: Sequence[Sequence[int] | str]) -> dict[str, int]:
    """The tokens each prompt's conversation may take, at most the model's own limit.

    An answer in a later prompt is text that is tokenized again, which may take more tokens than it was generated
    with: it is given twice the room.

    Args:
        asking: What requests are made with.
        prompts: The prompts.
        ids: Their first turns' token ids, or why there are none.

    Raises:
        InputError: The chat template refuses a conversation of several turns.
    """
    several = [prompt for prompt in prompts if prompt.followups]
    whole = [(*asking.opening(prompt), *(m for f in prompt.followups for m in (ANSWER, f))) for prompt in several]
    asked = {prompt.id: len(row) for prompt, row in zip(prompts, ids, strict=True)}
    if whole:
        lengths = map(len, asking.model.encode(whole))
        asked |= dict(zip((prompt.id for prompt in several), lengths, strict=True))
    most = asking.config.max_tokens
    return {
        prompt.id: min(asking.model.context_length, asked[prompt.id] + (2 * len(prompt.followups) + 1) * most)
        for prompt in prompts
    }


def first_turn(asking: Asking, prompts: Sequence[Prompt], ids: Sequence[Sequence[int] | str]) -> Turn:
    """The first turn, from the prompts and their token ids."""
    asked = [
        ((prompt.id, sample, 0), prompt, asking.opening(prompt), row)
        for prompt, row in zip(prompts, ids, strict=True)
        for sample in range(asking.config.n)
    ]
    return _turn(asking, asked)


def turn_of(work: Plan, turn: int, done: Mapping[Key, Row]) -> Turn:
    """One turn of a plan.

    Args:
        work: The plan.
        turn: Which; 0 is the first.
        done: The answers there are, those of the turns before among them.
    """
    if turn == 0:
        return work.first
    waiting = [(prompt, sample) for prompt in work.prompts if prompt.turns > turn for sample in range(work.config.n)]
    hopeless = {
        (prompt.id, sample, turn): NO_ANSWER_BEFORE
        for prompt, sample in waiting
        if done.get((prompt.id, sample, turn - 1), FAILED)["finish_reason"] == "error"
    }
    asked = [one for one in waiting if (one[0].id, one[1], turn) not in hopeless]
    conversations = [_so_far(work.asking, prompt, sample, turn, done) for prompt, sample in asked]
    ids = work.model.encode_each(conversations) if conversations else []
    rows = [
        ((prompt.id, sample, turn), prompt, conversation, row)
        for (prompt, sample), conversation, row in zip(asked, conversations, ids, strict=True)
    ]
    this = _turn(work.asking, rows)
    return Turn(this.requests, {**hopeless, **this.too_long})


def turns_of(work: Plan, done: Mapping[Key, Row]) -> Iterator[Turn]:
    """Every turn of a plan, one after the other, from the answers that are there when it is come to."""
    return (turn_of(work, turn, done) for turn in range(work.turns))


def unanswerable(work: Plan, done: Mapping[Key, Row]) -> dict[Key, str]:
    """Row key → why it can have no answer, once all that can are there."""
    return {key: reason for turn in turns_of(work, done) for key, reason in turn.too_long.items()}


def _so_far(asking: Asking, prompt: Prompt, sample: int, turn: int, done: Mapping[Key, Row]) -> tuple[Message, ...]:
    def later() -> Iterator[Message]:
        for before, followup in enumerate(prompt.followups[:turn]):
            yield assistant(done[prompt.id, sample, before]["output"])
            yield followup

    return (*asking.opening(prompt), *later())


def _turn(asking: Asking, asked: Sequence[tuple[Key, Prompt, tuple[Message, ...], Sequence[int] | str]]) -> Turn:
    requests, too_long = [], {}
    for key, prompt, messages, ids in asked:
        room = asking.rooms[prompt.id]
        if isinstance(ids, str):
            too_long[key] = ids
            continue
        if len(ids) >= room:
            takes = "the model takes" if room == asking.model.context_length else "its conversation has room for"
            too_long[key] = f"the prompt has {len(ids)} tokens, {takes} {room}"
            continue
        most = min(asking.config.max_tokens, room - len(ids))
        temperature = asking.temperature(prompt)
        requests.append(Request(key[0], key[1], tuple(ids), most, temperature, messages, turn=key[2]))
    return Turn(tuple(requests), too_long)
