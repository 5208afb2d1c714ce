"""How transformers loads each kind of reward model: all end as a model whose output has `logits`, one per row.

What the kinds are is in `reward_models.py`; here is a loader for each, and where a model goes that
is larger than a GPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from expo.checkpoint.folder import read_config
from expo.checkpoint.hub import ADAPTER_WEIGHTS
from expo.checkpoint.names import PEFT_PREFIX
from expo.engines import ScorerSetup
from expo.engines.coverage import SCORE, missing_parameters, require_trained, reward_config
from expo.engines.reward_adapters import ADAPTER_PICKLE
from expo.engines.reward_models import (
    ADAPTER,
    BROUGHT,
    HEADED,
    custom_of,
    head_of,
    kind_of,
    renamed,
)
from expo.engines.shapes import weight_files, weight_shapes
from expo.engines.torch_tools import loading
from expo.errors import InputError

SPARE = 1.1
"""How much more memory than its weights a model needs at least, to be put on one GPU."""

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A reward model in memory."""

    model: Any
    """A transformers model; its output's `logits` are (rows, 1)."""
    own_code: bool
    """Whether it runs code that it brings along, which may do anything with padding: its rows are scored one by one."""


def load_reward_model(setup: ScorerSetup, device: torch.device) -> Loaded:
    """Load a reward model of any kind.

    Args:
        setup: What to start.
        device: Where it goes; more than one GPU where `--device` names none and it does not fit on one.

    Raises:
        InputError: It cannot be loaded, or its weights are not all there.
        EnvironmentFailure: There is not enough memory.
    """
    kind = kind_of(setup.model, setup.config.chat_template)
    place = placement(setup, device)
    with loading(setup.model.name):
        model = LOADERS.get(kind.what, _load_classifier)(setup, place)
    brings_code = bool(read_config(setup.model).get("auto_map")) and setup.config.trust_remote_code
    if brings_code:
        _give_logits(setup.model, model)
    if setup.separator is not None and _has_token_types(model):
        _give_token_types(model, setup.separator)
    return Loaded(model.eval(), own_code=brings_code)


# --- where it goes -------------------------------------------------------------------------------------------------


def placement(setup: ScorerSetup, device: torch.device) -> str:
    """The `device_map`: the device, or `auto`, which spreads layers over GPUs and then over the host's memory."""
    if device.type != "cuda" or setup.config.device.startswith("cuda:"):
        return str(device)
    needed, free = int(SPARE * weight_bytes(setup)), free_memory()
    if needed <= free:
        return str(device)
    log.info(
        "%s needs about %.1f GB and the first GPU has %.1f GB free: its layers are spread over all GPUs (and "
        "host memory, if it does not fit there)",
        setup.model.name,
        needed / 1e9,
        free / 1e9,
    )
    return "auto"


def free_memory() -> int:
    """The free bytes of the first GPU."""
    return int(torch.cuda.mem_get_info(0)[0])


def weight_bytes(setup: ScorerSetup) -> int:
    """The bytes of a model's weights in the data type it runs in: of its files as they are, or counted from headers."""
    body = setup.model if setup.base is None else setup.base
    shapes = None if setup.config.dtype == "auto" else weight_shapes(body)
    if shapes is None:
        return sum(file.stat().st_size for file in weight_files(body) or ())
    return sum(map(math.prod, shapes.values())) * int(getattr(torch, setup.config.dtype).itemsize)


# --- loaders -------------------------------------------------------------------------------------------------------


def _load_classifier(setup: ScorerSetup, place: str, auto: str = "AutoModelForSequenceClassification") -> Any:  # noqa: ANN401 - a transformers model
    trust = setup.config.trust_remote_code
    model, info = getattr(transformers, auto).from_pretrained(
        setup.model,
        config=reward_config(setup.model, trust_remote_code=trust),
        dtype=setup.config.dtype,
        trust_remote_code=trust,
        device_map=place,
        output_loading_info=True,
    )
    require_trained(setup.model.name, model, info, "score")
    return model


def _load_brought(setup: ScorerSetup, place: str) -> Any:  # noqa: ANN401 - as above
    custom = custom_of(setup.model)
    return _load_classifier(setup, place) if custom is None else _load_classifier(setup, place, custom.auto)


def _load_headed(setup: ScorerSetup, place: str) -> Any:  # noqa: ANN401 - as above
    """A sequence classifier made of a causal model and its value head, which is kept in float32."""
    head = head_of(setup.model)
    if head is None:
        raise InputError(f"{setup.model.name} has no value head any more")
    trust = setup.config.trust_remote_code
    config = reward_config(setup.model, trust_remote_code=trust)
    config.pad_token_id = None  # the last token is read, whatever it is
    with torch.device("meta"):  # only to find its class
        empty: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust)  # type: ignore[no-untyped-call]
    stored = stored_tensors(setup.model)
    model, info = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict={renamed(name, head): tensor for name, tensor in stored.items()},
        dtype=setup.config.dtype,
        device_map=place,
        output_loading_info=True,
    )
    require_trained(setup.model.name, model, info, "score")
    own = {
        renamed(name, head): tensor[...]
        for name, tensor in stored.items()
        if renamed(name, head) in head.names.values()
    }
    _set_head(model, own)
    return model


