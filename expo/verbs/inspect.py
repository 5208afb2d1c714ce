"""`expo inspect`: how far θ_dpo is from θ_sft, per layer and module, and whether ExPO suits the pair.

The plan lists from headers which tensors can be compared (`plan`); one pass over both checkpoints measures them
(`_measure`). A mismatched pair is not refused: the mismatches are reported. The interpretation of the figures is in
`output/findings.py`, the picture in `output/plots.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from expo.checkpoint.folder import Location, is_adapter, refuse_inside
from expo.checkpoint.hub import locate
from expo.checkpoint.pickled import read_source
from expo.checkpoint.places import places
from expo.checkpoint.tokens import compare_tokens
from expo.config import InspectConfig
from expo.engines.torch_tools import find_device
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, json_line, open_file, shown, write_atomic
from expo.output.findings import Figures, Inspection, Measured, mismatches
from expo.output.plots import change_map, saved
from expo.output.trajectory import Followed, Trajectory, picture
from expo.progress import Progress, bytes_bar
from expo.theta.adapter.folders import require_base
from expo.theta.decide import overlap
from expo.theta.decide_adapter import overlap_adapter
from expo.theta.pair import (
    find_earlier,
    plan_located,
    require_rule_for,
    source_fingerprints,
    warn_of_dequantized,
)
from expo.theta.plan import Course, Overlap, PairPlan, PairSettings, Segment

if TYPE_CHECKING:
    from expo.theta.sources import SourceFiles  # imports torch, which planning does without

log = logging.getLogger(__name__)

COMPARED_BYTES = 1 << 20
"""How much of an integer tensor is compared at a time."""


@dataclass(frozen=True)
class InspectPlan:
    """Everything `expo inspect` will do."""

    config: InspectConfig
    sft: Location
    dpo: Location
    earlier: tuple[Location, ...]
    """The checkpoints of a training run but the last, which is `dpo`."""
    overlap: Overlap
    course: PairPlan | None
    """A training run's tensors with their partners at every step, where there are several checkpoints."""
    fingerprints: Row
    """The state of all inputs."""
    picture: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of DPO that are measured."""
        return sum(segment.nbytes for segment in self.overlap.segments)

    @property
    def moving(self) -> list[Segment]:
        """What a training run has at every step."""
        shards = () if self.course is None else self.course.shards
        return [segment for shard in shards for segment, _ in shard.segments() if segment.earlier]

    def describe(self) -> Row:
        """The plan as plain data."""
        both = self.overlap
        return {
            "sft": str(self.sft.path),
            "dpo": str(self.dpo.path),
            **({"checkpoints": [str(one.path) for one in (*self.earlier, self.dpo)]} if self.earlier else {}),
            **({"dequantized": both.dequantized} if both.dequantized else {}),
            "tensors": {"measured": len(both.segments), "compared": len(both.exact) + len(both.heads)},
            "mismatches": {kind: list(names) for kind, names in mismatches(both).items()},
            "bytes": self.nbytes,
            "picture": None if self.picture is None else str(self.picture),
        }


def run(config: InspectConfig) -> Inspection:
    """Measure a pair, and draw it if a picture is requested.

    Raises:
        InputError: The settings or inputs are at fault, or the picture would replace something else.
        EnvironmentFailure: I/O failed; nothing is left behind.
    """
    job = plan(config)
    if job.picture is None:
        return _measure(job)
    _require_writable(job.picture.parent)
    found = _measure(job)
    write_atomic(job.picture, _draw(found, job.picture.suffix.lower(), _mark(job.fingerprints)))
    return replace(found, picture=job.picture)


def plan(config: InspectConfig) -> InspectPlan:
    """List from headers what can be compared; nothing is written.

    Raises:
        InputError: An input is incomplete, quantized in a way that is not read, or an adapter to another model, or the
            picture would replace something else.
    """
    sft, dpo = (locate(model, weights_only=True, pickled=config.allow_pickle) for model in (config.sft, config.dpo))
    earlier = find_earlier(config, allow_pickle=config.allow_pickle)
    fingerprints = source_fingerprints(config, sft, dpo, earlier)
    picture = None if config.output is None else Path(config.output)
    if picture is not None:
        refuse_inside(picture, sft, dpo, *earlier)
        _refuse_picture(picture, _mark(fingerprints), overwrite=config.overwrite)
    both = _overlap(sft, dpo, config.allow_pickle)
    course = _course(config, sft, dpo, earlier)
    if course is None:  # else it was said already
        warn_of_dequantized(both.dequantized)
    return InspectPlan(config, sft, dpo, earlier, both, course, fingerprints, picture)


def _course(config: InspectConfig, sft: Location, dpo: Location, earlier: Sequence[Location]) -> PairPlan | None:
    """A training run's plan, as far as its checkpoints have tensors in common; None for a pair."""
    require_rule_for(config)
    steps = tuple(step for step, _ in config.course)
    if not earlier:
        return None
    course = Course(config.rule_name, steps)
    settings = PairSettings(alphas=(), copy_missing=True, common_vocabulary=True, course=course)
    return plan_located(sft, dpo, settings, allow_pickle=config.allow_pickle, earlier=earlier)


