"""A checkpoint written in parts: which shards a part has, the state of each part, and taking them into one output.

Parts share nothing while they run: each stages its shards in `<output>/.expo-partial/i-of-N/`, with a journal and a
lock of its own (`writer.py`), on whatever machine sees that folder. Joining checks that every shard is there and has
its checksum, and commits them from where they are, as one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from expo.cpus import usable_cpus
from expo.errors import InputError
from expo.files import Row, hash_file
from expo.journal import Journal, read_journal
from expo.output.writer import (
    FINISHED,
    JOURNAL_FILE,
    PART_FOLDER,
    SHARDS,
    SUFFIX,
    Checksums,
    ShardRecord,
    StagedOutput,
    record_of,
    staging_folder,
)
from expo.parts import Part, all_parts
from expo.settings import require_same
from expo.theta.plan import ShardPlan

HASHERS = 4
"""Threads that read staged shards for their checksums, at most."""


def share(shards: Sequence[ShardPlan], part: Part) -> tuple[ShardPlan, ...]:
    """A part's shards, in order: the largest first, each goes to the part that has the fewest bytes so far.

    A shard is the smallest share, since a file is the smallest thing that is committed.
    """
    loads = [(0, index) for index in range(part.count)]
    mine: set[str] = set()
    for shard in sorted(shards, key=lambda shard: -shard.nbytes):
        nbytes, index = heapq.heappop(loads)
        heapq.heappush(loads, (nbytes + shard.nbytes, index))
        if index == part.index:
            mine.add(shard.name)
    return tuple(shard for shard in shards if shard.name in mine)


@dataclass(frozen=True)
class PartState:
    """What is there of a part."""

    part: Part
    reason: str | None
    """Why it cannot be joined; None where it is finished."""
    records: Mapping[str, ShardRecord]
    """Its complete shards."""
    times: Row
    """When it was made, if it is finished."""

    @property
    def is_finished(self) -> bool:
        """Whether all of its shards are there."""
        return self.reason is None


def counts_in(folder: Path) -> set[int]:
    """How many parts an unfinished output was divided into; several numbers are a mix."""
    staging = staging_folder(folder)
    names = [path.name for path in staging.iterdir()] if staging.is_dir() else []
    return {int(found[1]) for found in map(PART_FOLDER.fullmatch, names) if found}


def require_same_cut(folder: Path, count: int | None, *, overwrite: bool) -> None:
    """Refuse to continue an output that was begun with another number of parts.

    Args:
        folder: The output folder.
        count: N; None for a run without parts.
        overwrite: Whether what is there may be replaced.

    Raises:
        InputError: It was begun with another number of parts.
    """
    others = counts_in(folder) - {count}
    if others and not overwrite:
        there = min(others)
        now = f", not of {count}" if count else ""
        raise InputError(
            f"{folder} has parts of {there}{now}: continue with --part i/{there} (in an array job slurm/{there}) or "
            f"--data-parallel {there} and --join {there}, or start over with --overwrite"
        )


def state_of(folder: Path, part: Part, fingerprint: Row, weights: Checksums | None, *, overwrite: bool) -> PartState:
    """What is there of a part; no weights are read.

    Args:
        folder: The output folder.
        part: Which part.
        fingerprint: What the output is made from.
        weights: With --verify: the checksums of the sources that it must have been made from.
        overwrite: Whether a part with other settings may be replaced.

    Raises:
        InputError: It was made with other settings.
    """
    staging = staging_folder(folder, part)
    header, *rows = read_journal(staging / JOURNAL_FILE) or [{}]
    if header.get("fingerprint") != fingerprint:
        if header and not overwrite:
            require_same(staging, header.get("fingerprint") or {}, fingerprint)
        return PartState(part, "not started", {}, {})
    begins = max((number for number, row in enumerate(rows) if "weights" in row), default=None)
    made_from = None if begins is None else rows[begins]["weights"]
    rows = rows[begins:]  # what was staged before may come from other weights, as in `StagedOutput`
    records = {record.shard: record for record in map(record_of, rows) if record is not None}
    there = {name: record for name, record in records.items() if _has_size(staging / (name + SUFFIX), record.nbytes)}
    finished = next((row for row in reversed(rows) if FINISHED in row), None)
    reason = None
    if weights is not None and made_from != weights:
        reason = "made without --verify" if made_from is None else "made from different weights"
    elif len(there) < len(records):
        reason = f"damaged, {sorted(records.keys() - there.keys())[0]} is missing"
    elif finished is None:
        reason = f"unfinished, {len(there)} shards"
    elif len(there) < finished[SHARDS]:
        reason = f"damaged, {len(there)} of {finished[SHARDS]} shards are recorded"
    return PartState(part, reason, there, finished[FINISHED] if finished else {})


def _has_size(file: Path, nbytes: int) -> bool:
    return file.is_file() and file.stat().st_size == nbytes


def adopt_parts(
    staged: StagedOutput, states: Iterable[PartState], shards: Sequence[ShardPlan], on_bytes: Callable[[int], object]
) -> dict[Part, str]:
    """Take every shard that the parts have into the output, once its checksum is that of its record.

    A shard whose checksum is another one is removed, so that its part makes it again.

    Args:
        staged: The output, which may have some shards itself.
        states: The parts that are finished.
        shards: Those that the output needs.
        on_bytes: Called with the size of each shard that was read.

    Returns:
        What is wrong with which part; empty where the output has all shards.
    """
    lacking = [
        (state, shard.name)
        for state in states
        for shard in share(shards, state.part)
        if shard.name not in staged.records
    ]
    wanted = [(state, state.records[name]) for state, name in lacking if name in state.records]
    wrong = {state.part: f"damaged, {name} is missing" for state, name in lacking if name not in state.records}
    with ThreadPoolExecutor(min(HASHERS, usable_cpus())) as pool:
        files = [staging_folder(staged.folder, state.part) / (one.shard + SUFFIX) for state, one in wanted]
        for (state, record), file, found in zip(wanted, files, pool.map(hash_file, files), strict=True):
            if found == record.xxh3:
                staged.adopt(record, state.part)
            else:
                with suppress(OSError):
                    file.unlink()
                wrong[state.part] = f"damaged, {record.shard} has a different checksum"
            on_bytes(record.nbytes)
    return wrong


def hold_parts(stack: ExitStack, folder: Path, fingerprint: Row, parts: Iterable[Part]) -> dict[Part, str]:
    """Lock parts until the stack ends, so that none is written while it is joined.

    Returns:
        The parts that are still running.
    """
    running: dict[Part, str] = {}
    for part in parts:
        journal = staging_folder(folder, part) / JOURNAL_FILE
        try:
            stack.enter_context(Journal(journal, {"fingerprint": fingerprint}))
        except InputError:
            running[part] = "still running"
    return running


def states_of(
    folder: Path, count: int, fingerprint: Row, weights: Checksums | None, *, overwrite: bool
) -> list[PartState]:
    """The state of every part.

    Raises:
        InputError: One was made with other settings.
    """
    return [state_of(folder, part, fingerprint, weights, overwrite=overwrite) for part in all_parts(count)]
