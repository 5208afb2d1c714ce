"""`expo extrapolate`: write θ(α) = θ_dpo + α(θ_dpo − θ_sft) as a checkpoint.

Plan from headers (`plan`), then a loop over shards and pieces (`_write_shards`). What is computed is in
`combine/` and `rules.py`, how files become final in `writer.py`.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expo import __version__
from expo.adapter.folders import is_adapter, output_side_files, require_base
from expo.card import model_card
from expo.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    config_with_dtype,
    source_fingerprint,
)
from expo.combine.decide import plan_pair
from expo.combine.decide_adapter import plan_adapter
from expo.combine.doubts import question_change, question_pair
from expo.combine.layout import index_json
from expo.combine.plan import PairPlan, PairRules, ShardPlan
from expo.config import ExtrapolateConfig
from expo.disk import Background
from expo.errors import EnvironmentFailure, InputError
from expo.hub import Location, locate, refuse_inside
from expo.pickled import read_source
from expo.progress import Progress, bytes_bar
from expo.publish import Destination, Pushed, find_destinations, make_repository, push
from expo.store import Row
from expo.tokens import require_same_tokens
from expo.writer import (
    CARD_FILE,
    MANIFEST_FILE,
    ShardRecord,
    StagedOutput,
    StagedShard,
    finish_interrupted,
    is_complete,
)

if TYPE_CHECKING:
    from expo.combine.stream import Combiner  # imports torch, which planning does without

FORMAT = 1
"""Raised when the same settings would give other bytes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """One α's output."""

    alpha: float
    folder: Path
    fingerprint: Row
    complete: bool
    """Whether it is there already."""
    destination: Destination | None
    """Where on the hub it goes; None where it stays here."""

    def describe(self) -> Row:
        """The output as plain data."""
        goes = {"push_to": self.destination.repository} if self.destination else {}
        return {"alpha": self.alpha, "path": str(self.folder), "complete": self.complete, **goes}


@dataclass(frozen=True)
class Plan:
    """Everything `expo extrapolate` will do."""

    config: ExtrapolateConfig
    sft: Location
    dpo: Location
    pair: PairPlan
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
            "outputs": [output.describe() for output in self.outputs],
            "tensors": _tensor_counts(pair),
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
            **_vocabulary(pair),
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
    """Where it is on the hub, where it was pushed."""


def run(config: ExtrapolateConfig) -> tuple[Written, ...]:
    """Write every α's checkpoint that is not complete.

    Raises:
        InputError: The settings or inputs are at fault; nothing is left behind.
        EnvironmentFailure: I/O failed; the same call goes on from there.
    """
    work = plan(config)
    finished = [finish_interrupted(output.folder, output.fingerprint) for output in work.todo]
    if any(finished):
        work = plan(config)
    for output in work.outputs:
        if output.destination:
            make_repository(output.destination, private=config.private)
    if work.todo:
        _execute(work)
    return tuple(map(_written, work.outputs))


def _written(output: Output) -> Written:
    pushed = push(output.destination, output.folder) if output.destination else None
    return Written(output.alpha, output.folder, "already complete" if output.complete else "written", pushed)


