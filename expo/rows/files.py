"""The files of a row job's output, and the one reader of their state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path

from expo.errors import InputError
from expo.files import Row, json_text, write_atomic
from expo.journal import Journal, kept_rows, read_journal
from expo.locks import RunLock, is_locked, lock_of

Columns = Mapping[str, type | tuple[type, ...]]
"""Column → the type of its values."""

ROW_SYNC_SECONDS = 1.0


class State(Enum):
    """The state of an output."""

    ABSENT = "not started"
    UNFINISHED = "in progress, or interrupted"
    FINISHED = "complete"
    WITHOUT_META = "a final file without its meta file: not written by expo"
    WITHOUT_FINAL = "a meta file without its final file"
    DAMAGED = "an invalid meta file"


@dataclass(frozen=True)
class Found:
    """The state of an output and its content, read once."""

    state: State
    meta: Row = field(default_factory=dict)
    """The meta file of a finished output."""
    journal: Sequence[Row] = ()
    """The rows in the journal of an unfinished output, without the header."""
    kept: int = 0
    """How many of them, the first ones, are those of the finished output that is extended."""
    fingerprint: Row | None = None
    """What the output was made from; None if not recorded."""


@dataclass(frozen=True)
class RowFiles:
    """The files of one row job's output.

    While it runs there is a hidden journal, `.<name>.journal.jsonl`; a file under its final name is complete, and may
    hold any rows of its task. One that is extended counts until the journal has all of its rows, which come in one
    write. The meta file beside it has its `fingerprint`, the number of `rows`, how many `failed`, and a hash of the
    items the rows were made from. The files of a job's parts are in the folder `<name>.parts` beside it.
    """

    final: Path
    """The file other programs read."""
    name: str
    """The output's name, without a suffix."""
    items_key: str
    """The meta file's key for the hash of the items."""

    @property
    def meta(self) -> Path:
        """The meta file."""
        return self.final.with_name(f"{self.name}.meta.json")

    @property
    def journal(self) -> Path:
        """The journal of an unfinished run."""
        return self.final.with_name(f".{self.name}.journal.jsonl")

    @property
    def parts_folder(self) -> Path:
        """Where the parts of a run are kept until they are joined."""
        return self.final.with_name(f"{self.name}.parts")

    def part(self, stem: str) -> RowFiles:
        """The files of a part."""
        return RowFiles(self.parts_folder / f"{stem}.jsonl", stem, self.items_key)

    def look(self) -> Found:
        """Read the state of the output: a finished one is that until a journal has rows.

        Raises:
            InputError: The journal's header has no fingerprint.
        """
        if not self.journal.exists():
            return self._look_at_final()
        header, *rows = lines = read_journal(self.journal) or [{}]
        if not rows:
            finished = self._look_at_final()
            return finished if finished.state is State.FINISHED else Found(State.UNFINISHED)
        if not isinstance(header.get("fingerprint"), dict):
            raise InputError(f"{self.journal} is damaged: remove it to start over")
        return Found(State.UNFINISHED, journal=rows, kept=kept_rows(lines), fingerprint=header["fingerprint"])

    def _look_at_final(self) -> Found:
        if not self.meta.exists():
            return Found(State.WITHOUT_META if self.final.exists() else State.ABSENT)
        if not self.final.exists():
            return Found(State.WITHOUT_FINAL)
        try:
            meta = json.loads(self.meta.read_bytes())
        except ValueError:
            meta = None
        if not self._is_meta(meta):
            return Found(State.DAMAGED)
        return Found(State.FINISHED, meta=meta, fingerprint=meta["fingerprint"])

    def _is_meta(self, content: object) -> bool:
        """Whether a meta file's content has what a rerun needs."""
        if not isinstance(content, dict):
            return False
        counts = [content.get("rows"), content.get("failed")]
        known = isinstance(content.get("fingerprint"), dict) and self.items_key in content
        return known and all(isinstance(count, int) for count in counts)

    def require_own(self) -> Found:
        """Read the state of an output that a run may continue.

        Raises:
            InputError: It was not written by expo, or is damaged.
        """
        found = self.look()
        if found.state is State.WITHOUT_META:
            raise InputError(f"{self.final} exists and expo did not write it: move it away, or choose another --name")
        if found.state is State.DAMAGED:
            raise InputError(f"{self.meta} is damaged: move it and {self.final.name} away")
        return found

    # --- writing

    def open_journal(self, fingerprint: Row) -> Journal:
        """Start or continue the journal, for one process at a time.

        Raises:
            InputError: Another run is writing this output, or its folder cannot be created.
        """
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"cannot create the folder {self.journal.parent}: choose another --output-dir") from error
        return Journal(self.journal, {"fingerprint": fingerprint}, sync_every_s=ROW_SYNC_SECONDS)

    @contextmanager
    def holding(self, journal: Journal) -> Iterator[None]:
        """Close the journal at the end; remove it if it has no rows."""
        try:
            yield
        finally:
            if journal.is_empty and self.journal.exists():
                self.journal.unlink()
            journal.close()
            if self.final.parent.exists() and not any(self.final.parent.iterdir()):
                self.final.parent.rmdir()

    def finish(self, journal: Journal, contents: Mapping[Path, str], meta: Row) -> None:
        """Write the final files, the meta file last, and end the run; the journal is closed and removed."""
        if journal.is_empty:  # it would not say that an older meta file does not belong to the new final files
            self.meta.unlink(missing_ok=True)
        journal.is_empty = False  # from here on, its presence says that the final files may be inconsistent
        for path, text in contents.items():
            write_atomic(path, text)
        write_atomic(self.meta, json_text(meta, indent=2) + "\n")
        self.journal.unlink()
        journal.close()

    def lock(self) -> RunLock | None:
        """The lock for writing these files; None where another run has it, or may have it."""
        try:
            return RunLock(lock_of(self.journal), alone_here=False)
        except InputError:
            return None

    def is_held(self) -> bool:
        """Whether a run is writing these files now, or may be; nothing is written to find out."""
        return is_locked(self.journal)

    def remove(self) -> None:
        """Remove all of them; the caller holds the lock."""
        for path in (self.journal, self.final, self.meta):
            path.unlink(missing_ok=True)


