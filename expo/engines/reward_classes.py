"""What classes of reward models do, told from config.json before anything is loaded.

At which token a classifier is read, which architectures vLLM is taken for, and which models' rows must not be padded.
The tables name classes of transformers'; `tests/test_scorers.py` runs on each architecture that vLLM is taken for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expo.engines.coverage import reward_config

VLLM_ARCHITECTURES = (
    "LlamaForSequenceClassification",
    "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "Qwen3ForSequenceClassification",
)
"""The architectures whose rewards with vLLM are those with transformers, in float32 on the same token ids."""

READ_LAST = frozenset(
    {
        "BioGptForSequenceClassification",
        "BloomForSequenceClassification",
        "CTRLForSequenceClassification",
        "FalconForSequenceClassification",
        "GPT2ForSequenceClassification",
        "GPTBigCodeForSequenceClassification",
        "GPTJForSequenceClassification",
        "GPTNeoForSequenceClassification",
        "GPTNeoXForSequenceClassification",
        "Gemma3ForSequenceClassification",
        "ModernBertDecoderForSequenceClassification",
        "MptForSequenceClassification",
        "OPTForSequenceClassification",
        "OpenAIGPTForSequenceClassification",
        "Qwen3_5ForSequenceClassification",
        "Zamba2ForSequenceClassification",
        "ZambaForSequenceClassification",
    }
)
"""Classes that read a row as `GenericForSequenceClassification` does, in a `forward` of their own."""

READ_PADDING = frozenset({"fnet", "xlnet"})
"""Kinds of encoders whose reward moves with the padding beside a row: one has no mask, one reads the last column."""

MOVING_POSITIONS = frozenset({"dynamic", "longrope"})
"""Kinds of rotary positions that depend on the longest row of a batch."""


def class_name(model: Path) -> str | None:
    """The class with which transformers scores a model of this type; None where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    name: str | None = NAMES.get(_kind(model))
    return name


def class_of_last(name: str | None) -> bool:
    """Whether a class of transformers' reads a row at its last id that is not the padding id, and attends backwards."""
    from transformers.modeling_layers import GenericForSequenceClassification

    return name in READ_LAST or getattr(_class(name), "forward", None) is GenericForSequenceClassification.forward


def _class(name: str | None) -> type | None:
    import transformers

    found = getattr(transformers, name, None) if name else None
    return found if isinstance(found, type) else None


def unread_id(model: Path, *, trust_remote_code: bool) -> int | None:
    """The id that a causal classifier skips at the end of a row: its padding id, as transformers takes it.

    Rows are cut there before any engine sees them. None for encoders, which read a token of their own, for a model
    without a padding id, and for one that brings its own code.
    """
    if not class_of_last(class_name(model)):
        return None
    try:
        config = reward_config(model, trust_remote_code=trust_remote_code)
    except Exception:  # the config is others'; the engine says what is wrong with it
        return None
    if trust_remote_code and getattr(config, "auto_map", None):
        return None
    pad_id = getattr(padding_table(config, class_name(model)), "pad_token_id", None)
    return pad_id if isinstance(pad_id, int) else None


def padding_table(config: Any, name: str | None) -> Any:  # noqa: ANN401 - transformers configs
    """The config whose padding id a class reads: of those that share a `forward`, the text model's in it."""
    from transformers.modeling_layers import GenericForSequenceClassification

    found = _class(name)
    return config.get_text_config() if found and issubclass(found, GenericForSequenceClassification) else config


def why_not_in_vllm(model: Path, *, trust_remote_code: bool) -> str | None:
    """Why vLLM is not taken for a reward model, wherever it runs; None where expo has compared its rewards."""
    name = class_name(model)
    if name not in VLLM_ARCHITECTURES:
        return f"expo has not compared vLLM's rewards of {name or 'a model that transformers does not know'}"
    config = reward_config(model, trust_remote_code=trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None):
        return f"{model.name} comes with its own code"
    if moves_positions(config):
        return (
            f"{model.name} has rotary positions that depend on a row's length, and vLLM uses the longest row's for all"
        )
    if attends_forwards(config):
        return f"{model.name} also attends to later tokens"
    return None


def head_dimension(model: Path) -> int | None:
    """Dimensions of an attention head, from config.json; None where it does not say."""
    config = reward_config(model, trust_remote_code=False)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    own = getattr(config, "head_dim", None)
    return own if isinstance(own, int) else width // heads if heads and width else None


def attends_forwards(config: Any) -> bool:  # noqa: ANN401 - a transformers config
    """Whether a model of a causal family is set to see what comes after a token."""
    text = config.get_text_config()
    return bool(getattr(text, "use_bidirectional_attention", False)) or getattr(text, "is_causal", True) is False


def moves_positions(config: Any) -> bool:  # noqa: ANN401 - a transformers config
    """Whether its rotary positions depend on the longest row of a batch."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return any(one.get("rope_type") in MOVING_POSITIONS for one in kinds)


def _kind(model: Path) -> str:
    from expo.checkpoint.folder import read_config

    return str(read_config(model).get("model_type"))
