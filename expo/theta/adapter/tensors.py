"""Match an adapter's tensors to its base: what is added to which tensor, and which tensors are replaced.

A pair of factors A, B of a module adds ΔW = scaling·B·A to the base's `<module>.weight`. A tensor that the adapter
stores whole (`modules_to_save`, trained biases, embeddings that were saved with it) replaces the base's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.dtypes import FLOAT_DTYPES
from expo.checkpoint.folder import ADAPTER_CONFIG, INDEX_FILE, SINGLE_FILE, Checkpoint, Shard, TensorInfo, read_shard
from expo.checkpoint.tied import TIED_HEADS, ties_head
from expo.errors import InputError, listed
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

_Factors = dict[str, dict[str, TensorInfo]]
"""Module → its factors, under A and B, or embedding_A and embedding_B."""


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

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns] of ΔW."""
        axis = 1 if self.transposed else 0
        return self.left.shape[axis], self.right.shape[1 - axis]

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
    factors, saved = _sort(shard)
    _settle_tied(path, base, settings, factors, saved)
    low_rank = {f"{module}.weight": _low_rank(module, pair, settings, base) for module, pair in factors.items()}
    problems = _mismatches(base, settings, low_rank, saved)
    if problems:
        raise InputError(f"the adapter {path.name} does not fit {base.path.name}: {'; '.join(problems)}")
    return Adapter(path, settings, low_rank, saved, (shard,))


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


def _sort(shard: Shard) -> tuple[_Factors, dict[str, TensorInfo]]:
    """The adapter's factors by module, and its whole tensors by the base's names."""
    file = shard.file
    factors: _Factors = {}
    plain: dict[str, TensorInfo] = {}
    wrapped: dict[str, TensorInfo] = {}
    for tensor in shard.tensors:
        name = tensor.name.removeprefix(PREFIX)
        factor = _FACTOR.fullmatch(name)
        if name == tensor.name or (factor is None and (".lora_" in name or ".token_adapter." in name)):
            raise InputError(f"{file}: {tensor.name} is not a tensor of a plain LoRA; {MERGE_FIRST}")
        if factor is not None:
            _add_factor(file, factors, factor, tensor)
        elif ".original_module." not in name:  # the untrained copy, if embeddings were saved too
            target = _WRAPPER.sub("", name)
            (plain if target == name else wrapped)[target] = tensor
    _require_pairs(file, factors)
    if not shard.tensors:
        raise InputError(f"{file} contains no tensors; save the adapter again")
    return factors, {**wrapped, **plain}


def _add_factor(file: Path, factors: _Factors, match: re.Match[str], tensor: TensorInfo) -> None:
    side = match["linear"] or f"embedding_{match['embedding']}"
    pair = factors.setdefault(match["module"], {})
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


# --- the base's names ---------------------------------------------------------------------------------------------


def _settle_tied(
    path: Path, base: Checkpoint, settings: Settings, factors: _Factors, saved: dict[str, TensorInfo]
) -> None:
    """Drop a tied head's copy of its embedding's change; refuse a change to only one of two tied tensors.

    Once merged, such a change would affect the other too, which the adapter was not trained for.
    """
    for head, embedding in tied_heads(base):
        changed = [name for name in (head, embedding) if name in saved or name.removesuffix(".weight") in factors]
        if changed and (not settings.tied or (len(changed) == 1 and head in base.tensors)):
            raise InputError(
                f"the adapter {path.name} changes {changed[0]}, but {base.path.name} ties {head} to {embedding}: "
                "merged, the change would reach both; train it with ensure_weight_tying, or on an untied base"
            )
        if embedding in changed and head not in base.tensors:
            saved.pop(head, None)
            factors.pop(head.removesuffix(".weight"), None)


def tied_heads(base: Checkpoint) -> list[tuple[str, str]]:
    """A checkpoint's tied heads, each with its embedding; if the config does not say, the heads it does not store."""
    ties = ties_head(base.config)
    return [
        (head, embedding)
        for head, embedding in TIED_HEADS
        if embedding in base.tensors and (head not in base.tensors if ties is None else ties)
    ]


def _mismatches(
    base: Checkpoint, settings: Settings, low_rank: dict[str, LowRank], saved: dict[str, TensorInfo]
) -> list[str]:
    shapes = [(name, pair.shape) for name, pair in low_rank.items()]
    shapes += [(name, tensor.shape) for name, tensor in saved.items()]
    layout = "[in, out]" if settings.fan_in_fan_out else "[out, in]"
    problems = listed("tensors that the base lacks", sorted({*low_rank, *saved} - set(base.tensors)))
    problems += listed("ranks that differ from its config's", _other_ranks(settings, low_rank))
    problems += listed(
        f"shapes that differ from the base's (with weights stored as {layout}, by fan_in_fan_out)",
        [
            f"{name} {list(shape)} ≠ {list(base.tensors[name].shape)}"
            for name, shape in shapes
            if name in base.tensors and shape != base.tensors[name].shape
        ],
    )
    return problems + listed("dtypes that cannot be combined", _other_dtypes(base, low_rank, saved))


def _other_ranks(settings: Settings, low_rank: dict[str, LowRank]) -> list[str]:
    wanted = {name: settings.rank_of(name.removesuffix(".weight")) for name in low_rank}
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
