"""Reward adapters of PEFT: the base they were trained on, and whether both fit; from headers and small files.

peft itself ignores tensors that it has no place for and leaves those that it lacks random; here both are refused.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

from expo.checkpoint.folder import ADAPTER_CONFIG, Location, find_folder, is_adapter
from expo.checkpoint.header import read_shard
from expo.checkpoint.hub import ADAPTER_WEIGHTS, locate
from expo.checkpoint.names import PEFT_PREFIX
from expo.engines.coverage import (
    SCORE,
    is_head,
    quiet,
    require_one_row,
    require_reward_weights,
    reward_config,
)
from expo.engines.shapes import Shapes, pickled_shapes, weight_shapes
from expo.errors import InputError, MissingExtra, first_line
from expo.files import read_json
from expo.theta.adapter.folders import hub_id_in_cache

ADAPTER_PICKLE = "adapter_model.bin"


def is_only_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return is_adapter(folder) and weight_shapes(folder) is None


def base_of(adapter: Location) -> Location:
    """The model that an adapter was trained on.

    Raises:
        InputError: It is not named, or not found.
    """
    settings = read_json(adapter.path / ADAPTER_CONFIG)
    recorded, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(recorded, str) or not recorded.strip():
        raise InputError(
            f"{adapter.label} is an adapter whose {ADAPTER_CONFIG} names no base model: set base_model_name_or_path "
            "there"
        )
    name = hub_id_in_cache(recorded) or recorded
    near = [str(folder / recorded) for folder in (adapter.path, adapter.path.parent)]
    local = next((found for one in (recorded, *near) if (found := find_folder(one)) is not None), None)
    if local is not None:
        return local
    try:
        return locate(f"{name}@{revision}" if isinstance(revision, str) and revision else name)
    except InputError as error:
        raise InputError(
            f"the base of the adapter {adapter.label} is not found: {error}; set "
            f"base_model_name_or_path in {ADAPTER_CONFIG} to where it is"
        ) from error


def adapter_shapes(folder: Path) -> Shapes:
    """The tensors of an adapter.

    Raises:
        InputError: There are none, or the file is damaged.
    """
    if (folder / ADAPTER_WEIGHTS).is_file():
        return {tensor.name: tensor.shape for tensor in read_shard(folder / ADAPTER_WEIGHTS).tensors}
    shapes = pickled_shapes([folder / ADAPTER_PICKLE]) if (folder / ADAPTER_PICKLE).is_file() else None
    if not shapes:
        raise InputError(f"{folder} contains {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
    return shapes


def require_adapter(adapter: Location, body: Path, *, trust_remote_code: bool) -> None:
    """Refuse an adapter without a trained head of one output, or that does not fit its base; from headers.

    Args:
        adapter: The adapter.
        body: Its base's folder.
        trust_remote_code: Whether to run Python code in it.

    Raises:
        InputError: It is refused; the message says which tensor is at fault.
        MissingExtra: peft is not installed.
    """
    folder, label = adapter.path, adapter.label
    settings = read_json(folder / ADAPTER_CONFIG)
    task, kind = settings.get("task_type") or "no task type", settings.get("peft_type")
    base = settings["base_model_name_or_path"]
    shapes = adapter_shapes(folder)
    saved = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items()}
    heads = {name: shape for name, shape in saved.items() if is_head(name) and ".lora_" not in name}
    if not heads:
        raise InputError(
            f"{label} is an adapter ({task}) of {base} without a trained score head: a reward adapter saves its head "
            'beside the factors (peft\'s task type SEQ_CLS, or modules_to_save=["score"])'
        )
    last = next((name for name in reversed(heads) if name.endswith(".weight")), next(iter(heads)))
    for name in (f"{SCORE}.weight", "classifier.weight", "classifier.out_proj.weight", last):
        if name in heads:
            require_one_row(label, name, heads[name])
            break
    if kind != "LORA":
        raise InputError(f"{label} is a {kind} adapter, and expo merges only LORA adapters: merge it with peft first")
    if find_spec("peft") is None:
        raise MissingExtra(f"{label} is a PEFT adapter: pip install 'llm-expo[peft]' to score with it")
    _require_fit(adapter, body, shapes, trust_remote_code)
    require_reward_weights(body, trust_remote_code=trust_remote_code, elsewhere=saved.keys())


def _require_fit(adapter: Location, body: Path, shapes: Shapes, trust_remote_code: bool) -> None:
    """Refuse an adapter that has other tensors than its settings give its base, as peft itself would ignore it."""
    expected = _expected_of(adapter, body, trust_remote_code)
    problems = [
        *(f"{name} is not in its weights" for name in expected if name not in shapes),
        *(f"{name} has no place in it" for name in shapes if name not in expected),
        *(
            f"{name} is {list(shape)}, not {list(expected[name])}"
            for name, shape in shapes.items()
            if name in expected and expected[name] != shape
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(
            f"the adapter {adapter.label} does not fit {body.name}: {problems[0]}{more}; its base is what "
            f"{ADAPTER_CONFIG} names as base_model_name_or_path"
        )


def _expected_of(adapter: Location, body: Path, trust_remote_code: bool) -> Shapes:
    """The tensors that peft would save of such an adapter, from a model without memory."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification

    with quiet():
        try:
            config = reward_config(body, trust_remote_code=trust_remote_code)
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
                model = get_peft_model(empty, PeftConfig.from_pretrained(str(adapter.path)))
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
        except Exception as error:  # settings and code are others'
            raise InputError(
                f"peft cannot put the adapter {adapter.label} on {body.name}: {first_line(error)}"
            ) from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
