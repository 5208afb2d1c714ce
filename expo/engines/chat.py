"""Conversations to token ids and back, with the model's own tokenizer and chat template.

Every engine gets prompts as these ids: one leading BOS if the template writes one, the user's text unchanged.
What a template does with a conversation is in `templates.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from expo.checkpoint.folder import CONFIG_FILE, read_config, read_json
from expo.engines.templates import (
    after_answer,
    asks_for_time,
    known_roles,
    left_out,
    read_template,
    with_clock_of,
)
from expo.errors import InputError, first_line
from expo.files import shown
from expo.tasks import Message

UNLIMITED = 1 << 30
PAD_BEFORE_POSITIONS = {
    **dict.fromkeys(("camembert", "data2vec-text", "ibert", "layoutlmv3", "longformer", "luke", "mpnet"), 1),
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"), 1),
    **dict.fromkeys(("lilt", "markuplm"), 0),
    "esm": None,
}
"""Kinds of models whose positions are counted from the padding id + 1, and the padding id where the config has none."""
TEMPLATE_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""Exceptions that a template's own expressions raise, besides Jinja's."""
GENERATION_CONFIG = "generation_config.json"


class Ending(NamedTuple):
    """The token that a chat template writes after an answer."""

    id: int
    text: str


class ChatTokenizer:
    """A tokenizer with a chat template.

    Args:
        model: The model's folder.
        template: A Jinja file used instead of the model's own chat template.
        trust_remote_code: Whether to run Python code in the folder.
        rows: How many tokens the model has vectors for; None if not known.

    Raises:
        InputError: The tokenizer cannot be loaded, or there is no chat template.
    """

    def __init__(self, model: Path, *, template: str | None, trust_remote_code: bool, rows: int | None = None) -> None:
        self._take(model, load_tokenizer(model, trust_remote_code), rows)
        if template is not None:
            self._tokenizer.chat_template = read_template(Path(template))
        if not self._tokenizer.chat_template:
            raise InputError(f"{model} has no chat template; pass one with --chat-template FILE")

    def _take(self, model: Path, tokenizer: Any, rows: int | None) -> None:  # noqa: ANN401 - a tokenizer of any class
        self._model = model
        self._end = UNLIMITED if rows is None else rows
        self._tokenizer: Any = tokenizer
        self._given: dict[str, Any] = {}

    @property
    def template(self) -> str:
        """The chat template's text."""
        return str(self._tokenizer.chat_template)

    @property
    def asks_for_time(self) -> bool:
        """Whether the chat template writes the time, or a part of it, into prompts."""
        return asks_for_time(self.template)

    def at(self, moment: str) -> Self:
        """The same tokenizer with its template's clock standing at a moment, in ISO 8601."""
        other = copy.copy(self)
        other._given = with_clock_of(self._tokenizer.get_chat_template(), datetime.fromisoformat(moment))
        return other

    @property
    def pad_id(self) -> int | None:
        """The padding token's id; None where there is none, or the model has no vector for it."""
        pad_id: int | None = self._tokenizer.pad_token_id
        return pad_id if pad_id is not None and pad_id < self._end else None

    @property
    def special_ids(self) -> set[int]:
        """Ids of special and added tokens; some stand for what is no text, such as an image."""
        return {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}

    @property
    def text_ids(self) -> list[int]:
        """Ids that the model has vectors for, without special and added tokens; with them where there are no others."""
        ids, special = range(min(self._end, len(self._tokenizer))), self.special_ids
        return [number for number in ids if number not in special] or list(ids)

    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: the tokenizer's EOS and those of generation_config.json, else config.json.

        Raises:
            InputError: One of the configured is no number.
        """
        own = [number for number in _as_list(self._tokenizer.eos_token_id) if number < self._end]
        return tuple(sorted({*own, *configured_stop_ids(self._model, self._end)}))

    def ending(self) -> Ending | None:
        """The first special token that the chat template writes after an answer; None where it writes none."""
        text = after_answer(lambda messages: self._render(messages, False))
        special = self.special_ids - {self._tokenizer.unk_token_id}
        for number in self._tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else ():
            token = str(self._tokenizer.convert_ids_to_tokens(number))
            if number in special and number < self._end and token.strip():
                return Ending(number, token)
        return None

    def encode(self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool) -> list[list[int]]:
        """Token ids from `apply_chat_template`, for all conversations at once.

        Raises:
            InputError: The template refuses a conversation, for example one with a system message, or the tokenizer
                cannot encode its text.
        """
        rows: list[list[int]] = self._apply(conversations, generation_prompt, tokenize=True, return_dict=False)
        return rows

    def _apply(self, conversations: Sequence[Sequence[Message]], generation_prompt: bool, **options: bool) -> Any:  # noqa: ANN401 - texts or ids
        from jinja2 import TemplateError

        rows = [list(messages) for messages in conversations]
        options = {"add_generation_prompt": generation_prompt, **options}
        try:
            return self._tokenizer.apply_chat_template(rows, **options, **self._given)
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise InputError(f"the chat template of {self._model} refuses the prompts: {first_line(error)}") from error
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers library raises bare ones
            raise InputError(
                f"the tokenizer in {self._model} cannot encode the prompts: {first_line(error)}"
            ) from error

    def encode_each(self, conversations: Sequence[Sequence[Message]]) -> list[list[int] | str]:
        """Token ids of each conversation, with a generation prompt, or why it has none.

        Raises:
            InputError: The template refuses all of them.
        """
        try:
            rows: list[list[int] | str] = [*self.encode(conversations, generation_prompt=True)]
        except InputError:
            rows = [self._encode_one(messages) for messages in conversations]
            if all(isinstance(row, str) for row in rows):
                raise
        return [row or "the chat template renders it as an empty prompt" for row in rows]

    def _encode_one(self, messages: Sequence[Message]) -> list[int] | str:
        try:
            return self.encode([messages], generation_prompt=True)[0]
        except InputError as error:
            return str(error).replace("refuses the prompts", "refuses it").replace("encode the prompts", "encode it")

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of token ids, without special tokens."""
        return [
            self._tokenizer.decode(list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in rows
        ]

    # --- what prompts must be

    def require_all_said(
        self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool, system_flag: bool = False
    ) -> None:
        """Refuse conversations with a message that the chat template ignores.

        Args:
            conversations: Row by row.
            generation_prompt: As they are encoded.
            system_flag: Whether their system messages are from `--system`.

        Raises:
            InputError: There is one; the message names its role and row, and how many rows have one.
        """

        def render(messages: Sequence[Message]) -> str | None:
            return self._render(messages, generation_prompt)

        rows = {
            number: [messages[one]["role"] for one in ignored]
            for number, messages in enumerate(conversations)
            if (text := render(messages)) is not None and (ignored := left_out(messages, text, render))
        }
        if not rows:
            return
        roles = dict.fromkeys(role for roles in rows.values() for role in roles)
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        drop = "drop --system, " if system_flag and "system" in roles else ""
        raise InputError(
            f"the chat template of {self._model} ignores messages with role {', '.join(map(repr, roles))} (row "
            f"{next(iter(rows))}{more}): {drop}use roles that it renders ({', '.join(known_roles(render))}), or pass a "
            "--chat-template that renders them"
        )

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str | None:
        """A conversation's text; None where the template rejects it."""
        try:
            text: str = self._apply([messages], generation_prompt, tokenize=False)[0]
        except InputError:
            return None
        return text

    def unreadable(self, ids: Sequence[int] | str) -> str | None:
        """Why the model cannot read a prompt's token ids; None where it can, or there are none."""
        worst = 0 if isinstance(ids, str) else max(ids, default=0)
        if worst < self._end:
            return None
        return (
            f"has token {shown(self._tokenizer.convert_ids_to_tokens(worst))} with id {worst}, and the model has "
            f"vectors for ids up to {self._end - 1} only: use the tokenizer and chat template it was trained with"
        )

    def require_readable(self, rows: Sequence[Sequence[int] | str]) -> None:
        """Refuse prompts with a token that the model has no vector for: tokens were added, and it was not resized.

        Raises:
            InputError: There is one; the message names its row, token and id.
        """
        for number, ids in enumerate(rows):
            if (why := self.unreadable(ids)) is not None:
                raise InputError(f"with the tokenizer in {self._model}, row {number} {why}")


def load_tokenizer(model: Path, trust_remote_code: bool) -> Any:  # noqa: ANN401 - a tokenizer of any class
    """The tokenizer in a folder.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise InputError(f"the tokenizer in {model} cannot be loaded: {first_line(error)}") from error
    except BaseException as error:
        # The tokenizers library raises bare Exceptions for files that it does not understand, and panics at some.
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (is_panic or isinstance(error, Exception)):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = " ".join(" ".join(lines[: 2 if lines[0].endswith(":") else 1]).split())
        newer = "it may need newer tokenizers/transformers"
        raise InputError(f"the tokenizer in {model} cannot be loaded: {why}; {newer}") from error


def configured_stop_ids(model: Path, rows: int | None) -> list[int]:
    """The `eos_token_id` of generation_config.json, else config.json, without those that the model cannot give.

    Args:
        model: The model's folder.
        rows: How many tokens the model has vectors for; None if not known.

    Raises:
        InputError: One is no number.
    """
    file = model / GENERATION_CONFIG
    configured = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    if configured is None:
        file = model / CONFIG_FILE
        configured = read_config(model).get("eos_token_id")
    ids, end = _as_list(configured), UNLIMITED if rows is None else rows
    for bad in (one for one in ids if type(one) is not int):
        raise InputError(f"{file} has eos_token_id {shown(bad)}, which is not a token id: correct it there")
    return [number for number in ids if 0 <= number < end]


def context_length(model: Path) -> int:
    """The longest sequence a model takes, in tokens, from its config.json; `UNLIMITED` where that has none."""
    config = read_config(model)
    tables = [config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict))]
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
    limits = [table[name] - _unused(table) for table in tables for name in names if isinstance(table.get(name), int)]
    return limits[0] if limits else UNLIMITED


def _unused(config: dict[str, Any]) -> int:
    """Positions that a model has and never gives to a token."""
    kind = config.get("model_type")
    if kind not in PAD_BEFORE_POSITIONS or config.get("position_embedding_type", "absolute") == "rotary":
        return 0
    pad_id = 1 if kind == "mpnet" else config.get("pad_token_id", PAD_BEFORE_POSITIONS[kind])
    return pad_id + 1 if isinstance(pad_id, int) else 0


def _as_list(ids: Any) -> list[Any]:  # noqa: ANN401 - from a file
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
