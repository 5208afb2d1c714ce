"""The plan of `expo score`, made from the outputs and the reward model's small files, and its run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from expo.checkpoint.folder import (
    find_folder,
    refuse_inside,
    require_loadable,
    source_fingerprint,
)
from expo.checkpoint.hub import locate
from expo.checkpoint.vocabulary import embedding_rows
from expo.config import ScoreConfig
from expo.engines import SCORERS, ScorerSetup, find_engine
from expo.engines.chat import ChatTokenizer, context_length
from expo.engines.coverage import require_reward_model
from expo.errors import InputError
from expo.parts import read_part
from expo.rows import EngineKeeper, plan_to_run, run as run_job
from expo.rows.dates import find_date
from expo.rows.files import RowFiles, refuse_replacing
from expo.score.job import ScoreJob, rows_file
from expo.score.rows import score_rows
from expo.settings import Fingerprint, absent_values, recorded
from expo.tasks import find_task, read_conversations

log = logging.getLogger(__name__)


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
        rows=tuple(score_rows(conversations, tokenizer, longest, outputs)),
        setup=ScorerSetup(config, location.path, tokenizer.pad_id),
        files=files,
        fingerprint=fingerprint,
        date=date,
    )
    return whole if config.part is None else whole.share(read_part(config.part, {}))