def _overlap(sft: Location, dpo: Location, allow_pickle: bool) -> Overlap:
    require_base(sft, dpo)
    base = read_source(sft, allow_pickle)
    return overlap_adapter(base, dpo.path) if is_adapter(dpo.path) else overlap(base, read_source(dpo, allow_pickle))


# --- measuring ----------------------------------------------------------------------------------------------------


def _measure(job: InspectPlan) -> Inspection:
    from expo.theta.sources import SourceFiles

    both = job.overlap
    with SourceFiles(*both.sources) as sources, closing(bytes_bar(job.nbytes, "inspect")) as progress:
        figures = _figures(job, sources, progress)
        unequal = tuple(segment.dpo.name for segment in both.exact if not _is_equal(segment, sources))
        untied = tuple(segment.dpo.name for segment in both.heads if not _is_equal(segment, sources))
    _require_unchanged(job)
    tensors = {segment.dpo.name: segment for segment in both.segments}  # a fused tensor has several
    where = places(tensors)
    measured = tuple(Measured(segment, where[name], figures[name]) for name, segment in tensors.items())
    run = None if job.course is None else _follow(job, job.course)
    return Inspection(job.sft.label, job.dpo.label, both, measured, unequal, untied, _moved_tokens(job), trajectory=run)


def _follow(job: InspectPlan, course: PairPlan) -> Trajectory:
    """Find the line of every tensor that a training run has at all of its steps."""
    from expo.theta import stream
    from expo.theta.sources import SourceFiles

    device, workers = find_device(job.config.device, prefer_gpu=False), job.config.workers or stream.default_workers()
    moving = job.moving
    nbytes = sum(segment.nbytes for segment in moving)
    with SourceFiles(*course.sources) as sources, closing(bytes_bar(nbytes, "trajectory")) as progress:
        combiner = stream.Combiner(sources, course.settings, device, workers)
        combiner.fit(moving, progress.update)
    where = places(combiner.fits)
    return Trajectory(
        job.config.rule_name,
        tuple(step for step, _ in job.config.course),
        tuple(Followed(name, where[name], fit) for name, fit in combiner.fits.items()),
    )


def _moved_tokens(job: InspectPlan) -> tuple[str, ...]:
    try:
        difference = compare_tokens(job.sft.path, job.dpo.path)
    except InputError as error:
        log.warning("%s; the token ids of SFT and DPO were not compared", error)
        return ()
    moved = sorted(difference.moved.items(), key=lambda item: item[1]) if difference else []
    return tuple(f"{shown(token)} {ours} ≠ {theirs}" for token, (ours, theirs) in moved)


