"""The stream of θ(α) pieces that executes a pair's plan.

Used by the checkpoint writer and anything else that needs θ(α): worker threads take pieces of about 1 MiB, which fit
the processor's cache, read them, combine them, and pass each to the sinks. So memory does not grow with the
model, nor with its largest tensor. On a GPU each worker has its own stream and pinned buffers, and the reads,
copies, arithmetic and writes of different workers overlap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from expo.checkpoint.folder import TensorInfo
from expo.cpus import usable_cpus
from expo.errors import InputError
from expo.theta.adapter.tensors import LowRank
from expo.theta.buffers import PAGE, HostBuffer, Lane, Outputs
from expo.theta.merge import CPU_TILE, CUDA_TILE, Deltas
from expo.theta.norms import (
    Norms,
    Scratch,
    add_difference,
    delta_norms,
    equal_infinities,
    is_finite,
    keep_equal,
    pair_norms,
    sampled_norms,
    sampled_square,
    stays_finite,
    wider,
)
from expo.theta.plan import PairSettings, Segment
from expo.theta.rules import find_rule
from expo.theta.sources import SourceFiles
from expo.theta.trajectory.fit import LINE_RULES, Fit, fit
from expo.theta.trajectory.pieces import Moved, Rows, combine, gram, total
from expo.theta.workers import Piece, Sink, Workers, pieces, unit_dtype

CPU_PIECE_BYTES = 1 << 20
CUDA_PIECE_BYTES = 4 << 20
COURSE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Of a training run: a piece at all steps, float32, for each worker."""
WINDOW_BYTES = 64 << 20
"""Of its tensors that are fitted before they are combined: read twice, the second time from memory."""
MAX_OUTPUT_BYTES = 64 << 20
"""Limit for all output buffers together; with very many α the pieces become smaller."""
MAX_DEFAULT_WORKERS = 4


def default_workers() -> int:
    """The default of `--workers`: the number of CPUs available to this process, at most four."""
    return min(MAX_DEFAULT_WORKERS, usable_cpus())


MakeTheta: TypeAlias = Callable[[float, Tensor], Tensor]
"""Computes θ(α) of a piece: (α, out) → out."""


