"""Checkpoint folders that are complete or visibly unfinished: staging, resume by shard, commit.

An output is built in `<folder>/.expo-partial/` under names that end in `.partial`, which no loader mistakes for
weights. A journal there records each complete shard. When all files are complete they are renamed into the folder:
shards first, then the manifest, the index and config.json (of an adapter adapter_config.json), without which nothing
loads the folder. After a kill, even
between two renames, rerunning the command continues. A part of an output is staged in a folder of its own in there, and
its files get their final names from there (`parts.py`).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO

from expo.checkpoint.folder import ADAPTER_CONFIG, CONFIG_FILE, INDEX_FILE, PARTIAL_FOLDER, read_json
from expo.disk import Background
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, hash_file, sync, sync_folder
from expo.journal import Journal, read_journal
from expo.output.shard import StagedShard
from expo.parts import Part
from expo.settings import require_same

MANIFEST_FILE = "expo.json"
CARD_FILE = "README.md"
LAST_FILES = (MANIFEST_FILE, INDEX_FILE, CONFIG_FILE, ADAPTER_CONFIG)
"""Renamed last, in this order; removed first, in reverse order."""

JOURNAL_FILE = "journal.jsonl"
SUFFIX = ".partial"
PART_FOLDER = re.compile(r"\d+-of-(\d+)")
"""Within the staging folder, where a part's files are."""
FINISHED = "finished"
"""The entry of a part's journal that says that all of its shards are there, and when they were made."""
SHARDS = "shards"
"""The entry beside it that says how many there are."""
STAGED_BY = "staged_by"
"""The entry of a commit that says which shards are in which part's folder."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRecord:
    """A complete staged shard."""

    shard: str
    nbytes: int
    xxh3: str
    """XXH3-128 of the whole file, hexadecimal (`xxhsum -H2` prints the same)."""
    delta_squared: float
    """‖θ_dpo − θ_sft‖² over the tensors that are extrapolated."""
    sft_squared: float
    """‖θ_sft‖² over the same."""
    fits: Mapping[str, Row] = field(default_factory=dict)
    """Of a training run: the line of each tensor in it that moves (`trajectory.fit.Fit`), by name."""
    approximation: Mapping[str, Row] = field(default_factory=dict)
    """Of an adapter of a given rank: what it has of each tensor (`approximation.Figures`), by name."""

    def row(self) -> Row:
        """As a journal records it."""
        return {name: value for name, value in asdict(self).items() if value or name not in OPTIONAL}


Checksums = Mapping[str, Mapping[str, str]]
"""With --verify: side → weight file → XXH3-128 of the sources, as `checkpoint.weights_xxh3` gives it."""

RECORD_KEYS = {one.name for one in fields(ShardRecord)}
OPTIONAL = {"fits", "approximation"}
"""Those that a journal leaves out where there are none."""


def record_of(row: Row) -> ShardRecord | None:
    """The shard that a row of a journal records; None where it says something else."""
    return ShardRecord(**row) if row.keys() | OPTIONAL == RECORD_KEYS else None


def read_records(journal: Path) -> list[ShardRecord]:
    """The complete shards that a journal records."""
    return [record for record in map(record_of, read_journal(journal)) if record is not None]


def is_complete(folder: Path, fingerprint: Row, *, overwrite: bool, weights: Checksums | None = None) -> bool:
    """Whether the folder already has this output; if not, check that it may be written there.

    Args:
        folder: The output folder; it need not exist.
        fingerprint: Every setting and source that changes the result.
        overwrite: Whether an output with other settings may be replaced.
        weights: Checksums of the sources' weights, as in the manifest; if given, the output's own weights are read
            and compared with its manifest too.

    Raises:
        InputError: The folder has other files or, without `overwrite`, an output that is damaged or has other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output {folder} is a file; choose another --output")
    journal = _read_journal(folder)
    manifest = _read_manifest(folder)
    if manifest and not journal and manifest.get("fingerprint") == fingerprint:
        fault = _fault(folder, manifest, weights)
        if fault is None:
            return True
        if not overwrite:
            raise InputError(f"{fault}; --overwrite rebuilds the output")
    foreign = sorted(set(_files(folder)) - _own_files(manifest, journal))
    if foreign:
        raise InputError(f"the output folder {folder} contains files expo did not write ({foreign[0]}); choose another")
    made_with = journal[0].get("fingerprint") if journal else (manifest or {}).get("fingerprint")
    if made_with is not None and not overwrite:
        require_same(folder, made_with, fingerprint)
    return False


def staging_folder(folder: Path, part: Part | None = None) -> Path:
    """Where an output, or a part of it, is until it is complete."""
    return folder / PARTIAL_FOLDER / (part.file_stem if part else "")


def _read_journal(folder: Path) -> list[Row]:
    return read_journal(staging_folder(folder) / JOURNAL_FILE)


