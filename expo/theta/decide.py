"""Decide from headers alone what happens to every tensor of a pair: `plan_pair`; `overlap` only compares the pair.

Tensors match by name. A DPO model that is an adapter over SFT has `decide_adapter.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expo.checkpoint.dtypes import DTYPES, EXACT_DTYPES, FLOAT_DTYPES, FROM_TORCH
from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.checkpoint.tied import TIED_HEADS, config_tables, ties_head
from expo.errors import InputError, listed
from expo.theta.plan import (
    Action,
    Match,
    Overlap,
    PairPlan,
    PairSettings,
    Segment,
    TensorPlan,
    Vocabulary,
    lay_out,
)

QUANTIZED = frozenset(
    (
        *("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv"),
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB"),
    )
)
"""Suffixes of the tensors that GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes store beside the weights;
older checkpoints have them without an entry in config.json."""


@dataclass(frozen=True)
class _Pair:
    """A tensor of DPO with its partner in SFT, cut to the rows both have."""

    dpo: TensorInfo
    sft: TensorInfo | None
    rows: int | None
    """Rows of DPO that have a partner where the vocabularies differ; None for all."""


def plan_pair(sft: Checkpoint, dpo: Checkpoint, settings: PairSettings) -> PairPlan:
    """Decide what happens to every tensor of DPO.

    Args:
        sft: The SFT checkpoint θ_sft.
        dpo: The DPO checkpoint θ_dpo, whose layout the outputs have.
        settings: How to combine them.

    Returns:
        The plan, for all α together.

    Raises:
        InputError: The checkpoints do not match; the message lists every kind of mismatch.
    """
    refuse_quantized(sft, dpo)
    matches = match_patterns(dpo, settings)
    excluded = {name for match in matches if match.flag == "--exclude" for name in match.names}
    tied = {head: side for head, side in _tied_heads(sft, dpo).items() if head not in excluded}
    vocabulary = _vocabulary(sft, dpo)
    pairs = {
        name: _Pair(info, None, None) if name in excluded else _partner(info, sft, tied, vocabulary, settings)
        for name, info in dpo.tensors.items()
    }
    dropped = [name for name in sft.tensors if name not in dpo.tensors and name not in tied]
    problems = _mismatches(pairs.values(), excluded, dropped, vocabulary, settings)
    problems += listed("heads on one side only that differ in size from their tied embedding", _unlike(tied))
    if problems:
        raise InputError(f"{sft.path.name} and {dpo.path.name} do not fit together: {'; '.join(problems)}")
    own = {name: match.alpha for match in matches for name in match.names}
    tensors = {name: _plan_tensor(pair, own.get(name), settings) for name, pair in pairs.items()}
    shards = lay_out(dpo, tensors, settings)
    equal = tuple(_equal(side, head) for head, side in tied.items())
    cut = vocabulary if any(pair.rows is not None for pair in pairs.values()) else None
    return PairPlan(sft, dpo, settings, shards, equal, tuple(sorted(dropped)), matches, cut)


def overlap(sft: Checkpoint, dpo: Checkpoint) -> Overlap:
    """List what can be compared in a pair and what cannot; tied heads and vocabularies as in `plan_pair`.

    Raises:
        InputError: A checkpoint is quantized.
    """
    refuse_quantized(sft, dpo)
    settings = PairSettings(alphas=(), common_vocabulary=True)
    tied, vocabulary = _tied_heads(sft, dpo), _vocabulary(sft, dpo)
    kinds: dict[str, list[_Pair]] = {"missing": [], "shape": [], "dtype": [], "alike": []}
    for info in dpo.tensors.values():
        pair = _partner(info, sft, tied, vocabulary, settings)
        kinds[_likeness(pair)].append(pair)
    segments = [_plan_tensor(pair, None, settings).segments[0] for pair in kinds["alike"]]
    return Overlap(
        segments=tuple(segment for segment in segments if not segment.is_raw),
        exact=tuple(segment for segment in segments if segment.is_raw),
        heads=tuple(_equal(side, head) for head, side in tied.items()),
        only_sft=tuple(name for name in sft.tensors if name not in dpo.tensors and name not in tied),
        only_dpo=tuple(pair.dpo.name for pair in kinds["missing"]),
        shapes=tuple((pair.sft, pair.dpo) for pair in kinds["shape"] if pair.sft),
        dtypes=tuple((pair.sft, pair.dpo) for pair in kinds["dtype"] if pair.sft),
        vocabulary=vocabulary if any(pair.rows is not None for pair in kinds["alike"]) else None,
        sources=(sft, dpo),
    )


def _likeness(pair: _Pair) -> str:
    if pair.sft is None:
        return "missing"
    if pair.rows is None and pair.sft.shape != pair.dpo.shape:
        return "shape"
    return "alike" if _fit(pair.sft, pair.dpo) else "dtype"


def refuse_quantized(*checkpoints: Checkpoint) -> None:
    """Refuse quantized checkpoints.

    Raises:
        InputError: One of them is quantized; the message names it and the method.
    """
    for checkpoint in checkpoints:
        method = _quantization(checkpoint)
        if method is not None:
            raise InputError(
                f"{checkpoint.path.name} is quantized ({method}); extrapolate the unquantized checkpoints and "
                "quantize the result (for dequantized weights, remove the quantization from config.json)"
            )


def _quantization(checkpoint: Checkpoint) -> str | None:
    """How a checkpoint is quantized, by its config or by a tensor that only quantized weights have."""
    for table in config_tables(checkpoint.config):
        for said in filter(None, map(table.get, ("quantization_config", "compression_config"))):
            return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else "unknown"
    return next((f"it contains {name}" for name in checkpoint.tensors if name.split(".")[-1] in QUANTIZED), None)


# --- patterns -----------------------------------------------------------------------------------------------------


def match_patterns(dpo: Checkpoint, settings: PairSettings) -> tuple[Match, ...]:
    """The tensors each pattern applies to: --exclude before --alpha-for, and the first match of a tensor wins.

    Raises:
        InputError: A pattern applies to no tensor.
    """
    patterns = [("--exclude", pattern, 0.0) for pattern in settings.exclude]
    patterns += [("--alpha-for", pattern, alpha) for pattern, alpha in settings.alpha_for]
    free = dict.fromkeys(dpo.tensors)
    matches = []
    for flag, pattern, alpha in patterns:
        search = re.compile(pattern).search
        names = tuple(name for name in free if search(name))
        if not names:
            taken = any(map(search, dpo.tensors))
            left = " that earlier patterns left" if taken else ""
            raise InputError(f"{flag} '{pattern}' matches no tensor{left}")
        for name in names:
            del free[name]
        matches.append(Match(flag, pattern, alpha, names))
    return tuple(matches)


# --- partners -----------------------------------------------------------------------------------------------------


def _tied_heads(sft: Checkpoint, dpo: Checkpoint) -> dict[str, Checkpoint]:
    """Heads that only one side stores and the other ties to its embedding, with the side that stores them."""
    found = {}
    for head, embedding in TIED_HEADS:
        for stores, lacks in ((sft, dpo), (dpo, sft)):
            both = embedding in stores.tensors and embedding in lacks.tensors
            if both and head in stores.tensors and head not in lacks.tensors and ties_head(lacks.config) is not False:
                found[head] = stores
    return found


def _embedding_of(head: str, checkpoint: Checkpoint) -> TensorInfo:
    return next(checkpoint.tensors[name] for other, name in TIED_HEADS if other == head and name in checkpoint.tensors)


def _unlike(tied: dict[str, Checkpoint]) -> list[str]:
    heads = {head: (side.tensors[head], _embedding_of(head, side)) for head, side in tied.items()}
    return [head for head, (a, b) in heads.items() if (a.shape, a.dtype) != (b.shape, b.dtype)]


def _equal(side: Checkpoint, head: str) -> Segment:
    """The comparison of a stored head with its own embedding."""
    stored, embedding = side.tensors[head], _embedding_of(head, side)
    return Segment("match", stored, embedding, (), stored.dtype, 0, stored.nbytes)


def _vocabulary(sft: Checkpoint, dpo: Checkpoint) -> Vocabulary | None:
    """The vocabulary sizes where they differ."""
    found = ([table.get("vocab_size") for table in config_tables(side.config)] for side in (sft, dpo))
    sizes = [next((size for size in given if isinstance(size, int)), None) for given in found]
    return Vocabulary(*sizes) if None not in sizes and sizes[0] != sizes[1] else None  # type: ignore[arg-type]


def _partner(
    info: TensorInfo,
    sft: Checkpoint,
    tied: dict[str, Checkpoint],
    vocabulary: Vocabulary | None,
    settings: PairSettings,
) -> _Pair:
    partner = _embedding_of(info.name, sft) if info.name in tied else sft.tensors.get(info.name)
    if partner is None or not settings.common_vocabulary or not _differs_by_vocabulary(partner, info, vocabulary):
        return _Pair(info, partner, None)
    rows = min(partner.shape[0], info.shape[0])
    return _Pair(info, partner.rows(0, rows), rows)


def _differs_by_vocabulary(sft: TensorInfo, dpo: TensorInfo, vocabulary: Vocabulary | None) -> bool:
    return (
        vocabulary is not None
        and sft.shape[1:] == dpo.shape[1:]
        and (sft.shape[:1], dpo.shape[:1]) == ((vocabulary.sft,), (vocabulary.dpo,))
    )


def _mismatches(
    pairs: Iterable[_Pair],
    excluded: set[str],
    dropped: list[str],
    vocabulary: Vocabulary | None,
    settings: PairSettings,
) -> list[str]:
    pairs = [pair for pair in pairs if pair.dpo.name not in excluded]
    shared = [(pair.sft, pair.dpo, pair.rows) for pair in pairs if pair.sft is not None]
    unlike = [(s, d) for s, d, rows in shared if s.shape != d.shape and rows is None]
    by_vocabulary = [pair for pair in unlike if _differs_by_vocabulary(*pair, vocabulary)]
    problems = []
    if not settings.copy_missing:
        hint = "pass --missing copy-dpo to copy them from DPO"
        problems += listed(f"tensors missing in SFT ({hint})", [pair.dpo.name for pair in pairs if pair.sft is None])
        problems += listed("tensors missing in DPO", [name for name in dropped if name not in excluded])
    hint = "the vocabularies differ in size: pass --vocab common to extrapolate the rows both have"
    problems += listed(hint, map(_shapes, by_vocabulary))
    problems += listed("shapes differ", map(_shapes, [pair for pair in unlike if pair not in by_vocabulary]))
    hint = "--exclude copies tensors from DPO"
    problems += listed(
        f"dtypes that cannot be combined ({hint})",
        [f"{d.name} {s.dtype}, {d.dtype}" for s, d, _ in shared if not _fit(s, d)],
    )
    return problems


def _shapes(pair: tuple[TensorInfo, TensorInfo]) -> str:
    sft, dpo = pair
    return f"{dpo.name} {list(sft.shape)} ≠ {list(dpo.shape)}"


def _fit(sft: TensorInfo, dpo: TensorInfo) -> bool:
    both_float = sft.dtype in FLOAT_DTYPES and dpo.dtype in FLOAT_DTYPES
    return both_float or (sft.dtype == dpo.dtype and dpo.dtype in EXACT_DTYPES)


# --- segments --------------------------------------------------------------------------------------------------------


def output_dtype(info: TensorInfo, settings: PairSettings) -> str:
    """The type a tensor of DPO is written in, as safetensors spells it."""
    return FROM_TORCH[settings.dtype] if settings.dtype != "auto" and info.dtype in FLOAT_DTYPES else info.dtype


def _plan_tensor(pair: _Pair, own_alpha: float | None, settings: PairSettings) -> TensorPlan:
    info = pair.dpo
    dtype = output_dtype(info, settings)
    alphas = settings.alphas if own_alpha is None else (own_alpha,) * len(settings.alphas)
    rows: Sequence[tuple[TensorInfo, TensorInfo | None]] = [(info, pair.sft)]
    if pair.rows is not None:
        rows = [(info.rows(0, pair.rows), pair.sft), (info.rows(pair.rows, info.shape[0]), None)]
    segments: list[Segment] = []
    offset = 0
    for dpo, sft in rows:
        nbytes = dpo.numel * DTYPES[dtype].bits // 8
        if nbytes or not segments:
            segments.append(Segment(action_for(dpo, sft, dtype), dpo, sft, alphas, dtype, offset, nbytes))
        offset += nbytes
    return TensorPlan(info.name, dtype, info.shape, offset, tuple(segments))


def action_for(dpo: TensorInfo, sft: TensorInfo | None, dtype: str) -> Action:
    """What happens to a tensor with this partner (None if SFT is not read), written in this type."""
    if sft is None:
        return "copy" if dtype == dpo.dtype else "convert"
    return "match" if dpo.dtype in EXACT_DTYPES else "extrapolate"