class Combiner:
    """Turns segments of a plan into θ(α).

    Args:
        sources: The open files of the plan's sources.
        settings: Those the plan was made with; one α per output.
        device: Where the arithmetic runs.
        workers: The number of threads; each processes its own pieces.
        exact_norms: Whether to compute all norms exactly, including ‖θ_dpo‖². Otherwise they are a cheap check,
            `norms.sampled_norms`.
    """

    def __init__(
        self,
        sources: SourceFiles,
        settings: PairSettings,
        device: torch.device,
        workers: int,
        *,
        exact_norms: bool = False,
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._rule = find_rule(settings.rule)
        self._exact_norms = exact_norms
        self._course = settings.course
        self.fits: dict[str, Fit] = {}
        """Of a training run: the line of each tensor that was combined, by name."""
        self._changed: dict[str, tuple[Segment, Norms]] = {}
        """The first segment of each of these tensors that moves, and the norms of all that do, which it reports."""
        outputs, sets = len(settings.alphas), 2 * workers
        wanted = CPU_PIECE_BYTES if device.type == "cpu" else CUDA_PIECE_BYTES
        steps = len(self._course.steps) if self._course else 0
        if steps:
            wanted = min(wanted, max(COURSE_BYTES[device.type] // (steps + 2) // PAGE, 1) * PAGE)
        self._piece_bytes = min(wanted, max(MAX_OUTPUT_BYTES // max(outputs * sets, 1) // PAGE, 1) * PAGE)
        lane_bytes = wanted if steps else self._piece_bytes
        self._fit_bytes = wanted  # whatever the number of α, so that sums and lines are the same
        self._tile = CPU_TILE if device.type == "cpu" else CUDA_TILE
        self._deltas = Deltas(sources.read, device, self._tile)
        lanes = [Lane(lane_bytes, device, steps) for _ in range(workers)]
        pinned = device.type == "cuda"
        buffers = [Outputs(self._piece_bytes, outputs, pinned=pinned) for _ in range(sets)]
        self._workers = Workers(lanes, buffers, stop=sources.stop)

    def run(
        self,
        segments: Iterable[tuple[Segment, int]],
        sinks: Sequence[Sink],
        on_bytes: Callable[[int], object] | None = None,
    ) -> list[tuple[Segment, Norms]]:
        """Combine segments and pass the outputs' bytes to the sinks.

        Args:
            segments: Each with the offset of its first output byte, in ascending order.
            sinks: One per α.
            on_bytes: Called from time to time, from this thread, with the number of new output bytes (without sinks,
                those that one sink would have received).

        Returns:
            The norms of each extrapolated piece, in order.

        Raises:
            InputError: A value is not finite, or sides that must be equal are not.
            EnvironmentFailure: Reading failed, or a sink.
        """
        segments = list(segments)
        self._sources.expect([segment for segment, _ in segments])
        norms: list[tuple[Segment, Norms]] = []
        for window in self._windows(segments):
            self._fit(window, None)
            todo = zip(count(len(norms)), pieces(window, self._piece_bytes, self._tile), strict=False)
            norms += self._workers.each(self._combine, todo, sinks, on_bytes)
        return norms

    def _windows(self, segments: list[tuple[Segment, int]]) -> Iterator[list[tuple[Segment, int]]]:
        """Of a training run, consecutive tensors of about WINDOW_BYTES; of a pair, all there is."""
        if self._course is None:
            yield segments
            return
        window: list[tuple[Segment, int]] = []
        for _, tensor in groupby(segments, key=lambda entry: entry[0].dpo.name):
            if sum(segment.nbytes for segment, _ in window) > WINDOW_BYTES:
                yield window
                window = []
            window += tensor
        yield window

    def fit(self, segments: Iterable[Segment], on_bytes: Callable[[int], object] | None = None) -> None:
        """Find the lines of a training run's tensors, for `fits`, without combining them.

        Args:
            segments: Those of whole tensors.
            on_bytes: Called from time to time, from this thread, with the number of bytes of the last step that were
                read since, each with those of the other steps.

        Raises:
            InputError: A value is not finite.
            EnvironmentFailure: Reading failed.
        """
        self._fit([(segment, 0) for segment in segments], on_bytes)

    def _fit(self, segments: Sequence[tuple[Segment, int]], on_bytes: Callable[[int], object] | None) -> None:
        """Find the lines of the tensors that a training run moves, from their changes at every step."""
        moving = [(segment, offset) for segment, offset in segments if segment.earlier]
        if self._course is None or not moving:
            return
        todo = enumerate(pieces(moving, self._fit_bytes, self._tile))
        found = self._workers.each(self._gram, todo, [], on_bytes)
        rule = LINE_RULES[self._course.rule]
        for name, of_tensor in groupby(found, key=lambda entry: entry[0].dpo.name):
            parts, grams, sizes = zip(*((segment, *of_piece) for segment, of_piece in of_tensor), strict=True)
            gram = total(grams)
            if not np.isfinite(gram).all():
                raise InputError(
                    f"tensor {name} contains NaN or infinity at one of the steps, and no line can be found for it; "
                    f"--exclude '^{re.escape(name)}$' copies it from the last step"
                )
            self.fits[name] = fit(rule, gram, self._course.steps)
            self._changed[name] = parts[0], Norms(float(gram[-1, -1]), math.fsum(sizes), sampled=True)

    def _combine(self, piece: Piece, lane: Lane, outputs: Sequence[Tensor]) -> Norms:
        segment, norms = piece.segment, Norms()
        if segment.earlier:
            return self._follow(piece, lane, outputs)
        dpo = lane.load(self._read(piece, segment.dpo, lane.dpo), 0)
        if segment.low_rank is not None:
            norms = self._merge(piece, segment.low_rank, dpo, outputs, lane)
        elif segment.sft is None:
            self._copy(segment, dpo, outputs, lane)
        else:
            sft = lane.load(self._read(piece, segment.sft, lane.sft), 1)
            if segment.is_raw:
                _require_equal(segment, sft, dpo)
                self._copy(segment, dpo, outputs, lane)
            else:
                norms = self._measure(sft, dpo, lane.scratch)
                self._extrapolate(segment, self._of_pair(sft, dpo, lane), norms, outputs, lane, (sft, dpo))
        lane.finish()
        return norms

    def _gram(self, piece: Piece, lane: Lane, _outputs: Sequence[Tensor]) -> tuple[Rows, float]:
        """The inner products of the piece's changes, and about ‖θ_0‖² of it."""
        moved = self._moved(piece, lane)
        return gram(moved.changes), sampled_square(moved.start)

    def _follow(self, piece: Piece, lane: Lane, outputs: Sequence[Tensor]) -> Norms:
        """θ(T) on the line that was found for the tensor."""
        segment, course = piece.segment, self._course
        assert course is not None
        moved, line = self._moved(piece, lane), self.fits[segment.dpo.name]
        weights = [line.weights(course.step_of(alpha)) for alpha in segment.alphas]
        values = combine(moved, weights, [lane.target(out) for out in outputs])
        for out, value in zip(outputs, values, strict=True):
            if not (self._settings.allow_nonfinite or is_finite(value)):
                _refuse_nonfinite(segment)
            lane.store(value, out)
        lane.finish()
        first, norms = self._changed[segment.dpo.name]
        return norms if segment is first and piece.first == 0 else Norms()

    def _moved(self, piece: Piece, lane: Lane) -> Moved:
        """θ_0 of the piece, and its change at every step."""
        segment = piece.segment
        assert segment.sft is not None
        stored = lane.load(self._read(piece, segment.sft, lane.sft), 1)
        dtypes = {unit_dtype(segment, step.tensor.dtype) for step in segment.steps}
        wide = torch.float64 if torch.float64 in {stored.dtype, *dtypes} else torch.float32
        moved = lane.changes.of(wide, piece.length)
        start = moved.start.copy_(stored)
        for step, row in zip(segment.steps, moved.changes, strict=True):
            if step.low_rank is not None:
                row.copy_(self._deltas.delta(step.low_rank, piece.first, piece.length, wide, lane))
            if step.low_rank is None or step.tensor != segment.sft:
                values = lane.load(self._read(piece, step.tensor, lane.dpo), 0)
                row.copy_(values).sub_(start) if step.low_rank is None else row.add_(values).sub_(start)
            lane.finish()  # the next step is read into the same memory
        return moved

    def _merge(self, piece: Piece, pair: LowRank, dpo: Tensor, outputs: Sequence[Tensor], lane: Lane) -> Norms:
        """θ_dpo is `dpo` and ΔW; `dpo` is SFT's own tensor unless the adapter replaces it."""
        segment, sft = piece.segment, dpo
        if segment.sft not in (None, segment.dpo):
            sft = lane.load(self._read(piece, segment.sft, lane.sft), 1)
        delta = self._deltas.delta(pair, piece.first, piece.length, wider(sft, dpo), lane)
        if sft is not dpo:
            add_difference(delta, sft, dpo, lane.scratch)
        norms = delta_norms(sft, delta, lane.scratch, of_dpo=self._exact_norms)
        self._extrapolate(segment, self._of_delta(sft, delta, lane), norms, outputs, lane)
        return norms if segment.sft is not None else Norms()

    def _of_pair(self, sft: Tensor, dpo: Tensor, lane: Lane) -> MakeTheta:
        combine, scratch = self._rule.combine, lane.scratch
        return lambda alpha, out: combine(sft, dpo, alpha, out, scratch) if alpha else out.copy_(dpo)

    def _of_delta(self, sft: Tensor, delta: Tensor, lane: Lane) -> MakeTheta:
        """As `_of_pair`; Δ may become θ_dpo."""
        from_delta, scratch = self._rule.from_delta, lane.scratch
        if from_delta is None:
            return self._of_pair(sft, delta.add_(sft), lane)
        return lambda alpha, out: from_delta(sft, delta, alpha, out, scratch)

    def _measure(self, sft: Tensor, dpo: Tensor, scratch: Scratch) -> Norms:
        norms = pair_norms(sft, dpo, scratch, of_dpo=True) if self._exact_norms else sampled_norms(sft, dpo, scratch)
        if not math.isfinite(norms.delta) and bool((both := equal_infinities(sft, dpo)).any()):
            sides = sft.masked_fill(both, 0), dpo.masked_fill(both, 0)
            norms = pair_norms(*sides, scratch, of_dpo=self._exact_norms)._replace(sampled=True)
        return norms

    def _read(self, piece: Piece, info: TensorInfo, buffer: HostBuffer) -> Tensor:
        dtype = unit_dtype(piece.segment, info.dtype)
        position = info.start + piece.first * dtype.itemsize
        tensor, view = buffer.to_read_into(position, piece.length * dtype.itemsize, dtype)
        self._sources.read(info.file, position, view)
        return tensor

    def _extrapolate(
        self,
        segment: Segment,
        theta: MakeTheta,
        norms: Norms,
        outputs: Sequence[Tensor],
        lane: Lane,
        sides: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        for alpha, out in zip(segment.alphas, outputs, strict=True):
            values = theta(alpha, lane.target(out))
            if not (stays_finite(self._rule.bound, norms, alpha, out.dtype) or is_finite(values)):
                kept = False if sides is None else keep_equal(values, *sides)
                if not (kept or self._settings.allow_nonfinite):
                    _refuse_nonfinite(segment)
            lane.store(values, out)

    def _copy(self, segment: Segment, dpo: Tensor, outputs: Sequence[Tensor], lane: Lane) -> None:
        for out in outputs:
            values = lane.target(out).copy_(dpo)
            if segment.action == "convert" and not (self._settings.allow_nonfinite or is_finite(values)):
                _refuse_nonfinite(segment)
            lane.store(values, out)


def _refuse_nonfinite(segment: Segment) -> None:
    raise InputError(
        f"the result for tensor {segment.dpo.name} contains NaN or infinity (from the inputs, or too large for "
        f"{segment.dtype}); --allow-nonfinite writes it anyway"
    )


def _require_equal(segment: Segment, sft: Tensor, dpo: Tensor) -> None:
    if torch.equal(sft, dpo):
        return
    if segment.sft is not None and segment.sft.name != segment.dpo.name:
        raise InputError(
            f"the head {segment.dpo.name} is stored on one side only, where it differs from the embedding "
            f"{segment.sft.name} that config.json ties it to: if it was trained by itself, set tie_word_embeddings "
            f"to false there; --exclude '^{re.escape(segment.dpo.name)}$' takes DPO's"
        )
    raise InputError(
        f"the {segment.dpo.dtype} tensor {segment.dpo.name} differs between SFT and DPO and cannot be "
        f"extrapolated; --exclude '^{re.escape(segment.dpo.name)}$' copies it from DPO"
    )


def total_norms(norms: Iterable[Norms]) -> Norms:
    """The sum, independent of the order."""
    pieces = list(norms)
    delta, sft, dpo = (math.fsum(piece[which] for piece in pieces) for which in range(3))
    return Norms(delta, sft, dpo, sampled=any(piece.sampled for piece in pieces))
