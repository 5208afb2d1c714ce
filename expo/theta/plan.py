"""The plan for a pair of checkpoints: plain data, with all decisions made.

`decide.py` makes it from headers; `lay_out` assigns files; `stream.py` executes it. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from expo.checkpoint.folder import SINGLE_FILE, Checkpoint, Shard, TensorInfo
from expo.checkpoint.tied import has_row_per_token
from expo.config.course import step_of
from expo.theta.adapter.tensors import Adapter, LowRank
from expo.theta.rules import DEFAULT_RULE

Action = Literal["extrapolate", "merge", "copy", "convert", "match"]
"""Compute θ(α); add an adapter's ΔW and compute θ(α); take DPO's bytes; take DPO's values in another dtype; take DPO's
bytes, which must equal SFT's."""


@dataclass(frozen=True)
class Course:
    """The checkpoints of a training run that are combined."""

    rule: str
    """A key of `trajectory.fit.LINE_RULES`."""
    steps: tuple[float, ...]
    """Those of the checkpoints, ascending; θ_dpo is the last one, s, and θ_sft is the start, step 0."""

    def step_of(self, alpha: float) -> float:
        """The step T that α stands for: 1 + α = T/s, as in the pair of the start and the last step."""
        return step_of(alpha, self.steps[-1])


@dataclass(frozen=True)
class PairSettings:
    """How a pair is combined."""

    alphas: tuple[float, ...]
    """One per output."""
    rule: str = DEFAULT_RULE
    """A key of `rules.RULES`."""
    alpha_for: tuple[tuple[str, float], ...] = ()
    """Regular expressions (searched in tensor names) with their own α in every output; the first match wins."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors copied from DPO, whatever `alpha_for` says."""
    copy_missing: bool = False
    """Copy tensors that SFT lacks instead of refusing."""
    common_vocabulary: bool = False
    """If the vocabularies differ in size, extrapolate the shared rows and copy DPO's additional rows."""
    dtype: str = "auto"
    """auto, or the name of the type that floating-point tensors are written in."""
    max_shard_bytes: int | None = None
    """Maximum bytes of one output file; None preserves the DPO shard layout."""
    allow_nonfinite: bool = False
    course: Course | None = None
    """Where the pair is the start and the last step of a training run with more than one checkpoint."""


@dataclass(frozen=True)
class Step:
    """A tensor, or consecutive rows of it, at a step of a training run."""

    tensor: TensorInfo
    low_rank: LowRank | None = None
    """What is added to it, if the step is an adapter."""


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a tensor, nearly always all of them, that are processed alike."""

    action: Action
    dpo: TensorInfo
    sft: TensorInfo | None
    """None where SFT is not read."""
    alphas: tuple[float, ...]
    """One per output."""
    dtype: str
    """Of the output, as safetensors spells it."""
    offset: int
    """First output byte, counted from the tensor's own first."""
    nbytes: int
    """Output bytes."""
    low_rank: LowRank | None = None
    """What is added to `dpo` to get θ_dpo, if it is merged."""
    earlier: tuple[Step, ...] = ()
    """The same at each step of the course but the last, which is `dpo`; none where it is no part of the course."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The same at every step of the course."""
        return (*self.earlier, Step(self.dpo, self.low_rank))

    @property
    def is_raw(self) -> bool:
        """Whether it is handled as bytes."""
        return self.action in ("copy", "match")

    @property
    def units(self) -> int:
        """Elements, or bytes if it is handled as bytes."""
        return self.nbytes if self.is_raw else self.dpo.numel


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    segments: tuple[Segment, ...]
    """In the order of their bytes."""
    start: int = 0
    """Offset of its first byte in its file."""

    @property
    def action(self) -> Action:
        """What happens to its first rows, and nearly always to all."""
        return self.segments[0].action


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    name: str
    header: bytes
    """Written first, as it is."""
    tensors: tuple[TensorPlan, ...]
    """In the order of their bytes."""
    nbytes: int

    def segments(self) -> Iterator[tuple[Segment, int]]:
        """Every segment with the offset of its first byte in the file."""
        return ((segment, tensor.start + segment.offset) for tensor in self.tensors for segment in tensor.segments)


