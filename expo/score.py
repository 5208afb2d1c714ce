"""`expo score`: rate what `expo generate` wrote with a reward model.

The plan is made from the outputs and the reward model's small files (`plan`); batches by length under a token
budget are then scored longest first, each durable before the next; the final files are written in output order.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import xxhash

from expo import __version__
from expo.checkpoint.folder import read_config, read_json, source_fingerprint
from expo.checkpoint.hub import Location, locate, refuse_inside
from expo.config import ScoreConfig
from expo.durable import Row, json_lines, texts_sha256
from expo.engines import Scorer, ScorerSetup, load_scorer, token_batches
from expo.engines.chat import ChatTokenizer, context_length
from expo.errors import InputError
from expo.fingerprint import Fingerprint
from expo.journal import Journal
from expo.progress import rows_bar
from expo.rows.files import Columns, RowFiles, refuse_dropping, refuse_replacing, require_columns
from expo.settings import absent_values, recorded
from expo.stats import mean_and_standard_error
from expo.tasks import Conversation, find_task, read_conversations, read_rows

ROW_COLUMNS: Columns = {
    "id": str,
    "sample": int,
    "reward": (float, int, type(None)),
    "tokens": int,
    "truncated": bool,
}
"""What every row has."""
JOURNAL_COLUMNS: Columns = {"row": int, "token_ids_xxh3": str}
"""What it has in the journal besides: which row it is, and of what."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRow:
    """One row to score."""

    number: int
    id: str
    sample: int
    turn: int | None
    """Which of the prompt's turns, where the task has several."""
    token_ids: tuple[int, ...]
    truncated: bool
    failed: bool
    """Whether there is no answer to score."""

    @property
    def token_ids_xxh3(self) -> str:
        """Tells what the reward is of."""
        return xxhash.xxh3_64_hexdigest(array("q", self.token_ids).tobytes())


@dataclass(frozen=True)
class Plan:
    """Everything `expo score` will do."""

    config: ScoreConfig
    engine: str
    location: Location
    outputs: Path
    conversations: tuple[Conversation, ...]
    rows: tuple[ScoreRow, ...]
    setup: ScorerSetup
    files: RowFiles
    rows_file: Path
    fingerprint: Row

    @property
    def items(self) -> list[object]:
        """What each reward is made from."""
        return _items(self.conversations)

    def describe(self) -> Row:
        """The plan as plain data."""
        scored = [row for row in self.rows if not row.failed]
        return {
            "reward_model": str(self.location.path),
            "engine": self.engine,
            "outputs": str(self.outputs),
            "rows": len(self.rows),
            "rows_without_answer": len(self.rows) - len(scored),
            "tokens": sum(len(row.token_ids) for row in scored),
            "truncated": sum(row.truncated for row in scored),
            "rewards": str(self.files.final),
        }


@dataclass(frozen=True)
class Scored:
    """What a run made."""

    rewards: Path
    meta: Path
    status: str
    """"written" or "already complete"."""
    n: int
    mean: float | None
    standard_error: float | None
    failed: int


def run(config: ScoreConfig) -> Scored:
    """Score every row that is not scored yet.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call goes on with the rest.
    """
    work = plan(config)
    journal = work.files.open(
        work.fingerprint,
        work.items,
        overwrite=config.overwrite,
        old_rows=lambda _: finished_rows(work),
        hopeless=lambda _: sum(row.failed for row in work.rows),
        beyond=lambda: _items(read_conversations(work.outputs, find_task(config.task), dataset=config.dataset)),
    )
    if journal is None:
        return _result(work, "already complete", read_json(work.files.meta))
    with work.files.holding(journal):
        done = rewarded(work, journal.rows)
        seconds, tokens, versions = _score(work, journal, done)
        rows = [done.get(row.number) or _unscored(row) for row in work.rows]
        meta = _meta(work, rows, seconds, tokens, versions)
        rewards = json_lines(row["reward"] for row in rows)
        work.files.finish(journal, rewards, meta, {work.rows_file: json_lines(map(_public, rows))})
    return _result(work, "written", meta)


