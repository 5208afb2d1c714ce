"""The model that answers: a checkpoint, a θ(α) that the engine combines while it loads, or a server's model."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from expo.checkpoint.folder import (
    CONFIG_FILE,
    Location,
    config_text,
    find_folder,
    is_adapter,
    refuse_inside,
    require_generator,
    require_loadable,
    source_fingerprint,
)
from expo.checkpoint.hub import locate
from expo.checkpoint.vocabulary import embedding_rows, require_same_vocabulary, rows_in
from expo.config import GenerateConfig, ThetaConfig
from expo.config.course import plain, step_of
from expo.config.logit_space import LOGITS, Space
from expo.engines import EngineSpec
from expo.engines.chat import UNLIMITED, ChatTokenizer, configured_stop_ids, context_length
from expo.engines.coverage import require_whole
from expo.engines.shapes import Shapes
from expo.errors import InputError
from expo.files import Row
from expo.settings import recorded
from expo.tasks import Message
from expo.theta.applied import Applied, rank_of, why_not_applied, write_applied
from expo.theta.names import theta_name
from expo.theta.pair import ThetaPlan, find_pair, plan_theta, source_fingerprints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What the plan knows about the model."""

    path: Path
    """Its folder, or its name on the server."""
    name: str
    """Its short name, the default name of the output."""
    record: Row
    """Its entries in the meta file."""
    fingerprint: Row
    """What distinguishes its rows from another model's."""
    tokenizer: ChatTokenizer | None = None
    """None if the server tokenizes."""
    context_length: int = UNLIMITED
    """The longest sequence it accepts, in tokens, as far as is known here."""
    theta: ThetaPlan | None = None
    """The θ(α) that the engine combines while it loads, if that is the model."""

    def describe(self) -> Row:
        """The model as plain data."""
        if self.theta is None:
            return {"model": str(self.path)}
        return describe_theta(self.theta, self.record.get("space", "weights"))

    @property
    def asks_for_time(self) -> bool:
        """Whether its chat template writes the time into prompts."""
        return self.tokenizer is not None and self.tokenizer.asks_for_time

    def at(self, moment: str) -> Model:
        """The same model with its template's clock standing at a moment."""
        return self if self.tokenizer is None else replace(self, tokenizer=self.tokenizer.at(moment))

    def encode(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Sequence[int]]:
        """The prompts' token ids; empty if the server tokenizes."""
        if self.tokenizer is None:
            return [()] * len(conversations)
        return self.tokenizer.encode(conversations, generation_prompt=True)

    def encode_each(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Sequence[int] | str]:
        """The prompts' token ids, or for each that the chat template rejects, why."""
        return self.encode(conversations) if self.tokenizer is None else self.tokenizer.encode_each(conversations)

    def readable_or_why(self, rows: Sequence[Sequence[int] | str]) -> Sequence[Sequence[int] | str]:
        """The prompts' token ids, or for each that the model has no vectors for, why."""
        tokenizer = self.tokenizer
        return rows if tokenizer is None else [tokenizer.unreadable(row) or row for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's token ids; with an engine that returns ids there is a tokenizer."""
        return self.tokenizer.decode([ids])[0] if self.tokenizer is not None else ""

    def stop_ids(self, further: Sequence[int]) -> tuple[int, ...]:
        """Token ids that end an answer, besides those that the server knows."""
        if self.tokenizer is None:
            return tuple(sorted(further))
        ids = {*self.tokenizer.stop_ids(), *further}
        ending = self.tokenizer.ending()
        if ending is not None and ending.id not in ids:
            log.warning(
                "the chat template ends an answer with %s, which is not a stop token, so answers may run on: "
                "pass --stop-token-id %d",
                ending.text,
                ending.id,
            )
        return tuple(sorted(ids))

    def pad_id(self, stop_ids: Sequence[int]) -> int:
        """An id to pad batches with."""
        own = self.tokenizer.pad_id if self.tokenizer is not None else None
        return own if own is not None else (*stop_ids, 0)[0]


def find_model(config: GenerateConfig, spec: EngineSpec) -> Model:
    """The model a run uses.

    Raises:
        InputError: There is no such model, or it cannot generate.
        EnvironmentFailure: The hub cannot be reached.
    """
    return _local(config, spec) if "local" in spec.can else _served(config)


def _local(config: GenerateConfig, spec: EngineSpec) -> Model:
    source = find_source(config)
    rows = embedding_rows(source.folder) if source.shapes is None else rows_in(source.shapes.items())
    configured_stop_ids(source.folder, rows)  # first, as transformers says less of a bad one
    require_whole(source.folder, source.label, source.shapes, trust_remote_code=config.trust_remote_code)
    tokenizer = ChatTokenizer(
        source.folder, template=config.chat_template, trust_remote_code=config.trust_remote_code, rows=rows
    )
    return Model(
        path=source.folder,
        name=source.name,
        record=source.record,
        fingerprint={**source.fingerprint, "chat_template": sha256(tokenizer.template.encode()).hexdigest()},
        tokenizer=tokenizer,
        context_length=min(context_length(source.folder), spec.call("context_limit", config) or UNLIMITED),
        theta=source.theta,
    )


def _served(config: GenerateConfig) -> Model:
    """The server is trusted about its model: one name means one model, at any URL."""
    model = config.model or ""
    name = model.rstrip("/").split("/")[-1]
    if not name.strip(".") and config.name is None:
        raise InputError(f"no output name can be derived from --model {model!r}; pass --name")
    record: Row = {"model": {"name": model, "revision": None}}
    return Model(path=Path(model), name=name, record=record, fingerprint={"model": model})


def require_server(config: GenerateConfig, engine: str, spec: EngineSpec) -> None:
    """Refuse an engine that uses a server and has no URL.

    Raises:
        InputError: It has none.
    """
    if "server" in spec.can and config.base_url is None:
        raise InputError(f"--engine {engine} needs the server's --base-url, such as http://localhost:8000/v1")


# --- what it is made of -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """The model that answers."""

    folder: Path
    """Its config, tokenizer and code, and its weights unless it is a θ(α)."""
    name: str
    """The name of its outputs."""
    fingerprint: Row
    record: Row
    """Its entries in the meta file."""
    theta: ThetaPlan | None = None

    @property
    def label(self) -> str:
        """Whose names the weights have, for messages."""
        if self.theta is None:
            return self.name
        return (self.theta.sft if is_adapter(self.theta.dpo.path) else self.theta.dpo).label

    @property
    def shapes(self) -> Shapes | None:
        """The tensors that an engine is given in place of those in the folder."""
        return None if self.theta is None else {t.name: t.shape for s in self.theta.pair.shards for t in s.tensors}


def describe_theta(theta: ThetaPlan, space: Space = "weights") -> Row:
    """A θ(α) as plain data; in logit space no tensor of it is made."""
    return {
        "sft": str(theta.sft.path),
        "dpo": str(theta.dpo.path),
        "alpha": theta.config.alpha,
        **_course(theta),
        **({"dequantized": theta.pair.dequantized} if theta.pair.dequantized else {}),
        **({"space": space} if space == LOGITS else {"tensors": theta.pair.tensor_counts()}),
    }


def find_source(config: GenerateConfig) -> ModelSource:
    """Find the model and plan its weights, reading only their headers.

    Raises:
        InputError: It does not exist, cannot generate, or the pair does not match.
        EnvironmentFailure: The hub cannot be reached.
    """
    if config.theta is not None:
        return _theta_source(config.theta, config.space, Path(config.output_dir))
    location = find_folder(config.model or "") or locate(config.model or "")
    if is_adapter(location.path) and not (location.path / CONFIG_FILE).is_file():
        raise InputError(
            f"--model {location.label} is an adapter: give it as --dpo, the model it was trained on as --sft, and "
            "--alpha 0"
        )
    require_generator(location.path)
    if not any(pair.startswith(("load_format=", "gguf_file=")) for pair in config.engine_arg):
        require_loadable(location.path)
    refuse_inside(Path(config.output_dir), location, flag="--output-dir")
    return ModelSource(
        location.path, location.name, {"model": source_fingerprint(location)}, {"model": _record(location)}
    )


def _theta_source(config: ThetaConfig, space: Space, output: Path) -> ModelSource:
    if space == LOGITS:
        require_same_vocabulary(*find_pair(config))
    theta = plan_theta(config)
    for location in (theta.sft, theta.dpo):
        require_generator(location.path)
    refuse_inside(output, theta.sft, theta.dpo, *theta.earlier, flag="--output-dir")
    linked = is_adapter(theta.dpo.path) or theta.pair.changes_config
    folder = _linked(theta) if linked else theta.dpo.path
    sides = {"sft": theta.sft, "dpo": theta.dpo}
    fingerprint = {
        **source_fingerprints(config, theta.sft, theta.dpo, theta.earlier),
        "alpha": config.alpha,
        **recorded(config, "weights"),
    }
    record = {
        **{side: _record(location) for side, location in sides.items()},
        "alpha": config.alpha,
        **({"space": space} if space == LOGITS else {}),
        **_course(theta),
    }
    name = theta_name(theta.dpo.name, config.alpha, config.last_step, space)
    return ModelSource(folder, name, fingerprint, record, theta)


def _course(theta: ThetaPlan) -> Row:
    """A training run's checkpoints, and where it is extrapolated to; empty for a pair."""
    if theta.config.last_step is None:
        return {}
    steps = [plain(step) for step, _ in theta.config.course]
    found = [{"step": step, **_record(one)} for step, one in zip(steps, (*theta.earlier, theta.dpo), strict=True)]
    return {"checkpoints": found, "target_step": step_of(theta.config.alpha, theta.config.last_step)}


def _record(location: Location) -> Row:
    return {"name": location.label, "revision": location.revision}


def applied_adapter(theta: ThetaPlan | None, room: int) -> Applied:
    """The adapter that makes θ(α) of SFT; its folder lives as long as the plan.

    Args:
        theta: The plan.
        room: For how many α the engine has room in a batch.

    Raises:
        InputError: The pair is none of an adapter that can be applied.
    """
    why = "the model is no pair" if theta is None else why_not_applied(theta.pair)
    if theta is None or why is not None:
        raise InputError(f"θ(α) cannot be applied as an adapter: {why}")
    folder = _folder_of(theta)
    write_applied(theta.pair, theta.config.alpha, folder)
    return Applied(folder, rank_of(theta.pair), room)


def _folder_of(theta: ThetaPlan) -> Path:
    """An empty folder that lives as long as a plan."""
    folder = Path(tempfile.mkdtemp(prefix="expo-"))
    weakref.finalize(theta, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _linked(theta: ThetaPlan) -> Path:
    """A folder of links to the side files of θ(α), and its config; it lives as long as the plan."""
    folder = _folder_of(theta)
    for name, file in theta.side_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file.resolve())
    if theta.pair.changes_config and (config := folder / CONFIG_FILE).is_symlink():
        config.unlink()
        config.write_text(config_text(theta.pair.dpo.config), encoding="utf-8")
    return folder
