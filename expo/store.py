"""Files that are whole or absent: atomic writes, durable journals, and fingerprints to compare.

A final name only ever appears by `os.replace` of a file that is complete and on the disk. What is in progress
lives under a hidden or `.partial` name, so that a rerun finds it and nobody else loads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import xxhash

from expo.errors import EnvironmentFailure, InputError
from expo.files import is_utf8
from expo.lock import RunLock

Row = dict[str, Any]
Columns = Mapping[str, type | tuple[type, ...]]
"""Column → what its values are."""

ROW_SYNC_SECONDS = 1.0
LOCK_SUFFIX = ".lock"
"""Of the link beside a journal that says which process writes it."""
HASH_BLOCK_BYTES = 1 << 20


def write_atomic(path: Path, content: str | bytes, *, fsync: bool = True) -> None:
    """Write a file (text as UTF-8) so that `path` holds the old content or the new one, never a part.

    Raises:
        EnvironmentFailure: Writing failed; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                sync(stream)
        os.replace(temporary, path)
        if fsync:
            sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # of a folder that cannot be written this fails as well
            temporary.unlink()
        raise EnvironmentFailure(f"writing {path} failed: {error.strerror}") from error


def sync(stream: IO[Any]) -> None:
    """Force a file's content to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(file: Path) -> str | None:
    """XXH3-128 of a whole file, hexadecimal; None where there is no file."""
    if not file.is_file():
        return None
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def json_text(value: object, *, indent: int | None = None) -> str:
    """A JSON value, text as it is (escaped only where UTF-8 cannot hold it)."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if is_utf8(text) else json.dumps(value, indent=indent)


def json_line(row: object) -> str:
    """One JSON value on one line, written as `json_text` writes it."""
    return json_text(row) + "\n"


def json_lines(rows: Iterable[object]) -> str:
    """One JSON value a line."""
    return "".join(map(json_line, rows))


class Journal:
    """Rows appended as they are finished; a context manager that only one process at a time can hold.

    The first line is the header (with a fingerprint), each further line one row. A line torn by a crash is cut
    off when the journal is opened again.

    Args:
        path: The journal's file.
        header: Written first into a new journal.
        sync_every_s: Rows are forced to the disk at most this often; always when the journal is closed.

    Attributes:
        rows: What an earlier run under the same fingerprint left; rows under another one are dropped.
        is_empty: Whether there is no row, old or new.

    Raises:
        InputError: Another process is writing this output.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, header: Row, *, sync_every_s: float = 0.0) -> None:
        self._path = path
        self._sync_every_s = sync_every_s
        self._synced_at = -math.inf
        self._stream = path.open("a", encoding="utf-8")
        try:
            self._lock = RunLock(path.with_name(path.name + LOCK_SUFFIX), alone_here=_alone_here(self._stream, path))
        except BaseException:
            self._stream.close()
            raise
        try:
            self._start(header)
        except BaseException:
            self._stream.close()
            self._lock.release()
            raise

    def _start(self, header: Row) -> None:
        lines = read_journal(self._path)
        kept = lines if lines and lines[0].get("fingerprint") == header.get("fingerprint") else []
        self._stream.truncate(len(json_lines(kept).encode()))
        self.rows = kept[1:]
        self.is_empty = not self.rows
        if not kept:
            self.append([header])
            self.is_empty = True

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Force the rows to the disk and let the next process have the journal."""
        if self._stream.closed:
            return
        try:
            sync(self._stream)
        finally:
            self._stream.close()
            self._lock.release()

    def append(self, rows: Sequence[Row]) -> None:
        """Add finished rows; a killed process loses none, a failing machine those of `sync_every_s`.

        Raises:
            EnvironmentFailure: Writing failed; the rows before are kept.
        """
        self.is_empty = False
        try:
            self._stream.write(json_lines(rows))
            self._stream.flush()
            self._lock.beat()
            if time.monotonic() - self._synced_at >= self._sync_every_s:
                sync(self._stream)
                self._synced_at = time.monotonic()
        except OSError as error:
            raise EnvironmentFailure(f"writing {self._path} failed: {error.strerror}") from error


def _alone_here(stream: IO[str], path: Path) -> bool:
    """Whether the kernel says that no other process of this machine holds the file; False where it cannot say."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another run is writing {path.parent}; wait for it, or choose another output") from error
    except OSError:
        return False
    return True


def read_journal(path: Path) -> list[Row]:
    """A journal's whole lines, header first; empty where there is no journal."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def header_fingerprint(path: Path, lines: Sequence[Row]) -> Row:
    """What the rows of a journal were made from.

    Args:
        path: The journal's file.
        lines: Its lines, the header first.

    Raises:
        InputError: The header does not say.
    """
    fingerprint = lines[0].get("fingerprint")
    if not isinstance(fingerprint, dict):
        raise InputError(f"{path} is damaged: remove it to start anew")
    return fingerprint


def require_columns(rows: Sequence[Row], columns: Columns, path: Path) -> None:
    """Refuse rows that are not as expo wrote them.

    Raises:
        InputError: A row lacks a column, or has another kind of value there.
    """
    for row in rows:
        if columns.keys() <= row.keys() and all(isinstance(row[name], kind) for name, kind in columns.items()):
            continue
        raise InputError(f"{path} is damaged: remove it to start anew")


def refuse_dropping(final: Path, rows: int, *, overwrite: bool) -> None:
    """Refuse to end a run without rows that its journal has.

    Args:
        final: The output.
        rows: How many rows have no place in it, as with a smaller `--limit` than the run was begun with.
        overwrite: Whether they may go.

    Raises:
        InputError: They may not.
    """
    if rows and not overwrite:
        raise InputError(
            f"the unfinished {final} has {rows} rows that this run has no place for (a smaller --limit?): finish it as "
            "it was begun, or drop them with --overwrite"
        )