def checksum(text: bytes) -> str:
    """SHA-256 of a file's content, as recorded in a part's meta file."""
    return sha256(text).hexdigest()


def require_columns(rows: Sequence[Row], columns: Columns, path: Path) -> Sequence[Row]:
    """Refuse rows that lack a column or have a wrong type.

    Returns:
        The rows.

    Raises:
        InputError: A row lacks a column, or has a value of another type.
    """
    for row in rows:
        if columns.keys() <= row.keys() and all(isinstance(row[name], kind) for name, kind in columns.items()):
            continue
        raise InputError(f"{path} is damaged: remove it to start over")
    return rows


def refuse_replacing(file: Path, outputs: Iterable[Path]) -> None:
    """Refuse outputs that would overwrite an input file, also through links.

    Raises:
        InputError: One is the file.
    """
    for output in outputs:
        if file.exists() and output.exists() and output.samefile(file):
            raise InputError(f"the output {output} is the input {file}; choose another --name or --output-dir")


class LineCount:
    """How many lines a growing file has, reading each byte once; none where there is no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = self._inode = 0

    def __call__(self) -> int:
        """The lines so far."""
        try:
            with self._path.open("rb") as stream:
                now = os.fstat(stream.fileno())
                if now.st_size < self._offset or now.st_ino != self._inode:
                    self._offset, self._lines, self._inode = 0, 0, now.st_ino  # rewritten
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return self._lines
        self._offset += len(data)
        self._lines += data.count(b"\n")
        return self._lines
