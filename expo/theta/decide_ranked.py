"""Decide which modules of SFT a LoRA adapter of a given rank changes, for a pair of whole checkpoints: `plan_ranked`.

Linear layers get factors; whatever else differs (norms, biases, embeddings, heads, experts, convolutions) stays as SFT
has it, and counts as error. A module is one of SFT, whose Δ is put together where DPO's weights are fused or split.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace

from expo.checkpoint.dtypes import DTYPES, FLOAT_DTYPES, FROM_TORCH
from expo.checkpoint.folder import TensorInfo
from expo.checkpoint.tied import TIED_HEADS, has_row_per_token
from expo.errors import InputError
from expo.theta.adapter.settings import Settings
from expo.theta.adapter.tensors import ADAPTER_WEIGHTS, CONV1D, CONV1D_MODELS, PREFIX
from expo.theta.decide import plan_pair
from expo.theta.partners import BASE_PREFIXES
from expo.theta.plan import AdapterPlan, Match, PairPlan, Segment, ShardPlan, TensorPlan, file_of

WEIGHT = ".weight"
NO_LINEAR = re.compile(r"embed|emb$|^(wte|wpe|shared|gate|router|shared_expert_gate|score|classifier|head|conv\d*d?)$")
"""Names of modules whose two-dimensional weights are not those of a linear layer that PEFT and vLLM take: embeddings,
routers of experts, heads. (The head of a language model has a row per token, and is found by that.)"""
EXPERTS = ".experts."
"""In the names of experts' weights, which transformers keeps stacked in one tensor that is no linear layer."""
MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Model types of which PEFT refuses `out_proj`."""
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""How the names of classes end that keep all but the head under one of `BASE_PREFIXES`."""
BARE = frozenset({"h", "layers", "blocks"})
"""How names begin where that prefix is missing."""

Part = tuple[TensorInfo, TensorInfo]
"""A tensor of DPO, or consecutive elements of one, and SFT's partner."""