def plan(config: ExtrapolateConfig) -> Plan:
    """Decide everything from headers; nothing is written.

    Raises:
        InputError: The inputs do not fit together, or an output folder may not be used.
    """
    destinations = find_destinations(config.repositories, private=config.private)
    sft = locate(config.sft, weights_only=True, pickled=config.allow_pickle)
    dpo = locate(config.dpo, pickled=config.allow_pickle)
    if is_adapter(dpo.path):  # then SFT's config and other side files are the output's
        sft = locate(config.sft, pickled=config.allow_pickle)
    folders = _output_folders(config, dpo)
    for folder in folders:
        refuse_inside(folder, sft, dpo)
    sources = {"sft": source_fingerprint(sft), "dpo": source_fingerprint(dpo)}
    outputs = tuple(
        _plan_output(config, alpha, folder, sources, destination)
        for alpha, folder, destination in zip_longest(config.alpha, folders, destinations)
    )
    rules = PairRules(
        alphas=tuple(output.alpha for output in outputs if not output.complete),
        alpha_for=config.alphas_for,
        exclude=config.exclude,
        copy_missing=config.missing == "copy-dpo",
        common_vocabulary=config.vocab == "common",
        dtype=config.dtype,
        max_shard_bytes=config.max_shard_bytes,
        allow_nonfinite=config.allow_nonfinite,
    )
    pair = _plan_pair(sft, dpo, config, rules)
    if pair.adapter is None:
        question_pair(sft, dpo, pair.sft, pair.dpo)
    require_same_tokens(sft.path, dpo.path)
    if pair.dropped:
        log.warning("%d tensors are in %s only and dropped (%s …)", len(pair.dropped), sft.label, pair.dropped[0])
    if pair.vocabulary:
        rows = pair.vocabulary
        log.warning(
            "vocabularies differ (SFT %d, DPO %d): %d rows are extrapolated, %d copied from DPO, %d of SFT dropped",
            *(rows.sft, rows.dpo, rows.common, rows.dpo - rows.common, rows.sft - rows.common),
        )
    return Plan(config, sft, dpo, pair, outputs, output_side_files(sft.path, dpo.path))


def _plan_pair(sft: Location, dpo: Location, config: ExtrapolateConfig, rules: PairRules) -> PairPlan:
    require_base(sft, dpo)
    if is_adapter(dpo.path):
        return plan_adapter(read_source(sft, config.allow_pickle), dpo.path, rules)
    return plan_pair(read_source(sft, config.allow_pickle), read_source(dpo, config.allow_pickle), rules)


def _output_folders(config: ExtrapolateConfig, dpo: Location) -> list[Path]:
    if config.output is None:
        return [Path("checkpoints") / f"{dpo.name}-ExPO-a{alpha!r}" for alpha in config.alpha]
    if "{alpha}" in config.output:
        return [Path(config.output.replace("{alpha}", repr(alpha))) for alpha in config.alpha]
    if len(config.alpha) == 1:
        return [Path(config.output)]
    return [Path(config.output) / f"alpha-{alpha!r}" for alpha in config.alpha]


def _plan_output(
    config: ExtrapolateConfig, alpha: float, folder: Path, sources: Row, destination: Destination | None
) -> Output:
    made_from = {"format": FORMAT, **_result_settings(config, alpha), **sources}
    complete = is_complete(folder, made_from, overwrite=config.overwrite)
    if destination and not config.overwrite:
        destination.require_same_output(made_from)
    return Output(alpha, folder, made_from, complete, destination)


def _execute(work: Plan) -> None:
    started, clock = time.time(), time.perf_counter()
    _require_space(work)
    with ExitStack() as stack:
        staged = [
            stack.enter_context(StagedOutput(output.folder, output.fingerprint, fsync=work.config.fsync))
            for output in work.todo
        ]
        times = {"started": started, **_write_shards(work, staged)}
        _require_unchanged(work)
        _question_change(work, staged)
        times["seconds"] = round(time.perf_counter() - clock, 3)
        for output, folder in zip(work.todo, staged, strict=True):
            _add_other_files(work, output, folder, times)
            folder.commit()


def _require_space(work: Plan) -> None:
    folder = next(parent for parent in (work.todo[0].folder, *work.todo[0].folder.resolve().parents) if parent.exists())
    staged = sum(file.stat().st_size for output in work.todo for file in output.folder.glob(".expo-partial/*.partial"))
    copied = sum(file.stat().st_size for file in work.side_files.values())
    needed, free = (work.pair.nbytes + copied) * len(work.todo) - staged, shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFailure(f"{folder} has {_amount(free)} free and {_amount(needed)} are needed")


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes} bytes"


