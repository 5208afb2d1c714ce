"""The rows that `expo score` scores: an answer with its conversation, as the token ids that a reward model reads."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from expo.checkpoint.folder import read_json
from expo.engines.chat import ChatTokenizer
from expo.engines.reward_tokens import PairTokenizer, RewardTokenizer
from expo.errors import InputError
from expo.files import Row, json_text, texts_sha256
from expo.tasks import Conversation, Message


@dataclass(frozen=True)
class ScoreRow:
    """One row to score."""

    number: int
    conversation: Conversation
    id: str
    sample: int
    token_ids: tuple[int, ...]
    """What the engine sees."""
    truncated: bool
    failed: bool
    """Whether there is no answer to score."""
    unread_ids: tuple[int, ...] = field(default=(), kw_only=True)
    """What follows that no reward model reads."""

    @cached_property
    def token_ids_xxh3(self) -> str:
        """Identifies what was scored."""
        return _xxh3(self.token_ids)

    def is_of(self, row: Row) -> bool:
        """Whether a row of the journal is about these tokens; it was with the unread ones, before they were cut off."""
        seen: str = row["token_ids_xxh3"]
        return seen == self.token_ids_xxh3 or (
            bool(self.unread_ids) and seen == _xxh3(self.token_ids + self.unread_ids)
        )

    @property
    def key(self) -> tuple[str, int, int]:
        """Its id, sample and turn, which no other row of its file has."""
        return self.id, self.sample, self.conversation.turn or 0

    @property
    def cluster(self) -> str:
        """Equal for rows that are not independent: answers to one prompt, and to the turns of one question."""
        one = self.conversation
        return str(one.id) if one.turn is not None else json_text(one.asked)

    def journal_row(self, reward: float | None) -> Row:
        """The row in the journal's form; a reward of None means it failed."""
        turn = self.conversation.turn
        return {
            "row": self.number,
            "token_ids_xxh3": self.token_ids_xxh3,
            "id": self.id,
            "sample": self.sample,
            **({} if turn is None else {"turn": turn}),
            "reward": reward,
            "tokens": len(self.token_ids),
            "truncated": self.truncated,
        }


def score_rows(
    conversations: Sequence[Conversation],
    tokenizer: RewardTokenizer | PairTokenizer,
    longest: int,
    outputs: Path,
    unread: int | None = None,
    *,
    whole: Sequence[Conversation],
) -> Iterator[ScoreRow]:
    """The rows of an output file, as token ids.

    Args:
        conversations: What is scored: the file's first ones.
        tokenizer: The reward model's.
        longest: The maximum number of tokens; longer rows lose their end.
        outputs: The file, beside which generate's meta file may be.
        unread: The id that the reward model skips at the end of a row, if it does.
        whole: All that the file contains.

    Raises:
        InputError: The chat template leaves out a message or renders nothing, or the model has no vector for a token.
    """
    messages = [conversation.messages for conversation in conversations]
    lost, keys = _of_generate(outputs, whole)
    failed = [conversation.failed or number in lost for number, conversation in enumerate(conversations)]
    ids = encode_answered(messages, failed, tokenizer, generation_prompt=False)
    tokenizer.require_all_said(messages, generation_prompt=False)
    tokenizer.require_readable(ids)
    seen: set[tuple[str, int, int | None]] = set()
    for number, (conversation, row_ids) in enumerate(zip(conversations, ids, strict=True)):
        if not row_ids and not failed[number]:
            raise InputError(f"row {number} of {outputs} has no tokens: the chat template renders it as an empty text")
        kept = tokenizer.cut(row_ids, longest)
        name, sample = keys[number] if number < len(keys) else (conversation.id or str(number), 0)
        while (name, sample, conversation.turn) in seen:  # a file of others may answer a question twice
            sample += 1
        seen.add((name, sample, conversation.turn))
        yield ScoreRow(
            number=number,
            conversation=conversation,
            id=name,
            sample=sample,
            token_ids=(read := cut(kept, unread)),
            truncated=len(row_ids) > longest,
            failed=failed[number],
            unread_ids=tuple(kept[len(read) :]),
        )


def encode_answered(
    conversations: Sequence[Sequence[Message]],
    failed: Sequence[bool],
    tokenizer: ChatTokenizer,
    *,
    generation_prompt: bool,
) -> Sequence[Sequence[int]]:
    """Token ids of the rows; none for rows without an answer where the chat template refuses them, as it did before.

    Raises:
        InputError: The template refuses a row that has an answer, or the tokenizer cannot encode it.
    """
    try:
        return tokenizer.encode(conversations, generation_prompt=generation_prompt)
    except InputError:
        if not any(failed) or all(failed):
            raise
        answered = [messages for messages, lost in zip(conversations, failed, strict=True) if not lost]
        ids = iter(tokenizer.encode(answered, generation_prompt=generation_prompt))
        return [() if lost else next(ids) for lost in failed]


def _xxh3(ids: Sequence[int]) -> str:
    return xxhash.xxh3_64_hexdigest(array("q", ids).tobytes())


def cut(ids: Sequence[int], unread: int | None) -> tuple[int, ...]:
    """A row up to the last id that is read; one that has no other id keeps its first, as transformers reads it."""
    end = len(ids)
    while end > 1 and ids[end - 1] == unread:
        end -= 1
    return tuple(ids[:end])


def _of_generate(outputs: Path, conversations: Sequence[Conversation]) -> tuple[set[int], list[tuple[str, int]]]:
    """Which rows failed, and every row's id and sample, from generate's meta file; empty if there is none.

    Raises:
        InputError: It is damaged, or names other rows, as where a run was killed between the two files.
    """
    file = outputs.with_name(f"{outputs.stem}.meta.json")
    advice = f"move it away to score {outputs.name} without it"
    try:
        meta = read_json(file) if file.is_file() else {}
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    if meta.get("command") != "generate":
        return set(), []
    try:
        failed = {int(error["row"]) for error in meta["errors"]}
        columns = meta["per_row"]["id"], meta["per_row"]["sample"]
        keys = [(str(name), int(sample)) for name, sample in zip(*columns, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged: {advice}") from error
    asked = texts_sha256(one.asked for one in conversations[: len(keys)])
    if len(conversations) >= len(keys) and asked != meta.get("prompts_sha256", asked):
        raise InputError(
            f"{file} is about different prompts from those in {outputs.name}: `expo generate` finishes a run that was "
            f"killed between the two, --dataset names the questions of mtbench, or {advice}"
        )
    return failed, keys
