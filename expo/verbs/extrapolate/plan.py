"""What `expo extrapolate` will do, decided from headers: the outputs, the plan of the pair, and which part of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from expo.checkpoint.folder import Location, refuse_inside, weights_xxh3
from expo.checkpoint.side_files import warn_of_missing
from expo.config import ExtrapolateConfig
from expo.config.course import plain, shown_step, step_of
from expo.files import Row
from expo.output.manifest import Origin, vocabulary_rows
from expo.output.parts import PartState, require_same_cut, share, state_of, states_of
from expo.output.publish import Destination, find_destinations
from expo.output.writer import Checksums, is_complete
from expo.parts import Part, all_parts, array_list, read_part
from expo.settings import Fingerprint, absent_values, recorded
from expo.theta.adapter.folders import output_side_files
from expo.theta.decide_ranked import plan_ranked
from expo.theta.names import theta_name
from expo.theta.pair import find_earlier, find_pair, pair_settings, plan_located, source_fingerprints
from expo.theta.plan import PairPlan, ShardPlan
from expo.verbs.extrapolate.adapter import adapter_files, adapter_plan, require_kind

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
    """Whether it, or the part of it that is asked for, already exists."""
    destination: Destination | None
    """Where it is pushed; None if it is not."""
    target_step: float | None = None
    """Of a training run, the step that α stands for."""

    def describe(self) -> Row:
        """The output as plain data."""
        goes = {"push_to": self.destination.repository} if self.destination else {}
        step = {} if self.target_step is None else {"target_step": self.target_step}
        return {"alpha": self.alpha, **step, "path": str(self.folder), "complete": self.complete, **goes}


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

    @property
    def part(self) -> Part | None:
        """The part that is asked for; None where it is the whole."""
        return part_of(self.config)

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The files that this run writes of each output."""
        return self.pair.shards if self.part is None else share(self.pair.shards, self.part)

    @property
    def nbytes(self) -> int:
        """The bytes of these files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def checks_equal(self) -> bool:
        """Whether this run looks at the tensors that must be equal and are in no file: one part does it for all."""
        return self.part is None or self.part.index == 0

    def _sft_bytes(self) -> int:
        """The bytes of SFT's tensors that this run reads."""
        return self.pair.sft_bytes(self.shards, with_equal=self.checks_equal)

    def _describe_join(self, count: int) -> Row:
        """What is there of each part, and which ones are to be made, as of row jobs (`rows.parts.describe_parts`)."""
        found: dict[Part, list[str | None]] = {part: [] for part in all_parts(count)}
        for output in self.todo:
            for state in self.states(output, count):
                found[state.part].append(state.reason)
        made = "finished" if self.todo else "nothing left to do"
        said = {part: next(filter(None, reasons), made) for part, reasons in found.items()}
        return {
            "parts_to_join": count,
            "parts": [{"part": str(part), "state": state} for part, state in said.items()],
            "parts_to_make": array_list(part.index for part, reasons in found.items() if any(reasons)),
            "joined": not self.todo,
        }

    def states(self, output: Output, count: int) -> list[PartState]:
        """The state of each of `count` parts of an output that has a share of it."""
        states = states_of(output.folder, count, output.fingerprint, self.weights, overwrite=self.config.overwrite)
        return [state for state in states if share(self.pair.shards, state.part)]

    def _describe_course(self) -> list[Row]:
        steps = [step for step, _ in self.config.course]
        return [
            {"step": plain(step), "path": str(one.path)}
            for step, one in zip(steps, (*self.earlier, self.dpo), strict=True)
        ]

    def describe(self) -> Row:
        """The plan as plain data."""
        pair = self.pair
        return {
            "sft": str(self.sft.path),
            "dpo": str(self.dpo.path),
            **({"checkpoints": self._describe_course()} if self.config.course else {}),
            "rule": self.config.rule_name,
            **({"dequantized": pair.dequantized} if pair.dequantized else {}),
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
            **({"sft_bytes_fetched": self._sft_bytes() if self.todo else 0} if self.sft.read_remote else {}),
            **({"part": str(self.part)} if self.part else {}),
            **({"workers": self.config.data_parallel} if self.config.data_parallel else {}),
            **({"ray": self.config.ray} if self.config.ray else {}),
            **(self._describe_join(self.config.join) if self.config.join else {}),
            "shards": [{"file": shard.name, "bytes": shard.nbytes} for shard in self.shards],
            "bytes_per_output": self.nbytes,
            "side_files": ", ".join(self.side_files),
        }


