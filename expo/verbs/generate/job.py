"""What `expo generate` does with a plan: how rows are produced and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from expo import __version__
from expo.config import GenerateConfig
from expo.engines import (
    Completion,
    EngineSpec,
    Failure,
    Generator,
    GeneratorSetup,
    Outcome,
    Request,
)
from expo.engines.torch_tools import gpus_per_engine, worker_environments
from expo.errors import InputError
from expo.files import Row, shown, texts_sha256
from expo.parts import Part
from expo.redact import without_secrets
from expo.rows.files import Columns, require_columns
from expo.rows.job import Figures, Key, RowJob, Rows
from expo.rows.parts import describe_parts
from expo.tasks import Answer, Prompt, Task, read_outputs, read_rows
from expo.verbs.generate.model import Model, applied_adapter
from expo.verbs.generate.requests import RequestBuilder, Turn

NAMES = ("id", "sample", "turn")
"""A row's key, as the journal names it."""
WHY = ("reason", "lasting")
"""What a failed row also has."""
APPLIED = "applied as an adapter"
"""How the engine had θ(α), where it did not load its weights."""


@dataclass(frozen=True, kw_only=True)
class GenerateJob(RowJob):
    """Everything `expo generate` will do."""

    verb: ClassVar[str] = "generate"
    columns: ClassVar[Columns] = {
        "id": str,
        "sample": int,
        "output": str,
        "length": (int, type(None)),
        "finish_reason": str,
        "prompt_tokens": (int, type(None)),
    }
    seconds_key: ClassVar[str] = "generate_seconds"

    config: GenerateConfig
    spec: EngineSpec
    model: Model
    task: Task
    prompts: tuple[Prompt, ...]
    """Those that are answered, in the task's order."""
    all_prompts: tuple[Prompt, ...]
    """The task's, also beyond `--limit`."""
    only: tuple[str, ...] | None = None
    """The ids of the prompts that this job was restricted to, in the task's order; None: all up to `--limit`."""
    builder: RequestBuilder
    first: Turn
    """The first turn; later turns are built from its answers."""
    planned: Turn
    """The first turn of all prompts up to `--limit`."""
    setup: GeneratorSetup
    probe: Path | None = None
    """In a process that is given this job: the file for what the engine answers to a probe, made instead of rows."""
    timed: bool = False
    """Whether a probe also says how long a batch takes."""
    room: int | None = None
    """For how many α in one batch the engine has room, which applies adapters; None for one that loads θ(α)."""

    # --- its rows

    @property
    def requests(self) -> tuple[Request, ...]:
        """The first turn's requests."""
        return self.first.requests

    @property
    def turns(self) -> int:
        """The maximum number of turns of a prompt."""
        return max((prompt.turns for prompt in self.prompts), default=1)

    @property
    def keys(self) -> list[Key]:
        """All rows, in output order: prompt-major, then samples, then turns."""
        return [(prompt.id, sample, turn) for prompt, sample, turn in self._rows()]

    @property
    def items(self) -> list[object]:
        """The conversations to answer, without the answers."""
        return [prompt.asked(turn) for prompt, _, turn in self._rows()]

    def _rows(self) -> Iterator[tuple[Prompt, int, int]]:
        for prompt in self.prompts:
            yield from ((prompt, sample, turn) for sample in range(self.config.n) for turn in range(prompt.turns))

    def everything(self) -> Self:
        """All prompts of the task."""
        return replace(self, prompts=self.all_prompts)

    def covering(self, keys: Collection[Key]) -> Self:
        """With the prompts of these rows; those beyond `--limit` have no requests."""
        ids, more = {prompt.id for prompt in self.prompts}, {key[0] for key in keys}
        return self if more <= ids else self._with(ids | more)

    def takes_in(self, keys: Collection[Key]) -> bool:
        """A job of some prompts goes on with any up to `--limit`."""
        return self.only is not None and all(key[0] in self.builder.token_budgets for key in keys)

    def of(self, ids: Collection[str]) -> Self:
        """The same job of only these prompts, with the engine's setup of all.

        Args:
            ids: Of prompts up to `--limit`, in any order.

        Raises:
            InputError: There is no such prompt, or none is given.
        """
        planned = self.builder.token_budgets.keys()
        unknown = next((name for name in ids if name not in planned), None)
        if unknown is not None:
            raise InputError(f"{self.task.name} has no prompt {shown(unknown)} among the {len(planned)} to answer")
        if not ids:
            raise InputError(f"none of the prompts of {self.task.name} is to be answered")
        return replace(self, only=())._with(set(ids))

    def _with(self, ids: Container[str]) -> Self:
        """The same job of these prompts."""
        prompts = tuple(prompt for prompt in self.all_prompts if prompt.id in ids)
        only = None if self.only is None else tuple(prompt.id for prompt in prompts)
        return replace(self, prompts=prompts, first=self.planned.of(ids), only=only)

    def share(self, part: Part) -> Self:
        """One part of the job: of the task's prompts i, i + N, … those that the job has, with all their samples.

        So a prompt is in the same part whichever others are answered.
        """
        its = {prompt.id for prompt in part.of(self.all_prompts)}
        prompts = tuple(prompt for prompt in self.prompts if prompt.id in its)
        files = self.files.part(part.file_stem)
        return replace(self, prompts=prompts, first=self.first.of(its), files=files, part=part, whole=self)

    def key_of(self, row: Row) -> Key:
        """The prompt's id, the sample and the turn."""
        return row["id"], row["sample"], row.get("turn", 0)

    def is_answered(self, row: Row) -> bool:
        """Whether there is an answer."""
        return bool(row["finish_reason"] != "error")

    def pending(self, done: Mapping[Key, Row]) -> bool:
        """Whether any answerable prompt has no answer."""
        return any(request.key not in done for turn in self._each_turn(done) for request in turn.requests)

    def impossible(self, done: Mapping[Key, Row]) -> Rows:
        """The rows whose prompt the model cannot take, or whose previous turn failed."""
        return {
            key: failed_row(key, why, lasting=True)
            for turn in self._each_turn(done)
            for key, why in turn.unanswerable.items()
        }

    def _each_turn(self, done: Mapping[Key, Row]) -> Iterator[Turn]:
        """Every turn in order, each built from the answers available when it is reached."""
        yield self.first
        for number in range(1, self.turns):
            yield self.builder.turn(self.prompts, number, done)

    # --- producing them

    def with_gpu_share(self, share: float | None) -> Self:
        """The same job with an engine that has this share of each GPU's memory."""
        return replace(self, setup=replace(self.setup, gpu_share=share))

    def with_adapter(self, room: int) -> Self:
        """The same job with an engine that applies θ(α) to SFT as an adapter; it is written now.

        Raises:
            InputError: The pair is none of a LoRA adapter that can be applied.
        """
        return replace(self, room=room, setup=replace(self.setup, applied=applied_adapter(self.setup.theta, room)))

    def worker_options(self) -> dict[str, Any]:
        """The date in prompts, which prompts, the engine's share of a GPU, how it has θ(α), and the file of a probe."""
        share, probe, room = self.setup.gpu_share, self.probe, self.room
        return {
            **super().worker_options(),
            **({} if self.only is None else {"prompts": list(self.only)}),
            **({} if share is None else {"gpu_share": share}),
            **({} if room is None else {"room": room}),
            **({} if probe is None else {"probe": str(probe)}),
            **({"timed": True} if self.timed else {}),
        }

    def open_engine(self) -> Generator:
        """Start the engine."""
        engine: Generator = self.spec.load()(self.setup)
        return engine

    def execute(self, engine: Generator, done: Rows) -> Iterator[list[Row]]:
        """Request the missing answers, turn by turn."""
        for turn in self._each_turn(done):
            finished = {key for key, row in done.items() if self.is_answered(row)}
            if all(request.key in finished for request in turn.requests):
                continue
            for outcomes in engine.generate(turn.requests, finished):
                yield [self.journal_row(one) for one in outcomes]

    def tokens(self, row: Row) -> int:
        """Its generated tokens, as far as they are known."""
        return int(row["length"] or 0)

    def worker_environments(self, count: int) -> list[dict[str, str]]:
        """The GPUs of each worker, or its share of the CPU's threads."""
        return worker_environments(self.engine, self.spec, self.config, count)

    def gpus_per_engine(self, there: bool) -> int:
        """The GPUs of each engine on a cluster."""
        return gpus_per_engine(self.engine, self.spec, self.config, asked=self.config.engine, there=there)

    def journal_row(self, one: Outcome) -> Row:
        """An answer in the journal's form; its text excludes the stop token."""
        if isinstance(one, Failure):
            return failed_row(one.request.key, one.reason, lasting=one.lasting)
        if isinstance(one, Completion):
            ids = one.token_ids
            stopped = bool(ids) and ids[-1] in self.setup.stop_ids
            text = self.model.decode(ids[:-1] if stopped else ids)
            length: int | None = len(ids)
            prompt_tokens: int | None = len(one.request.prompt_ids)
        else:
            text, length, prompt_tokens = one.text, one.length, one.prompt_tokens
        return {
            **self._named(one.request.key),
            "output": text,
            "length": length,
            "finish_reason": one.finish_reason,
            "prompt_tokens": prompt_tokens,
        }

    def _named(self, key: Key) -> Row:
        """A key's columns; includes the turn if the task has several."""
        prompt, sample, turn = key
        return {"id": prompt, "sample": sample, **({"turn": turn} if self.turns > 1 else {})}

    # --- writing them

    def finished_keys(self, meta: Row) -> list[Key] | None:
        """The ids, samples and turns in the meta file."""
        try:
            names = meta["per_row"]
            turns = names.get("turn", [0] * len(names["id"]))
            columns = zip(names["id"], names["sample"], turns, strict=True)
            return [(str(prompt), int(sample), int(turn)) for prompt, sample, turn in columns]
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def finished_rows(self, meta: Row, keys: Sequence[Key]) -> list[Row]:
        """The rows of the finished output, from its final file and the per-row figures in its meta file.

        Raises:
            InputError: The two are inconsistent.
        """
        files = self.files
        if self.part is not None:
            return list(require_columns(read_rows(files.final), self.columns, files.final))
        try:
            reasons = {error["row"]: {key: error[key] for key in WHY if key in error} for error in meta["errors"]}
            columns = {**meta["per_row"], "output": read_outputs(files.final, self.task)}
            rows = [
                {
                    **dict(zip(columns, values, strict=True)),
                    **dict(zip(NAMES, key, strict=True)),
                    **reasons.get(row, {}),
                }
                for row, (key, *values) in enumerate(zip(keys, *columns.values(), strict=True))
            ]
            require_columns(rows, self.columns, files.final)
        except (KeyError, IndexError, TypeError, ValueError, InputError) as error:
            raise InputError(
                f"{files.final} is damaged, or {files.meta.name} does not belong to it: move both away"
            ) from error
        return rows

    def render(self, rows: Sequence[Row]) -> dict[Path, str]:
        """The output file, in the task's format."""
        prompts = {prompt.id: prompt for prompt in self.prompts}
        answers = [Answer(prompts[row["id"]], row["output"], row["length"], row["finish_reason"]) for row in rows]
        return {self.files.final: self.task.write(answers, self.name)}

    def meta_of(self, rows: Sequence[Row], figures: Figures, *, extends: bool) -> Row:
        """The content of the meta file."""
        config = self.recorded_config()
        if self.config.base_url is not None:
            config["base_url"] = without_secrets(self.config.base_url)
        names = [self._named(self.key_of(row)) for row in rows]
        errors = [
            {"row": number, **names[number], **{key: row[key] for key in WHY if key in row}}
            for number, row in enumerate(rows)
            if not self.is_answered(row)
        ]
        # A longer run batches its rows differently from the one it extends, which shows in padded rows below float32.
        batches_matter = self.spec.pads and self.config.dtype != "float32"
        repeatable = figures.repeatable and not (extends and batches_matter)
        unknown = sum(row["length"] is None for row in rows)
        return {
            "command": self.verb,
            "name": self.name,
            "config": config,
            "engine": self.engine,
            **({} if self.setup.applied is None else {"weights": APPLIED}),
            "versions": {"expo": __version__, **figures.versions},
            **self.model.record,
            "rows": len(rows),
            "failed": len(errors),
            "errors": errors,
            "tokens_in": sum(row["prompt_tokens"] or 0 for row in rows),
            "tokens_out": sum(map(self.tokens, rows)),
            **({"rows_of_unknown_length": unknown} if unknown else {}),
            "finish_reasons": dict(sorted(Counter(row["finish_reason"] for row in rows).items())),
            "rows_this_run": figures.rows,
            "engine_start_seconds": round(figures.engine_start_seconds, 3),
            "generate_seconds": round(figures.seconds, 3),
            "engine_step_seconds": round(figures.engine_step_seconds, 3),
            "tokens_per_second": figures.tokens_per_second,
            "prompts_sha256": texts_sha256(self.items),
            "repeatable": repeatable,
            "fingerprint": self.fingerprint,
            "per_row": {
                **{column: [name[column] for name in names] for column in self._named(("", 0, 0))},
                **{column: [row[column] for row in rows] for column in ("length", "finish_reason", "prompt_tokens")},
            },
        }

    def describe(self) -> Row:
        """The plan as plain data."""
        known = self.model.tokenizer is not None
        temperatures = Counter(self.builder.temperature(prompt) for prompt, _, _ in self._rows())
        return {
            **self.model.describe(),
            "engine": self.engine,
            "task": self.task.name,
            **describe_parts(self),
            **self.describe_date(),
            "rows": len(self.keys),
            "rows_too_long": len(self.first.unanswerable),
            "temperatures": {str(value): number for value, number in sorted(temperatures.items())},
            "prompt_tokens": sum(len(request.prompt_ids) for request in self.requests) if known else None,
            "context_length": self.setup.context_length if known else None,
            "stop_token_ids": list(self.setup.stop_ids),
            "output": str(self.files.final),
        }


def failed_row(key: Key, reason: str, *, lasting: bool) -> Row:
    """The row of a prompt that could not be answered; `lasting` if trying again is not expected to help."""
    return {
        "id": key[0],
        "sample": key[1],
        "turn": key[2],
        "output": "",
        "length": 0,
        "finish_reason": "error",
        "prompt_tokens": 0,
        "reason": reason,
        **({"lasting": True} if lasting else {}),
    }