def require_same(what: Path | str, old: Row, new: Row, *, advice: str = "--overwrite replaces it") -> None:
    """Refuse an output made with other settings.

    Raises:
        InputError: The fingerprints differ; the message names the first setting that does.
    """
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if before != now:
            shown = "" if isinstance(now, dict) or isinstance(before, dict) else f" ({before!r} then, {now!r} now)"
            raise InputError(f"{what} was made with another {key.replace('_', '-')}{shown}; {advice}")


def texts_sha256(texts: Iterable[object]) -> str:
    """SHA-256 over JSON values, one a line; equal for equal prompts wherever they came from."""
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(json_line(text).encode())
    return hasher.hexdigest()


def refuse_replacing(file: Path, outputs: Iterable[Path]) -> None:
    """Refuse outputs that would take an input file's place, also through links.

    Raises:
        InputError: One is the file.
    """
    for output in outputs:
        if file.exists() and output.exists() and output.samefile(file):
            raise InputError(f"the output {output} is the input {file}; choose another --name or --output-dir")


@dataclass(frozen=True)
class RowFiles:
    """The files of one output that is made row by row.

    While it is made there is a hidden journal, `.<name>.journal.jsonl`; what is under a final name is whole. The
    meta file goes with it: its `fingerprint`, the number of `rows`, how many `failed`, and a hash of the items the
    rows were made from.
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

    def finished(self) -> Row | None:
        """The meta of a whole output; None where there is none or it is being made again.

        Raises:
            InputError: There is an output that expo did not write.
        """
        if self.journal.exists():
            return None
        if self.final.exists() and not self.meta.exists():
            raise InputError(f"{self.final} exists and expo did not write it: move it away, or choose another --name")
        if not self.final.exists() or not self.meta.exists():
            return None
        try:
            content = json.loads(self.meta.read_bytes())
        except ValueError:
            content = None
        if not self.is_meta(content):
            raise InputError(f"{self.meta} is damaged: move it and {self.final.name} away")
        return dict(content)

    def is_meta(self, content: object) -> bool:
        """Whether a meta file's content says what a rerun goes by."""
        if not isinstance(content, dict):
            return False
        counts = [content.get("rows"), content.get("failed")]
        known = isinstance(content.get("fingerprint"), dict) and self.items_key in content
        return known and all(isinstance(count, int) for count in counts)

    def open(
        self,
        fingerprint: Row,
        items: Sequence[object],
        *,
        overwrite: bool,
        old_rows: Callable[[Row], list[Row]],
        hopeless: Callable[[Row], int] = lambda _meta: 0,
        beyond: Callable[[], Sequence[object]] | None = None,
    ) -> Journal | None:
        """Start or continue the run; None where the output is complete.

        Args:
            fingerprint: Every setting and source that changes the rows.
            items: What each row is made from, in order; an old output must be made from a prefix of them, or
                the other way round.
            overwrite: Whether an output with other settings may be replaced.
            old_rows: Gives the journal rows of a finished output (from its meta) that a longer run keeps.
            hopeless: Of a finished output (from its meta) how many items fail whenever they are tried; where no others
                failed it is complete.
            beyond: Gives the items that a run without `--limit` has, to compare a longer old output with; None where
                the fingerprint says that those are the same.

        Raises:
            InputError: There is an output with other settings or from other items, or another run is writing it.
        """
        meta = self.finished()
        rows: list[Row] = []
        if meta is not None:
            problem = self._difference(meta, fingerprint, items, beyond)
            more = meta["rows"] - len(items)
            if problem is None and (more > 0 or (more == 0 and self._is_settled(meta, hopeless))):
                return None
            if problem is None:
                rows = old_rows(meta)
            elif not overwrite:
                raise problem
        elif not overwrite and len(lines := read_journal(self.journal)) > 1:
            require_same(self.final, header_fingerprint(self.journal, lines), fingerprint)
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self.journal.parent} cannot be a folder: choose another --output-dir") from error
        journal = Journal(self.journal, {"fingerprint": fingerprint}, sync_every_s=ROW_SYNC_SECONDS)
        if rows:
            journal.append(rows)
            journal.rows = rows
        return journal

    @staticmethod
    def _is_settled(meta: Row, hopeless: Callable[[Row], int]) -> bool:
        return not meta["failed"] or meta["failed"] <= hopeless(meta)

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

    def _difference(
        self, meta: Row, fingerprint: Row, items: Sequence[object], beyond: Callable[[], Sequence[object]] | None
    ) -> InputError | None:
        try:
            require_same(self.final, meta.get("fingerprint", {}), fingerprint)
        except InputError as error:
            return error
        count = meta["rows"]
        if len(items) < count:
            if beyond is None:
                return None
            items = beyond()
        if texts_sha256(items[:count]) != meta[self.items_key]:
            return InputError(f"{self.final} was made from other rows; --overwrite replaces it")
        return None

    def finish(self, journal: Journal, final_text: str, meta: Row, others: dict[Path, str]) -> None:
        """Write the final files, the meta file last, and end the run.

        Args:
            journal: The open journal; closed and removed.
            final_text: Content of the final file.
            meta: Content of the meta file.
            others: Further files and their contents.
        """
        journal.is_empty = False  # from here on it says that the files under final names may not belong together
        for path, text in {**others, self.final: final_text}.items():
            write_atomic(path, text)
        write_atomic(self.meta, json_text(meta, indent=2) + "\n")
        self.journal.unlink()
        journal.close()
