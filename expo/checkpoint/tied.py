"""Heads that are tied to their embeddings: which there are, and what a config says about them.

To support another model's tied head, add a line to `TIED_HEADS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TIED_HEADS = (
    ("lm_head.weight", "model.embed_tokens.weight"),
    ("lm_head.weight", "model.language_model.embed_tokens.weight"),
    ("lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    ("lm_head.weight", "transformer.wte.weight"),
    ("lm_head.weight", "transformer.word_embeddings.weight"),
    ("lm_head.weight", "backbone.embeddings.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ("output.weight", "model.tok_embeddings.weight"),
)
"""Heads and the embeddings they are tied to: a checkpoint of a tied model may omit the head."""

ROWS_PER_TOKEN = frozenset(
    (
        *(".".join(name.split(".")[-2:]) for pair in TIED_HEADS for name in pair),
        *("lm_head.bias", "embed_tokens_per_layer.weight", "output_layer.weight", "shared.weight", "embed_out.bias"),
    )
)
"""Last two parts of the names of tensors with a row per token: embeddings and heads."""

TIED_BY_DEFAULT = frozenset(
    {"bloom", "cohere", "falcon", "gemma", "gemma2", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"}
)
"""Model types whose config.json omits tie_word_embeddings when it is true."""


def has_row_per_token(name: str) -> bool:
    """Whether a tensor is an embedding or a head, whose rows belong to tokens."""
    return ".".join(name.split(".")[-2:]) in ROWS_PER_TOKEN


def config_tables(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model's config and the tables in it, such as a multimodal model's `text_config`."""
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def ties_head(config: dict[str, Any]) -> bool | None:
    """Whether a model uses its embedding as its head; None if the config does not say or its tables disagree."""
    flags = {bool(table["tie_word_embeddings"]) for table in config_tables(config) if "tie_word_embeddings" in table}
    if not flags and config.get("model_type") in TIED_BY_DEFAULT:
        return True
    return flags.pop() if len(flags) == 1 else None