def _read_manifest(folder: Path) -> Row | None:
    file = folder / MANIFEST_FILE
    try:
        content = read_json(file) if file.is_file() else {}
    except InputError as error:
        raise InputError(
            f"{error}; without it expo cannot tell which files it wrote: remove {folder}, or choose another"
        ) from error
    return content if _is_manifest(content) else None


def _is_manifest(content: Row) -> bool:
    """Whether a JSON object looks like a manifest of expo, as far as it is used here."""
    files, shards = content.get("files"), content.get("shards")
    return (
        isinstance(content.get("fingerprint"), dict)
        and (isinstance(files, list) and all(isinstance(name, str) for name in files))
        and (isinstance(shards, dict) and all(isinstance(one, dict) and "bytes" in one for one in shards.values()))
    )


def _fault(folder: Path, manifest: Row, weights: Checksums | None) -> str | None:
    """What is wrong with a finished output, if anything."""
    for name in manifest["files"]:
        if not _is_whole(folder / name, manifest["shards"].get(name, {}), by_content=weights is not None):
            return f"{folder / name} is missing or damaged"
    for side, files in (weights or {}).items():
        then = _checksums_in(manifest, side)
        if then is None:
            log.warning("%s was made without --verify: only sizes and times of %s are compared", folder, side)
        elif then != files:
            changed = sorted(name for name in {*then, *files} if then.get(name) != files.get(name))
            return f"{folder} was made from different weights of {side} ({changed[0]} has a different checksum)"
    return None


def _checksums_in(manifest: Row, side: str) -> dict[str, str] | None:
    """The checksums of a side's weights in the manifest; None if missing or malformed."""
    sources = manifest.get("sources")
    said = sources.get(side) if isinstance(sources, dict) else None
    hashes = said.get("xxh3") if isinstance(said, dict) else None
    return hashes if isinstance(hashes, dict) else None


def _is_whole(file: Path, said: Row, *, by_content: bool) -> bool:
    if not file.is_file() or said.get("bytes", file.stat().st_size) != file.stat().st_size:
        return False
    return not by_content or said.get("xxh3") is None or hash_file(file) == said["xxh3"]


def _own_files(manifest: Row | None, journal: list[Row]) -> set[str]:
    own = {MANIFEST_FILE, *manifest.get("files", [])} if manifest else set()
    for row in journal:
        own |= {*row.get("replaces", []), *row.get("commit", [])}
    return own


def _files(folder: Path) -> Iterator[str]:
    for parent, subfolders, files in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        subfolders[:] = [name for name in subfolders if relative / name != Path(PARTIAL_FOLDER)]
        yield from (str(relative / name) for name in files)


def finish_interrupted(folder: Path, fingerprint: Row) -> bool:
    """Finish the renames of an interrupted commit; returns whether there were any.

    Args:
        folder: The output folder.
        fingerprint: What the output is made from; a commit with another fingerprint is left alone.

    Raises:
        InputError: Another run is writing there.
        EnvironmentFailure: Renaming failed.
    """
    journal = _read_journal(folder)
    if not any("commit" in row for row in journal) or journal[0].get("fingerprint") != fingerprint:
        return False
    with StagedOutput(folder, fingerprint) as staged:
        staged.finish_commit()
    return True


