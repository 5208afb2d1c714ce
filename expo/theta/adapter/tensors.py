"""Match an adapter's tensors to its base: what is added to which tensor, and which tensors are replaced.

A pair of factors A, B of a module adds ΔW = scaling·B·A to the base's `<module>.weight`. A tensor that the adapter
stores whole (`modules_to_save`, trained biases, embeddings that were saved with it) replaces the base's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from expo.checkpoint.dtypes import FLOAT_DTYPES
from expo.checkpoint.folder import (
    ADAPTER_CONFIG,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    Shard,
    TensorInfo,
    read_json,
    read_shard,
)
from expo.checkpoint.names import without_wrappers
from expo.errors import InputError, listed
from expo.theta.adapter.embeddings import resized, resized_problem, settle_tied, with_rows
from expo.theta.adapter.names import base_names
from expo.theta.adapter.settings import MERGE_FIRST, Settings, read_settings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's prefix to the base model's own names."""

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
"""Includes the adapter's own name (`.default`), as in weights saved without PEFT's `save_pretrained`."""
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
"""Part of a whole tensor's name if its module was wrapped in training."""

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose `CONV1D` modules store weights as [in, out], and all others as [out, in]."""
CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")

log = logging.getLogger(__name__)

_Factors = dict[str, dict[str, TensorInfo]]
"""The name of a module's weight → its factors, under A and B, or embedding_A and embedding_B."""


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · L · R of one weight; L [rows, rank] and R [rank, columns], in the weight's own layout."""

    left: TensorInfo
    """L, or Lᵀ [rank, rows]."""
    right: TensorInfo
    """R, or Rᵀ [columns, rank]."""
    transposed: bool
    """Whether Lᵀ and Rᵀ are stored: B·A is [out, in] but the base stores [in, out], as for embeddings."""
    scale: float
    span: tuple[int, int] | None = None
    """The rows of L, from the first up to the last, that are used; None for all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns] of ΔW."""
        axis = 1 if self.transposed else 0
        first, last = self.span or (0, self.left.shape[axis])
        return last - first, self.right.shape[1 - axis]

    @property
    def first_row(self) -> int:
        """The first row of L that is used."""
        return self.span[0] if self.span else 0

    def rows(self, first: int, last: int) -> LowRank:
        """ΔW of the rows from `first` up to `last`."""
        return replace(self, span=(self.first_row + first, self.first_row + last))

    @property
    def ranks(self) -> tuple[int, int]:
        """The inner dimension of L and that of R, which must be the same."""
        axis = 1 if self.transposed else 0
        return self.left.shape[1 - axis], self.right.shape[axis]


@dataclass(frozen=True)
class Adapter:
    """An adapter matched to its base; a tensor in neither mapping stays the base's."""

    path: Path
    settings: Settings
    low_rank: dict[str, LowRank]
    """The base's tensor name → what is added to it, or to the tensor in `saved` if there is one too."""
    saved: dict[str, TensorInfo]
    """The base's tensor name → the tensor that replaces it."""
    shards: tuple[Shard, ...]
    """The adapter's one file."""
    layout: Checkpoint
    """The base as a merged checkpoint would be laid out: with a head of its own where merging unties it, a config that
    says so, and the size of the adapter's vocabulary."""
    resized: dict[str, tuple[int, int]]
    """Embedding and head, if the vocabularies differ in size: the base's rows and the adapter's."""
    modules: dict[str, str]
    """The adapter's name of a module that has factors → the base's tensor that they are added to."""
    whole: dict[str, str]
    """A tensor that is stored whole, as its file calls it → the base's tensor that it replaces; copies too."""

    def describe(self) -> dict[str, object]:
        """The adapter in figures."""
        return {
            "merged": len(self.low_rank),
            "replaced": len(self.saved),
            "ranks": sorted({pair.ranks[0] for pair in self.low_rank.values()}),
            "scalings": sorted({pair.scale for pair in self.low_rank.values()}),
        }


