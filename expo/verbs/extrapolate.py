"""`expo extrapolate`: write θ(α) = θ_dpo + α(θ_dpo − θ_sft) as a checkpoint.

Plan from headers (`plan`), then a loop over shards and pieces (`_write_shards`). The arithmetic is in `theta/`, staging
and committing files in `output/writer.py`, the manifest and model card in `output/manifest.py`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from expo.checkpoint.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    Location,
    config_text,
    refuse_inside,
    source_fingerprint,
    weights_xxh3,
)
from expo.checkpoint.side_files import warn_of_missing
from expo.config import ExtrapolateConfig
from expo.disk import Background, reading_ahead
from expo.engines.torch_tools import find_device
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row
from expo.output.frames import frame
from expo.output.manifest import Origin, card, delta_figures, manifest, vocabulary_rows
from expo.output.publish import Destination, Pushed, find_destinations, make_repository, push
from expo.output.writer import (
    CARD_FILE,
    MANIFEST_FILE,
    Checksums,
    ShardRecord,
    StagedOutput,
    StagedShard,
    finish_interrupted,
    is_complete,
)
from expo.progress import Progress, bytes_bar
from expo.settings import Fingerprint, absent_values, recorded
from expo.theta.adapter.folders import output_side_files
from expo.theta.names import theta_name
from expo.theta.pair import find_pair, pair_settings, plan_located
from expo.theta.pair_checks import check_change
from expo.theta.plan import PairPlan, ShardPlan, index_json

if TYPE_CHECKING:
    from pandas import DataFrame

    from expo.theta.stream import Combiner  # imports torch, which planning does without

FORMAT = 1
"""Incremented when the same settings would give different bytes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """One α's output."""

    alpha: float
    folder: Path
    fingerprint: Row
    complete: bool
    """Whether it already exists."""
    destination: Destination | None
    """Where it is pushed; None if it is not."""

    def describe(self) -> Row:
        """The output as plain data."""
        goes = {"push_to": self.destination.repository} if self.destination else {}
        return {"alpha": self.alpha, "path": str(self.folder), "complete": self.complete, **goes}


@dataclass(frozen=True)
class ExtrapolatePlan(Origin):
    """Everything `expo extrapolate` will do."""

    outputs: tuple[Output, ...]
    side_files: dict[str, Path]
    """Name in the outputs → the file that is copied."""

    @property
    def todo(self) -> tuple[Output, ...]:
        """The outputs that are not complete, in the order of the pair's α."""
        return tuple(output for output in self.outputs if not output.complete)

    def describe(self) -> Row:
        """The plan as plain data."""
        pair = self.pair
        return {
            "sft": str(self.sft.path),
            "dpo": str(self.dpo.path),
            "rule": self.config.rule,
            "outputs": [output.describe() for output in self.outputs],
            "tensors": pair.tensor_counts(),
            "share_copied": round(pair.copied[1], 4),
            "patterns": [
                {
                    "flag": one.flag,
                    "pattern": one.pattern,
                    "alpha": one.alpha,
                    "tensors": len(one.names),
                    "names": list(one.names),
                }
                for one in pair.matches
            ],
            **vocabulary_rows(pair),
            "shards": [{"file": shard.name, "bytes": shard.nbytes} for shard in pair.shards],
            "bytes_per_output": pair.nbytes,
            "side_files": ", ".join(self.side_files),
        }


@dataclass(frozen=True)
class Written:
    """One output after the run."""

    alpha: float
    path: Path
    status: str
    """"written" or "already complete"."""
    pushed: Pushed | None = None
    """Where it is on the hub, if it was pushed."""

    def __fspath__(self) -> str:
        return str(self.path)

    def describe(self) -> Row:
        """The output as plain data."""
        return asdict(self)


