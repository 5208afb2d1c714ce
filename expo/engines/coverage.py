"""Whether a checkpoint has every tensor that its model reads: decided from headers, before anything is loaded.

transformers' own loader is asked, with tensors that have shapes and no values, for a model without memory. It knows
which names are renamed, fused or tied, and which may be absent; a model of 32 layers takes a fifth of a second. A model
that transformers does not know, or that is quantized, is not judged: its engine refuses it where it must.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expo.checkpoint.folder import CONFIG_FILE, read_config
from expo.checkpoint.names import PEFT_PREFIX, WRAPPERS
from expo.engines.shapes import Shapes, weight_shapes
from expo.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HEADS = frozenset(
    {
        "score",
        "classifier",
        "pre_classifier",
        "classification_head",
        "sequence_summary",
        "logits_proj",
        "v_head",
        "value_head",
        "reward_head",
        "regression_head",
        "summary",
    }
)
"""First parts of the names of heads that give a reward."""

SCORE = "score"
"""The head of transformers' sequence classifiers that are causal models."""

PARTS = frozenset({*WRAPPERS, "module", "base_layer", "original_module"})
"""Parts of names that training wrappers and PEFT add."""

TRAINED_BUFFER, TRAINED_BUFFER_METHOD = ".e_score_correction_bias", "noaux_tc"
"""A router's bias, trained although it is a buffer, and the way of routing that reads it."""

CONVERSION = "automatic conversion"
"""Part of transformers' message about tensors that cannot be fused, such as experts of which one is missing."""

SAVE_AGAIN = "save the model inside the wrapper with `save_pretrained` (an adapter: after `merge_and_unload`)"


@dataclass(frozen=True)
class Coverage:
    """What a model's loader says about a checkpoint's names and shapes."""

    architecture: str
    missing: tuple[str, ...]
    """What the model reads and the checkpoint lacks, by the checkpoint's kind of names, in the model's order."""
    unlike: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Tensors with another shape: name, the checkpoint's, the model's."""
    unread: tuple[str, ...]
    """What the model has no place for."""


def require_whole(model: Path, label: str, shapes: Shapes | None, *, trust_remote_code: bool) -> None:
    """Refuse weights that leave a part of the model that answers without values.

    Args:
        model: The folder with the config, and the code if there is any.
        label: Whose weights they are, for the message.
        shapes: The weights; None takes those in the folder.
        trust_remote_code: Whether to run Python code in the folder.

    Raises:
        InputError: A tensor is missing, misnamed or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = weight_shapes(model) if shapes is None else shapes
    if shapes is None:
        return
    found = _look(AutoModelForCausalLM, AutoConfig.from_pretrained, model, shapes, trust_remote_code)
    _require_unwrapped(label, shapes, found.missing if found else None)
    if found is None:
        return
    _require_tensors(label, found, "answer")
    bias = [name for name in found.unread if name.endswith("lm_head.bias")]
    if bias:
        raise InputError(f"{label} has {bias[0]}, which {found.architecture} would ignore")


def require_reward_model(model: Path, *, trust_remote_code: bool) -> None:
    """Refuse a model without a trained score head or with more than one label, before its weights are loaded.

    Its own tensors decide; where they cannot be judged, the architecture's name does.

    Args:
        model: The model's folder.
        trust_remote_code: Whether to run Python code in it.

    Raises:
        InputError: The model is not a reward model.
    """
    try:
        judged = require_reward_weights(model, trust_remote_code=trust_remote_code)
    except NoHead as error:
        raise _causal(model) or error from None
    found = None if judged else _causal(model)
    if found is not None:
        raise found


