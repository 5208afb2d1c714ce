"""The reward models people have: a table of kinds, told apart by a folder's small files and headers.

Each kind says how it is recognised, how its tensors are judged before anything is loaded, which engines run it and at
which token it is read. How transformers loads it is in `reward_loading.py`, how its token ids are made in
`reward_tokens.py`. To add a kind, add a line to `KINDS` and one to `LOADERS` there; a head of another name on a body
that transformers knows is a line in `HEADS`, a class that a model brings along a line in `CUSTOM`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expo.checkpoint.folder import Location, find_folder, is_adapter, read_config, require_loadable, source_fingerprint
from expo.checkpoint.hub import locate
from expo.engines.coverage import (
    SCORE,
    require_one_row,
    require_reward_model,
    require_reward_weights,
)
from expo.engines.reward_adapters import base_of, is_only_adapter, require_adapter
from expo.engines.reward_classes import unread_id
from expo.engines.shapes import Shapes, weight_shapes
from expo.errors import InputError
from expo.files import read_json, shown
from expo.theta.adapter.folders import VOCABULARIES

TRL_PREFIX = "pretrained_model."
"""What TRL's wrapper adds to the names of the model inside it, where it was saved as a whole."""
ONLY_TRANSFORMERS = frozenset({"transformers"})

Reads = Literal["classifier", "last", "own"]
"""Where a reward is read: as transformers' classifiers do (the last id that is not the config's padding id; encoders
at their pooled token), at the last id whatever it is, or wherever the model's own code reads it."""


@dataclass(frozen=True)
class Head:
    """A head of another name than that of a sequence classifier, on the body of a causal model."""

    by: str
    """Who saves such checkpoints."""
    weight: str
    bias: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """Its tensors → their names in a sequence classifier."""
        return {self.weight: f"{SCORE}.weight", **({self.bias: f"{SCORE}.bias"} if self.bias else {})}


HEADS = (
    Head("TRL's value heads", "v_head.summary.weight", "v_head.summary.bias"),
    Head("UltraRM and Eurus-RM", "regression_head.weight"),
    Head("OpenRLHF", "value_head.weight"),
)
"""All of them give one number for each token, and the last token's is the reward."""


@dataclass(frozen=True)
class Custom:
    """A class that a model brings along, and how its one number is got."""

    auto: str
    """The class of transformers' that finds it."""
    output: str
    """What of its output is the reward: an attribute with one number per row."""
    ends_with: str | None = None
    """The entry of its config with the token id that every row must end with."""


CUSTOM = {
    "LlamaForRewardModelWithGating": Custom("AutoModelForSequenceClassification", "score"),  # ArmoRM
    "InternLM2ForRewardModel": Custom("AutoModel", "logits", ends_with="reward_token_id"),  # internlm2-*-reward
}
"""Architecture → how its reward is got; others give `logits`, as transformers' own classes do."""


@dataclass(frozen=True)
class Kind:
    """A kind of reward models."""

    what: str
    """In messages: "rm is …"."""
    is_one: Callable[[Path], bool]
    """Whether a folder holds one."""
    require: Callable[[RewardModel, bool], None]
    """Refuse one whose tensors do not give one trained number, from headers; the flag is `--trust-remote-code`."""
    engines: frozenset[str] | None = ONLY_TRANSFORMERS
    """Which engines can run it; None: any that knows its architecture."""
    reads: Reads = "classifier"


