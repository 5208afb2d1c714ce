"""Writing an output's shards, or a part of them: a loop over shards and pieces with no decisions left in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from expo.disk import Background, reading_ahead
from expo.engines.torch_tools import find_device
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row
from expo.output.shard import StagedShard
from expo.output.writer import ShardRecord, StagedOutput, staging_folder
from expo.progress import Progress, bytes_bar
from expo.theta.decide_ranked import RankedPlan
from expo.theta.pair import source_fingerprints
from expo.theta.plan import PairPlan, ShardPlan
from expo.verbs.extrapolate.commit import check_changes, complete
from expo.verbs.extrapolate.plan import ExtrapolatePlan
from expo.verbs.extrapolate.ranked import write_factors

if TYPE_CHECKING:
    from expo.theta.norms import Norms
    from expo.theta.stream import Combiner  # imports torch, which planning does without


def write(job: ExtrapolatePlan) -> None:
    """Write what is missing of the outputs, or of the part that is asked for; an output is then committed.

    Raises:
        InputError: The inputs are at fault; what was staged is discarded.
        EnvironmentFailure: I/O failed; calling again continues.
    """
    started, clock = time.time(), time.perf_counter()
    _require_space(job)
    with ExitStack() as stack:
        staged = [
            stack.enter_context(
                StagedOutput(
                    output.folder, output.fingerprint, weights=job.weights, fsync=job.config.fsync, part=job.part
                )
            )
            for output in job.todo
        ]
        made = write_factors(job, job.pair, staged) if isinstance(job.pair, RankedPlan) else _write_shards(job, staged)
        times = {"started": started, **made}
        _require_unchanged(job)
        times["seconds"] = round(time.perf_counter() - clock, 3)
        if job.part is not None:
            for folder in staged:
                folder.finish_part(times)
            return
        check_changes(job, [folder.records for folder in staged])
        for output, folder in zip(job.todo, staged, strict=True):
            complete(job, output, folder, times)


def _require_space(job: ExtrapolatePlan) -> None:
    folder = next(parent for parent in (job.todo[0].folder, *job.todo[0].folder.resolve().parents) if parent.exists())
    own = [staging_folder(output.folder, job.part) for output in job.todo]
    staged = sum(file.stat().st_size for staging in own for file in staging.glob("*.partial"))
    copied = sum(file.stat().st_size for file in job.side_files.values()) if job.part is None else 0
    needed, free = (job.nbytes + copied) * len(job.todo) - staged, shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFailure(f"{folder} has {_amount(free)} free, but {_amount(needed)} are needed")


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes} bytes"


def _write_shards(job: ExtrapolatePlan, staged: Sequence[StagedOutput]) -> Row:
    """Combine the missing shards; returns the time of the first read and the seconds that combining took."""
    for output in staged:
        output.verify()
    first_read, settings = time.time(), job.pair.settings
    with reading_ahead(_in_turn(job.pair, job.shards)):
        from expo.theta import stream
        from expo.theta.sources import SourceFiles
    device, workers = find_device(job.config.device, prefer_gpu=False), job.config.workers or stream.default_workers()
    with ExitStack() as stack:
        progress = stack.enter_context(closing(bytes_bar(job.nbytes * len(staged), "extrapolate")))
        started = time.perf_counter()
        sources = stack.enter_context(SourceFiles(*job.pair.sources))
        disk = stack.enter_context(Background())
        if job.pair.equal and job.checks_equal:
            stream.Combiner(sources, replace(settings, alphas=()), device, workers).run(
                [(segment, 0) for segment in job.pair.equal], []
            )
        combiner = stream.Combiner(sources, settings, device, workers)
        for shard in job.shards:
            if any(shard.name not in output.records for output in staged):
                _write_shard(shard, combiner, staged, disk, progress)
            else:
                progress.update(shard.nbytes * len(staged))
        return {"first_read": first_read, "combine_seconds": round(time.perf_counter() - started, 3)}


def _in_turn(pair: PairPlan, shards: Sequence[ShardPlan]) -> list[Path]:
    """The weight files of these shards in approximate reading order: a file of each side in turn."""
    read = {
        info.file for shard in shards for segment, _ in shard.segments() for info in (segment.dpo, segment.sft) if info
    }
    sides = zip_longest(*([shard.file for shard in source.shards] for source in pair.sources))
    return [file for files in sides for file in files if file in read]


def _write_shard(
    shard: ShardPlan, combiner: Combiner, staged: Sequence[StagedOutput], disk: Background, progress: Progress
) -> None:
    from expo.theta.stream import total_norms

    with ExitStack() as stack:
        files = []
        for output in staged:
            files.append(output.start_shard(shard.name, shard.header, shard.nbytes, disk))
            stack.callback(files[-1].close)
        pieces = combiner.run(shard.segments(), files, progress.update)
        norms, lines = total_norms(norms for _, norms in pieces), combiner.fits
        fits = {tensor.name: asdict(lines[tensor.name]) for tensor in shard.tensors if tensor.name in lines}
        for output, file in zip(staged, files, strict=True):
            disk.submit(_finish_shard, output, file, shard, norms, fits)
        stack.pop_all()  # the files are the background's now


def _finish_shard(
    output: StagedOutput, file: StagedShard, shard: ShardPlan, norms: Norms, fits: Mapping[str, Row]
) -> None:
    with closing(file):
        output.record(ShardRecord(shard.name, shard.nbytes, file.finish(), norms.delta, norms.sft, fits))


def _require_unchanged(job: ExtrapolatePlan) -> None:
    now = source_fingerprints(job.config, job.sft, job.dpo, job.earlier)
    for side, location in (("sft", job.sft), ("dpo", job.dpo), ("course", job.dpo)):
        if now.get(side) != job.todo[0].fingerprint.get(side):
            raise InputError(f"{location.path} changed while it was read; rerun the command")