@dataclass(frozen=True)
class Match:
    """The tensors that a pattern of the settings was applied to."""

    flag: str
    pattern: str
    alpha: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Vocabularies of different sizes: rows of the embedding and of the head."""

    sft: int
    dpo: int

    @property
    def common(self) -> int:
        """Rows that both have, which are extrapolated."""
        return min(self.sft, self.dpo)


@dataclass(frozen=True)
class PairPlan:
    """Everything that will happen, decided from headers."""

    sft: Checkpoint
    dpo: Checkpoint
    """The layout of the outputs; `Adapter.layout`, θ_sft itself but for the head, if θ_dpo is an adapter over it."""
    settings: PairSettings
    shards: tuple[ShardPlan, ...]
    equal: tuple[Segment, ...] = ()
    """Compared before anything is written: a head that one side omits must equal the other's embedding."""
    dropped: tuple[str, ...] = ()
    """Tensors that only SFT has, which the output, with DPO's layout, omits."""
    missing: tuple[str, ...] = ()
    """Tensors that only DPO has, which are copied."""
    untied: tuple[str, ...] = ()
    """Heads of DPO that are combined with SFT's embedding, to which SFT ties its own."""
    renamed: int = 0
    """How many tensors have another name in SFT, or are parts of a tensor there, or the reverse."""
    matches: tuple[Match, ...] = ()
    vocabulary: Vocabulary | None = None
    adapter: Adapter | None = None
    earlier: tuple[Checkpoint | Adapter, ...] = ()
    """The checkpoints of the course but the last."""

    def at(self, alpha: float) -> PairPlan:
        """The plan of one output at another α, of a pair of which no tensor has an α of its own."""
        return replace(
            self,
            settings=replace(self.settings, alphas=(alpha,)),
            shards=tuple(
                replace(shard, tensors=tuple(_at(tensor, alpha) for tensor in shard.tensors)) for shard in self.shards
            ),
        )

    @property
    def sources(self) -> tuple[Checkpoint | Adapter, ...]:
        """The checkpoints whose files are read."""
        return (self.sft, self.dpo if self.adapter is None else self.adapter, *self.earlier)

    @property
    def nbytes(self) -> int:
        """Bytes of one output's weights."""
        return sum(shard.nbytes for shard in self.shards)

    def sft_bytes(self, shards: Iterable[ShardPlan], *, with_equal: bool) -> int:
        """How many bytes of SFT's tensors are read.

        Args:
            shards: Those of the output's files that are made.
            with_equal: Whether the tensors that must be equal, and are in no file, are read, too.
        """
        made = [segment for shard in shards for segment, _ in shard.segments()]
        equal = self.equal if with_equal else ()
        return sum(segment.sft.nbytes for segment in (*equal, *made) if segment.sft is not None)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → shard name."""
        return {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}

    @property
    def is_single_file(self) -> bool:
        """Whether the output is one model.safetensors without an index."""
        kept = self.settings.max_shard_bytes is None and self.dpo.sharded
        return [shard.name for shard in self.shards] == [SINGLE_FILE] and not kept

    @property
    def changes_config(self) -> bool:
        """Whether the outputs' config is not that of their side files.

        An adapter may change the base's, and one that says how the weights are quantized is no longer true.
        """
        return self.dpo.dequantized is not None or (self.adapter is not None and self.dpo.config != self.sft.config)

    @property
    def dequantized(self) -> dict[str, str]:
        """The quantized models, by what they are in the pair, with how they are stored."""
        steps = [] if self.settings.course is None else [f"step {step:g}" for step in self.settings.course.steps]
        return dequantized_among(zip(("sft", "dpo", *steps), self.sources, strict=False))

    @property
    def has_change(self) -> bool:
        """Whether α, and so the change from SFT to DPO, matters to any tensor."""
        segments = (segment for shard in self.shards for segment, _ in shard.segments())
        return any(segment.sft is not None and not segment.is_raw for segment in segments)

    @property
    def extrapolates_tokens(self) -> bool:
        """Whether a tensor with a row per token is extrapolated; if no name says which one that is, whether any is."""
        named = [has_row_per_token(name) for name in self.dpo.tensors]
        made = [tensor.name for shard in self.shards for tensor in shard.tensors if not _is_copied(tensor)]
        return any(map(has_row_per_token, made)) if any(named) else bool(made)

    @property
    def copied(self) -> tuple[int, float]:
        """How many tensors are copied from DPO, and their share of the bytes."""
        tensors = [tensor for shard in self.shards for tensor in shard.tensors]
        copied = [tensor.nbytes for tensor in tensors if _is_copied(tensor)]
        return len(copied), sum(copied) / max(self.tensor_bytes, 1)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one output's tensors, without headers."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)

    def count(self, *actions: Action) -> int:
        """How many tensors have one of these actions."""
        return sum(tensor.action in actions for shard in self.shards for tensor in shard.tensors)

    def tensor_counts(self) -> dict[str, int]:
        """How many tensors are produced in which way."""
        merged = {} if self.adapter is None else {"merged": self.count("merge")}
        made = {"extrapolated": self.count("extrapolate"), "copied": self.count("copy", "convert")}
        return {**merged, **made, "equal": self.count("match")}


def dequantized_among(sides: Iterable[tuple[str, Checkpoint | Adapter]]) -> dict[str, str]:
    """How those of these sides are stored that are dequantized."""
    found = ((name, one.dequantized) for name, one in sides if isinstance(one, Checkpoint))
    return {name: stored for name, stored in found if stored is not None}


@dataclass(frozen=True)
class AdapterPlan(PairPlan):
    """The plan of a LoRA adapter's one file, in place of a checkpoint's."""

    @property
    def is_single_file(self) -> bool:
        """An adapter has no index."""
        return True

    @property
    def changes_config(self) -> bool:
        """An adapter has no config of a model."""
        return False


def _at(tensor: TensorPlan, alpha: float) -> TensorPlan:
    return replace(tensor, segments=tuple(replace(segment, alphas=(alpha,)) for segment in tensor.segments))


def _is_copied(tensor: TensorPlan) -> bool:
    return all(segment.sft is None for segment in tensor.segments)


@dataclass(frozen=True)
class Overlap:
    """What two checkpoints have in common, tensor by tensor, and what they do not."""

    segments: tuple[Segment, ...]
    """Floating-point tensors of both, in DPO's order."""
    exact: tuple[Segment, ...]
    """Integer and boolean tensors of both."""
    heads: tuple[Segment, ...]
    """A head that one side omits, with its embedding on the side that stores it; they should be equal."""
    only_sft: tuple[str, ...]
    only_dpo: tuple[str, ...]
    shapes: tuple[tuple[TensorInfo, TensorInfo], ...]
    """Tensors of SFT and of DPO that differ in shape."""
    dtypes: tuple[tuple[TensorInfo, TensorInfo], ...]
    """Tensors of SFT and of DPO, of one shape, whose types cannot be combined."""
    vocabulary: Vocabulary | None
    """Set if the vocabularies differ in size; then the segments have only the shared rows."""
    sources: tuple[Checkpoint | Adapter, ...] = ()
    """The checkpoints that the segments are read from."""
    renamed: int = 0
    """As in `PairPlan`."""

    @property
    def dequantized(self) -> dict[str, str]:
        """As in `PairPlan`."""
        return dequantized_among(zip(("sft", "dpo"), self.sources, strict=False))