@dataclass(frozen=True)
class RewardModel:
    """A reward model on the disk."""

    location: Location
    kind: Kind
    base: Location | None = None
    """Of an adapter: the model it was trained on."""
    template: str | None = None
    """The `--chat-template` that is used instead of its own."""

    @property
    def body(self) -> Path:
        """The folder with the config and the weights of all but the head and what an adapter changes."""
        return self.location.path if self.base is None else self.base.path

    @property
    def takes_pairs(self) -> bool:
        """Whether prompt and answer are a pair of texts, because there is no chat template."""
        if self.base is None:
            return self.kind is PAIRS
        return self.template_file is None and not _has_template(self.tokenizer_folder) and _is_encoder(self.body)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer: an adapter's own, if it has one, else its base's."""
        own = self.location.path
        return own if self.base is None or _holds(own, VOCABULARIES) else self.base.path

    @property
    def template_file(self) -> str | None:
        """The template to use instead of the tokenizer's own: as given, or an adapter's beside its base's tokenizer."""
        own = self.location.path / "chat_template.jinja"
        beside = self.tokenizer_folder != self.location.path and own.is_file()
        return self.template or (str(own) if beside else None)

    @property
    def engines(self) -> frozenset[str] | None:
        """The engines that can run it; None: any that knows its architecture."""
        return ONLY_TRANSFORMERS if self.takes_pairs else self.kind.engines

    def why_not(self, engine: str) -> str | None:
        """Why an engine does not run it; None where nothing of its kind stands against it."""
        engines = self.engines
        if engines is None or engine in engines:
            return None
        what = PAIRS.what if self.takes_pairs else self.kind.what
        return f"{self.location.label} is {what}, which only the {' or '.join(sorted(engines))} engine runs"

    def runs_own_code(self, *, trust_remote_code: bool) -> bool:
        """Whether it runs code that it brings along."""
        return trust_remote_code and bool(read_config(self.body).get("auto_map"))

    def unread_id(self, *, trust_remote_code: bool) -> int | None:
        """The id that it skips at the end of a row; see `reward_classes.unread_id`."""
        if self.kind.reads != "classifier":
            return None
        return unread_id(self.body, trust_remote_code=trust_remote_code)

    def require_trained(self, *, trust_remote_code: bool) -> None:
        """Refuse one that does not give one trained number, by its small files and headers.

        Raises:
            InputError: It has no trained head or several outputs, or needs code that is not trusted.
            MissingExtra: It needs a library that is not installed.
        """
        require_loadable(self.body)
        self.kind.require(self, trust_remote_code)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies its state, and its base's."""
        own = source_fingerprint(self.location)
        return own if self.base is None else {"adapter": own, "base": source_fingerprint(self.base)}

    @property
    def normalization(self) -> dict[str, float] | None:
        """The `mean` and `std` of its rewards, which some trainers leave in the config; None where there are none.

        They are recorded and not applied: rewards are raw logits, and (reward − mean) / std normalises them.
        """
        config = read_config(self.body)
        mean, std = config.get("mean"), config.get("std")
        if not isinstance(mean, (int, float)) or not isinstance(std, (int, float)):
            return None
        return {"mean": float(mean), "std": float(std)}


def find_reward_model(model: str, *, template: str | None = None, trust_remote_code: bool = False) -> RewardModel:
    """Find a reward model and judge it by its small files and headers, before its weights are loaded.

    Args:
        model: A directory, a hub id, or `id@revision`.
        template: The chat template that is used instead of the model's own.
        trust_remote_code: Whether to run Python code in its folder.

    Raises:
        InputError: There is none, it has no trained head or several outputs, or it needs code that is not trusted.
        EnvironmentFailure: The hub cannot be reached.
        MissingExtra: It needs a library that is not installed.
    """
    found = recognise(find_folder(model) or locate(model), template)
    found.require_trained(trust_remote_code=trust_remote_code)
    return found


def recognise(location: Location, template: str | None = None) -> RewardModel:
    """What a reward model on the disk is; an adapter's base is found, and fetched if need be.

    Raises:
        InputError: An adapter's base is not there.
        EnvironmentFailure: The hub cannot be reached.
    """
    kind = kind_of(location.path, template)
    return RewardModel(location, kind, base_of(location) if kind is ADAPTER else None, template)


def kind_of(folder: Path, template: str | None = None) -> Kind:
    """The kind of the reward model in a folder; what is nothing else is taken for a sequence classifier."""
    possible = KINDS if template is None else [kind for kind in KINDS if kind is not PAIRS]
    return next(kind for kind in possible if kind.is_one(folder))


# --- sequence classifiers, of chats or of text pairs ---------------------------------------------------------------


def _require_classifier(found: RewardModel, trust_remote_code: bool) -> None:
    require_reward_model(found.location.path, trust_remote_code=trust_remote_code)


def _takes_pairs(folder: Path) -> bool:
    """Whether a folder holds an encoder whose tokenizer has no chat template."""
    return not _has_template(folder) and _is_encoder(folder)


