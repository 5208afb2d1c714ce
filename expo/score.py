"""`expo score`: score the answers of `expo generate` with a reward model.

The plan is made from the outputs and the reward model's small files (`plan`); batches by length, within a token
budget, are then scored longest first, each durable before the next; the final files are written in output order.
"""

from __future__ import annotations

import logging
import math
import statistics
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Self

import xxhash

from expo import __version__
from expo.checkpoint.folder import (
    Location,
    find_folder,
    read_json,
    refuse_inside,
    require_loadable,
    source_fingerprint,
)
from expo.checkpoint.hub import locate
from expo.checkpoint.vocabulary import embedding_rows
from expo.config import ScoreConfig
from expo.engines import SCORERS, EngineSpec, Scorer, ScorerSetup, find_engine, token_batches
from expo.engines.chat import ChatTokenizer, context_length
from expo.engines.coverage import require_reward_model
from expo.engines.torch_tools import worker_environments
from expo.errors import InputError
from expo.files import Row, json_lines, texts_sha256
from expo.parts import Part, read_part
from expo.rows import EngineKeeper, plan_to_run, run as run_job
from expo.rows.dates import find_date
from expo.rows.files import Columns, RowFiles, refuse_replacing, require_columns
from expo.rows.job import Figures, Key, RowJob, Rows
from expo.settings import Fingerprint, absent_values, recorded
from expo.tasks import Conversation, find_task, read_conversations, read_rows

ROW_COLUMNS: Columns = {
    "id": str,
    "sample": int,
    "reward": (float, int, type(None)),
    "tokens": int,
    "truncated": bool,
}
"""The columns of every row."""
JOURNAL_COLUMNS: Columns = {"row": int, "token_ids_xxh3": str}
"""The additional columns in the journal: which row it is, and of which tokens."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRow:
    """One row to score."""

    number: int
    conversation: Conversation
    id: str
    sample: int
    token_ids: tuple[int, ...]
    truncated: bool
    failed: bool
    """Whether there is no answer to score."""

    @cached_property
    def token_ids_xxh3(self) -> str:
        """Identifies what was scored."""
        return xxhash.xxh3_64_hexdigest(array("q", self.token_ids).tobytes())

    def journal_row(self, reward: float | None) -> Row:
        """The row in the journal's form; a reward of None means it failed."""
        turn = self.conversation.turn
        return {
            "row": self.number,
            "token_ids_xxh3": self.token_ids_xxh3,
            "id": self.id,
            "sample": self.sample,
            **({} if turn is None else {"turn": turn}),
            "reward": reward,
            "tokens": len(self.token_ids),
            "truncated": self.truncated,
        }


@dataclass(frozen=True)
class Scored:
    """The result of a run."""

    rewards: Path
    meta: Path
    status: str
    """"written" or "already complete"."""
    n: int
    mean: float | None
    standard_error: float | None
    failed: int
    reason: str | None = None
    """Why the first failed row failed."""
    can_retry: bool = False
    """Whether the same command tries failed rows again, which may help."""