# --- the output's files -----------------------------------------------------------------------------------------------


def lay_out(dpo: Checkpoint, tensors: dict[str, TensorPlan], settings: PairSettings) -> tuple[ShardPlan, ...]:
    """The output's files, in DPO's order of tensors."""
    if settings.max_shard_bytes is None:
        return keep_layout(dpo.shards, tensors)
    return reshard(dpo.shards, tensors, settings.max_shard_bytes)


def keep_layout(shards: Iterable[Shard], tensors: dict[str, TensorPlan]) -> tuple[ShardPlan, ...]:
    """The DPO shard layout; headers are DPO's, byte for byte, unless missing or a dtype changes."""
    plans = []
    for shard in shards:
        planned = [tensors[info.name] for info in shard.tensors]
        changed = not shard.header or [tensor.dtype for tensor in planned] != [info.dtype for info in shard.tensors]
        header = make_header(planned, shard.metadata) if changed else shard.header
        plans.append(_shard(shard.output_name or shard.file.name, header, planned))
    return tuple(plans)


def file_of(name: str, tensors: Sequence[TensorPlan], metadata: dict[str, str]) -> ShardPlan:
    """One file of consecutive tensors."""
    return _shard(name, make_header(tensors, metadata), tensors)


def reshard(shards: Sequence[Shard], tensors: dict[str, TensorPlan], max_bytes: int) -> tuple[ShardPlan, ...]:
    """DPO's tensors in their order, in files of at most `max_bytes` (one tensor may be larger)."""
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in (tensors[info.name] for shard in shards for info in shard.tensors):
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    metadata = {name: text for shard in shards for name, text in shard.metadata.items()}
    return tuple(
        _shard(_shard_name(number, len(groups)), make_header(group, metadata), group)
        for number, group in enumerate(groups, start=1)
    )


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(name: str, header: bytes, tensors: Sequence[TensorPlan]) -> ShardPlan:
    placed, start = [], len(header)
    for tensor in tensors:
        placed.append(replace(tensor, start=start))
        start += tensor.nbytes
    return ShardPlan(name, header, tuple(placed), start)


def make_header(tensors: Iterable[TensorPlan], metadata: dict[str, str]) -> bytes:
    """A safetensors header, padded to eight bytes, for consecutive tensors."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_json(plan: PairPlan) -> str:
    """The text of model.safetensors.index.json."""
    content = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(plan.weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"
