"""Conversations to token ids and back, with the model's own tokenizer and chat template.

Every engine gets prompts as these ids: one leading BOS if the template writes one, the user's text unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expo.checkpoint.folder import read_config, read_json
from expo.errors import InputError, first_line
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


class ChatTokenizer:
    """A tokenizer with a chat template.

    Args:
        model: The model's folder.
        template: A Jinja file used instead of the model's own chat template.
        trust_remote_code: Whether to run Python code in the folder.

    Raises:
        InputError: There is no tokenizer or no chat template.
    """

    def __init__(self, model: Path, *, template: str | None, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        self._model = model
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the tokenizer in {model} cannot be loaded: {first_line(error)}") from error
        if template is not None:
            self._tokenizer.chat_template = _read_template(Path(template))
        if not self._tokenizer.chat_template:
            raise InputError(f"{model} has no chat template; pass one with --chat-template FILE")

    @property
    def template(self) -> str:
        """The chat template's text."""
        return str(self._tokenizer.chat_template)

    @property
    def pad_id(self) -> int | None:
        """The padding token's id."""
        pad_id: int | None = self._tokenizer.pad_token_id
        return pad_id

    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: the tokenizer's EOS and those of generation_config.json, else config.json."""
        file = self._model / "generation_config.json"
        configured = (read_json(file) if file.is_file() else {}).get("eos_token_id")
        if configured is None:
            configured = read_config(self._model).get("eos_token_id")
        ids = {*_as_list(self._tokenizer.eos_token_id), *_as_list(configured)}
        return tuple(sorted(ids))

    def encode(self, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool) -> list[list[int]]:
        """Token ids from `apply_chat_template`, for all conversations at once.

        Raises:
            InputError: The template refuses a conversation, for example one with a system message.
        """
        from jinja2 import TemplateError

        try:
            rows: list[list[int]] = self._tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                tokenize=True,
                add_generation_prompt=generation_prompt,
                return_dict=False,
            )
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise InputError(f"the chat template of {self._model} refuses the prompts: {first_line(error)}") from error
        return rows

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
            return str(error).replace("refuses the prompts", "refuses it")

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of token ids, without special tokens."""
        return [
            self._tokenizer.decode(list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in rows
        ]


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


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template {path} cannot be read: {error}") from error


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