def _figures(job: InspectPlan, sources: SourceFiles, progress: Progress) -> dict[str, Figures]:
    """The figures of every floating-point tensor; one run per file of DPO, to bound the pieces held in memory."""
    from expo.theta import stream

    device, workers = find_device(job.config.device, prefer_gpu=False), job.config.workers or stream.default_workers()
    combiner = stream.Combiner(sources, PairSettings(alphas=()), device, workers, exact_norms=True)
    empty = Figures(tensors=1, identical=1, delta_squared=0.0, sft_squared=0.0, dpo_squared=0.0)
    figures = {segment.dpo.name: empty for segment in job.overlap.segments}
    for _, segments in groupby(job.overlap.segments, key=lambda segment: segment.dpo.file):
        pieces = combiner.run([(segment, 0) for segment in segments], [], progress.update)
        for name, of_tensor in groupby(pieces, key=lambda piece: piece[0].dpo.name):
            norms = stream.total_norms(norms for _, norms in of_tensor)
            figures[name] = Figures(1, int(norms.delta == 0), norms.delta, norms.sft, norms.dpo)
    return figures


def _is_equal(segment: Segment, sources: SourceFiles) -> bool:
    """Whether both sides of a segment have the same bytes."""
    if segment.sft is None or segment.sft.nbytes != segment.dpo.nbytes:
        return False
    sides = [(info, bytearray(COMPARED_BYTES)) for info in (segment.sft, segment.dpo)]
    for first in range(0, segment.nbytes, COMPARED_BYTES):
        length = min(COMPARED_BYTES, segment.nbytes - first)
        for info, buffer in sides:
            sources.read(info.file, info.start + first, memoryview(buffer)[:length])
        left, right = (buffer[:length] for _, buffer in sides)
        if left != right:
            return False
    return True


def _require_unchanged(job: InspectPlan) -> None:
    now = source_fingerprints(job.config, job.sft, job.dpo, job.earlier)
    for side, location in (("sft", job.sft), ("dpo", job.dpo), ("course", job.dpo)):
        if now.get(side) != job.fingerprints.get(side):
            raise InputError(f"{location.path} changed while it was read; rerun the command")


# --- the picture --------------------------------------------------------------------------------------------------

MARK = "expo inspect "
"""Prefix of the metadata entry that identifies the weights a picture was drawn from."""


def _mark(fingerprints: Row) -> str:
    return MARK + xxhash.xxh3_128_hexdigest(json_line(fingerprints).encode())


def _refuse_picture(picture: Path, mark: str, *, overwrite: bool) -> None:
    """Refuse to replace what is not a picture of the same weights."""
    if not picture.exists():
        return
    with open_file(picture) as stream:
        content = stream.read()
    if MARK.encode() not in content:
        raise InputError(f"{picture} exists and expo did not write it: move it away, or choose another --output")
    if mark.encode() not in content and not overwrite:
        raise InputError(f"{picture} was drawn from other weights; --overwrite replaces it")


def _require_writable(folder: Path) -> None:
    """Create the picture's folder before the long measurement, so that it fails early."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    if not os.access(folder, os.W_OK):
        raise EnvironmentFailure(f"cannot write to {folder}; choose another --output")


def _draw(found: Inspection, suffix: str, mark: str) -> bytes:
    if found.trajectory is not None:
        return saved(picture(found.trajectory, f"{found.sft} → {found.dpo}"), suffix, mark)
    modules, relative = found.modules, found.total.relative
    size = "no tensor in common" if relative is None else f"{relative:.3g} in total"
    return change_map(
        {one.name: {layer: f.relative for layer, f in one.layers.items()} for one in modules if one.layers},
        {one.name: one.figures.relative for one in modules if not one.layers},
        title=f"{found.sft} → {found.dpo}\n‖Δ‖ / ‖θ_sft‖: {size}, Δ = θ_dpo − θ_sft",
        suffix=suffix,
        mark=mark,
    )