def run(config: ScoreConfig, keeper: EngineKeeper | None = None) -> Scored:
    """Score every row that has no score yet.

    Args:
        config: The settings.
        keeper: Keeps the engine open after this run; without one, the engine is closed at the end.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    done = run_job(plan_to_run(plan, config), keeper)
    meta, files = done.meta, done.job.files
    n, mean, error = meta.get("n", meta["rows"] - meta["failed"]), meta.get("mean"), meta.get("standard_error")
    return Scored(files.final, files.meta, done.status, n, mean, error, meta["failed"], done.reason, done.can_retry)


@dataclass(frozen=True, kw_only=True)
class ScoreJob(RowJob):
    """Everything `expo score` will do."""

    verb: ClassVar[str] = "score"
    columns: ClassVar[Columns] = {**ROW_COLUMNS, **JOURNAL_COLUMNS}
    seconds_key: ClassVar[str] = "score_seconds"

    config: ScoreConfig
    spec: EngineSpec
    location: Location
    outputs: Path
    rows: tuple[ScoreRow, ...]
    setup: ScorerSetup

    # --- its rows

    @cached_property
    def by_number(self) -> dict[Key, ScoreRow]:
        """Row key → what is scored."""
        return {(row.number,): row for row in self.rows}

    @property
    def keys(self) -> list[Key]:
        """The rows' numbers."""
        return list(self.by_number)

    @property
    def items(self) -> list[object]:
        """The conversations that are scored."""
        return [list(row.conversation.messages) for row in self.rows]

    def items_beyond(self) -> list[object]:
        """The conversations of the whole file, whose content is not part of the fingerprint."""
        task = find_task(self.config.task)
        whole = read_conversations(self.outputs, task, dataset=self.config.dataset)
        return [list(conversation.messages) for conversation in whole]

    def share(self, part: Part) -> Self:
        """One part of the job."""
        rows = tuple(part.of(self.rows))
        return replace(self, rows=rows, files=self.files.part(part.file_stem), part=part, whole=self)

    def key_of(self, row: Row) -> Key:
        """The row's number."""
        return (row["row"],)

    def is_answered(self, row: Row) -> bool:
        """Whether there is a reward."""
        return row["reward"] is not None

    def is_current(self, row: Row) -> bool:
        """Whether it is the reward of the current answer: the outputs may have been regenerated since."""
        one = self.by_number.get(self.key_of(row))
        return one is not None and row["token_ids_xxh3"] == one.token_ids_xxh3

    def pending(self, done: Mapping[Key, Row]) -> bool:
        """Whether any answer has no reward."""
        return any(key not in done and not row.failed for key, row in self.by_number.items())

    def impossible(self, done: Mapping[Key, Row]) -> Rows:
        """The rows without an answer."""
        return {key: row.journal_row(None) for key, row in self.by_number.items() if row.failed and key not in done}

    # --- producing them

    def open_engine(self) -> Scorer:
        """Start the engine."""
        engine: Scorer = self.spec.load()(self.setup)
        return engine

    def execute(self, engine: Scorer, done: Rows) -> Iterator[list[Row]]:
        """Score the remaining rows, in batches that are a pure function of all rows."""
        rows = [row for row in self.rows if not row.failed]
        for numbers in token_batches([len(row.token_ids) for row in rows], self.config.batch_tokens):
            batch = [rows[number] for number in numbers]
            if all((row.number,) in done for row in batch):
                continue
            rewards = engine.score([row.token_ids for row in batch])
            yield [
                row.journal_row(reward if math.isfinite(reward) else None)
                for row, reward in zip(batch, rewards, strict=True)
            ]

    def tokens(self, row: Row) -> int:
        """The tokens of the conversation."""
        return int(row["tokens"])

    def worker_environments(self, count: int) -> list[dict[str, str]]:
        """The GPUs of each worker, or its share of the CPU's threads."""
        return worker_environments(self.engine, self.spec, self.config, count)

    # --- writing them

    def finished_rows(self, meta: Row) -> list[Row]:  # noqa: ARG002 - all is in the rows file
        """The rows of the finished output, from its rows file; none, to be scored again, where it is damaged."""
        file = rows_file(self.files) if self.part is None else self.files.final
        try:
            rows = require_columns(read_rows(file), ROW_COLUMNS, file)
        except InputError:
            log.warning("%s is missing or damaged: its rows are scored again", file)
            return []
        return [{**one.journal_row(None), **row} for one, row in zip(self.rows, rows, strict=False)]

    def render(self, rows: Sequence[Row]) -> dict[Path, str]:
        """The rewards, one number per line, and the file with the details of each row."""
        public = [{key: value for key, value in row.items() if key not in JOURNAL_COLUMNS} for row in rows]
        return {
            rows_file(self.files): json_lines(public),
            self.files.final: json_lines(row["reward"] for row in rows),
        }

    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:  # noqa: ARG002 - the interface
        """The content of the meta file."""
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        mean, standard_error = mean_and_standard_error(rewards)
        return {
            "command": self.verb,
            "name": self.name,
            "config": self.recorded_config(),
            "engine": self.engine,
            "versions": {"expo": __version__, **figures.versions},
            "reward_model": self.location.label,
            "revision": self.location.revision,
            "rows": len(rows),
            "n": len(rewards),
            "mean": mean,
            "standard_error": standard_error,
            "truncated": sum(row["truncated"] for row in rows),
            "failed": len(rows) - len(rewards),
            "errors": [
                {
                    "row": number,
                    "id": row["id"],
                    "sample": row["sample"],
                    "reason": self._why_failed(row),
                    "lasting": True,
                }
                for number, row in enumerate(rows)
                if not self.is_answered(row)
            ],
            "rows_this_run": figures.rows,
            "engine_start_seconds": round(figures.engine_start_seconds, 3),
            "score_seconds": round(figures.seconds, 3),
            "tokens_per_second": figures.tokens_per_second,
            "prompts_sha256": texts_sha256(row.conversation.asked for row in self.rows),
            "outputs_sha256": texts_sha256(self.items),
            "fingerprint": self.fingerprint,
        }

    def _why_failed(self, row: Row) -> str:
        one = self.by_number[self.key_of(row)]
        if one.failed:
            return f"{self.outputs.name} has no answer to score, since generating it failed"
        wider = "" if self.config.dtype == "float32" else "; --dtype float32 may give one"
        return f"the reward model gives it no finite number{wider}"

    def describe(self) -> Row:
        """The plan as plain data."""
        scored = [row for row in self.rows if not row.failed]
        return {
            "reward_model": str(self.location.path),
            "engine": self.engine,
            "outputs": str(self.outputs),
            **self.describe_parts(),
            **self.describe_date(),
            "rows": len(self.rows),
            "rows_without_answer": len(self.rows) - len(scored),
            "tokens": sum(len(row.token_ids) for row in scored),
            "truncated": sum(row.truncated for row in scored),
            "rewards": str(self.files.final),
        }