def _load_adapter(setup: ScorerSetup, place: str) -> Any:  # noqa: ANN401 - as above
    """The base with the adapter merged into it, and the adapter's head."""
    from peft import PeftModel

    base = setup.model if setup.base is None else setup.base
    trust = setup.config.trust_remote_code
    model, info = AutoModelForSequenceClassification.from_pretrained(
        base,
        config=reward_config(base, trust_remote_code=trust),
        dtype=setup.config.dtype,
        trust_remote_code=trust,
        device_map=place,
        output_loading_info=True,
    )
    missing = missing_parameters(model, info)
    merged: Any = PeftModel.from_pretrained(model, str(setup.model)).merge_and_unload()
    saved = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in _adapter_tensors(setup.model).items()}
    untrained = [name for name in missing if name not in saved]
    if untrained:
        raise InputError(
            f"{base.name} lacks {untrained[0]}: it would score with random weights; download or save it again"
        )
    _set_head(merged, {name: tensor for name, tensor in saved.items() if name.rpartition(".")[0] == SCORE})
    return merged


LOADERS: Mapping[str, Callable[[ScorerSetup, str], Any]] = {
    ADAPTER.what: _load_adapter,
    HEADED.what: _load_headed,
    BROUGHT.what: _load_brought,
}
"""Kind → its loader; others are sequence classifiers, which transformers loads by itself."""


def _set_head(model: Any, tensors: Mapping[str, Tensor]) -> None:  # noqa: ANN401 - as above
    """Give a classifier a head as it was trained, in float32 whatever the body's type, with a bias if it has one."""
    if not tensors:
        return
    head: nn.Linear = getattr(model, SCORE)
    device = head.weight.device
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor.float().to(device), requires_grad=False)
        setattr(head, name.rpartition(".")[2], parameter)
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))


# --- stored tensors ------------------------------------------------------------------------------------------------


class _Stored:
    """A tensor in a safetensors file with what transformers' loader asks of one; its values are read when indexed."""

    def __init__(self, file: Any, name: str) -> None:  # noqa: ANN401 - an open file
        self._slice = file.get_slice(name)
        self.dtype: torch.dtype = file.get_slice(name)[:0].dtype

    def is_floating_point(self) -> bool:
        """Whether it is cast to the model's dtype."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: object) -> Tensor:
        tensor: Tensor = self._slice[index]
        return tensor


def stored_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint's files, read when they are indexed."""
    tensors: dict[str, Any] = {}
    for file in weight_files(folder) or ():
        if file.suffix == ".bin":
            tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            opened: Any = safe_open(file, "pt")
            tensors |= {name: _Stored(opened, name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (folder / ADAPTER_WEIGHTS).is_file():
        return load_file(folder / ADAPTER_WEIGHTS)
    tensors: dict[str, Tensor] = torch.load(folder / ADAPTER_PICKLE, map_location="cpu", weights_only=True)
    return tensors


# --- what is asked and what is given -------------------------------------------------------------------------------


def _has_token_types(model: Any) -> bool:  # noqa: ANN401 - a transformers model
    return int(getattr(model.config, "type_vocab_size", 0)) > 1


def _give_token_types(model: Any, separator: int) -> None:  # noqa: ANN401 - as above
    """Have the encoder given the token types of text pairs: 0 up to the first separator, 1 after it."""

    def add(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids: Tensor = inputs[0] if inputs else named["input_ids"]  # (rows, width)
        seen = (ids == separator).long().cumsum(dim=1)
        before = torch.nn.functional.pad(seen, (1, 0))[:, :-1]  # separators to the left of each id
        return inputs, {**named, "token_type_ids": (before > 0).long()}

    model.base_model.register_forward_pre_hook(add, with_kwargs=True)


def _give_logits(folder: Path, model: Any) -> None:  # noqa: ANN401 - as above
    """Have a model with code of its own give its one number as `logits`."""
    custom = custom_of(folder)

    def as_logits(_: nn.Module, inputs: object, output: Any) -> Any:  # noqa: ANN401, ARG001 - whatever it gives
        name = "logits" if custom is None else custom.output
        value = output if isinstance(output, Tensor) else getattr(output, name, None)
        if not isinstance(value, Tensor):
            raise InputError(
                f"{folder.name} gives {type(output).__name__} without {name}: expo does not know which output is its "
                "reward"
            )
        return SimpleNamespace(logits=value.reshape(len(value), -1))

    model.register_forward_hook(as_logits)