def _write_shards(work: Plan, staged: Sequence[StagedOutput]) -> Row:
    """Combine what is not there yet; when the first read was, and the seconds from it to the last write."""
    for output in staged:
        output.verify()
    stream, rules = _arithmetic(), work.pair.rules
    device, workers = stream.pick_device(work.config.device), work.config.workers or stream.default_workers()
    with ExitStack() as stack:
        progress = stack.enter_context(closing(bytes_bar(work.pair.nbytes * len(staged), "extrapolate")))
        first_read, started = time.time(), time.perf_counter()
        sources = stack.enter_context(stream.SourceFiles(*work.pair.sources))
        disk = stack.enter_context(Background())
        if work.pair.equal:
            stream.Combiner(sources, replace(rules, alphas=()), device, workers).run(
                [(part, 0) for part in work.pair.equal], []
            )
        combiner = stream.Combiner(sources, rules, device, workers)
        for shard in work.pair.shards:
            if any(shard.name not in output.records for output in staged):
                _write_shard(shard, combiner, staged, disk, progress)
            else:
                progress.update(shard.nbytes * len(staged))
        return {"first_read": first_read, "combine_seconds": round(time.perf_counter() - started, 3)}


def _write_shard(
    shard: ShardPlan, combiner: Combiner, staged: Sequence[StagedOutput], disk: Background, progress: Progress
) -> None:
    with ExitStack() as stack:
        files = []
        for output in staged:
            files.append(output.start_shard(shard.name, shard.header, shard.nbytes, disk))
            stack.callback(files[-1].close)
        pieces = combiner.run(shard.parts(), files, progress.update)
        delta, sft, _ = _arithmetic().total_norms(norms for _, norms in pieces)
        for output, file in zip(staged, files, strict=True):
            disk.submit(_finish_shard, output, file, shard, delta, sft)
        stack.pop_all()  # the files are the background's now


def _finish_shard(output: StagedOutput, file: StagedShard, shard: ShardPlan, delta: float, sft: float) -> None:
    with closing(file):
        output.record(ShardRecord(shard.name, shard.nbytes, file.finish(), delta, sft))