def read_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Read an adapter's config and header and match them to its base.

    Args:
        path: The adapter's folder.
        base: The checkpoint it was trained on, θ_sft.

    Raises:
        InputError: It is not a plain LoRA, or does not match the base; the message lists every kind of mismatch.
    """
    _require_safetensors(path)
    settings = read_settings(path / ADAPTER_CONFIG)
    shard = read_shard(path / ADAPTER_WEIGHTS)
    named = _sort(shard, settings)
    targets = base_names({**named.factors, **named.saved}, base)
    factors = {targets[name]: pair for name, pair in named.factors.items()}
    saved = {targets[name]: tensor for name, tensor in named.saved.items()}
    layout = settle_tied(path, base, settings, factors, saved, {targets[name] for name in named.trained})
    modules = {targets[name]: name.removesuffix(".weight") for name in named.factors}
    low_rank = {name: _low_rank(modules[name], pair, settings, base) for name, pair in factors.items()}
    rows = resized(layout, {name: tensor.shape for name, tensor in (low_rank | saved).items()})
    problems = listed(LACKING, sorted({*low_rank, *saved} - set(layout.tensors)))
    problems += listed("ranks that differ from its config's", _other_ranks(settings, low_rank, modules))
    problems += _mismatches(layout, settings, low_rank, saved, rows)
    if rows and (problem := resized_problem(layout, rows, saved)):
        problems.append(problem)
    if problems:
        raise InputError(_does_not_fit(path, base, problems))
    return Adapter(
        path,
        settings,
        low_rank,
        saved,
        (shard,),
        with_rows(layout, rows) if rows else layout,
        rows,
        modules={name.removesuffix(".weight"): targets[name] for name in named.factors},
        whole={stored: targets[name] for stored, name in named.whole.items()},
    )


def _does_not_fit(path: Path, base: Checkpoint, problems: list[str]) -> str:
    trained_on = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    model = f" ({trained_on})" if isinstance(trained_on, str) and trained_on else ""
    lacks = problems[0].startswith(LACKING)
    way = f"give the model it was trained on{model} as --sft" + (f", or {MERGE_FIRST}" if lacks else "")
    return f"the adapter {path.name} does not fit {base.path.name}: {'; '.join(problems)}; {way}"


def _require_safetensors(path: Path) -> None:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).exists():
            raise InputError(f"{path} contains both {name} and {ADAPTER_CONFIG}: remove the stale one")
    if (path / ADAPTER_WEIGHTS).is_file():
        return
    if (path / "adapter_model.bin").exists():
        raise InputError(f"{path} has only adapter_model.bin; load it with peft and save it again as safetensors")
    raise InputError(f"{path} contains {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")


# --- the adapter's names ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """An adapter's tensors by its own names, without PEFT's prefix and what wrappers add."""

    factors: _Factors
    saved: dict[str, TensorInfo]
    trained: frozenset[str]
    """Which of `saved` were trained whole."""
    whole: dict[str, str]
    """Every tensor that is stored whole, as its file calls it → its name in `saved`."""


def _sort(shard: Shard, settings: Settings) -> _Named:
    """The adapter's factors, and its whole tensors."""
    file = shard.file
    factors: _Factors = {}
    plain: dict[str, TensorInfo] = {}
    wrapped: dict[str, TensorInfo] = {}
    trained, renamed = set(), ""
    whole: dict[str, str] = {}
    for tensor in shard.tensors:
        name = own_name(file, tensor)
        renamed = renamed or (tensor.name if tensor.name != PREFIX + name else "")
        factor = _FACTOR.fullmatch(name)
        if factor is None and (".lora_" in name or ".token_adapter." in name):
            raise InputError(f"{file}: {tensor.name} is not a tensor of a plain LoRA; {MERGE_FIRST}")
        if factor is not None:
            _add_factor(file, factors, factor, tensor)
        elif ".original_module." not in name:  # the untrained copy, if embeddings were saved too
            target = _WRAPPER.sub("", name)
            _add_saved(file, plain if target == name else wrapped, target, tensor)
            whole[tensor.name] = target
            if settings.trains(target.rpartition(".")[0]) or ".modules_to_save." in name:
                trained.add(target)
    _require_pairs(file, factors)
    if not shard.tensors:
        raise InputError(f"{file} contains no tensors; save the adapter again")
    if renamed:
        log.warning("%s: names such as %s contain a training wrapper's prefix, which is dropped", file, renamed)
    return _Named(factors, {**wrapped, **plain}, frozenset(trained), whole)


def own_name(file: Path, tensor: TensorInfo) -> str:
    """A tensor's name without PEFT's prefix and what wrappers add.

    Raises:
        InputError: It lacks the prefix, without which PEFT ignores it.
    """
    name = without_wrappers(tensor.name)
    if not name.startswith(PREFIX):
        raise InputError(
            f"{file}: {tensor.name} is not a tensor of a plain LoRA as PEFT saves it, whose name begins with {PREFIX} "
            "(others are ignored when it is loaded): save the adapter again with peft's save_pretrained"
        )
    return without_wrappers(name.removeprefix(PREFIX))