def _causal(model: Path) -> InputError | None:
    architectures = [str(name) for name in read_config(model).get("architectures") or []]
    causal = [name for name in architectures if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if not causal:
        return None
    return InputError(
        f"{model.name} is a {causal[0]}, not a reward model: it has no trained score head; use a model with one "
        "label, such as weqweasdas/RM-Mistral-7B"
    )


class NoHead(InputError):
    """A checkpoint without the head of a reward model."""


def require_reward_weights(
    model: Path,
    *,
    trust_remote_code: bool,
    auto: str = "AutoModelForSequenceClassification",
    shapes: Shapes | None = None,
    elsewhere: Collection[str] = (),
) -> bool:
    """Refuse a model whose own tensors are not those of a reward model with one output.

    Args:
        model: The model's folder.
        trust_remote_code: Whether to run Python code in it.
        auto: The class of transformers' that finds the model's.
        shapes: The weights, by the names that this class has for them; None takes those in the folder.
        elsewhere: Names of tensors that are not in the folder, and come from an adapter.

    Returns:
        Whether that could be judged.

    Raises:
        InputError: A tensor is missing (`NoHead` if it is the head's), misnamed or of another shape, or the head has
            more outputs.
    """
    import transformers

    shapes = weight_shapes(model) if shapes is None else shapes
    if shapes is None:
        return False
    found = _look(getattr(transformers, auto), reward_config, model, shapes, trust_remote_code)
    if found is not None and elsewhere:
        found = replace(
            found,
            missing=tuple(name for name in found.missing if name not in elsewhere),
            unlike=tuple(one for one in found.unlike if one[0] not in elsewhere),
        )
    _require_unwrapped(model.name, shapes, found.missing if found else None)
    if found is None:
        return False
    _require_head(model.name, found)
    _require_tensors(model.name, found, "score")
    heads = [name for name in found.unread if is_head(name)]
    if heads:
        raise InputError(f"{model.name} has {heads[0]}, which {found.architecture} would ignore")
    return True


def _require_head(label: str, found: Coverage) -> None:
    for name, theirs, ours in sorted(found.unlike, key=lambda one: -len(one[1])):  # a weight before its bias
        if is_head(name) and ours[0] == 1 and theirs[1:] == ours[1:]:
            require_one_row(label, name, theirs)
    missing = next(filter(is_head, found.missing), None)
    if missing is not None:
        other = next(filter(is_head, found.unread), None)
        unread = f"; {other} is not a head that {found.architecture} reads" if other else ""
        raise NoHead(f"{label} has no trained score head ({missing} is not in its weights{unread})")


def require_one_row(label: str, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a head with several outputs.

    Raises:
        InputError: Its weight has not one row.
    """
    if shape[0] != 1:
        raise InputError(f"{label} has {shape[0]} labels; a reward model has one ({name} is {list(shape)})")


def missing_parameters(model: Any, info: Mapping[str, Any]) -> list[str]:  # noqa: ANN401 - a transformers model
    """Parameters that were not in the weights from which a model was loaded, in its order.

    Buffers are left out, but for trained ones: they are computed or 0, never random, and older checkpoints lack some.

    Args:
        model: The model.
        info: What transformers says about its loading.
    """
    missing = set(info["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", ()))
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if getattr(model.config, "topk_method", TRAINED_BUFFER_METHOD) == TRAINED_BUFFER_METHOD:
        trained |= {name for name in missing if name.endswith(TRAINED_BUFFER)}
    return [name for name in model.state_dict() if name in missing & trained]


def require_trained(label: str, model: Any, info: Mapping[str, Any], verb: str = "answer") -> None:  # noqa: ANN401
    """Refuse a loaded model with parameters that were not in its weights, where headers could not tell.

    Raises:
        InputError: There is one.
    """
    untrained = missing_parameters(model, info)
    if untrained:
        raise InputError(
            f"{label} lacks {untrained[0]}: it would {verb} with random weights; download or save it again"
        )


def is_token(pad_id: object, config: Any) -> bool:  # noqa: ANN401 - a transformers config
    """Whether a padding id has a row in the model's embedding; some configs have -1, or one beyond the vocabulary."""
    return isinstance(pad_id, int) and 0 <= pad_id < getattr(config, "vocab_size", pad_id + 1)


def reward_config(model: Path, *, trust_remote_code: bool) -> Any:  # noqa: ANN401 - a transformers config
    """The config that a reward model is loaded with: one label, whatever its file says or does not say.

    A padding id beyond the vocabulary is none: the model's embedding could not be made with it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for table in (config, getattr(config, "text_config", None)):
        if table is None:
            continue
        table.num_labels = 1
        pad_id = getattr(table, "pad_token_id", None)
        if isinstance(pad_id, int) and pad_id >= 0 and not is_token(pad_id, table):
            table.pad_token_id = None
    return config


# --- what the loader says -----------------------------------------------------------------------------------------


class _Shape:
    """A tensor as transformers' loader takes one from a file, without values."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def is_floating_point(self) -> bool:
        """Whether it may be cast."""
        return True

    def __getitem__(self, index: Any) -> Tensor:  # noqa: ANN401 - as torch has it
        import torch

        return torch.empty(self._shape, device="meta")[index]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports about what is missing, and its progress bar."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _look(
    auto: Any,  # noqa: ANN401 - a class of transformers' that finds models
    read_config: Callable[..., Any],
    model: Path,
    shapes: Shapes,
    trust_remote_code: bool,
) -> Coverage | None:
    """What transformers' loader says; None where it cannot judge.

    A sweep asks for each of its jobs, so the last answers are kept, but where code beside the config has a say.
    """
    config = model / CONFIG_FILE
    if trust_remote_code or not config.is_file():
        return _loaders_answer(auto, read_config, model, shapes, trust_remote_code)
    return _kept_answer(auto, read_config, model, tuple(shapes.items()), config.read_bytes())


@lru_cache(maxsize=4)
def _kept_answer(
    auto: Any,  # noqa: ANN401 - as above
    read_config: Callable[..., Any],
    model: Path,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    _config: bytes,
) -> Coverage | None:
    return _loaders_answer(auto, read_config, model, dict(shapes), trust_remote_code=False)


def _loaders_answer(
    auto: Any,  # noqa: ANN401 - as above
    read_config: Callable[..., Any],
    model: Path,
    shapes: Shapes,
    trust_remote_code: bool,
) -> Coverage | None:
    with quiet():
        try:
            config = read_config(model, trust_remote_code=trust_remote_code)
            tables = (config, getattr(config, "text_config", None))
            if any(getattr(table, "quantization_config", None) for table in tables):
                return None
            empty = _empty_model(auto, config, trust_remote_code)
        except Exception:  # config and code are others', and the engine may know more than transformers
            return None
        found = _asked(empty, shapes)
    foreign = hasattr(config, "auto_map") and not trust_remote_code  # the names may be those of the code beside it
    return None if found is None or (foreign and 2 * len(found.missing) > len(shapes)) else found


def _empty_model(auto: Any, config: Any, trust_remote_code: bool) -> Any:  # noqa: ANN401 - as above
    """A model without memory, of the class that transformers takes, or that the config names."""
    import torch
    import transformers

    with torch.device("meta"):
        try:
            return auto.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError:
            return getattr(transformers, config.architectures[0])(config)


def _asked(empty: Any, shapes: Shapes) -> Coverage | None:  # noqa: ANN401 - a transformers model
    import torch

    try:
        model, info = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict={name: _Shape(shape) for name, shape in shapes.items()},
            dtype=torch.float32,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # as for the config
        lacking = _lacking(empty, shapes) if CONVERSION in str(error) else []
        return Coverage(type(empty).__name__, tuple(lacking), (), ()) if lacking else None
    missing = missing_parameters(model, info)
    unlike = sorted((name, tuple(theirs), tuple(ours)) for name, theirs, ours in info["mismatched_keys"])
    faulty = {*missing, *(name for name, _, _ in unlike)}
    lacking = _lacking(model, shapes) if faulty - shapes.keys() else []
    if lacking and not faulty.intersection(lacking):
        missing = lacking  # parts of what the model has fused
    return Coverage(type(empty).__name__, tuple(missing), tuple(unlike), tuple(sorted(info["unexpected_keys"])))


def _lacking(model: Any, shapes: Shapes) -> list[str]:  # noqa: ANN401 - a transformers model
    """The names that `save_pretrained` would write and the checkpoint lacks."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import revert_weight_conversion

        if not getattr(model, "_weight_conversions", None):
            model._weight_conversions = get_model_conversion_mapping(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
        return [name for name in revert_weight_conversion(model, state) if name not in shapes]
    except Exception:  # not a public interface of transformers; it only finds better words
        return []


# --- what is refused ----------------------------------------------------------------------------------------------


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of a head that gives a reward."""
    return name.split(".")[0] in HEADS


def _require_tensors(label: str, found: Coverage, verb: str) -> None:
    if found.missing:
        more = f" (and {len(found.missing) - 1} more)" if len(found.missing) > 1 else ""
        raise InputError(
            f"{label} lacks {found.missing[0]}{more}, which {found.architecture} reads: it would {verb} with random "
            "weights; download or save it again"
        )
    if found.unlike:
        name, theirs, ours = found.unlike[0]
        raise InputError(
            f"{label} does not fit its config.json: {name} is {list(theirs)}, and {found.architecture} has "
            f"{list(ours)} there"
        )


def _require_unwrapped(label: str, shapes: Shapes, missing: Collection[str] | None) -> None:
    prefix = _wrapping(shapes, missing)
    if prefix:
        raise InputError(
            f"{label} names its tensors with {prefix!r}, such as {next(name for name in shapes if prefix in name)}: "
            f"they would be replaced by random weights; {SAVE_AGAIN}"
        )


def _wrapping(names: Collection[str], missing: Collection[str] | None) -> str | None:
    """What a wrapper added to the names of all that is missing, or of all tensors where that is not known."""
    if missing is None:
        return next((word for word in (PEFT_PREFIX, *_dotted()) if all(name.startswith(word) for name in names)), None)
    first = next(iter(missing), None)
    if first is None:
        return None
    prefix = next((name.removesuffix(first) for name in names if name.endswith(f".{first}")), None)
    if prefix and all(prefix + name in names for name in missing):
        return prefix
    bare = {_bare(name) for name in names}
    wrapped = [word for word in (PEFT_PREFIX, *_dotted()) if any(f".{word}" in f".{name}" for name in names)]
    return wrapped[0] if wrapped and bare.issuperset(missing) else None


def _dotted() -> list[str]:
    return [f"{word}." for word in sorted(PARTS)]


def _bare(name: str) -> str:
    return ".".join(part for part in name.removeprefix(PEFT_PREFIX).split(".") if part not in PARTS)
