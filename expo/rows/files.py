"""The files of an output that is made row by row, and the one reader of what state they are in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path

from expo.errors import InputError
from expo.files import Row, json_text, write_atomic
from expo.journal import LOCK_SUFFIX, Journal, RunLock, read_journal

Columns = Mapping[str, type | tuple[type, ...]]
"""Column → what its values are."""

ROW_SYNC_SECONDS = 1.0


class State(Enum):
    """What there is of an output."""

    ABSENT = "not begun"
    UNFINISHED = "being made, or stopped while it was"
    FINISHED = "whole"
    WITHOUT_META = "a final file without its meta file: somebody else's"
    WITHOUT_FINAL = "a meta file without its final file"
    DAMAGED = "a meta file that is not as expo wrote it"


@dataclass(frozen=True)
class Found:
    """What there is of an output, read once."""

    state: State
    meta: Row = field(default_factory=dict)
    """Of a finished output."""
    journal: Sequence[Row] = ()
    """Of an unfinished one: the rows of its journal, without the header."""
    fingerprint: Row | None = None
    """What it was made from; None where nothing says so."""


@dataclass(frozen=True)
class RowFiles:
    """The files of one output that is made row by row.

    While it is made there is a hidden journal, `.<name>.journal.jsonl`; what is under a final name is whole. The
    meta file goes with it: its `fingerprint`, the number of `rows`, how many `failed`, and a hash of the items the
    rows were made from. Where it is made in parts, a folder `<name>.parts` beside it has their files.
    """

    final: Path
    """The file other programs read."""
    name: str
    """The output's name, without a suffix."""
    items_key: str
    """Under which key the meta has the hash of what the rows were made from."""

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
        """Where the parts of a run lie until they are joined."""
        return self.final.with_name(f"{self.name}.parts")

    def part(self, stem: str) -> RowFiles:
        """The files of a part."""
        return RowFiles(self.parts_folder / f"{stem}.jsonl", stem, self.items_key)

    def look(self) -> Found:
        """Read what there is of the output.

        Raises:
            InputError: The journal's header does not say what its rows were made from.
        """
        if self.journal.exists():
            header, *rows = read_journal(self.journal) or [{}]
            if rows and not isinstance(header.get("fingerprint"), dict):
                raise InputError(f"{self.journal} is damaged: remove it to start over")
            return Found(State.UNFINISHED, journal=rows, fingerprint=header.get("fingerprint") if rows else None)
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
        """Whether a meta file's content says what a rerun goes by."""
        if not isinstance(content, dict):
            return False
        counts = [content.get("rows"), content.get("failed")]
        known = isinstance(content.get("fingerprint"), dict) and self.items_key in content
        return known and all(isinstance(count, int) for count in counts)

    def require_own(self) -> Found:
        """What there is, where a run may go on from it.

        Raises:
            InputError: It is somebody else's, or damaged.
        """
        found = self.look()
        if found.state is State.WITHOUT_META:
            raise InputError(f"{self.final} exists and expo did not write it: move it away, or choose another --name")
        if found.state is State.DAMAGED:
            raise InputError(f"{self.meta} is damaged: move it and {self.final.name} away")
        return found

    # --- writing

    def open_journal(self, fingerprint: Row) -> Journal:
        """Begin or continue the journal, for one process at a time.

        Raises:
            InputError: Another run is writing this output, or its folder cannot be one.
        """
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"cannot create the folder {self.journal.parent}: choose another --output-dir") from error
        return Journal(self.journal, {"fingerprint": fingerprint}, sync_every_s=ROW_SYNC_SECONDS)

    @contextmanager
    def holding(self, journal: Journal) -> Iterator[None]:
        """Close the journal at the end, and leave none behind that has no rows."""
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
        journal.is_empty = False  # from here on it says that the files under final names may not belong together
        for path, text in contents.items():
            write_atomic(path, text)
        write_atomic(self.meta, json_text(meta, indent=2) + "\n")
        self.journal.unlink()
        journal.close()

    def lock(self) -> RunLock | None:
        """The right to write these files; None where another run has it, or may."""
        try:
            return RunLock(self.journal.with_name(self.journal.name + LOCK_SUFFIX), alone_here=False)
        except InputError:
            return None

    def remove(self) -> None:
        """Remove all of them; the caller holds the lock."""
        for path in (self.journal, self.final, self.meta):
            path.unlink(missing_ok=True)


def checksum(text: bytes) -> str:
    """SHA-256 of a file's content, as the meta file of a part has it."""
    return sha256(text).hexdigest()


def require_columns(rows: Sequence[Row], columns: Columns, path: Path) -> Sequence[Row]:
    """Refuse rows that are not as expo wrote them.

    Returns:
        The rows.

    Raises:
        InputError: A row lacks a column, or has another kind of value there.
    """
    for row in rows:
        if columns.keys() <= row.keys() and all(isinstance(row[name], kind) for name, kind in columns.items()):
            continue
        raise InputError(f"{path} is damaged: remove it to start over")
    return rows


def refuse_replacing(file: Path, outputs: Iterable[Path]) -> None:
    """Refuse outputs that would take an input file's place, also through links.

    Raises:
        InputError: One is the file.
    """
    for output in outputs:
        if file.exists() and output.exists() and output.samefile(file):
            raise InputError(f"the output {output} is the input {file}; choose another --name or --output-dir")
