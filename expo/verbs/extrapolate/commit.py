"""Completing outputs: the files beside the shards, and joining the shards that parts have staged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TypeAlias

from expo.arguments import shown
from expo.checkpoint.folder import ADAPTER_CONFIG, CONFIG_FILE, INDEX_FILE, config_text
from expo.errors import InputError, listed
from expo.files import Row
from expo.output.manifest import card, delta_figures, fits_in, manifest
from expo.output.parts import PartState, adopt_parts, hold_parts
from expo.output.writer import CARD_FILE, MANIFEST_FILE, ShardRecord, StagedOutput
from expo.parts import Part, array_list
from expo.progress import bytes_bar
from expo.theta.decide_ranked import RankedPlan
from expo.theta.decide_scaled import ScaledPlan
from expo.theta.pair_checks import check_change, check_lines
from expo.theta.plan import index_json
from expo.verbs.extrapolate.adapter import adapter_config, check_approximation, check_factors, ranked_config
from expo.verbs.extrapolate.plan import ExtrapolatePlan, Output

Wrong: TypeAlias = Mapping[Part, str]
"""Part → why it cannot be joined."""
OnBytes: TypeAlias = Callable[[int], object]
"""Called with the bytes that were handled."""


def join(job: ExtrapolatePlan, count: int) -> None:
    """Commit every output from what `count` parts have staged, once each shard has its checksum.

    Raises:
        InputError: A part is missing, unfinished, damaged or has other settings; the other parts are kept.
        EnvironmentFailure: I/O failed; calling again continues.
    """
    states = [job.states(output, count) for output in job.todo]
    _require_all(job, count, {one.part: one.reason for parts in states for one in parts if one.reason})
    check_changes(job, [{name: of for one in parts for name, of in one.records.items()} for parts in states])
    with closing(bytes_bar(job.nbytes * len(job.todo), "join")) as progress:
        for output, parts in zip(job.todo, states, strict=True):
            _require_all(job, count, _join_one(job, output, parts, progress.update))


def _join_one(job: ExtrapolatePlan, output: Output, parts: Sequence[PartState], on_bytes: OnBytes) -> Wrong:
    """Commit one output; nothing is raised inside of it, since that would discard what is staged."""
    clock = time.perf_counter()
    with ExitStack() as stack:
        if running := hold_parts(stack, output.folder, output.fingerprint, [one.part for one in parts]):
            return running
        staged = stack.enter_context(StagedOutput(output.folder, output.fingerprint, fsync=job.config.fsync))
        staged.verify()
        if wrong := adopt_parts(staged, parts, job.shards, on_bytes):
            return wrong
        seconds = round(time.perf_counter() - clock, 3)
        complete(job, output, staged, {**_times(parts), "join_seconds": seconds})
    return {}


def _times(parts: Sequence[PartState]) -> Row:
    """When the parts were made: side by side, so that all of them took as long as the slowest."""
    made = [one.times for one in parts]
    return {
        **{name: min(times[name] for times in made) for name in ("started", "first_read")},
        **{name: max(times[name] for times in made) for name in ("combine_seconds", "seconds")},
        "parts": [{"part": str(one.part), **one.times} for one in parts],
    }


def _require_all(job: ExtrapolatePlan, count: int, wrong: Wrong) -> None:
    if wrong:
        first, *_ = wrong
        command = shown("extrapolate", replace(job.config, join=None, data_parallel=None, ray=None, part=str(first)))
        parts = listed("", (f"{part} ({reason})" for part, reason in wrong.items()))[0].removeprefix(": ")
        raise InputError(
            f"{len(wrong)} of {count} parts cannot be joined yet: {parts}; to make one: {command}; all of them as an "
            f"array job: --array={array_list(sorted(part.index for part in wrong))} and --part slurm/{count}"
        )


def complete(job: ExtrapolatePlan, output: Output, folder: StagedOutput, times: Row) -> None:
    """Add the files beside the shards, and give all of them their final names.

    Raises:
        EnvironmentFailure: I/O failed; calling again continues.
    """
    for name, file in job.side_files.items():
        folder.add_copy(name, file)
    texts = {**_config_texts(job, output), CARD_FILE: card(job, output.alpha, folder.records)}
    for name, text in texts.items():
        folder.add_text(name, text)
    files = sorted({*job.side_files, *folder.records, *texts})
    folder.add_text(MANIFEST_FILE, manifest(job, output.alpha, output.fingerprint, folder.records, files, times))
    folder.commit()


def _config_texts(job: ExtrapolatePlan, output: Output) -> dict[str, str]:
    """The files that say how the weights are read, except where DPO's is copied."""
    if isinstance(job.pair, ScaledPlan):
        return {ADAPTER_CONFIG: adapter_config(job, job.pair, output.alpha)}
    if isinstance(job.pair, RankedPlan):
        return {ADAPTER_CONFIG: ranked_config(job, job.pair, output.alpha)}
    texts = {} if job.pair.is_single_file else {INDEX_FILE: index_json(job.pair)}
    if CONFIG_FILE in job.side_files and (job.config.dtype != "auto" or job.pair.changes_config):
        texts[CONFIG_FILE] = config_text(job.pair.dpo.config, job.config.dtype)
    return texts


def check_changes(job: ExtrapolatePlan, records: Sequence[Mapping[str, ShardRecord]]) -> None:
    """See that θ_dpo differs from θ_sft as a pair's sides do, and how well a training run's lines fit.

    Args:
        job: The plan.
        records: Of each output, all of its shards.
    """
    changed = [shards for output, shards in zip(job.todo, records, strict=True) if output.alpha]
    if isinstance(job.pair, ScaledPlan):
        check_factors(job.pair, changed)
    elif isinstance(job.pair, RankedPlan):
        check_approximation(records[0])
    elif changed and job.pair.has_change:
        figures = delta_figures(changed[0])
        check_change(figures["norm"], figures["relative"])
    if changed and (course := job.pair.settings.course) is not None:
        from expo.theta.trajectory.fit import quality

        check_lines(quality(fits_in(changed[0]).values()), len(course.steps))
