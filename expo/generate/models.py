"""The model that answers: one whose folder is here, or one that a server has and only the server knows.

Which engines have what a setting `needs` is in `CAPABLE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expo.config import GenerateConfig
from expo.durable import Row
from expo.engines.chat import UNLIMITED, ChatTokenizer, context_length
from expo.engines.vllm import given_arguments
from expo.errors import InputError
from expo.generate.source import describe_theta, find_source
from expo.settings import flag, settings_of
from expo.tasks import Message
from expo.theta.pair import ThetaPlan

CAPABLE = {"local": ("vllm", "transformers"), "engine_arg": ("vllm",), "server": ("openai",)}
"""What a setting may need of an engine → the engines that have it."""


@dataclass(frozen=True)
class Model:
    """What the plan knows of the model."""

    path: Path
    """Its folder; where a server has it, the name it has there."""
    name: str
    """Its short name, which the output has by default."""
    record: Row
    """What the meta file says of it."""
    fingerprint: Row
    """What tells its rows from another model's."""
    tokenizer: ChatTokenizer | None = None
    """None where the server has it."""
    context_length: int = UNLIMITED
    """The longest sequence it takes, in tokens, as far as is known here."""
    theta: ThetaPlan | None = None
    """The θ(α) that is made of a pair while the engine loads, where that answers."""

    def describe(self) -> Row:
        """The model as plain data."""
        return describe_theta(self.theta) if self.theta is not None else {"model": str(self.path)}

    def encode(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Sequence[int]]:
        """The prompts' token ids; empty ones where the server has the tokenizer."""
        if self.tokenizer is None:
            return [()] * len(conversations)
        return self.tokenizer.encode(conversations, generation_prompt=True)

    def encode_each(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Sequence[int] | str]:
        """The prompts' token ids, or why the chat template gives one none."""
        return self.encode(conversations) if self.tokenizer is None else self.tokenizer.encode_each(conversations)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's token ids; an engine that gives ids has a tokenizer beside it."""
        return self.tokenizer.decode([ids])[0] if self.tokenizer is not None else ""

    def stop_ids(self, further: Sequence[int]) -> tuple[int, ...]:
        """Token ids that end an answer, beside those that the server knows."""
        own = self.tokenizer.stop_ids() if self.tokenizer is not None else ()
        return tuple(sorted({*own, *further}))

    def pad_id(self, stop_ids: Sequence[int]) -> int:
        """An id to fill batches with."""
        own = self.tokenizer.pad_id if self.tokenizer is not None else None
        return own if own is not None else (*stop_ids, 0)[0]


def find_model(config: GenerateConfig, engine: str) -> Model:
    """The model a run uses.

    Raises:
        InputError: There is no such model, or it cannot answer.
        EnvironmentFailure: The hub cannot be reached.
    """
    return _served(config) if engine == "openai" else _local(config)


def _local(config: GenerateConfig) -> Model:
    source = find_source(config)
    tokenizer = ChatTokenizer(source.folder, template=config.chat_template, trust_remote_code=config.trust_remote_code)
    return Model(
        path=source.folder,
        name=source.name,
        record=source.record,
        fingerprint={**source.fingerprint, "chat_template": sha256(tokenizer.template.encode()).hexdigest()},
        tokenizer=tokenizer,
        context_length=min(context_length(source.folder), _engines_limit(config)),
        theta=source.theta,
    )


def _engines_limit(config: GenerateConfig) -> int:
    """The longest sequence that `--engine-arg max_model_len` leaves the engine."""
    given = given_arguments(config).get("max_model_len")
    return given if type(given) is int and given > 0 else UNLIMITED


def _served(config: GenerateConfig) -> Model:
    """The server's word is taken for what its model is: under one name it is one model, at any URL."""
    model = config.model or ""
    name = model.rstrip("/").split("/")[-1]
    if not name.strip(".") and config.name is None:
        raise InputError(f"--model {model!r} gives the output no name; pass --name")
    record: Row = {"model": {"name": model, "revision": None}}
    return Model(path=Path(model), name=name, record=record, fingerprint={"model": model})


def require_fitting(config: GenerateConfig, engine: str) -> None:
    """Refuse settings that go with another engine.

    Raises:
        InputError: There is one, or the openai engine has no URL.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, setting in settings_of(GenerateConfig).items():
        engines = CAPABLE[setting.needs] if setting.needs else (engine,)
        if engine not in engines and getattr(config, name) != defaults[name]:
            plural = "s" if len(engines) > 1 else ""
            raise InputError(
                f"{flag(name)} is for the {' and '.join(engines)} engine{plural}, and this run uses {engine}"
            )
    if engine == "openai" and config.base_url is None:
        raise InputError("--engine openai needs the server's --base-url, such as http://localhost:8000/v1")
