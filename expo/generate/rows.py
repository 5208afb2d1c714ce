"""The rows of one output: as the journal has them, as the final file has them, and what the meta file says of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expo import __version__
from expo.durable import Row, json_lines, texts_sha256
from expo.engines import Completion, Failure, Key, Outcome, TextCompletion
from expo.errors import InputError
from expo.generate.decide import Plan
from expo.redact import without_secrets
from expo.rows.files import Columns, require_columns
from expo.tasks import Answer, read_outputs, read_rows

ROW_COLUMNS: Columns = {
    "id": str,
    "sample": int,
    "output": str,
    "length": int,
    "finish_reason": str,
    "prompt_tokens": int,
}
"""What every journal row has."""

TRANSIENT = ("overwrite", "dry_run", "output_dir", "part", "join", "data_parallel")
"""The settings that say how a run is done, not what."""


@dataclass(frozen=True)
class RunFigures:
    """What one run of the engine took."""

    rows: int = 0
    tokens_out: int = 0
    engine_start_seconds: float = 0.0
    generate_seconds: float = 0.0
    engine_step_seconds: float = 0.0
    repeatable: bool = False
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def row_key(row: Row) -> Key:
    """Which row a journal's row is."""
    return row["id"], row["sample"], row.get("turn", 0)


def _named(key: Key, work: Plan) -> Row:
    """A key's columns; the turn is one where the task has several."""
    prompt, sample, turn = key
    return {"id": prompt, "sample": sample, **({"turn": turn} if work.turns > 1 else {})}


def journal_rows(work: Plan, outcomes: Sequence[Outcome]) -> list[Row]:
    """Answers as the journal keeps them, in the order they came."""
    return [_journal_row(work, one) for one in outcomes]


def _journal_row(work: Plan, one: Outcome) -> Row:
    if isinstance(one, Failure):
        return failed_row(one.request.key, one.reason)
    text, length, prompt_tokens = _decoded(work, one) if isinstance(one, Completion) else _as_given(one)
    return {
        **_named(one.request.key, work),
        "output": text,
        "length": length,
        "finish_reason": one.finish_reason,
        "prompt_tokens": prompt_tokens,
    }


def _decoded(work: Plan, one: Completion) -> tuple[str, int, int]:
    """Text without the stop token, tokens, and tokens of the prompt."""
    ids = one.token_ids
    stopped = bool(ids) and ids[-1] in work.setup.stop_ids
    return work.model.decode(ids[:-1] if stopped else ids), len(ids), len(one.request.prompt_ids)


def _as_given(one: TextCompletion) -> tuple[str, int, int]:
    return one.text, one.length, one.prompt_tokens


def failed_row(key: Key, reason: str) -> Row:
    """The row of a prompt that could not be answered."""
    return {
        "id": key[0],
        "sample": key[1],
        "turn": key[2],
        "output": "",
        "length": 0,
        "finish_reason": "error",
        "prompt_tokens": 0,
        "reason": reason,
    }


def final_text(work: Plan, rows: Sequence[Row]) -> str:
    """The text of the output file, rows in prompt order."""
    prompts = {prompt.id: prompt for prompt in work.prompts}
    answers = [Answer(prompts[row["id"]], row["output"], row["length"], row["finish_reason"]) for row in rows]
    return work.task.write(answers, work.name)


def part_text(rows: Sequence[Row]) -> str:
    """The text of a part's file: the rows as the journal has them, in prompt order."""
    return json_lines(rows)


def part_meta(work: Plan, meta: Row, text: str) -> Row:
    """What a part's meta file says more than that of a whole output: which part it is, and its file's checksum."""
    return {**meta, "part": str(work.part), "rows_sha256": sha256(text.encode()).hexdigest()}


def sound(rows: list[Row], path: Path) -> list[Row]:
    """The rows of a journal or a part's file, when they are as expo writes them.

    Raises:
        InputError: They are not.
    """
    require_columns(rows, ROW_COLUMNS, path)
    return rows


def old_rows(work: Plan, meta: Row) -> list[Row]:
    """The journal rows of a finished output, from its final file and the per-row figures in its meta.

    Raises:
        InputError: The two do not belong together.
    """
    rows = sound(read_rows(work.files.final), work.files.final) if work.part is not None else _rejoined(work, meta)
    return [row for row in rows if row["finish_reason"] != "error"]


def _rejoined(work: Plan, meta: Row) -> list[Row]:
    files = work.files
    try:
        columns = {**meta["per_row"], "output": read_outputs(files.final, work.task)}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        require_columns(rows, ROW_COLUMNS, files.final)
    except (KeyError, IndexError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{files.final} is damaged, or {files.meta.name} is another's: move both away") from error
    return rows


def _is_repeatable(work: Plan, figures: RunFigures, *, extends: bool) -> bool:
    """Whether an uninterrupted run gives this file: shown for each engine on a CPU.

    A longer run batches its rows otherwise than the one it extends, and below float32 transformers' rows depend on
    their batch in the last bits.
    """
    batches_matter = work.engine == "transformers" and work.config.dtype != "float32"
    return figures.repeatable and not (extends and batches_matter)


def meta_of(work: Plan, rows: Sequence[Row], figures: RunFigures, *, extends: bool) -> Row:
    """What the meta file holds."""
    config = dataclasses.asdict(work.config)
    for transient in TRANSIENT:
        del config[transient]
    if work.config.base_url is not None:
        config["base_url"] = without_secrets(work.config.base_url)
    names = [_named(row_key(row), work) for row in rows]
    errors = [
        {"row": number, **names[number], "reason": row["reason"]}
        for number, row in enumerate(rows)
        if row["finish_reason"] == "error"
    ]
    seconds = figures.generate_seconds
    return {
        "command": "generate",
        "name": work.name,
        "config": config,
        "engine": work.engine,
        "versions": {"expo": __version__, **figures.versions},
        **work.model.record,
        "rows": len(rows),
        "failed": len(errors),
        "errors": errors,
        "tokens_in": sum(row["prompt_tokens"] for row in rows),
        "tokens_out": sum(row["length"] for row in rows),
        "finish_reasons": dict(sorted(Counter(row["finish_reason"] for row in rows).items())),
        "rows_this_run": figures.rows,
        "engine_start_seconds": round(figures.engine_start_seconds, 3),
        "generate_seconds": round(seconds, 3),
        "engine_step_seconds": round(figures.engine_step_seconds, 3),
        "tokens_per_second": round(figures.tokens_out / seconds, 1) if seconds else 0.0,
        "prompts_sha256": texts_sha256(work.items),
        "repeatable": _is_repeatable(work, figures, extends=extends),
        "fingerprint": work.fingerprint,
        "per_row": {
            **{column: [name[column] for name in names] for column in _named(("", 0, 0), work)},
            **{column: [row[column] for row in rows] for column in ("length", "finish_reason", "prompt_tokens")},
        },
    }
