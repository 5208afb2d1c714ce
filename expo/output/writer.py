"""Checkpoint folders that are complete or visibly unfinished: staging, resume by shard, commit.

An output is built in `<folder>/.expo-partial/` under names that end in `.partial`, which no loader mistakes for
weights. A journal there records each complete shard. When all files are complete they are renamed into the folder:
shards first, then the manifest, the index and config.json, without which nothing loads the folder. After a kill, even
between two renames, rerunning the command continues.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

import xxhash

from expo.checkpoint.folder import CONFIG_FILE, INDEX_FILE, PARTIAL_FOLDER, read_json
from expo.disk import Background, preallocate
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row, hash_file, sync, sync_folder
from expo.journal import Journal, read_journal
from expo.settings import require_same

MANIFEST_FILE = "expo.json"
CARD_FILE = "README.md"
LAST_FILES = (MANIFEST_FILE, INDEX_FILE, CONFIG_FILE)
"""Renamed last, in this order; removed first, in reverse order."""

JOURNAL_FILE = "journal.jsonl"
SUFFIX = ".partial"
FLUSH_BYTES = 256 << 20
"""A file is flushed to disk each time this much of it is written, so that little is left at its end."""

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


Checksums = Mapping[str, Mapping[str, str]]
"""With --verify: side → weight file → XXH3-128 of the sources, as `checkpoint.weights_xxh3` gives it."""

RECORD_KEYS = {field.name for field in fields(ShardRecord)}


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


def _read_journal(folder: Path) -> list[Row]:
    return read_journal(folder / PARTIAL_FOLDER / JOURNAL_FILE)


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


class StagedShard:
    """One output file being written; pieces arrive in any order and are written and hashed in sequence.

    Args:
        path: The staged file.
        header: Its first bytes.
        nbytes: Its final size; the disk space is allocated at once.
        fsync: Whether `finish` flushes it to disk.
        disk: Flushes what is written so far from time to time, in the background.

    Raises:
        EnvironmentFailure: The disk is full, or writing failed.
    """

    def __init__(
        self, path: Path, header: bytes, nbytes: int, *, fsync: bool = True, disk: Background | None = None
    ) -> None:
        self._path = path
        self._fsync = fsync
        self._disk = disk if fsync else None
        self._flushed = 0
        self._hash = xxhash.xxh3_128()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[int, memoryview, Callable[[], None]]] = {}
        self._turn = 0
        self._busy = False
        with self._explained(), ExitStack() as opening:
            self._stream: IO[bytes] = opening.enter_context(path.open("wb", buffering=0))
            preallocate(self._stream.fileno(), nbytes)
            self._append(0, memoryview(header))
            opening.pop_all()

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Take piece `number`, which belongs at `offset` in the file; `done` is called when `data` is free again.

        Called from several threads. The caller with the next piece writes it and all that wait behind it.

        Raises:
            EnvironmentFailure: The disk is full, or writing failed.
        """
        with self._lock:
            self._waiting[number] = (offset, data, done)
        while (piece := self._next()) is not None:
            offset, data, done = piece
            with self._explained():
                self._append(offset, data)
            done()
            with self._lock:
                self._turn += 1
                self._busy = False

    def _next(self) -> tuple[int, memoryview, Callable[[], None]] | None:
        with self._lock:
            if self._busy or self._turn not in self._waiting:
                return None
            self._busy = True
            return self._waiting.pop(self._turn)

    def _append(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._stream.fileno(), data[done:], offset + done)
        self._hash.update(data)
        if self._disk is not None and offset + done >= self._flushed + FLUSH_BYTES:
            self._flushed = offset + done
            self._disk.offer(sync, self._stream)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"writing {self._path} failed: {error.strerror}; rerun the same command to continue"
            raise EnvironmentFailure(message) from error

    def finish(self) -> str:
        """Make the file durable, close it, and return its checksum."""
        with self._explained():
            if self._fsync:
                sync(self._stream)
            self._stream.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._stream.close()


class StagedOutput:
    """An output folder while it is written; a context manager that holds its lock.

    On an `InputError` the staged files are discarded; on any other exception they are kept for the next run.

    Args:
        folder: The output folder.
        fingerprint: What the output is made from; files staged under another one are discarded.
        weights: With --verify: shards that were not staged from these are rebuilt.
        fsync: Whether files are flushed to disk.

    Raises:
        InputError: Another run is writing there.
        EnvironmentFailure: The folder cannot be created or written.
    """

    def __init__(self, folder: Path, fingerprint: Row, *, weights: Checksums | None = None, fsync: bool = True) -> None:
        self.folder = folder
        self._fsync = fsync
        self._staging = folder / PARTIAL_FOLDER
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            self._journal = self._open_journal(fingerprint)
        except OSError as error:
            raise EnvironmentFailure(f"cannot write to {folder}: {error.strerror}") from error
        self._staged: list[str] = []
        self.records = {row["shard"]: ShardRecord(**row) for row in self._recorded(weights)}

    def _recorded(self, weights: Checksums | None) -> list[Row]:
        rows: list[Row] = []
        made_from = None
        for row in self._journal.rows:
            if "weights" in row:
                rows, made_from = [], row["weights"]
            elif row.keys() == RECORD_KEYS:
                rows.append(row)
        if weights is None or weights == made_from:
            return rows
        self._journal.append([{"weights": weights}])
        if rows:
            log.warning("the files staged in %s may come from other weights; rebuilding them", self.folder)
        return []

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
            self._remove_staging()
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
        self._journal.append([asdict(record)])

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
        return self._staging / (name + SUFFIX)

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
        self._journal.append([{"commit": files}])
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
        files = next(row["commit"] for row in rows if "commit" in row)
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
        for name in _files(self._staging):
            if not name.startswith(JOURNAL_FILE):  # its lock has its name too
                (self._staging / name).unlink()

    def _remove_staging(self) -> None:
        shutil.rmtree(self._staging)
        for folder in self._made:
            if not any(folder.iterdir()):
                folder.rmdir()