def plan(config: ScoreConfig) -> Plan:
    """Decide everything from the outputs and the reward model's small files; nothing is written.

    Raises:
        InputError: The outputs, the reward model or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    task = find_task(config.task)
    folder = Path(config.output_dir)
    outputs = Path(config.outputs or folder / f"outputs_{task.name}" / f"{config.name}{task.suffix}")
    if not outputs.is_file():
        raise InputError(f"no outputs to score: {outputs} does not exist; run `expo generate` first, or pass --outputs")
    if config.dataset is not None and not task.by_id:
        raise InputError(f"--dataset is for mtbench: the outputs of {task.name} hold their prompts")
    conversations = read_conversations(outputs, task, dataset=config.dataset, limit=config.limit)
    if not conversations:
        raise InputError(f"{outputs} holds no rows")
    location = locate(config.reward_model)
    require_reward_model(location.path)
    refuse_inside(folder, location, flag="--output-dir")
    tokenizer = ChatTokenizer(location.path, template=config.chat_template, trust_remote_code=config.trust_remote_code)
    longest = min(config.max_length or context_length(location.path), context_length(location.path))
    files = RowFiles(folder / f"rewards_{task.name}" / f"{config.name}.jsonl", config.name, "outputs_sha256")
    rows_file = files.final.with_name(f"{config.name}.rows.jsonl")
    refuse_replacing(outputs, (files.final, files.meta, rows_file))
    engine = "transformers" if config.engine == "auto" else config.engine
    made_from = {
        "task": task.name,
        "reward_model": source_fingerprint(location),
        "engine": engine,
        "chat_template": sha256(tokenizer.template.encode()).hexdigest(),
        **recorded(config, "rows", "batches"),
    }
    return Plan(
        config=config,
        engine=engine,
        location=location,
        outputs=outputs,
        conversations=tuple(conversations),
        rows=tuple(_score_rows(conversations, tokenizer, longest, outputs)),
        setup=ScorerSetup(config, location.path, tokenizer.pad_id),
        files=files,
        rows_file=rows_file,
        fingerprint=Fingerprint(made_from, absent_values(config, "rows", "batches", engine=engine)),
    )


def _items(conversations: Sequence[Conversation]) -> list[object]:
    return [list(conversation.messages) for conversation in conversations]


def require_reward_model(model: Path) -> None:
    """Refuse a model without a trained score head or with more than one label, before its weights are loaded.

    Args:
        model: The model's folder.

    Raises:
        InputError: The model is not a reward model.
    """
    config = read_config(model)
    architectures = [str(name) for name in config.get("architectures") or []]
    causal = [name for name in architectures if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if causal:
        raise InputError(
            f"{model.name} is a {causal[0]}, not a reward model: it has no trained score head; give a model with one "
            "label, such as weqweasdas/RM-Mistral-7B"
        )
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels")
    if labels is not None and labels != 1:
        raise InputError(f"{model.name} has {labels} labels; a reward model has one")


def _score_rows(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, longest: int, outputs: Path
) -> Iterator[ScoreRow]:
    ids = tokenizer.encode([conversation.messages for conversation in conversations], generation_prompt=False)
    failed, keys = _of_generate(outputs)
    for number, (conversation, row_ids) in enumerate(zip(conversations, ids, strict=True)):
        name, sample = keys[number] if number < len(keys) else (conversation.id or str(number), 0)
        yield ScoreRow(
            number=number,
            id=name,
            sample=sample,
            turn=conversation.turn,
            token_ids=tuple(row_ids[:longest]),
            truncated=len(row_ids) > longest,
            failed=conversation.failed or number in failed,
        )


def _of_generate(outputs: Path) -> tuple[set[int], list[tuple[str, int]]]:
    """Which rows failed, and every row's id and sample, as generate's meta file says; nothing where it has none.

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


