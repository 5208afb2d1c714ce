"""A conversation as the token ids that a reward model reads: its chat template's, or those of a pair of texts.

Both are `ChatTokenizer`s, without a generation prompt, and say how a conversation that is too long loses its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from expo.checkpoint.folder import read_config
from expo.checkpoint.vocabulary import embedding_rows
from expo.config import Bos
from expo.engines.chat import ChatTokenizer, load_tokenizer
from expo.engines.reward_models import RewardModel, custom_of
from expo.errors import InputError, first_line
from expo.tasks import Message

PAIR = "question and answer as a text pair; the turns before the answer are lines of the question"
"""What stands for a chat template in fingerprints."""
PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def reward_tokenizer(found: RewardModel, *, bos: Bos, trust_remote_code: bool) -> RewardTokenizer | PairTokenizer:
    """The tokenizer of a reward model.

    Args:
        found: The reward model.
        bos: Whether its rows begin as the chat template gives them, or without BOS.
        trust_remote_code: Whether to run Python code in its folder.

    Raises:
        InputError: The tokenizer cannot be loaded, there is no chat template, or `bos` does not go with it.
    """
    folder, rows = found.tokenizer_folder, embedding_rows(found.body)
    if not found.takes_pairs:
        custom = None if found.base is not None else custom_of(folder)
        ending = [] if custom is None or custom.ends_with is None else [int(read_config(folder)[custom.ends_with])]
        return RewardTokenizer(
            folder,
            template=found.template_file,
            trust_remote_code=trust_remote_code,
            rows=rows,
            with_bos=bos != "none",
            ending=ending,
        )
    if bos == "none":
        raise InputError(f"--bos none is for chat templates, and {found.location.label} reads text pairs")
    return PairTokenizer(folder, trust_remote_code=trust_remote_code, rows=rows)


class RewardTokenizer(ChatTokenizer):
    """A chat template's ids, with what is special about a reward model.

    Args:
        model: The folder of the tokenizer.
        template: A Jinja file used instead of its own chat template.
        trust_remote_code: Whether to run Python code in the folder.
        rows: How many tokens the model has vectors for; None if not known.
        with_bos: Whether the BOS that the template writes first stays.
        ending: Ids that every row ends with, whatever it loses.

    Raises:
        InputError: As for `ChatTokenizer`.
    """

    separator: int | None = None
    """As for `PairTokenizer`: there is none."""

    def __init__(
        self,
        model: Path,
        *,
        template: str | None,
        trust_remote_code: bool,
        rows: int | None = None,
        with_bos: bool = True,
        ending: Sequence[int] = (),
    ) -> None:
        super().__init__(model, template=template, trust_remote_code=trust_remote_code, rows=rows)
        self._ending = list(ending)
        self._drops = 0
        if not with_bos:  # what the template writes, never a BOS that the user's text spells
            first = super().encode([PROBE], generation_prompt=False)[0][:1]
            self._drops = int(first == [self._tokenizer.bos_token_id])

    def encode(self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool) -> list[list[int]]:
        """As `ChatTokenizer.encode`."""
        rows = super().encode(conversations, generation_prompt=generation_prompt)
        return [[*row[self._drops :], *self._ending] for row in rows]

    def cut(self, ids: Sequence[int], longest: int) -> Sequence[int]:
        """A row without the end of its conversation, where it has more than `longest` tokens."""
        if len(ids) <= longest:
            return ids
        kept = max(0, longest - len(self._ending))
        return [*ids[:kept], *self._ending]


class PairTokenizer(ChatTokenizer):
    """Prompt and answer as a pair of texts, `tokenizer(question, answer)`, as encoders are trained on them.

    The question is what stands before the answer; several turns are its lines. An empty answer is, as to the tokenizer,
    no second text. Where a text spells a special token, such as `[SEP]`, it stays text.

    Args:
        model: The folder of the tokenizer.
        trust_remote_code: Whether to run Python code in the folder.
        rows: How many tokens the model has vectors for; None if not known.

    Raises:
        InputError: The tokenizer cannot be loaded, or marks pairs in a way that is not known.
    """

    def __init__(self, model: Path, *, trust_remote_code: bool, rows: int | None = None) -> None:
        self._take(model, load_tokenizer(model, trust_remote_code), rows)
        self._frame = frozenset(self._encoded(["", ""])["input_ids"])
        probe = self._encoded(["a", "b"])
        self.separator = self._separator(probe["input_ids"], probe.get("token_type_ids"))
        """The id after whose first place the token types are 1; None where there are none."""

    @property
    def template(self) -> str:
        """What stands for the template in fingerprints."""
        return PAIR

    @property
    def asks_for_time(self) -> bool:
        """Whether the time is written into prompts: never."""
        return False

    def at(self, moment: str) -> Self:  # noqa: ARG002 - the interface
        """The same tokenizer."""
        return self

    def encode(self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool) -> list[list[int]]:  # noqa: ARG002
        """Token ids of question and answer; a conversation that does not end with an answer has an empty one.

        Raises:
            InputError: The tokenizer cannot encode a text.
        """
        rows: list[list[int]] = [self._encoded(pair_of(messages))["input_ids"] for messages in conversations]
        return rows

    def cut(self, ids: Sequence[int], longest: int) -> Sequence[int]:
        """A row without the answer's end, where it has more than `longest` tokens; what frames the pair stays.

        Where the question alone is too long, it loses its end too.
        """
        texts = [place for place, one in enumerate(ids) if one not in self._frame]
        dropped = set(texts[max(0, len(texts) - max(0, len(ids) - longest)) :])
        return [one for place, one in enumerate(ids) if place not in dropped][:longest]

    def require_all_said(
        self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool, system_flag: bool = False
    ) -> None:
        """As for `ChatTokenizer`: every message is part of the pair."""

    def _encoded(self, pair: Sequence[str]) -> Any:  # noqa: ANN401 - a library's mapping
        try:
            return self._tokenizer(pair[0], pair[1], split_special_tokens=True)
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers library raises bare ones
            raise InputError(f"the tokenizer in {self._model} cannot encode pairs: {first_line(error)}") from error

    def _separator(self, ids: Sequence[int], types: Sequence[int] | None) -> int | None:
        if types is None or not any(types):
            return None
        separator = ids[types.index(1) - 1]
        if list(types) != token_types(ids, separator):
            raise InputError(
                f"the tokenizer in {self._model} marks text pairs with token types {list(types)}, which expo does not "
                "support"
            )
        return int(separator)


def pair_of(messages: Sequence[Message]) -> tuple[str, str]:
    """Question and answer: the contents before the answer, one per line, and the answer."""
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    before = messages[:-1] if answered else messages
    return "\n".join(one["content"] for one in before), messages[-1]["content"] if answered else ""


def token_types(ids: Sequence[int], separator: int) -> list[int]:
    """The token types of a pair: 0 up to the first separator, 1 after it."""
    end = ids.index(separator)
    return [int(place > end) for place in range(len(ids))]
