"""Decide from headers alone what happens to every tensor of a pair: `plan_pair`; `overlap` only compares the pair.

`partners.py` matches the tensors. A DPO model that is an adapter over SFT has `decide_adapter.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from expo.checkpoint.dtypes import DTYPES, EXACT_DTYPES, FLOAT_DTYPES, FROM_TORCH
from expo.checkpoint.folder import Checkpoint, TensorInfo
from expo.checkpoint.quantized import dequantized
from expo.checkpoint.tied import TIED_HEADS, config_tables, has_row_per_token, ties_head
from expo.errors import InputError, listed
from expo.theta.partners import Parts, find_partners, name_difference, unwrapped
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

CONSTANTS = frozenset({"inv_freq", "original_inv_freq", "cos_cached", "sin_cached"})
"""Tables of rotary embeddings, which older checkpoints hold, in any dtype."""


@dataclass(frozen=True)
class _Pair:
    """A tensor of DPO with its partner in SFT."""

    dpo: TensorInfo
    parts: Parts
    """Consecutive elements of it, each with SFT's; SFT has none for a tensor without a partner, nor for rows of DPO
    beyond SFT's vocabulary."""

    @property
    def alone(self) -> bool:
        """Whether SFT has nothing for it."""
        return all(sft is None for _, sft in self.parts)

    @property
    def unlike(self) -> bool:
        """Whether the shapes differ."""
        return any(sft is not None and sft.shape != dpo.shape for dpo, sft in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the dtypes can be combined."""
        return all(sft is None or _fit(sft, self.dpo) for _, sft in self.parts)

    @property
    def cut(self) -> bool:
        """Whether only the rows that both vocabularies have are combined."""
        return self.parts[0][1] is not None and self.parts[-1][1] is None


@dataclass(frozen=True)
class _Matched:
    """A pair's tensors, matched."""

    sft: Checkpoint
    dpo: Checkpoint
    pairs: dict[str, _Pair]
    """By DPO's names, in their order."""
    missing: tuple[str, ...]
    """Tensors of DPO alone."""
    dropped: tuple[str, ...]
    """Tensors of SFT alone."""
    heads: dict[str, Checkpoint]
    """Heads that only one side stores, which must equal their embedding there, with that side."""
    untied: tuple[str, ...]
    """Heads of DPO alone that are combined with SFT's embedding, to which SFT ties its own."""
    vocabulary: Vocabulary | None
    renamed: int


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
    sft, dpo = dequantized(sft), dequantized(dpo)
    sft, dpo = unwrapped(sft, dpo), unwrapped(dpo, sft)
    matches = match_patterns(dpo, settings)
    excluded = {name for match in matches if match.flag == "--exclude" for name in match.names}
    both = _match(sft, dpo, excluded, common=settings.common_vocabulary)
    if problems := _mismatches(both, excluded, settings):
        raise InputError(f"{sft.path.name} and {dpo.path.name} do not fit together: {'; '.join(problems)}")
    own = {name: match.alpha for match in matches for name in match.names}
    tensors = {name: _plan_tensor(pair, own.get(name), settings) for name, pair in both.pairs.items()}
    return PairPlan(
        sft=sft,
        dpo=dpo,
        settings=settings,
        shards=lay_out(dpo, tensors, settings),
        equal=tuple(_equal(side, head) for head, side in both.heads.items()),
        dropped=both.dropped,
        missing=both.missing,
        untied=both.untied,
        renamed=both.renamed,
        matches=matches,
        vocabulary=both.vocabulary if any(pair.cut for pair in both.pairs.values()) else None,
    )


def overlap(sft: Checkpoint, dpo: Checkpoint) -> Overlap:
    """List what can be compared in a pair and what cannot; matched as in `plan_pair`.

    Raises:
        InputError: A checkpoint is quantized in a way that is not read.
    """
    sft, dpo = dequantized(sft), dequantized(dpo)
    sft, dpo = unwrapped(sft, dpo), unwrapped(dpo, sft)
    settings = PairSettings(alphas=())
    both = _match(sft, dpo, set(), common=True)
    kinds: dict[str, list[_Pair]] = {"missing": [], "shape": [], "dtype": [], "alike": []}
    for pair in both.pairs.values():
        if not is_constant(pair.dpo.name):
            kinds[_likeness(pair)].append(pair)
    segments = [segment for pair in kinds["alike"] for segment in _plan_tensor(pair, None, settings).segments]
    compared = [segment for segment in segments if segment.sft is not None]
    return Overlap(
        segments=tuple(segment for segment in compared if not segment.is_raw),
        exact=tuple(segment for segment in compared if segment.is_raw),
        heads=tuple(_equal(side, head) for head, side in both.heads.items()),
        only_sft=both.dropped,
        only_dpo=tuple(pair.dpo.name for pair in kinds["missing"]),
        shapes=tuple((pair.parts[0][1], pair.dpo) for pair in kinds["shape"] if pair.parts[0][1]),
        dtypes=tuple((pair.parts[0][1], pair.dpo) for pair in kinds["dtype"] if pair.parts[0][1]),
        vocabulary=both.vocabulary if any(pair.cut for pair in kinds["alike"]) else None,
        sources=(sft, dpo),
        renamed=both.renamed,
    )


def _likeness(pair: _Pair) -> str:
    if pair.alone:
        return "missing"
    if pair.unlike:
        return "shape"
    return "alike" if pair.fits else "dtype"


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
            left = " beyond those of earlier patterns" if taken else ""
            raise InputError(f"{flag} '{pattern}' matches no tensor{left}")
        for name in names:
            del free[name]
        matches.append(Match(flag, pattern, alpha, names))
    return tuple(matches)


# --- partners -----------------------------------------------------------------------------------------------------


def is_constant(name: str) -> bool:
    """Whether a tensor is a table that a model computes from its config, and no weight: copied from DPO."""
    return name.rpartition(".")[2] in CONSTANTS


def _match(sft: Checkpoint, dpo: Checkpoint, excluded: set[str], *, common: bool) -> _Matched:
    """Find every tensor's partner, for two `unwrapped` checkpoints.

    Args:
        sft: θ_sft.
        dpo: θ_dpo.
        excluded: Tensors of DPO that need none.
        common: Whether rows that only one vocabulary has are left out.
    """
    found = find_partners(sft, dpo)
    parts, left = dict(found.parts), dict(found.left)
    heads: dict[str, Checkpoint] = {}
    untied = []
    partners = {sft.name for own in found.parts.values() for _, sft in own if sft}
    for head, embedding in TIED_HEADS:
        partner = found.whole(embedding)
        if partner and not parts.get(head, partner) and head not in excluded and ties_head(sft.config) is not False:
            parts[head] = ((dpo.tensors[head], partner),)
            if ties_head(dpo.config):
                heads[head] = dpo
            else:
                untied.append(head)
        if head in left and embedding in partners and ties_head(dpo.config) is not False and head not in excluded:
            heads[head] = sft
            del left[head]
    sizes = _vocabulary(sft, dpo, parts)
    pairs = {}
    for name, info in dpo.tensors.items():
        own = () if name in excluded or is_constant(name) else parts[name]
        if common and len(own) == 1 and _differs_by_vocabulary(own[0], sizes):
            own = _cut(own[0])
        pairs[name] = _Pair(info, own or ((info, None),))
    return _Matched(
        sft=sft,
        dpo=dpo,
        pairs=pairs,
        missing=tuple(n for n, p in pairs.items() if p.alone and n not in excluded and not is_constant(n)),
        dropped=tuple(sorted(name for name in left if not is_constant(name))),
        heads=heads,
        untied=tuple(untied),
        vocabulary=sizes,
        renamed=found.renamed,
    )


def _embedding_of(head: str, checkpoint: Checkpoint) -> TensorInfo:
    return next(checkpoint.tensors[name] for other, name in TIED_HEADS if other == head and name in checkpoint.tensors)


def _equal(side: Checkpoint, head: str) -> Segment:
    """The comparison of a stored head with its own embedding."""
    stored, embedding = side.tensors[head], _embedding_of(head, side)
    return Segment("match", stored, embedding, (), stored.dtype, 0, stored.nbytes)


def _vocabulary(sft: Checkpoint, dpo: Checkpoint, parts: Mapping[str, Parts]) -> Vocabulary | None:
    """The vocabulary sizes where they differ: rows of the embedding or head, or those that the configs give.

    A config may give none, or one from before tokens were added.
    """
    for info, partner in (part for name, own in parts.items() if has_row_per_token(name) for part in own):
        if partner and info.shape[1:] == partner.shape[1:] and info.shape != partner.shape:
            return Vocabulary(partner.shape[0], info.shape[0])
    found = ([table.get("vocab_size") for table in config_tables(side.config)] for side in (sft, dpo))
    sizes = [next((size for size in given if isinstance(size, int)), None) for given in found]
    return Vocabulary(*sizes) if None not in sizes and sizes[0] != sizes[1] else None  # type: ignore[arg-type]


def _differs_by_vocabulary(pair: tuple[TensorInfo, TensorInfo | None], sizes: Vocabulary | None) -> bool:
    dpo, sft = pair
    if sft is None or sft.shape[1:] != dpo.shape[1:] or sft.shape == dpo.shape:
        return False
    by_rows = sizes is not None and (sft.shape[0], dpo.shape[0]) == (sizes.sft, sizes.dpo)
    return has_row_per_token(dpo.name) or by_rows


def _cut(pair: tuple[TensorInfo, TensorInfo | None]) -> Parts:
    """The rows that both have, and the further ones of DPO."""
    dpo, sft = pair
    rows = min(dpo.shape[0], sft.shape[0]) if sft else 0
    return (dpo.rows(0, rows), sft and sft.rows(0, rows)), (dpo.rows(rows, dpo.shape[0]), None)


def _mismatches(both: _Matched, excluded: set[str], settings: PairSettings) -> list[str]:
    pairs = [pair for name, pair in both.pairs.items() if name not in excluded]
    unlike = [part for pair in pairs if pair.unlike for part in pair.parts[:1]]
    by_vocabulary = [part for part in unlike if _differs_by_vocabulary(part, both.vocabulary)]
    problems = []
    if both.missing and both.dropped and not settings.copy_missing:
        problems.append(name_difference(both.dropped, both.missing))
    elif not settings.copy_missing:
        hint = "pass --missing copy-dpo to copy them from DPO"
        problems += listed(f"tensors missing in SFT ({hint})", both.missing)
        hint = "--missing copy-dpo goes on without them"
        problems += listed(f"tensors missing in DPO ({hint})", both.dropped)
    hint = "the vocabularies differ in size: pass --vocab common to extrapolate the rows both have"
    problems += listed(hint, map(_shapes, by_vocabulary))
    problems += listed("shapes differ", map(_shapes, [part for part in unlike if part not in by_vocabulary]))
    hint = "--exclude copies tensors from DPO"
    mixed = [(pair.parts[0][1], pair.dpo) for pair in pairs if not pair.fits]
    problems += listed(
        f"dtypes that cannot be combined ({hint})", [f"{d.name} {s.dtype}, {d.dtype}" for s, d in mixed if s]
    )
    sized = {head: (side.tensors[head], _embedding_of(head, side)) for head, side in both.heads.items()}
    other = [head for head, (a, b) in sized.items() if (a.shape, a.dtype) != (b.shape, b.dtype)]
    return problems + listed("heads on one side only that differ in size from their tied embedding", other)


def _shapes(pair: tuple[TensorInfo, TensorInfo | None]) -> str:
    dpo, sft = pair
    return f"{dpo.name} {list(sft.shape if sft else ())} ≠ {list(dpo.shape)}"


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
    segments: list[Segment] = []
    offset = 0
    for dpo, sft in pair.parts:
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
