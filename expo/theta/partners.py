"""Which tensor of SFT belongs to each of DPO's: `unwrapped` names, then `find_partners`.

Tensors match by name. Where names differ, three differences are known exactly: a wrapper that training put around the
model or a part of it, the prefix under which a checkpoint stores its language model, and fused against split weights.
Whatever else has no partner is left to the caller, and `name_difference` describes it.
To support another fused layout, add a line to `FUSED`.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.checkpoint.names import PARALLEL, PEFT_PREFIX, UNMERGED, spelling, without_parts
from expo.errors import InputError

MAYBE_WRAPPERS = (PEFT_PREFIX, PARALLEL)
"""Around all tensors they are no model's; elsewhere they are removed where the other side has the name without."""
BASE_PREFIXES = frozenset({"model.", "transformer.", "backbone.", "gpt_neox."})
"""Where a causal model keeps everything but its head: never a wrapper."""

ALIASES = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
)
"""Mixtral's names of what other models with experts call otherwise, as its stacked weights do."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Module → those whose rows it has, one after the other."""
STACKED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""Module with the weights of all experts along a first axis → those of one expert whose rows it has."""
OTHER_LAYOUTS = frozenset({"codegen", "dbrx", "gpt_oss", "llama4", "llama4_text"})
"""Model types whose fused weights are interleaved or transposed."""

log = logging.getLogger(__name__)

Parts = tuple[tuple[TensorInfo, TensorInfo | None], ...]
"""Consecutive elements of one tensor of DPO, nearly always all of them, each with SFT's."""


@dataclass(frozen=True)
class Partners:
    """What two checkpoints have in common."""

    parts: dict[str, Parts]
    """DPO's name → its parts, in DPO's order; a tensor without a partner has none."""
    left: dict[str, TensorInfo]
    """SFT's tensors that are no partner."""
    renamed: int = 0
    """How many partners have another name."""

    def whole(self, name: str) -> TensorInfo | None:
        """SFT's tensor for one of DPO's; None if there is none, or only parts of it."""
        parts = self.parts.get(name, ())
        return parts[0][1] if len(parts) == 1 else None


# --- names around the whole model ---------------------------------------------------------------------------------


def unwrapped(checkpoint: Checkpoint, other: Checkpoint | None = None) -> Checkpoint:
    """A checkpoint with the names that its model would have without the wrappers of training, which is logged.

    Args:
        checkpoint: As it was read.
        other: The other side of the pair.

    Raises:
        InputError: Two tensors have the same name without the wrappers, or it holds an adapter that is not merged.
    """
    theirs = other.tensors if other is not None else checkpoint.tensors
    if unmerged := [name for name in checkpoint.tensors if UNMERGED.search(name) and name not in theirs]:
        raise InputError(
            f"{checkpoint.path.name} contains an unmerged adapter ({unmerged[0]}): merge it first, with peft's "
            "merge_and_unload, and save the result"
        )
    names = dict(zip(checkpoint.tensors, _model_names(checkpoint, other), strict=True))
    changed = [name for name, short in names.items() if name != short]
    if not changed:
        return checkpoint
    if len(set(names.values())) < len(names):
        raise InputError(
            f"{checkpoint.path.name} has a tensor both with and without a wrapper's prefix, such as {changed[0]}"
        )
    log.warning(
        "%d of %d tensor names in %s contain a training wrapper's prefix: %s is read as %s",
        *(len(changed), len(names), checkpoint.path.name, changed[0], names[changed[0]]),
    )
    shards = tuple(
        replace(shard, header=b"", tensors=tuple(replace(info, name=names[info.name]) for info in shard.tensors))
        for shard in checkpoint.shards
    )
    return replace(checkpoint, shards=shards, tensors={info.name: info for shard in shards for info in shard.tensors})


def _model_names(checkpoint: Checkpoint, other: Checkpoint | None) -> list[str]:
    """The names without wrappers, in their order."""
    names = _without_prefixes([without_parts(name) for name in checkpoint.tensors])
    others = set(_without_prefixes([without_parts(name) for name in other.tensors])) if other is not None else set()
    for wrapper in MAYBE_WRAPPERS:
        within = re.compile(rf"(?:^|(?<=\.)){re.escape(wrapper)}")
        bare = [within.sub("", name) for name in names]
        names = [
            short if short in others and name not in others else name for name, short in zip(names, bare, strict=True)
        ]
    if other is None or checkpoint.config.get("architectures") != other.config.get("architectures"):
        return names
    foreign = _foreign_prefix(names, others)
    return [name.removeprefix(foreign) for name in names]


def _without_prefixes(names: list[str]) -> list[str]:
    around = (wrapper for wrapper in MAYBE_WRAPPERS if all(name.startswith(wrapper) for name in names))
    wrapper = next(around, None)
    return names if wrapper is None else _without_prefixes([name.removeprefix(wrapper) for name in names])


