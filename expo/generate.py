"""`expo generate`: answer a task's prompts with a model.

The plan is made from the prompts and the model's small files (`plan`); the engine then yields rows as they
finish, each durable before the next is waited for; the final file is written when all are there.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expo import __version__
from expo.backends import Completion, Generator, GeneratorSetup, Request, load_generator
from expo.backends.chat import ChatTokenizer, context_length
from expo.backends.vllm import why_not
from expo.checkpoint import PARTIAL_FOLDER, read_config, read_json, source_fingerprint
from expo.config import GenerateConfig
from expo.errors import InputError
from expo.hub import Location, locate
from expo.progress import rows_bar
from expo.store import Journal, Row, RowFiles, texts_sha256
from expo.tasks import Answer, Prompt, Task, find_task, load_prompts, read_rows

RESULT_SETTINGS = (
    *("dtype", "engine_arg", "system", "n", "temperature", "top_k", "top_p", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "stop_token_id"),
)
"""The settings that change the rows, beside the model, the task and the engine."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything `expo generate` will do."""

    config: GenerateConfig
    engine: str
    """The engine, chosen."""
    location: Location
    task: Task
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    """Prompt-major, one per sample; rows without one do not fit the context."""
    too_long: dict[tuple[str, int], str]
    """Row key → why it has no request."""
    tokenizer: ChatTokenizer
    setup: GeneratorSetup
    files: RowFiles
    name: str
    fingerprint: Row

    @property
    def keys(self) -> list[tuple[str, int]]:
        """All rows, in output order."""
        return [(prompt.id, sample) for prompt in self.prompts for sample in range(self.config.n)]

    @property
    def items(self) -> list[object]:
        """What the rows are made from, in output order."""
        return [prompt.item for prompt in self.prompts for _ in range(self.config.n)]

    def describe(self) -> Row:
        """The plan as plain data."""
        return {
            "model": str(self.location.path),
            "engine": self.engine,
            "task": self.task.name,
            "rows": len(self.keys),
            "rows_too_long": len(self.too_long),
            "prompt_tokens": sum(len(request.prompt_ids) for request in self.requests),
            "context_length": self.setup.context_length,
            "stop_token_ids": list(self.setup.stop_ids),
            "output": str(self.files.final),
        }


@dataclass(frozen=True)
class Generated:
    """What a run made."""

    output: Path
    meta: Path
    status: str
    """"written" or "already complete"."""
    rows: int
    failed: int


def run(config: GenerateConfig) -> Generated:
    """Generate every row that is not there yet.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call goes on with the rest.
    """
    work = plan(config)
    journal = work.files.open(
        work.fingerprint, work.items, overwrite=config.overwrite, old_rows=lambda meta: _old_rows(work, meta)
    )
    if journal is None:
        meta = read_json(work.files.meta)
        return Generated(work.files.final, work.files.meta, "already complete", meta["rows"], meta["failed"])
    with work.files.holding(journal):
        done = {(row["id"], row["sample"]): row for row in journal.rows if row["finish_reason"] != "error"}
        extends = bool(done) and work.files.final.exists()
        run_figures = _generate(work, journal, done)
        done |= {key: _failed_row(key, reason) for key, reason in work.too_long.items()}
        rows = [done[key] for key in work.keys]
        meta = _meta(work, rows, run_figures, extends=extends)
        work.files.finish(journal, _final_text(work, rows), meta, {})
    return Generated(work.files.final, work.files.meta, "written", len(rows), meta["failed"])


