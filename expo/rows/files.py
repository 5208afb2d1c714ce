"""The files of an output that is made row by row, and what state they are in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expo.durable import Row, json_text, texts_sha256, write_atomic
from expo.errors import InputError
from expo.fingerprint import require_same
from expo.journal import Journal, header_fingerprint, read_journal

Columns = Mapping[str, type | tuple[type, ...]]
"""Column → what its values are."""

ROW_SYNC_SECONDS = 1.0


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