@dataclass(frozen=True)
class Module:
    """A linear layer of SFT and the factors that it gets."""

    name: str
    sft: TensorInfo
    """Its weight [out, in]; where `transposed`, [in, out]."""
    parts: tuple[Part, ...]
    """Which elements of it are whose; all of it."""
    rank: int
    alpha: float | None
    """Its own α; None where it is that of the output."""
    transposed: bool
    dtype: str
    """Of its factors, as safetensors spells it."""

    @property
    def factors(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """The tensors in the adapter's file, A and then B: name and shape."""
        rows, columns = reversed(self.sft.shape) if self.transposed else self.sft.shape
        prefix = f"{PREFIX}{self.name}"
        return (f"{prefix}.lora_A.weight", (self.rank, columns)), (f"{prefix}.lora_B.weight", (rows, self.rank))


@dataclass(frozen=True)
class RankedPlan(AdapterPlan):
    """The plan of the adapter's one file."""

    modules: tuple[Module, ...] = ()
    """In the order of their factors in the file."""
    rest: tuple[Part, ...] = ()
    """What differs and has no place in the adapter."""
    exact: tuple[Segment, ...] = ()
    """Integers, which must be equal on both sides."""
    rank: int = 0
    """The largest of the modules' ranks."""

    @property
    def copied(self) -> tuple[int, float]:
        """Nothing is DPO's own."""
        return 0, 0.0

    def tensor_counts(self) -> dict[str, int]:
        """How many of SFT's tensors the adapter changes, and how many it leaves."""
        changed = {module.sft.name for module in self.modules}
        return {"approximated": len(changed), "left as in SFT": len({sft.name for _, sft in self.rest} - changed)}

    def alphas_of(self, alpha: float) -> dict[str, float]:
        """The α of every module, where `alpha` is that of the output."""
        return {one.name: alpha if one.alpha is None else one.alpha for one in self.modules}

    @property
    def read_bytes(self) -> int:
        """Bytes of SFT's tensors that are compared with DPO's."""
        parts = (*self.rest, *(part for module in self.modules for part in module.parts))
        return sum(sft.nbytes for _, sft in parts)

    @property
    def lora_settings(self) -> Settings:
        """The adapter's settings at α = 0, where every scaling is 1."""
        smaller = {f"^{re.escape(one.name)}": one.rank for one in self.modules if one.rank != self.rank}
        return Settings(
            rank=self.rank,
            alpha=float(self.rank),
            rank_pattern=smaller,
            alpha_pattern={name: float(rank) for name, rank in smaller.items()},
            fan_in_fan_out=any(one.transposed for one in self.modules),
        )

    @property
    def target_modules(self) -> list[str]:
        """The modules' last names, or a whole name where a tensor that gets no factors has the same last name."""
        others = {_leaf(name) for name in self.sft.tensors.keys() - {one.sft.name for one in self.modules}}
        lasts = {one.name: _leaf(one.sft.name) for one in self.modules}
        return sorted({name if last in others else last for name, last in lasts.items()})


def plan_ranked(pair: PairPlan, rank: int, dtype: str = "auto") -> RankedPlan:
    """Decide which modules get factors of which size.

    Args:
        pair: The plan of the checkpoint θ(α).
        rank: The largest rank.
        dtype: Of the factors; auto is that of SFT's tensors.

    Raises:
        InputError: No tensor can have factors, or a pattern gives parts of a module different α.
    """
    _require_loaded_names(pair)
    both = _with_all_partners(pair)
    segments = [segment for shard in both.shards for segment, _ in shard.segments()]
    parts: dict[str, list[Segment]] = {}
    for segment in segments:
        if segment.sft is not None and not segment.is_raw:
            parts.setdefault(segment.sft.name, []).append(segment)
    own = {name: match.alpha for match in pair.matches for name in match.names}
    modules = tuple(_modules(pair, parts, own, rank, dtype))
    taken = {module.sft.name for module in modules}
    if not modules:
        raise InputError(f"{pair.sft.path.name} has no linear layer that a LoRA adapter could change")
    _require_used(pair.matches, {dpo.name for module in modules for dpo, _ in module.parts})
    plan = RankedPlan(
        **{one.name: getattr(pair, one.name) for one in fields(PairPlan)},
        modules=modules,
        rest=tuple(_part(one) for name, of in parts.items() if name not in taken for one in of),
        exact=tuple(segment for segment in segments if segment.action == "match"),
        rank=max(module.rank for module in modules),
    )
    return replace(plan, shards=(_file(modules),))


def _with_all_partners(pair: PairPlan) -> PairPlan:
    """The same plan where tensors of `--exclude` have their partners, too: θ_dpo − θ_sft is taken of all."""
    if not pair.settings.exclude:
        return pair
    return plan_pair(pair.sft, pair.dpo, replace(pair.settings, exclude=(), alpha_for=()))


def _modules(
    pair: PairPlan, parts: Mapping[str, list[Segment]], own: Mapping[str, float], rank: int, dtype: str
) -> Iterator[Module]:
    model_type = str(pair.sft.config.get("model_type"))
    for name, info in pair.sft.tensors.items():
        of = parts.get(name, [])
        if not (is_linear(info, model_type) and _covers(info, of)):
            continue
        alphas = {own.get(segment.dpo.name) for segment in of}
        if len(alphas) > 1:
            raise InputError(
                f"--alpha-for or --exclude gives {', '.join(segment.dpo.name for segment in of)} different α, and "
                f"they are one module in {pair.sft.path.name}: {name}"
            )
        yield Module(
            name=name.removesuffix(WEIGHT),
            sft=info,
            parts=tuple(map(_part, of)),
            rank=min(rank, *info.shape),
            alpha=alphas.pop(),
            transposed=model_type in CONV1D_MODELS and _leaf(name) in CONV1D,
            dtype=info.dtype if dtype == "auto" else FROM_TORCH[dtype],
        )


def is_linear(info: TensorInfo, model_type: str) -> bool:
    """Whether a tensor is the weight of a linear layer that PEFT and vLLM give factors, by its name and shape."""
    name, leaf = info.name, _leaf(info.name)
    if not name.endswith(WEIGHT) or len(info.shape) != 2 or 0 in info.shape or info.dtype not in FLOAT_DTYPES:
        return False
    if EXPERTS in name or NO_LINEAR.search(leaf) or has_row_per_token(name) or name in _HEADS:
        return False
    return not (model_type in MAMBA and leaf == "out_proj")


_HEADS = frozenset(head for head, _ in TIED_HEADS)


def _leaf(name: str) -> str:
    """The last name of the module of a tensor."""
    return name.removesuffix(WEIGHT).rpartition(".")[2]


def _covers(info: TensorInfo, segments: Collection[Segment]) -> bool:
    """Whether these are all elements of a tensor of SFT, each once."""
    sides = [segment.sft for segment in segments if segment.sft is not None]
    starts = {part.start for part in sides}
    return sum(part.numel for part in sides) == info.numel and len(starts) == len(sides)


def _part(segment: Segment) -> Part:
    assert segment.sft is not None
    return segment.dpo, segment.sft


def _require_used(matches: Collection[Match], changed: Collection[str]) -> None:
    for match in matches:
        if not set(match.names) & set(changed):
            raise InputError(
                f"{match.flag} '{match.pattern}' matches only tensors that get no LoRA factors ({match.names[0]} …), "
                "and stay as SFT has them"
            )


def _require_loaded_names(pair: PairPlan) -> None:
    """Refuse names without the prefix that a model's tensors have once it is loaded, which PEFT would not find."""
    classes = pair.sft.config.get("architectures")
    kind = str(classes[0]) if isinstance(classes, list) and classes else ""
    if kind.endswith(LANGUAGE_MODELS) and {name.partition(".")[0] for name in pair.sft.tensors} & BARE:
        raise InputError(
            f"the tensors of {pair.sft.path.name} lack the prefix that they have in a loaded {kind} "
            f"(one of {', '.join(sorted(BASE_PREFIXES))}): load it with transformers, and save it again"
        )


def _file(modules: Collection[Module]) -> ShardPlan:
    tensors = [
        TensorPlan(name, module.dtype, shape, shape[0] * shape[1] * DTYPES[module.dtype].bits // 8, ())
        for module in modules
        for name, shape in module.factors
    ]
    return file_of(ADAPTER_WEIGHTS, tensors, {"format": "pt"})
