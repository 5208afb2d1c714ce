"""The rows of one output: as the journal has them, as the final file has them, and what the meta file says of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from expo import __version__
from expo.backends import Completion
from expo.generate.decide import Plan
from expo.store import Row, texts_sha256
from expo.tasks import Answer, read_rows


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


def journal_rows(work: Plan, completions: Sequence[Completion]) -> list[Row]:
    """Answers as the journal keeps them, in the order they came."""
    texts = work.tokenizer.decode([_without_stop(one, work.setup.stop_ids) for one in completions])
    return [
        {
            "id": one.request.id,
            "sample": one.request.sample,
            "output": text,
            "length": len(one.token_ids),
            "finish_reason": one.finish_reason,
            "prompt_tokens": len(one.request.prompt_ids),
        }
        for one, text in zip(completions, texts, strict=True)
    ]


def _without_stop(completion: Completion, stop_ids: Sequence[int]) -> Sequence[int]:
    ids = completion.token_ids
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def failed_row(key: tuple[str, int], reason: str) -> Row:
    """The row of a prompt that could not be answered."""
    return {
        "id": key[0],
        "sample": key[1],
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


def old_rows(work: Plan, meta: Row) -> list[Row]:
    """The journal rows of a finished output, from its final file and the per-row figures in its meta."""
    outputs = [row["output"] for row in read_rows(work.files.final)]
    figures = meta["per_row"]
    columns = (figures["id"], figures["sample"], figures["length"], figures["finish_reason"], figures["prompt_tokens"])
    names = ("id", "sample", "length", "finish_reason", "prompt_tokens", "output")
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, outputs, strict=True)]
    return [row for row in rows if row["finish_reason"] != "error"]


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
    for transient in ("overwrite", "dry_run", "output_dir"):
        del config[transient]
    per_row = ("id", "sample", "length", "finish_reason", "prompt_tokens")
    errors = [
        {"row": number, "id": row["id"], "sample": row["sample"], "reason": row["reason"]}
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
        **work.source.record,
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
        "per_row": {key: [row[key] for row in rows] for key in per_row},
    }