def rows_file(files: RowFiles) -> Path:
    """The file beside the rewards with each row's id, sample, tokens and whether it was truncated."""
    return files.final.with_name(f"{files.name}.rows.jsonl")


def mean_and_standard_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and its standard error s/√n.

    Args:
        values: The sample; no NaN.

    Returns:
        None for the mean of no values, and for the standard error of fewer than two.
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values, mean) / math.sqrt(len(values)) if len(values) > 1 else None


def plan(config: ScoreConfig) -> ScoreJob:
    """Decide everything from the outputs and the reward model's small files; nothing is written.

    Raises:
        InputError: The outputs, the reward model or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    engine, spec = find_engine(SCORERS, config.engine)
    task = find_task(config.task)
    folder = Path(config.output_dir)
    outputs = Path(config.outputs or folder / f"outputs_{task.name}" / f"{config.name}{task.suffix}")
    if not outputs.is_file():
        raise InputError(f"no outputs to score: {outputs} does not exist; run `expo generate` first, or pass --outputs")
    if config.dataset is not None and not task.by_id:
        raise InputError(f"--dataset is for mtbench: the outputs of {task.name} contain their prompts")
    conversations = read_conversations(outputs, task, dataset=config.dataset, limit=config.limit)
    if not conversations:
        raise InputError(f"{outputs} contains no rows")
    location = find_folder(config.reward_model) or locate(config.reward_model)
    require_loadable(location.path)
    require_reward_model(location.path, trust_remote_code=config.trust_remote_code)
    refuse_inside(folder, location, flag="--output-dir")
    tokenizer = ChatTokenizer(
        location.path,
        template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
        rows=embedding_rows(location.path),
    )
    longest = context_length(location.path)
    if config.max_length is not None and config.max_length > longest:
        log.warning("--max-length %d: %s takes at most %d tokens", config.max_length, location.label, longest)
    longest = min(config.max_length or longest, longest)
    files = RowFiles(folder / f"rewards_{task.name}" / f"{config.name}.jsonl", config.name, "outputs_sha256")
    refuse_replacing(outputs, (files.final, files.meta, rows_file(files)))
    made_from = {
        "task": task.name,
        "reward_model": source_fingerprint(location),
        "engine": engine,
        "chat_template": sha256(tokenizer.template.encode()).hexdigest(),
        **recorded(config, "rows", "batches"),
    }
    fingerprint = Fingerprint(made_from, absent_values(config, "rows", "batches"))
    date = find_date(files, fingerprint, overwrite=config.overwrite) if tokenizer.asks_for_time else None
    if date is not None:
        tokenizer, fingerprint = tokenizer.at(date.moment), fingerprint.with_entry(date.entry)
    whole = ScoreJob(
        config=config,
        engine=engine,
        spec=spec,
        name=config.name,
        location=location,
        outputs=outputs,
        rows=tuple(_score_rows(conversations, tokenizer, longest, outputs)),
        setup=ScorerSetup(config, location.path, tokenizer.pad_id),
        files=files,
        fingerprint=fingerprint,
        date=date,
    )
    return whole if config.part is None else whole.share(read_part(config.part, {}))


def _score_rows(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, longest: int, outputs: Path
) -> Iterator[ScoreRow]:
    messages = [conversation.messages for conversation in conversations]
    ids = tokenizer.encode(messages, generation_prompt=False)
    tokenizer.require_all_said(messages, generation_prompt=False)
    tokenizer.require_readable(ids)
    failed, keys = _of_generate(outputs)
    for number, (conversation, row_ids) in enumerate(zip(conversations, ids, strict=True)):
        name, sample = keys[number] if number < len(keys) else (conversation.id or str(number), 0)
        yield ScoreRow(
            number=number,
            conversation=conversation,
            id=name,
            sample=sample,
            token_ids=tuple(row_ids[:longest]),
            truncated=len(row_ids) > longest,
            failed=conversation.failed or number in failed,
        )


def _of_generate(outputs: Path) -> tuple[set[int], list[tuple[str, int]]]:
    """Which rows failed, and every row's id and sample, from generate's meta file; empty if there is none.

    Raises:
        InputError: It is damaged.
    """
    file = outputs.with_name(f"{outputs.stem}.meta.json")
    advice = f"move it away to score {outputs.name} without it"
    try:
        meta = read_json(file) if file.is_file() else {}
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    if meta.get("command") != "generate":
        return set(), []
    try:
        failed = {int(error["row"]) for error in meta["errors"]}
        columns = meta["per_row"]["id"], meta["per_row"]["sample"]
        keys = [(str(name), int(sample)) for name, sample in zip(*columns, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged: {advice}") from error
    return failed, keys
