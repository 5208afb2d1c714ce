"""The engine's requests: the first turn's from the prompts alone, later ones from the answers before them.

A later turn's prompt is `apply_chat_template` of the conversation so far. It depends only on the earlier answers of its
own conversation, so a run may be stopped between any two rows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from expo.config import DEFAULT_TEMPERATURE, GenerateConfig
from expo.engines import Key, Request, request_seed
from expo.errors import InputError
from expo.files import Row
from expo.tasks import Message, Prompt, Task, assistant
from expo.verbs.generate.model import Model

ANSWER = assistant(".")
"""Stands for a missing answer when the length of a conversation is estimated."""

FAILED = {"finish_reason": "error"}
NO_ANSWER_BEFORE = "the previous turn has no answer"


@dataclass(frozen=True)
class Turn:
    """One turn of all rows."""

    requests: tuple[Request, ...] = ()
    """Prompt-major, one per sample; rows that do not fit the context have none."""
    unanswerable: dict[Key, str] = field(default_factory=dict)
    """Row key → why it has no request: its prompt is too long, or the chat template rejects it."""

    def of(self, ids: Container[str]) -> Turn:
        """The same turn of some prompts only."""
        return Turn(
            tuple(request for request in self.requests if request.id in ids),
            {key: reason for key, reason in self.unanswerable.items() if key[0] in ids},
        )


@dataclass(frozen=True)
class RequestBuilder:
    """Builds requests from prompts."""

    config: GenerateConfig
    task: Task
    model: Model
    token_budgets: Mapping[str, int]
    """Prompt id → the maximum tokens of its whole conversation; a function of that prompt alone."""

    @classmethod
    def begin(cls, config: GenerateConfig, task: Task, model: Model, prompts: Sequence[Prompt]) -> tuple[Self, Turn]:
        """The builder for some prompts, and their first turn.

        Raises:
            InputError: The chat template rejects all prompts or a conversation of several turns, or ignores a message;
                or the model cannot read a prompt's tokens.
        """
        opening = cls(config, task, model, {})
        ids = model.encode_each([opening.opening(prompt) for prompt in prompts])
        if model.tokenizer is not None:
            whole = [opening.whole(prompt) for prompt in prompts]
            model.tokenizer.require_all_said(whole, generation_prompt=True, system_flag=config.system is not None)
            model.tokenizer.require_readable(ids)
        builder = cls(config, task, model, opening.budgets(prompts, ids))
        asked = [
            ((prompt.id, sample, 0), prompt, builder.opening(prompt), row)
            for prompt, row in zip(prompts, ids, strict=True)
            for sample in range(config.n)
        ]
        return builder, builder.build(asked)

    def opening(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation of the first turn."""
        if self.config.system is None:
            return prompt.messages
        return ({"role": "system", "content": self.config.system}, *prompt.messages)

    def whole(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation of its last turn, before there are answers."""
        return (*self.opening(prompt), *(message for later in prompt.followups for message in (ANSWER, later)))

    def temperature(self, prompt: Prompt) -> float:
        """The user's temperature, or that of the row's category, or the paper's."""
        if self.config.temperature is not None:
            return self.config.temperature
        return self.task.temperatures.get(str(prompt.columns.get("category")), DEFAULT_TEMPERATURE)

    def budgets(self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int] | str]) -> dict[str, int]:
        """The maximum tokens of each prompt's conversation, at most the model's own limit.

        An answer in a later prompt is tokenized again, which may take more tokens than were generated: it is budgeted
        twice.

        Args:
            prompts: The prompts.
            ids: Their first turns' token ids, or why there are none.

        Raises:
            InputError: The chat template rejects a conversation of several turns.
        """
        several = [prompt for prompt in prompts if prompt.followups]
        asked = {prompt.id: len(row) for prompt, row in zip(prompts, ids, strict=True)}
        if several:
            whole = [self.whole(prompt) for prompt in several]
            asked |= {prompt.id: len(row) for prompt, row in zip(several, self.model.encode(whole), strict=True)}
        most = self.config.max_tokens
        return {
            prompt.id: min(self.model.context_length, asked[prompt.id] + (2 * len(prompt.followups) + 1) * most)
            for prompt in prompts
        }

    def turn(self, prompts: Sequence[Prompt], number: int, done: Mapping[Key, Row]) -> Turn:
        """A later turn.

        Args:
            prompts: The prompts; those with fewer turns are skipped.
            number: Which turn, from 1.
            done: The answers so far, including those of the previous turns.
        """
        waiting = [(prompt, sample) for prompt in prompts if prompt.turns > number for sample in range(self.config.n)]
        lost = {
            (prompt.id, sample, number): NO_ANSWER_BEFORE
            for prompt, sample in waiting
            if done.get((prompt.id, sample, number - 1), FAILED)["finish_reason"] == "error"
        }
        asked = [one for one in waiting if (one[0].id, one[1], number) not in lost]
        conversations = [self._so_far(prompt, sample, number, done) for prompt, sample in asked]
        ids = self.model.readable_or_why(self.model.encode_each(conversations)) if conversations else []
        rows = [
            ((prompt.id, sample, number), prompt, conversation, row)
            for (prompt, sample), conversation, row in zip(asked, conversations, ids, strict=True)
        ]
        this = self.build(rows)
        return Turn(this.requests, {**lost, **this.unanswerable})

    def _so_far(self, prompt: Prompt, sample: int, turn: int, done: Mapping[Key, Row]) -> tuple[Message, ...]:
        answers = (assistant(done[prompt.id, sample, before]["output"]) for before in range(turn))
        later = zip(answers, prompt.followups, strict=False)
        return (*self.opening(prompt), *(message for pair in later for message in pair))

    def build(self, asked: Sequence[tuple[Key, Prompt, tuple[Message, ...], Sequence[int] | str]]) -> Turn:
        """The requests for conversations given with their token ids, or with why they have none."""
        requests, unanswerable = [], {}
        for key, prompt, messages, ids in asked:
            budget = self.token_budgets[prompt.id]
            if isinstance(ids, str):
                unanswerable[key] = ids
                continue
            if len(ids) >= budget:
                limit = "the model takes" if budget == self.model.context_length else "its conversation's budget is"
                unanswerable[key] = f"the prompt has {len(ids)} tokens, {limit} {budget}"
                continue
            most = min(self.config.max_tokens, budget - len(ids))
            name, sample, turn = key
            seed = request_seed(self.config, key)
            temperature = self.temperature(prompt)
            requests.append(Request(name, sample, tuple(ids), most, temperature, messages, turn, seed))
        return Turn(tuple(requests), unanswerable)


def require_one_system_message(prompts: Sequence[Prompt], config: GenerateConfig) -> None:
    """Refuse `--system` for conversations with a system message of their own: templates treat two of them differently.

    Raises:
        InputError: A row has a system message of its own.
    """
    if config.system is None:
        return
    for number, prompt in enumerate(prompts):
        if any(message["role"] == "system" for message in prompt.messages):
            raise InputError(f"row {number} has its own system message: drop --system, or remove that message")