def _add_saved(file: Path, found: dict[str, TensorInfo], name: str, tensor: TensorInfo) -> None:
    if name in found:
        raise InputError(f"{file} contains both {found[name].name} and {tensor.name}; save the adapter again")
    found[name] = tensor


def _add_factor(file: Path, factors: _Factors, match: re.Match[str], tensor: TensorInfo) -> None:
    side = match["linear"] or f"embedding_{match['embedding']}"
    pair = factors.setdefault(f"{match['module']}.weight", {})
    if side in pair:
        raise InputError(f"{file} contains more than one adapter: {pair[side].name} and {tensor.name}")
    if len(tensor.shape) != 2:
        raise InputError(
            f"{file}: {tensor.name} {list(tensor.shape)} is a convolution's weight, not a matrix; {MERGE_FIRST}"
        )
    pair[side] = tensor


def _require_pairs(file: Path, factors: _Factors) -> None:
    for pair in factors.values():
        if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            names = " and ".join(tensor.name for tensor in pair.values())
            raise InputError(f"{file} contains {names} without the other factor; save the adapter again")


def _low_rank(module: str, pair: dict[str, TensorInfo], settings: Settings, base: Checkpoint) -> LowRank:
    a, b = pair[min(pair)], pair[max(pair)]
    scale = settings.scale_of(module)
    if _is_in_out(module, settings, base) or "embedding_A" in pair:
        return LowRank(a, b, transposed=True, scale=scale)
    return LowRank(b, a, transposed=False, scale=scale)


def _is_in_out(module: str, settings: Settings, base: Checkpoint) -> bool:
    # PEFT's fan_in_fan_out is that of the last module it wrapped, which may be GPT-2's head.
    if base.config.get("model_type") in CONV1D_MODELS:
        return module.split(".")[-1] in CONV1D
    return settings.fan_in_fan_out


# --- what does not fit --------------------------------------------------------------------------------------------

LACKING = "tensors that the base lacks"


def _mismatches(
    base: Checkpoint,
    settings: Settings,
    low_rank: dict[str, LowRank],
    saved: dict[str, TensorInfo],
    rows: Mapping[str, tuple[int, int]],
) -> list[str]:
    factors = _unlike(base, {name: pair.shape for name, pair in low_rank.items()}, rows)
    layout = ""
    if any(shape[::-1] == base.tensors[name].shape for name, shape in factors.items()):
        layout = (
            f" (with weights stored as {'[in, out]' if settings.fan_in_fan_out else '[out, in]'}, by fan_in_fan_out)"
        )
    unlike = {**factors, **_unlike(base, {name: tensor.shape for name, tensor in saved.items()}, rows)}
    problems = listed(
        f"shapes that differ from the base's{layout}",
        [f"{name} {list(shape)} ≠ {list(base.tensors[name].shape)}" for name, shape in unlike.items()],
    )
    return problems + listed("dtypes that cannot be combined", _other_dtypes(base, low_rank, saved))


def _unlike(
    base: Checkpoint, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Shapes that are not the base's, nor those of another vocabulary."""
    wanted = {
        name: (rows[name][1], *info.shape[1:]) if name in rows else info.shape for name, info in base.tensors.items()
    }
    return {name: shape for name, shape in shapes.items() if name in wanted and shape != wanted[name]}


def _other_ranks(settings: Settings, low_rank: dict[str, LowRank], modules: dict[str, str]) -> list[str]:
    wanted = {name: settings.rank_of(modules[name]) for name in low_rank}
    return [
        f"{name} {'×'.join(map(str, pair.ranks))} ≠ {wanted[name]}"
        for name, pair in low_rank.items()
        if set(pair.ranks) != {wanted[name]}
    ]


def _other_dtypes(base: Checkpoint, low_rank: dict[str, LowRank], saved: dict[str, TensorInfo]) -> list[str]:
    sides = [(name, [pair.left.dtype, pair.right.dtype]) for name, pair in low_rank.items()]
    sides += [(name, [tensor.dtype]) for name, tensor in saved.items()]
    return [
        f"{name} {base.tensors[name].dtype}, {', '.join(dtypes)}"
        for name, dtypes in sides
        if name in base.tensors and not FLOAT_DTYPES.issuperset((base.tensors[name].dtype, *dtypes))
    ]