def plan(config: ExtrapolateConfig) -> ExtrapolatePlan:
    """Decide everything from headers; nothing is written.

    Raises:
        InputError: The inputs do not match, or an output folder cannot be used.
    """
    repositories = config.repositories if config.part is None else ()  # a part is not pushed
    destinations = find_destinations(repositories, private=config.private)
    sft, dpo = find_pair(config)
    if config.as_adapter:
        require_kind(dpo, config.rank)
    earlier = find_earlier(config, allow_pickle=config.allow_pickle)
    folders = _output_folders(config, dpo)
    for folder in folders:
        refuse_inside(folder, sft, dpo, *earlier)
    sources = source_fingerprints(config, sft, dpo, earlier)
    outputs = tuple(
        _plan_output(config, alpha, folder, sources, destination)
        for alpha, folder, destination in zip_longest(config.alpha, folders, destinations)
    )
    pair = _plan_pair(config, (sft, *earlier, dpo), outputs)
    weights = _checksums(config, sft, dpo, earlier) if config.verify else None  # last, since it takes long
    verified = tuple(_verified(config, output, weights) for output in outputs)
    if verified != outputs:
        pair = _plan_pair(config, (sft, *earlier, dpo), verified)
    if config.as_adapter:
        made = adapter_plan(pair, dpo) if config.rank is None else plan_ranked(pair, config.rank, config.dtype)
        return ExtrapolatePlan(config, sft, (), dpo, made, weights, verified, adapter_files(dpo))
    files = output_side_files(sft.path, dpo.path)
    if todo := [output for output in verified if not output.complete]:
        warn_of_missing(sft, dpo, files.keys(), todo[0].folder)
    return ExtrapolatePlan(config, sft, earlier, dpo, pair, weights, verified, files)


def _plan_pair(config: ExtrapolateConfig, models: Sequence[Location], outputs: Sequence[Output]) -> PairPlan:
    sft, *earlier, dpo = models
    todo = (output.alpha for output in outputs if not output.complete)
    settings = pair_settings(config, todo, dtype=config.dtype, max_shard_bytes=config.max_shard_bytes)
    return plan_located(sft, dpo, settings, allow_pickle=config.allow_pickle, earlier=earlier)


def _checksums(config: ExtrapolateConfig, sft: Location, dpo: Location, earlier: Sequence[Location]) -> Checksums:
    steps = {f"step {step:g}": one for (step, _), one in zip(config.course, earlier, strict=False)}
    models = {"sft": sft, "dpo": dpo, **steps}
    log.info("reading %s for their checksums", ", ".join(one.label for one in models.values()))
    return {side: weights_xxh3(one.path) for side, one in models.items()}


def _verified(config: ExtrapolateConfig, output: Output, weights: Checksums | None) -> Output:
    """The output, complete only if it was made from these weights and its own are intact."""
    if weights is None or not output.complete:
        return output
    return replace(output, complete=_is_complete(config, output.folder, output.fingerprint, weights))


def _is_complete(config: ExtrapolateConfig, folder: Path, fingerprint: Row, weights: Checksums | None = None) -> bool:
    """Whether nothing is left to do for an output, or for the part of it that is asked for."""
    overwrite, part = config.overwrite, part_of(config)
    if is_complete(folder, fingerprint, overwrite=overwrite, weights=weights):
        return True
    if config.ray is None:  # on a cluster, the run goes on with the number of parts that there is
        require_same_cut(folder, cut_of(config), overwrite=overwrite)
    return part is not None and state_of(folder, part, fingerprint, weights, overwrite=overwrite).is_finished


def cut_of(config: ExtrapolateConfig) -> int | None:
    """The number of parts; None for a run without parts."""
    part = part_of(config)
    if part is not None:
        return part.count
    return config.processes if config.processes > 1 else config.join


def part_of(config: ExtrapolateConfig) -> Part | None:
    """The part that is asked for; None where it is the whole."""
    return None if config.part is None else read_part(config.part, {})


def _output_folders(config: ExtrapolateConfig, dpo: Location) -> list[Path]:
    last = config.last_step
    if config.output is None:
        kind = "-adapter" if config.as_adapter else ""
        return [Path("checkpoints") / (theta_name(dpo.name, alpha, last) + kind) for alpha in config.alpha]
    named = [Path(config.named_by(config.output, alpha)) for alpha in config.alpha]
    if len(config.alpha) == 1 or named[0] != Path(config.output):
        return named
    if last is not None:
        return [Path(config.output) / f"step-{shown_step(step_of(alpha, last))}" for alpha in config.alpha]
    return [Path(config.output) / f"alpha-{alpha!r}" for alpha in config.alpha]


def _plan_output(
    config: ExtrapolateConfig, alpha: float, folder: Path, sources: Row, destination: Destination | None
) -> Output:
    values = {"format": FORMAT, "alpha": alpha, **recorded(config, "weights"), **sources}
    made_from = Fingerprint(values, absent_values(config, "weights"))
    complete = _is_complete(config, folder, made_from)
    if destination and not config.overwrite:
        destination.require_same_output(made_from)
    last = config.last_step
    return Output(alpha, folder, made_from, complete, destination, None if last is None else step_of(alpha, last))