def _arithmetic() -> ModuleType:
    """`combine.stream`, which imports torch: a fifth faster without the garbage collector looking on."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        from expo.combine import stream
    finally:
        if collecting:
            gc.enable()
    return stream


def _require_unchanged(work: Plan) -> None:
    for side, location in (("sft", work.sft), ("dpo", work.dpo)):
        if source_fingerprint(location) != work.todo[0].fingerprint[side]:
            raise InputError(f"{location.path} changed while it was read; run the command again")


def _question_change(work: Plan, staged: Sequence[StagedOutput]) -> None:
    changed = [folder for output, folder in zip(work.todo, staged, strict=True) if output.alpha]
    if changed and work.pair.count("extrapolate", "merge"):
        figures = _delta_figures(changed[0])
        question_change(figures["norm"], figures["relative"])


def _add_other_files(work: Plan, output: Output, folder: StagedOutput, times: Row) -> None:
    for name, file in work.side_files.items():
        folder.add_copy(name, file)
    if work.config.dtype != "auto" and CONFIG_FILE in work.side_files:
        folder.add_text(CONFIG_FILE, config_with_dtype(work.pair.dpo.path, work.config.dtype))
    if not work.pair.is_single_file:
        folder.add_text(INDEX_FILE, index_json(work.pair))
    figures = _delta_figures(folder)
    folder.add_text(CARD_FILE, _card(work, output, figures))
    files = sorted({*work.side_files, *folder.records, CARD_FILE, *([] if work.pair.is_single_file else [INDEX_FILE])})
    manifest = _manifest(work, output, folder, files, figures, times)
    folder.add_text(MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _delta_figures(folder: StagedOutput) -> Row:
    # fsum, since a resumed run has the records in another order; null, since JSON has no NaN.
    delta = math.sqrt(math.fsum(record.delta_squared for record in folder.records.values()))
    size = math.sqrt(math.fsum(record.sft_squared for record in folder.records.values()))
    figures = {"norm": delta, "sft_norm": size, "relative": delta / size if size else 0.0}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _tensor_counts(pair: PairPlan) -> dict[str, int]:
    return {
        **({} if pair.adapter is None else {"merged": pair.count("merge")}),
        "extrapolated": pair.count("extrapolate"),
        "copied": pair.count("copy", "convert"),
        "equal": pair.count("match"),
    }


def _vocabulary(pair: PairPlan) -> Row:
    if pair.vocabulary is None:
        return {}
    sft, dpo, common = pair.vocabulary.sft, pair.vocabulary.dpo, pair.vocabulary.common
    rows = {"sft": sft, "dpo": dpo, "rows_extrapolated": common}
    return {"vocabulary": rows | {"rows_copied_from_dpo": dpo - common, "rows_of_sft_dropped": sft - common}}


RESULT_SETTINGS = ("dtype", "max_shard_size", "alpha_for", "exclude", "missing", "vocab", "allow_nonfinite")
"""Settings that change the result, beside α and the sources."""


def _result_settings(config: ExtrapolateConfig, alpha: float) -> Row:
    values = {name: getattr(config, name) for name in RESULT_SETTINGS}
    return {"alpha": alpha, **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}}


def _source_names(work: Plan) -> Row:
    """The sources as they were given; of a path its last part, since the rest says nothing to others."""
    config = work.config
    return {
        "sft": config.sft if work.sft.hub_id else work.sft.name,
        "dpo": config.dpo if work.dpo.hub_id else work.dpo.name,
    }


def _manifest(
    work: Plan, output: Output, folder: StagedOutput, files: list[str], figures: Row, times: Row
) -> dict[str, Any]:
    return {
        "command": "extrapolate",
        "versions": {"expo": __version__, "torch": version("torch"), "python": platform.python_version()},
        "config": {**_source_names(work), **_result_settings(work.config, output.alpha)},
        "alpha": output.alpha,
        "fingerprint": output.fingerprint,
        "sources": {
            side: {"name": location.label, "revision": location.revision}
            for side, location in (("sft", work.sft), ("dpo", work.dpo))
        },
        "tensors": _tensor_counts(work.pair),
        **_vocabulary(work.pair),
        **({} if work.pair.adapter is None else {"lora": work.pair.adapter.describe()}),
        "delta": figures,
        "bytes": work.pair.nbytes,
        "shards": {
            name: {"bytes": record.nbytes, "xxh3": record.xxh3} for name, record in sorted(folder.records.items())
        },
        "files": files,
        "clock": times,
    }


def _card(work: Plan, output: Output, figures: Row) -> str:
    counts, relative = _tensor_counts(work.pair), figures["relative"]
    return model_card(
        title=f"{work.dpo.name}-ExPO-a{output.alpha!r}",
        alpha=output.alpha,
        sft=work.sft,
        dpo=work.dpo,
        command=_command(work, output.alpha),
        is_adapter=work.pair.adapter is not None,
        figures={
            "tensors extrapolated": counts["extrapolated"] + counts.get("merged", 0),
            "‖θ_dpo − θ_sft‖ / ‖θ_sft‖ of these": "not finite" if relative is None else f"{relative:.5f}",
            "tensors copied from θ_dpo": counts["copied"] + counts["equal"],
        },
    )


def _command(work: Plan, alpha: float) -> str:
    words = ["expo", "extrapolate"]
    for flag, location in (("--sft", work.sft), ("--dpo", work.dpo)):
        words += [flag, f"{location.hub_id}@{location.revision}" if location.hub_id else location.name]
    words += ["--alpha", repr(alpha)]
    for name in RESULT_SETTINGS:
        value, flag = getattr(work.config, name), "--" + name.replace("_", "-")
        if isinstance(value, tuple):
            words += [word for item in value for word in (flag, item)]
        elif value != getattr(ExtrapolateConfig, name):
            words += [flag] if value is True else [flag, value]
    words += ["--allow-pickle"] if work.config.allow_pickle else []
    return shlex.join(words)