def _foreign_prefix(names: Sequence[str], others: set[str]) -> str:
    """A prefix of all names without which the other side, a model of the same class, has them all."""
    for prefix in accumulate(f"{part}." for part in names[0].split(".")[:3]):
        if prefix in BASE_PREFIXES or not all(name.startswith(prefix) for name in names):
            return ""
        if all(name.removeprefix(prefix) in others for name in names):
            return prefix
    return ""


# --- partners -----------------------------------------------------------------------------------------------------


def find_partners(sft: Checkpoint, dpo: Checkpoint) -> Partners:
    """Match the tensors of a pair by name; both are `unwrapped`."""
    parts: dict[str, Parts] = {
        name: ((info, sft.tensors[name]),) if name in sft.tensors else () for name, info in dpo.tensors.items()
    }
    ours = {name: info for name, info in sft.tensors.items() if name not in dpo.tensors}
    theirs = {name: info for name, info in dpo.tensors.items() if name not in sft.tensors}
    found = {**_renamed(ours, theirs)}
    if not OTHER_LAYOUTS & {str(side.config.get("model_type")) for side in (sft, dpo)}:
        left = {name: info for name, info in theirs.items() if name not in found}
        used = {info.name for own in found.values() for _, info in own if info}
        found |= _fused({name: info for name, info in ours.items() if name not in used}, left)
    used = {info.name for own in found.values() for _, info in own if info}
    return Partners(parts | found, {name: info for name, info in ours.items() if name not in used}, len(found))


def core(name: str) -> str:
    """A tensor's name in one spelling, for experts as well."""
    name = spelling(name)
    for pattern, usual in ALIASES:
        name = pattern.sub(usual, name)
    return name


def _by_core(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Core → tensor, where it is the only one."""
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        groups.setdefault(core(name), []).append(info)
    return {name: group[0] for name, group in groups.items() if len(group) == 1}


def _renamed(ours: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> dict[str, Parts]:
    known = _by_core(ours)
    return {info.name: ((info, known[name]),) for name, info in _by_core(theirs).items() if name in known}


def _fused(ours: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> dict[str, Parts]:
    """Fused weights of one side and the other's split ones."""
    sft, dpo = _by_core(ours), _by_core(theirs)
    found: dict[str, list[tuple[TensorInfo, TensorInfo]]] = {}
    for name, info in dpo.items():
        if pieces := _pieces(name, info, sft):
            found[info.name] = pieces
    for name, info in sft.items():
        for part, piece in _pieces(name, info, dpo) or ():
            found.setdefault(piece.name, []).append((piece, part))
    return {name: tuple(pieces) for name, pieces in found.items()}


def _pieces(
    name: str, fused: TensorInfo, split: Mapping[str, TensorInfo]
) -> list[tuple[TensorInfo, TensorInfo]] | None:
    """The consecutive parts of a fused tensor with the split tensors that they are; None if these are not all there."""
    for names, shape in _split_names(name, fused):
        tensors = [split[one] for one in names if one in split]
        rows = [info.shape[0] for info in tensors if info.shape[1:] == shape[1:] and info.shape]
        if (
            len(rows) < len(names)
            or fused.numel != sum(info.numel for info in tensors)
            or not _fills(rows, shape, names)
        ):
            continue
        starts = [0, *accumulate(info.numel for info in tensors)]
        return [(fused.part(start, info.shape), info) for start, info in zip(starts, tensors, strict=False)]
    return None


def _fills(rows: Sequence[int], shape: tuple[int, ...], names: Sequence[str]) -> bool:
    """Whether each run of split tensors has the rows of one (expert's) fused weight."""
    each = len(names) * shape[0] // sum(rows) if sum(rows) else 0
    return bool(each) and all(sum(rows[i : i + each]) == shape[0] for i in range(0, len(rows), each))


def _split_names(name: str, fused: TensorInfo) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """The split names that a fused one may stand for, with the shape of one run of these."""
    path, kind = re.fullmatch(r"(.*?)(\.weight|\.bias|)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    outer, _, module = path.rpartition(".")
    if module in FUSED and fused.shape:
        yield [f"{outer}.{part}{kind}" for part in FUSED[module]], fused.shape
    if module in STACKED and outer.endswith("experts") and len(fused.shape) == 3:
        experts = range(fused.shape[0])
        yield [f"{outer}.{expert}.{part}.weight" for expert in experts for part in STACKED[module]], fused.shape[1:]


# --- what has no partner ------------------------------------------------------------------------------------------


def name_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """How the names of tensors without a partner differ: counts of both sides, and two that are most alike.

    Args:
        ours: Names of SFT; at least one.
        theirs: Names of DPO; at least one.
    """
    near = difflib.get_close_matches(theirs[0], ours[:500], n=1, cutoff=0.0)[0]
    return (
        f"tensors under names that the other side does not have: {len(ours)} of SFT (such as {near}) and {len(theirs)} "
        f"of DPO (such as {theirs[0]}); rename those that are the same, or --exclude DPO's to copy them"
    )