def plan(config: GenerateConfig) -> Plan:
    """Decide everything from the prompts and the model's small files; nothing is written.

    Raises:
        InputError: The model, the task or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    engine = choose_engine(config)
    task = find_task(config.task)
    location = locate(config.model)
    require_generator(location.path)
    prompts = load_prompts(task, config.dataset)
    dataset_sha256 = texts_sha256(prompt.item for prompt in prompts)
    prompts = prompts[: config.limit]
    tokenizer = ChatTokenizer(location.path, template=config.chat_template, trust_remote_code=config.trust_remote_code)
    ids = tokenizer.encode([_messages(prompt, config) for prompt in prompts], generation_prompt=True)
    limit = context_length(location.path)
    requests, too_long = _requests(config, prompts, ids, limit)
    stop_ids = tuple(sorted({*tokenizer.stop_ids(), *config.stop_token_id}))
    needed = max((len(request.prompt_ids) + request.max_tokens for request in requests), default=1)
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else (*stop_ids, 0)[0]
    setup = GeneratorSetup(config, location.path, stop_ids, pad_id, min(limit, needed))
    name = config.name or location.name
    files = RowFiles(Path(config.output_dir) / f"outputs_{task.name}" / f"{name}{task.suffix}", name, "prompts_sha256")
    made_from = {
        "task": task.name,
        "dataset_sha256": dataset_sha256,
        "model": source_fingerprint(location),
        "engine": engine,
        "chat_template": sha256(tokenizer.template.encode()).hexdigest(),
        **({"batch_tokens": config.batch_tokens} if engine == "transformers" else {}),
        **{key: _plain(getattr(config, key)) for key in RESULT_SETTINGS},
    }
    return Plan(
        config=config,
        engine=engine,
        location=location,
        task=task,
        prompts=tuple(prompts),
        requests=requests,
        too_long=too_long,
        tokenizer=tokenizer,
        setup=setup,
        files=files,
        name=name,
        fingerprint=made_from,
    )


def choose_engine(config: GenerateConfig) -> str:
    """The engine `--engine` names; auto is vLLM where it can run, and says which and why.

    Raises:
        InputError: The setting goes with another engine.
    """
    engine: str = config.engine
    if engine == "auto":
        reason = why_not()
        engine = "vllm" if reason is None else "transformers"
        log.info("engine: %s (%s)", engine, reason or "vLLM is installed and can run")
    if engine != "vllm" and config.engine_arg:
        raise InputError(f"--engine-arg is for the vllm engine, and this run uses {engine}")
    return engine


def require_generator(path: Path) -> None:
    """Refuse a model folder that cannot answer: one expo has not finished writing, or a reward model.

    Raises:
        InputError: It is one of these.
    """
    for architecture in read_config(path).get("architectures") or []:
        if str(architecture).endswith("ForSequenceClassification"):
            raise InputError(f"{path.name} is a {architecture}: it scores and cannot generate")
    if (path / PARTIAL_FOLDER).exists():
        raise InputError(f"{path} is an unfinished output of expo: run the command that makes it again")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _messages(prompt: Prompt, config: GenerateConfig) -> Sequence[dict[str, str]]:
    system = [{"role": "system", "content": config.system}] if config.system is not None else []
    return [*system, *prompt.messages]


def _requests(
    config: GenerateConfig, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], limit: int
) -> tuple[tuple[Request, ...], dict[tuple[str, int], str]]:
    requests, too_long = [], {}
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        room = limit - len(prompt_ids)
        for sample in range(config.n):
            if room < 1:
                too_long[prompt.id, sample] = f"the prompt has {len(prompt_ids)} tokens, the model takes {limit}"
            else:
                requests.append(Request(prompt.id, sample, tuple(prompt_ids), min(config.max_tokens, room)))
    return tuple(requests), too_long


@dataclass(frozen=True)
class _RunFigures:
    """What one run of the engine took."""

    rows: int = 0
    tokens_out: int = 0
    engine_start_seconds: float = 0.0
    generate_seconds: float = 0.0
    engine_step_seconds: float = 0.0
    repeatable: bool = False
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def _generate(work: Plan, journal: Journal, done: dict[tuple[str, int], Row]) -> _RunFigures:
    """Run the engine over the rows that are not in `done`, adding them to it and to the journal."""
    missing = [request for request in work.requests if request.key not in done]
    if not missing:
        return _RunFigures()
    log.info("%s: %d of %d rows to generate with %s", work.name, len(missing), len(work.keys), work.engine)
    clock = time.perf_counter()
    engine = load_generator(work.engine)(work.setup)
    started = time.perf_counter()
    tokens_out = 0
    for rows in _finished_rows(work, engine, done):
        journal.append(rows)
        done |= {(row["id"], row["sample"]): row for row in rows}
        tokens_out += sum(row["length"] for row in rows)
    return _RunFigures(
        rows=len(missing),
        tokens_out=tokens_out,
        engine_start_seconds=started - clock,
        generate_seconds=time.perf_counter() - started,
        engine_step_seconds=engine.step_seconds,
        repeatable=engine.repeatable,
        versions=engine.versions(),
    )


def _finished_rows(work: Plan, engine: Generator, done: dict[tuple[str, int], Row]) -> Iterator[list[Row]]:
    finished_before = len(done)
    progress = rows_bar(len(work.requests), "generate", initial=finished_before)
    try:
        for completions in engine.generate(work.requests, set(done)):
            yield _rows(work, completions)
            progress.update(len(completions))
    finally:
        progress.close()


def _rows(work: Plan, completions: Sequence[Completion]) -> list[Row]:
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


def _failed_row(key: tuple[str, int], reason: str) -> Row:
    return {
        "id": key[0],
        "sample": key[1],
        "output": "",
        "length": 0,
        "finish_reason": "error",
        "prompt_tokens": 0,
        "reason": reason,
    }


def _final_text(work: Plan, rows: Sequence[Row]) -> str:
    prompts = {prompt.id: prompt for prompt in work.prompts}
    answers = [Answer(prompts[row["id"]], row["output"], row["length"], row["finish_reason"]) for row in rows]
    return work.task.write(answers, work.name)


def _old_rows(work: Plan, meta: Row) -> list[Row]:
    """The journal rows of a finished output, from its final file and the per-row figures in its meta."""
    outputs = [row["output"] for row in read_rows(work.files.final)]
    figures = meta["per_row"]
    columns = (figures["id"], figures["sample"], figures["length"], figures["finish_reason"], figures["prompt_tokens"])
    names = ("id", "sample", "length", "finish_reason", "prompt_tokens", "output")
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, outputs, strict=True)]
    return [row for row in rows if row["finish_reason"] != "error"]


def _is_repeatable(work: Plan, figures: _RunFigures, *, extends: bool) -> bool:
    """Whether an uninterrupted run gives this file: shown for each engine on a CPU.

    A longer run batches its rows otherwise than the one it extends, and below float32 transformers' rows depend on
    their batch in the last bits.
    """
    batches_matter = work.engine == "transformers" and work.config.dtype != "float32"
    return figures.repeatable and not (extends and batches_matter)


def _meta(work: Plan, rows: Sequence[Row], figures: _RunFigures, *, extends: bool) -> Row:
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
        "model": {"name": work.location.label, "revision": work.location.revision},
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