def _is_encoder(folder: Path) -> bool:
    """Whether it is a model that fills masks, which a pair of texts is given as `tokenizer(question, answer)`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return read_config(folder).get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _has_template(folder: Path) -> bool:
    if _holds(folder, ("chat_template.*", "additional_chat_templates")):
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(file.name, pattern) for file in folder.iterdir() for pattern in patterns)


# --- heads of other names ------------------------------------------------------------------------------------------


def head_of(folder: Path) -> Head | None:
    """The head of another name among a folder's tensors; None where there is none, or a classifier's beside it."""
    shapes = weight_shapes(folder) or {}
    names = {name.removeprefix(TRL_PREFIX) for name in shapes}
    if is_adapter(folder) or f"{SCORE}.weight" in names or _architecture(folder) in CUSTOM:
        return None
    return next((head for head in HEADS if head.weight in names), None)


def renamed(name: str, head: Head) -> str:
    """A tensor's name in a sequence classifier."""
    bare = name.removeprefix(TRL_PREFIX)
    return head.names.get(bare, bare)


def _require_head(found: RewardModel, trust_remote_code: bool) -> None:
    folder, label = found.location.path, found.location.name
    head, shapes = head_of(folder), weight_shapes(folder)
    if head is None or shapes is None:  # recognised by them
        raise InputError(f"{label} has no trained score head")
    own = {name.removeprefix(TRL_PREFIX): shape for name, shape in shapes.items()}
    require_one_row(label, head.weight, own[head.weight])
    if head.bias is not None and head.bias not in own:
        raise InputError(f"{label} lacks {head.bias}, which {head.by} have beside {head.weight}: save it again")
    bias = head.names.get(head.bias or "")
    as_classifier = {renamed(name, head): shape for name, shape in shapes.items()}
    without_bias: Shapes = {name: shape for name, shape in as_classifier.items() if name != bias}
    if not require_reward_weights(folder, trust_remote_code=trust_remote_code, shapes=without_bias):
        raise InputError(
            f"{label} has {head.weight} on a {read_config(folder).get('model_type', 'model without a model_type')}, "
            "which transformers has no sequence classifier for: its reward cannot be computed"
        )


# --- adapters ------------------------------------------------------------------------------------------------------


def _require_adapter(found: RewardModel, trust_remote_code: bool) -> None:
    require_adapter(found.location, found.body, trust_remote_code=trust_remote_code)


# --- code that a model brings along --------------------------------------------------------------------------------


def custom_of(folder: Path) -> Custom | None:
    """What is known of the class that a model brings along; None where it brings none, or an unknown one."""
    return CUSTOM.get(_architecture(folder)) if read_config(folder).get("auto_map") else None


def _architecture(folder: Path) -> str:
    names = read_config(folder).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _require_custom(found: RewardModel, trust_remote_code: bool) -> None:
    folder = found.location.path
    custom = custom_of(folder)
    if not trust_remote_code:
        raise InputError(
            f"{found.location.label} is a {_architecture(folder)}, which comes with its own Python code: "
            "review it, then pass --trust-remote-code to run it"
        )
    if custom is None:  # recognised by it
        return
    if custom.ends_with is not None and type(read_config(folder).get(custom.ends_with)) is not int:
        said = shown(read_config(folder).get(custom.ends_with))
        raise InputError(f"{folder}/config.json has {custom.ends_with} {said}, which is no token id")
    require_reward_weights(folder, trust_remote_code=True, auto=custom.auto)


# --- the table -----------------------------------------------------------------------------------------------------

ADAPTER = Kind("a PEFT adapter", is_only_adapter, _require_adapter)
HEADED = Kind(
    "a causal model with a value head", lambda folder: head_of(folder) is not None, _require_head, reads="last"
)
BROUGHT = Kind(
    "a model with code of its own", lambda folder: custom_of(folder) is not None, _require_custom, reads="own"
)
PAIRS = Kind("an encoder of text pairs", _takes_pairs, _require_classifier)
CLASSIFIER = Kind("a sequence classifier", lambda _: True, _require_classifier, engines=None)

KINDS = (ADAPTER, HEADED, BROUGHT, PAIRS, CLASSIFIER)
"""In the order in which they are looked for."""