class Extrapolated(tuple[Written, ...]):
    """The result of a run: an output per α, in the order in which they were asked for."""

    __slots__ = ()

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The checkpoint's folder, where there is one α.

        Raises:
            InputError: There are several.
        """
        if len(self) > 1:
            raise InputError(f"there are {len(self)} checkpoints, one for each α: take the path of one, as in [0].path")
        return self[0].path

    def describe(self) -> Row:
        """The outputs as plain data."""
        return {"outputs": [one.describe() for one in self]}

    def to_pandas(self) -> DataFrame:
        """A row per α: `alpha`, `path`, `status`, and where it was pushed."""
        return frame(one.describe() for one in self)


def run(config: ExtrapolateConfig) -> Extrapolated:
    """Write every α's checkpoint that is not complete.

    Raises:
        InputError: The settings or inputs are at fault; nothing is left behind.
        EnvironmentFailure: I/O failed; calling again continues.
    """
    job = plan(config)
    finished = [finish_interrupted(output.folder, output.fingerprint) for output in job.todo]
    if any(finished):
        job = plan(config)
    for output in job.outputs:
        if output.destination:
            make_repository(output.destination, private=config.private)
    if job.todo:
        _execute(job)
    return Extrapolated(map(_written, job.outputs))


def _written(output: Output) -> Written:
    pushed = push(output.destination, output.folder) if output.destination else None
    return Written(output.alpha, output.folder, "already complete" if output.complete else "written", pushed)


def plan(config: ExtrapolateConfig) -> ExtrapolatePlan:
    """Decide everything from headers; nothing is written.

    Raises:
        InputError: The inputs do not match, or an output folder cannot be used.
    """
    destinations = find_destinations(config.repositories, private=config.private)
    sft, dpo = find_pair(config)
    folders = _output_folders(config, dpo)
    for folder in folders:
        refuse_inside(folder, sft, dpo)
    sources = {"sft": source_fingerprint(sft), "dpo": source_fingerprint(dpo)}
    outputs = tuple(
        _plan_output(config, alpha, folder, sources, destination)
        for alpha, folder, destination in zip_longest(config.alpha, folders, destinations)
    )
    pair = _plan_pair(config, sft, dpo, outputs)
    weights = _checksums(sft, dpo) if config.verify else None  # last, since it takes long
    verified = tuple(_verified(config, output, weights) for output in outputs)
    if verified != outputs:
        pair = _plan_pair(config, sft, dpo, verified)
    files = output_side_files(sft.path, dpo.path)
    if todo := [output for output in verified if not output.complete]:
        warn_of_missing(sft, dpo, files.keys(), todo[0].folder)
    return ExtrapolatePlan(config, sft, dpo, pair, weights, verified, files)


def _plan_pair(config: ExtrapolateConfig, sft: Location, dpo: Location, outputs: Sequence[Output]) -> PairPlan:
    todo = (output.alpha for output in outputs if not output.complete)
    settings = pair_settings(config, todo, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes)
    return plan_located(sft, dpo, settings, allow_pickle=config.allow_pickle)


def _checksums(sft: Location, dpo: Location) -> Checksums:
    log.info("reading %s and %s for their checksums", sft.label, dpo.label)
    return {"sft": weights_xxh3(sft.path), "dpo": weights_xxh3(dpo.path)}


def _verified(config: ExtrapolateConfig, output: Output, weights: Checksums | None) -> Output:
    """The output, complete only if it was made from these weights and its own are intact."""
    if weights is None or not output.complete:
        return output
    complete = is_complete(output.folder, output.fingerprint, overwrite=config.overwrite, weights=weights)
    return replace(output, complete=complete)


def _output_folders(config: ExtrapolateConfig, dpo: Location) -> list[Path]:
    if config.output is None:
        return [Path("checkpoints") / theta_name(dpo.name, alpha) for alpha in config.alpha]
    if "{alpha}" in config.output:
        return [Path(config.output.replace("{alpha}", repr(alpha))) for alpha in config.alpha]
    if len(config.alpha) == 1:
        return [Path(config.output)]
    return [Path(config.output) / f"alpha-{alpha!r}" for alpha in config.alpha]


def _plan_output(
    config: ExtrapolateConfig, alpha: float, folder: Path, sources: Row, destination: Destination | None
) -> Output:
    values = {"format": FORMAT, "alpha": alpha, **recorded(config, "weights"), **sources}
    made_from = Fingerprint(values, absent_values(config, "weights"))
    complete = is_complete(folder, made_from, overwrite=config.overwrite)
    if destination and not config.overwrite:
        destination.require_same_output(made_from)
    return Output(alpha, folder, made_from, complete, destination)


def _execute(job: ExtrapolatePlan) -> None:
    started, clock = time.time(), time.perf_counter()
    _require_space(job)
    with ExitStack() as stack:
        staged = [
            stack.enter_context(
                StagedOutput(output.folder, output.fingerprint, weights=job.weights, fsync=job.config.fsync)
            )
            for output in job.todo
        ]
        times = {"started": started, **_write_shards(job, staged)}
        _require_unchanged(job)
        _check_change(job, staged)
        times["seconds"] = round(time.perf_counter() - clock, 3)
        for output, folder in zip(job.todo, staged, strict=True):
            _add_other_files(job, output, folder, times)
            folder.commit()


def _require_space(job: ExtrapolatePlan) -> None:
    folder = next(parent for parent in (job.todo[0].folder, *job.todo[0].folder.resolve().parents) if parent.exists())
    staged = sum(file.stat().st_size for output in job.todo for file in output.folder.glob(".expo-partial/*.partial"))
    copied = sum(file.stat().st_size for file in job.side_files.values())
    needed, free = (job.pair.nbytes + copied) * len(job.todo) - staged, shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFailure(f"{folder} has {_amount(free)} free, but {_amount(needed)} are needed")


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes} bytes"


def _write_shards(job: ExtrapolatePlan, staged: Sequence[StagedOutput]) -> Row:
    """Combine the missing shards; returns the time of the first read and the seconds that combining took."""
    for output in staged:
        output.verify()
    first_read, settings = time.time(), job.pair.settings
    with reading_ahead(_in_turn(job.pair)):
        from expo.theta import stream
    device, workers = find_device(job.config.device, prefer_gpu=False), job.config.workers or stream.default_workers()
    with ExitStack() as stack:
        progress = stack.enter_context(closing(bytes_bar(job.pair.nbytes * len(staged), "extrapolate")))
        started = time.perf_counter()
        sources = stack.enter_context(stream.SourceFiles(*job.pair.sources))
        disk = stack.enter_context(Background())
        if job.pair.equal:
            stream.Combiner(sources, replace(settings, alphas=()), device, workers).run(
                [(segment, 0) for segment in job.pair.equal], []
            )
        combiner = stream.Combiner(sources, settings, device, workers)
        for shard in job.pair.shards:
            if any(shard.name not in output.records for output in staged):
                _write_shard(shard, combiner, staged, disk, progress)
            else:
                progress.update(shard.nbytes * len(staged))
        return {"first_read": first_read, "combine_seconds": round(time.perf_counter() - started, 3)}


def _in_turn(pair: PairPlan) -> list[Path]:
    """The weight files in approximate reading order: a file of each side in turn."""
    sides = zip_longest(*([shard.file for shard in source.shards] for source in pair.sources))
    return [file for files in sides for file in files if file is not None]


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
        norms = total_norms(norms for _, norms in pieces)
        for output, file in zip(staged, files, strict=True):
            disk.submit(_finish_shard, output, file, shard, norms.delta, norms.sft)
        stack.pop_all()  # the files are the background's now


def _finish_shard(output: StagedOutput, file: StagedShard, shard: ShardPlan, delta: float, sft: float) -> None:
    with closing(file):
        output.record(ShardRecord(shard.name, shard.nbytes, file.finish(), delta, sft))


def _require_unchanged(job: ExtrapolatePlan) -> None:
    for side, location in (("sft", job.sft), ("dpo", job.dpo)):
        if source_fingerprint(location) != job.todo[0].fingerprint[side]:
            raise InputError(f"{location.path} changed while it was read; rerun the command")


def _check_change(job: ExtrapolatePlan, staged: Sequence[StagedOutput]) -> None:
    changed = [folder for output, folder in zip(job.todo, staged, strict=True) if output.alpha]
    if changed and job.pair.has_change:
        figures = delta_figures(changed[0].records)
        check_change(figures["norm"], figures["relative"])


def _add_other_files(job: ExtrapolatePlan, output: Output, folder: StagedOutput, times: Row) -> None:
    for name, file in job.side_files.items():
        folder.add_copy(name, file)
    if CONFIG_FILE in job.side_files and (job.config.dtype != "auto" or job.pair.changes_config):
        folder.add_text(CONFIG_FILE, config_text(job.pair.dpo.config, job.config.dtype))
    if not job.pair.is_single_file:
        folder.add_text(INDEX_FILE, index_json(job.pair))
    folder.add_text(CARD_FILE, card(job, output.alpha, folder.records))
    files = sorted({*job.side_files, *folder.records, CARD_FILE, *([] if job.pair.is_single_file else [INDEX_FILE])})
    folder.add_text(MANIFEST_FILE, manifest(job, output.alpha, output.fingerprint, folder.records, files, times))
