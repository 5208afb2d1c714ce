"""The log-probabilities of preference pairs under one θ(α), as a row job: a row per pair."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import xxhash

from expo import __version__
from expo.config import GenerateConfig
from expo.engines import EngineSpec, GeneratorSetup
from expo.engines.batches import token_batches
from expo.engines.chat import ChatTokenizer
from expo.engines.log_probs import Answered, ThetaLogProbs
from expo.engines.torch_tools import gpus_per_engine, worker_environments
from expo.errors import InputError
from expo.files import Row, json_lines, read_rows, texts_sha256
from expo.parts import Part
from expo.rows.files import Columns, require_columns
from expo.rows.job import Figures, Key, RowJob, Rows
from expo.tasks import Preference, assistant
from expo.verbs.score.implicit import answer_span

NUMBER = (float, int, type(None))


@dataclass(frozen=True)
class PairRow:
    """A pair as token ids."""

    number: int
    pair: Preference
    chosen: Answered
    rejected: Answered
    truncated: bool
    """Whether one of the answers has lost its end."""

    @property
    def key(self) -> Key:
        """Names it within its file."""
        return (self.pair.id,)

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens the chosen and the rejected answer have."""
        chosen, rejected = (max(0, len(one.token_ids) - one.start) for one in (self.chosen, self.rejected))
        return chosen, rejected

    @property
    def is_readable(self) -> bool:
        """Whether something of both answers is left."""
        return min(self.tokens) > 0

    @cached_property
    def token_ids_xxh3(self) -> str:
        """Identifies what is read: the tokens, and which of them are the answers'."""
        ids = [number for one in (self.chosen, self.rejected) for number in (one.start, *one.token_ids, -1)]
        return xxhash.xxh3_64_hexdigest(array("q", ids).tobytes())

    def row(self, chosen: float, rejected: float) -> Row:
        """The row in the file's form; what is not finite is None."""
        tokens = self.tokens
        return {
            "id": self.pair.id,
            "chosen": chosen if math.isfinite(chosen) else None,
            "rejected": rejected if math.isfinite(rejected) else None,
            "chosen_tokens": tokens[0],
            "rejected_tokens": tokens[1],
            "truncated": self.truncated,
            "token_ids_xxh3": self.token_ids_xxh3,
        }


def pair_rows(pairs: Sequence[Preference], tokenizer: ChatTokenizer, longest: int) -> tuple[PairRow, ...]:
    """Pairs as token ids, each answer up to the token that the chat template closes it with.

    Args:
        pairs: The pairs.
        tokenizer: The policy's.
        longest: The longest conversation that is read, in tokens; longer ones lose their end.

    Raises:
        InputError: The chat template refuses a conversation or leaves out a message, or the model has no vector for a
            token.
    """
    prompts = tokenizer.encode([pair.messages for pair in pairs], generation_prompt=True)
    ending = tokenizer.ending()
    sides = []
    for side in ("chosen", "rejected"):
        said = [(*pair.messages, assistant(getattr(pair, side))) for pair in pairs]
        ids = tokenizer.encode(said, generation_prompt=False)
        tokenizer.require_all_said(said, generation_prompt=False)
        tokenizer.require_readable(ids)
        spans = [
            answer_span(prompt, row, None if ending is None else ending.id)
            for prompt, row in zip(prompts, ids, strict=True)
        ]
        sides.append([(tuple(row[:end]), start) for row, (start, end) in zip(ids, spans, strict=True)])
    return tuple(
        PairRow(
            number,
            pair,
            chosen=Answered(chosen[0][:longest], chosen[1]),
            rejected=Answered(rejected[0][:longest], rejected[1]),
            truncated=max(len(chosen[0]), len(rejected[0])) > longest,
        )
        for number, (pair, chosen, rejected) in enumerate(zip(pairs, *sides, strict=True))
    )