class StagedOutput:
    """An output folder while it is written; a context manager that holds its lock.

    On an `InputError` the staged files are discarded; on any other exception they are kept for the next run.

    Args:
        folder: The output folder.
        fingerprint: What the output is made from; files staged under another one are discarded.
        weights: With --verify: shards that were not staged from these are rebuilt.
        fsync: Whether files are flushed to disk.
        part: Of which part the files are; None is the whole output, which alone is committed.

    Raises:
        InputError: Another run is writing there.
        EnvironmentFailure: The folder cannot be created or written.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Row,
        *,
        weights: Checksums | None = None,
        fsync: bool = True,
        part: Part | None = None,
    ) -> None:
        self.folder = folder
        self._fsync = fsync
        self._staging = staging_folder(folder, part)
        self._made = [parent for parent in self._staging.parents if not parent.exists()]
        self._staged_by: dict[str, str] = {}
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            self._journal = self._open_journal(fingerprint)
        except OSError as error:
            raise EnvironmentFailure(f"cannot write to {folder}: {error.strerror}") from error
        self._staged: list[str] = []
        self.records = self._recorded(weights)

    def _recorded(self, weights: Checksums | None) -> dict[str, ShardRecord]:
        records: dict[str, ShardRecord] = {}
        made_from = None
        for row in self._journal.rows:
            if "weights" in row:
                records, made_from = {}, row["weights"]
            elif record := record_of(row):
                records[record.shard] = record
        if weights is None or weights == made_from:
            return records
        self._journal.append([{"weights": weights}])
        if records:
            log.warning("the files staged in %s may come from other weights; rebuilding them", self.folder)
        return {}

    def _open_journal(self, fingerprint: Row) -> Journal:
        own = _own_files(_read_manifest(self.folder), _read_journal(self.folder))
        replaces = sorted(own & set(_files(self.folder)))  # a manifest that names ../x must not reach it
        journal = Journal(self._staging / JOURNAL_FILE, {"fingerprint": fingerprint, "replaces": replaces})
        try:
            if not journal.rows:
                self._empty_staging()
        except OSError:
            journal.close()
            raise
        return journal

    def __enter__(self) -> StagedOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, InputError):
            self._discard()
        self._journal.close()

    def verify(self) -> None:
        """Drop the records of shards whose staged bytes have changed."""
        for name, record in list(self.records.items()):
            if hash_file(self._path(name)) != record.xxh3:
                log.warning("the staged %s is damaged; rebuilding it", name)
                del self.records[name]

    def start_shard(self, name: str, header: bytes, nbytes: int, disk: Background | None = None) -> StagedShard:
        """Open one shard's file; `disk` flushes it in the background."""
        return StagedShard(self._path(name), header, nbytes, fsync=self._fsync, disk=disk)

    def record(self, record: ShardRecord) -> None:
        """Record that a shard is complete; a rerun keeps it."""
        self.records[record.shard] = record
        self._journal.append([record.row()])

    def finish_part(self, times: Row) -> None:
        """Record that a part is complete, and when it was made."""
        self._journal.append([{FINISHED: times, SHARDS: len(self.records)}])

    def adopt(self, record: ShardRecord, part: Part) -> None:
        """Take a shard that a part has staged; it stays where it is until the output is committed."""
        self.records[record.shard] = record
        self._staged_by[record.shard] = part.file_stem

    def add_text(self, name: str, text: str) -> None:
        """Stage a small file."""
        with self._new_file(name) as stream:
            stream.write(text.encode(errors="backslashreplace"))  # half a surrogate pair becomes its JSON escape

    def add_copy(self, name: str, source: Path) -> None:
        """Stage a copy of a file, byte for byte."""
        with self._new_file(name) as stream, source.open("rb") as original:
            shutil.copyfileobj(original, stream)

    def _new_file(self, name: str) -> IO[bytes]:
        self._staged.append(name)
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def _path(self, name: str) -> Path:
        return self._staging / self._staged_by.get(name, "") / (name + SUFFIX)

    def commit(self) -> None:
        """Give every staged file its final name; all must be complete.

        Raises:
            EnvironmentFailure: Renaming failed; the next run continues it.
        """
        files = self._in_order({*self.records, *self._staged})
        try:
            self._sync_staged(self._staged)
        except OSError as error:
            raise self._failure(error) from error
        self._journal.append([{"commit": files, STAGED_BY: self._staged_by}])
        self.finish_commit()

    def finish_commit(self) -> None:
        """Do the renames of a commit, or those that a killed run left.

        Raises:
            EnvironmentFailure: Renaming failed; the next run continues it.
        """
        try:
            self._rename_all()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> EnvironmentFailure:
        return EnvironmentFailure(
            f"completing {self.folder} failed: {error.strerror}; rerun the same command to continue"
        )

    def _rename_all(self) -> None:
        rows = read_journal(self._staging / JOURNAL_FILE)
        commit = next(row for row in rows if "commit" in row)
        files, self._staged_by = commit["commit"], commit.get(STAGED_BY, {})
        started = any("removed" in row for row in rows)
        if not started:
            for name in reversed(self._in_order(rows[0]["replaces"])):
                (self.folder / name).unlink(missing_ok=True)
            self._journal.append([{"removed": True}])
        for name in files:
            if self._path(name).exists():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._path(name), self.folder / name)
        self._sync_folders(self.folder, files)
        self._remove_staging()

    @staticmethod
    def _in_order(names: Iterable[str]) -> list[str]:
        rank = {name: position for position, name in enumerate(LAST_FILES)}
        return sorted(names, key=lambda name: (rank.get(name, -1), name))

    def _sync_staged(self, names: list[str]) -> None:
        for name in names if self._fsync else []:
            with self._path(name).open("rb+") as stream:
                sync(stream)

    def _sync_folders(self, root: Path, names: list[str]) -> None:
        for folder in {(root / name).parent for name in names} if self._fsync else set():
            sync_folder(folder)

    def _empty_staging(self) -> None:
        for name in self._own_staged():
            if not name.startswith(JOURNAL_FILE):  # its lock has its name too
                (self._staging / name).unlink()

    def _own_staged(self) -> list[str]:
        """The files in the staging folder that are not a part's."""
        return [name for name in _files(self._staging) if not PART_FOLDER.fullmatch(Path(name).parts[0])]

    def _discard(self) -> None:
        """Remove what this run staged; what parts have staged is theirs."""
        if any(PART_FOLDER.fullmatch(path.name) for path in self._staging.iterdir()):
            for name in self._own_staged():
                (self._staging / name).unlink()
        else:
            self._remove_staging()

    def _remove_staging(self) -> None:
        shutil.rmtree(self._staging)
        for folder in self._made:
            with suppress(OSError):  # another part has something there, or has removed it
                folder.rmdir()