def _score(work: Plan, journal: Journal, done: dict[int, Row]) -> tuple[float, int, dict[str, str]]:
    """Score the rows that are not in `done`, adding them; gives seconds, tokens and library versions."""
    rows = [row for row in work.rows if not row.failed]
    batches = token_batches([len(row.token_ids) for row in rows], work.config.batch_tokens)
    todo = [[rows[number] for number in batch] for batch in batches]
    todo = [batch for batch in todo if any(row.number not in done for row in batch)]
    if not todo:
        return 0.0, 0, {}
    log.info("%s: %d of %d rows to score with %s", work.config.name, sum(map(len, todo)), len(rows), work.engine)
    engine = load_scorer(work.engine)(work.setup)
    started, tokens = time.perf_counter(), 0
    progress = rows_bar(len(rows), "score", initial=len(rows) - sum(map(len, todo)))
    try:
        for batch in todo:
            scored = _score_batch(engine, batch)
            journal.append(scored)
            done |= {row["row"]: row for row in scored if row["reward"] is not None}
            tokens += sum(row["tokens"] for row in scored)
            progress.update(len(batch))
    finally:
        progress.close()
    return time.perf_counter() - started, tokens, engine.versions()


def _score_batch(engine: Scorer, batch: Sequence[ScoreRow]) -> list[Row]:
    rewards = engine.score([row.token_ids for row in batch])
    return [
        {**_unscored(row), "reward": reward if math.isfinite(reward) else None}
        for row, reward in zip(batch, rewards, strict=True)
    ]


def _unscored(row: ScoreRow) -> Row:
    return {
        "row": row.number,
        "token_ids_xxh3": row.token_ids_xxh3,
        "id": row.id,
        "sample": row.sample,
        **({} if row.turn is None else {"turn": row.turn}),
        "reward": None,
        "tokens": len(row.token_ids),
        "truncated": row.truncated,
    }


def _public(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in JOURNAL_COLUMNS}


def finished_rows(work: Plan) -> list[Row]:
    """The journal rows of a finished output, from its rows file; none, to be scored again, where it is damaged."""
    try:
        rows = read_rows(work.rows_file)
        require_columns(rows, ROW_COLUMNS, work.rows_file)
    except InputError:
        log.warning("%s is missing or damaged: its rows are scored again", work.rows_file)
        return []
    return [
        {"row": one.number, "token_ids_xxh3": one.token_ids_xxh3, **row}
        for one, row in zip(work.rows, rows, strict=False)
    ]


def rewarded(work: Plan, rows: Sequence[Row]) -> dict[int, Row]:
    """Number → row of the journal's rows that have a reward for what is scored now.

    The outputs may have been made anew since an interrupted run, whose rewards for other answers are dropped.

    Raises:
        InputError: A row is not as expo wrote it, or has no place in this run.
    """
    require_columns(rows, {**ROW_COLUMNS, **JOURNAL_COLUMNS}, work.files.journal)
    there = {row["row"]: row for row in rows if row["reward"] is not None}
    wanted = {row.number: row.token_ids_xxh3 for row in work.rows}
    refuse_dropping(work.files.final, len(there.keys() - wanted.keys()), overwrite=work.config.overwrite)
    return {number: row for number, row in there.items() if row["token_ids_xxh3"] == wanted.get(number)}


def _meta(work: Plan, rows: Sequence[Row], seconds: float, tokens: int, versions: dict[str, str]) -> Row:
    config = dataclasses.asdict(work.config)
    for transient in ("overwrite", "dry_run", "output_dir"):
        del config[transient]
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    mean, standard_error = mean_and_standard_error(rewards)
    return {
        "command": "score",
        "name": work.config.name,
        "config": config,
        "engine": work.engine,
        "versions": {"expo": __version__, **versions},
        "reward_model": work.location.label,
        "revision": work.location.revision,
        "rows": len(rows),
        "n": len(rewards),
        "mean": mean,
        "standard_error": standard_error,
        "truncated": sum(row["truncated"] for row in rows),
        "failed": len(rows) - len(rewards),
        "score_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "prompts_sha256": texts_sha256(one.asked for one in work.conversations),
        "outputs_sha256": texts_sha256(work.items),
        "fingerprint": work.fingerprint,
    }


def _result(work: Plan, status: str, meta: Row) -> Scored:
    return Scored(
        rewards=work.files.final,
        meta=work.files.meta,
        status=status,
        n=meta["n"],
        mean=meta["mean"],
        standard_error=meta["standard_error"],
        failed=meta["failed"],
    )