@dataclass(frozen=True, kw_only=True)
class LikelihoodJob(RowJob):
    """Reads all pairs under one θ(α)."""

    verb: ClassVar[str] = "read"
    columns: ClassVar[Columns] = {
        "id": str,
        "chosen": NUMBER,
        "rejected": NUMBER,
        "chosen_tokens": int,
        "rejected_tokens": int,
        "truncated": bool,
        "token_ids_xxh3": str,
    }
    seconds_key: ClassVar[str] = "read_seconds"

    config: GenerateConfig
    spec: EngineSpec
    alpha: float
    record: Row
    """What the meta file says of the pair."""
    rows: tuple[PairRow, ...]
    all_rows: Callable[[], tuple[PairRow, ...]]
    """Those of the whole file of pairs, also beyond `--limit`."""
    setup: GeneratorSetup

    # --- its rows

    @cached_property
    def by_name(self) -> dict[Key, PairRow]:
        """Row key → pair."""
        return {row.key: row for row in self.rows}

    @property
    def keys(self) -> list[Key]:
        """The pairs' ids."""
        return [row.key for row in self.rows]

    @property
    def items(self) -> list[object]:
        """The pairs."""
        return [row.pair.source for row in self.rows]

    def everything(self) -> Self:
        """All pairs of the file."""
        return replace(self, rows=self.all_rows())

    def covering(self, keys: Collection[Key]) -> Self:
        """With these pairs, also beyond `--limit`."""
        if all(key in self.by_name for key in keys):
            return self
        wanted = {*self.by_name, *keys}
        return replace(self, rows=tuple(row for row in self.all_rows() if row.key in wanted))

    def share(self, part: Part) -> Self:
        """One part of the job."""
        rows = tuple(part.of(self.rows))
        return replace(self, rows=rows, files=self.files.part(part.file_stem), part=part, whole=self)

    def key_of(self, row: Row) -> Key:
        """The pair's id."""
        return (row["id"],)

    def is_answered(self, row: Row) -> bool:
        """Whether both log-probabilities are there."""
        return row["chosen"] is not None and row["rejected"] is not None

    def is_current(self, row: Row) -> bool:
        """Whether it is about the pair as it is now."""
        one = self.by_name.get(self.key_of(row))
        return one is not None and row["token_ids_xxh3"] == one.token_ids_xxh3

    def pending(self, done: Mapping[Key, Row]) -> bool:
        """Whether any pair that can be read is not done."""
        return any(key not in done and row.is_readable for key, row in self.by_name.items())

    def impossible(self, done: Mapping[Key, Row]) -> Rows:
        """The pairs of which an answer is cut off whole."""
        none = math.nan
        return {
            key: row.row(none, none) for key, row in self.by_name.items() if not row.is_readable and key not in done
        }

    # --- producing them

    def open_engine(self) -> ThetaLogProbs:
        """Start the engine."""
        engine: ThetaLogProbs = self.spec.load()(self.setup)
        return engine

    def execute(self, engine: ThetaLogProbs, done: Rows) -> Iterator[list[Row]]:
        """Read the remaining pairs, in batches that are a pure function of all pairs."""
        rows = [row for row in self.rows if row.is_readable]
        widths = [2 * max(len(row.chosen.token_ids), len(row.rejected.token_ids)) for row in rows]
        for numbers in token_batches(widths, self.config.batch_tokens):
            batch = [rows[number] for number in numbers]
            if all(row.key in done for row in batch):
                continue
            sums = engine.log_probs([answer for row in batch for answer in (row.chosen, row.rejected)])
            both = zip(batch, sums[::2], sums[1::2], strict=True)
            yield [row.row(chosen, rejected) for row, chosen, rejected in both if row.key not in done]

    def tokens(self, row: Row) -> int:
        """The tokens of both conversations."""
        one = self.by_name[self.key_of(row)]
        return len(one.chosen.token_ids) + len(one.rejected.token_ids)

    def worker_environments(self, count: int) -> list[dict[str, str]]:
        """The GPUs of each worker, or its share of the CPU's threads."""
        return worker_environments(self.engine, self.spec, self.config, count)

    def gpus_per_engine(self, there: bool) -> int:
        """The GPUs of each engine on a cluster."""
        return gpus_per_engine(self.engine, self.spec, self.config, asked=self.config.engine, there=there)

    # --- writing them

    def finished_keys(self, meta: Row) -> list[Key] | None:
        """The ids in the rows file."""
        try:
            rows = self._finished()
        except InputError:
            return None
        return list(map(self.key_of, rows)) if len(rows) == meta["rows"] else None

    def _finished(self) -> Sequence[Row]:
        return require_columns(read_rows(self.files.final), self.columns, self.files.final)

    def finished_rows(self, meta: Row, keys: Sequence[Key]) -> list[Row]:  # noqa: ARG002 - all is in the rows file
        """The rows of the finished output.

        Raises:
            InputError: It is damaged.
        """
        return list(self._finished())

    def render(self, rows: Sequence[Row]) -> dict[Path, str]:
        """The log-probabilities, a row per pair."""
        return {self.files.final: json_lines(rows)}

    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:  # noqa: ARG002 - the interface
        """The content of the meta file."""
        failed = [(number, row) for number, row in enumerate(rows) if not self.is_answered(row)]
        return {
            "command": "sweep --likelihood",
            "name": self.name,
            "engine": self.engine,
            "versions": {"expo": __version__, **figures.versions},
            **self.record,
            "rows": len(rows),
            "failed": len(failed),
            "errors": [
                {"row": number, "id": row["id"], "reason": self._why_failed(row), "lasting": True}
                for number, row in failed
            ],
            "truncated": sum(row["truncated"] for row in rows),
            "tokens": sum(map(self.tokens, rows)),
            "rows_this_run": figures.rows,
            "engine_start_seconds": round(figures.engine_start_seconds, 3),
            self.seconds_key: round(figures.seconds, 3),
            "tokens_per_second": figures.tokens_per_second,
            "pairs_sha256": texts_sha256(self.items),
            "fingerprint": self.fingerprint,
        }

    def _why_failed(self, row: Row) -> str:
        if not self.by_name[self.key_of(row)].is_readable:
            return "its prompt alone fills the longest sequence that the model takes, or an answer is empty"
        wider = "" if self.config.dtype == "float32" else "; --dtype float32 may give one"
        return f"{self.name} gives one of its answers no finite log-probability{wider}"
