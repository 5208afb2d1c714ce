"""The plan of `expo score`, made from the outputs and the models' small files, and its run.

Each reward model of a run is a job of its own, and so is the implicit reward: with its own files, fingerprint, parts
and engine, which is closed before the next one's is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from expo.checkpoint.folder import (
    Location,
    is_adapter,
    refuse_inside,
    require_generator,
    require_loadable,
)
from expo.checkpoint.vocabulary import embedding_rows, require_same_vocabulary
from expo.config import ScoreConfig
from expo.engines import EngineSpec, ScorerSetup, find_engine, require_fitting
from expo.engines.chat import UNLIMITED, ChatTokenizer, context_length
from expo.engines.coverage import require_whole
from expo.engines.log_probs import LOG_PROBS, LogProbSetup
from expo.engines.reward_models import RewardModel, recognise
from expo.engines.reward_tokens import PairTokenizer, RewardTokenizer, reward_tokenizer
from expo.errors import InputError
from expo.files import Row
from expo.parts import read_part
from expo.rows import EngineKeeper, plan_to_run, run as run_job
from expo.rows.dates import TemplateDate, find_date
from expo.rows.files import RowFiles
from expo.settings import Fingerprint, absent_values, recorded, require_same
from expo.tasks import Conversation, Task, find_task, read_conversations
from expo.verbs.score.engine import choose_engine, reward_fingerprint
from expo.verbs.score.implicit import AnswerRow, ImplicitJob, answer_span
from expo.verbs.score.job import ScoreJob
from expo.verbs.score.known import with_recipe
from expo.verbs.score.result import Scored, scored
from expo.verbs.score.rows import ScoreRow, encode_answered, score_rows
from expo.verbs.score.scorers import ScoredBy, files_of, find_scorers

FEW_TOKENS = 8
"""More than these, at the end of a prompt, are no generation prompt, nor letters that were joined with the answer's."""

AnyTokenizer = TypeVar("AnyTokenizer", bound=ChatTokenizer)
AnyRow = TypeVar("AnyRow", bound=ScoreRow)

log = logging.getLogger(__name__)


def run(
    config: ScoreConfig,
    keeper: EngineKeeper | None = None,
    *,
    only: int | None = None,
    moment: str | None = None,
    room: int = 0,
    gpu_share: float | None = None,
) -> Scored:
    """Score every row that has no score yet, with one reward model after the other.

    Args:
        config: The settings.
        keeper: Keeps the engine open after this run; without one, each engine is closed at the end of its rows.
        only: The one of the reward models to score with, counted from 0; all if None.
        moment: At which the clock of a chat template stands, in ISO 8601, if an output is begun now; None: now.
        room: The longest rows that the engine is to take, in tokens, where it stays for longer ones than this run's.
        gpu_share: The engine's share of each GPU's memory, where it is not alone there.

    Raises:
        InputError: The settings or inputs are at fault; what was finished before stays.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    answers = _read_answers(config)
    scorers = find_scorers(config, answers.task, only)
    jobs = [plan_to_run(partial(_job, answers, scorer, moment), config) for scorer in scorers]
    _require_different(jobs)
    first, *further = [scored(run_job(job.with_room(room, gpu_share), keeper)) for job in jobs]
    return replace(first, further=tuple(further))


def plan(config: ScoreConfig, like: Sequence[ScoreJob] = ()) -> ScoreJob:
    """Decide everything from the outputs and the models' small files; nothing is written.

    Args:
        config: The settings.
        like: The jobs of the same reward models for other outputs, whose engine and date these are to have, so that
            rewards can be compared.

    Returns:
        The first reward model's job, which has those of the further ones.

    Raises:
        InputError: The outputs, a model or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    answers = _read_answers(config)
    jobs = []
    for scorer in find_scorers(config, answers.task):
        other = next((job for job in like if job.number == scorer.number), None)
        engine = config.engine if other is None else other.engine
        moment = None if other is None or other.date is None else other.date.moment
        jobs.append(_job(answers, scorer, moment, replace(config, engine=engine)))
    _require_different(jobs)
    return replace(jobs[0], further=tuple(jobs[1:]))


@dataclass(frozen=True)
class ReadyModel:
    """A reward model that was found and judged before there is anything to score."""

    location: Location
    body: Path
    """The folder with its weights, or of an adapter those of its base."""
    engine: str
    spec: EngineSpec
    config: ScoreConfig
    """The settings, resolved."""


def find_reward_models(config: ScoreConfig) -> list[ReadyModel]:
    """The reward models of a run whose outputs may not be there yet, with the engine of each.

    Raises:
        InputError: A model is missing, is no reward model, or does not go with a setting; or rewards are there that
            were made with others.
        EnvironmentFailure: The hub cannot be reached.
    """
    task = find_task(config.task)
    return [_ready(scorer, task, config) for scorer in find_scorers(config, task) if scorer.sft is None]


def _ready(scorer: ScoredBy, task: Task, config: ScoreConfig) -> ReadyModel:
    config = with_recipe(config, scorer.location)
    found = _judged(scorer.location, config)
    outputs = Path(config.output_dir) / f"outputs_{task.name}" / f"{config.name}{task.suffix}"
    files = files_of(scorer, outputs, task, config)
    engine, spec, config = choose_engine(config, found, files)
    tokenizer = reward_tokenizer(found, bos=config.bos, trust_remote_code=config.trust_remote_code)
    fingerprint = reward_fingerprint(_made_from(task, scorer, engine, tokenizer), config, found)
    there = files.look().fingerprint
    if there is not None and not config.overwrite:
        if there.get("reward_model") != fingerprint["reward_model"]:
            raise InputError(
                f"{files.final} has rewards by a reward model other than {scorer.location.label}: give that one first "
                "and this one as a second --reward-model; --overwrite replaces the rewards"
            )
        require_same(files.final, there, _dated(tokenizer, fingerprint, files, config)[1])
    return ReadyModel(scorer.location, found.body, engine, spec, config)


def _judged(location: Location, config: ScoreConfig) -> RewardModel:
    """The reward model of a folder, if its checkpoint has a trained head."""
    found = recognise(location, config.chat_template)
    found.require_trained(trust_remote_code=config.trust_remote_code)
    refuse_inside(Path(config.output_dir), location, *([] if found.base is None else [found.base]), flag="--output-dir")
    return found


# --- what is scored ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """The outputs, read once for all."""

    file: Path
    task: Task
    conversations: Sequence[Conversation]
    """Up to `--limit`."""
    whole: Sequence[Conversation]


def _read_answers(config: ScoreConfig) -> _Answers:
    task = find_task(config.task)
    file = Path(config.outputs or Path(config.output_dir) / f"outputs_{task.name}" / f"{config.name}{task.suffix}")
    if not file.is_file():
        raise InputError(f"no outputs to score: {file} does not exist; run `expo generate` first, or pass --outputs")
    if config.dataset is not None and not task.by_id:
        raise InputError(f"--dataset is for mtbench: the outputs of {task.name} contain their prompts")
    whole = conversations = read_conversations(file, task, dataset=config.dataset)
    if config.limit is not None:
        conversations = read_conversations(file, task, dataset=config.dataset, limit=config.limit)
    if not conversations:
        raise InputError(f"{file} contains no rows")
    return _Answers(file, task, conversations, whole)


def _require_different(jobs: Sequence[ScoreJob]) -> None:
    """Refuse one reward model that is given twice: by two names, or as a copy."""
    seen: dict[Path, str] = {}
    for job in (job for job in jobs if not isinstance(job, ImplicitJob)):
        given = job.config.reward_models[job.number]
        for path in (job.location.path.resolve(), job.files.final):
            if path in seen:
                raise InputError(f"--reward-model {seen[path]} and {given} are the same model: give it once")
            seen[path] = given


# --- one job ------------------------------------------------------------------------------------------------------


def _job(answers: _Answers, scorer: ScoredBy, moment: str | None, config: ScoreConfig) -> ScoreJob:
    """The job of one reward model, or of one part of it."""
    make = _reward_job if scorer.sft is None else _implicit_job
    whole = make(answers, scorer, moment, config)
    return whole if config.part is None else whole.share(read_part(config.part, {}))


def _reward_job(answers: _Answers, scorer: ScoredBy, moment: str | None, config: ScoreConfig) -> ScoreJob:
    location = scorer.location
    config = with_recipe(config, location)
    found = _judged(location, config)
    files = files_of(scorer, answers.file, answers.task, config)
    engine, spec, config = choose_engine(config, found, files)
    tokenizer = reward_tokenizer(found, bos=config.bos, trust_remote_code=config.trust_remote_code)
    longest = _longest(config, location if found.base is None else found.base)
    longest = min(longest, spec.call("context_limit", config) or longest)
    fingerprint = reward_fingerprint(_made_from(answers.task, scorer, engine, tokenizer), config, found)
    tokenizer, fingerprint, date = _dated(tokenizer, fingerprint, files, config, moment)
    unread = found.unread_id(trust_remote_code=config.trust_remote_code)
    read = partial(_score_rows, tokenizer=tokenizer, longest=longest, unread=unread)
    rows = read(answers)
    _say_cut_prompts(rows, tokenizer, longest)
    return ScoreJob(
        config=config,
        engine=engine,
        spec=spec,
        name=files.name,
        location=location,
        outputs=answers.file,
        rows=rows,
        all_rows=_all_rows(answers, config, read, rows),
        longest=longest,
        setup=ScorerSetup(
            config,
            location.path,
            max(len(row.token_ids) for row in rows),
            base=None if found.base is None else found.base.path,
            separator=tokenizer.separator,
        ),
        normalization=found.normalization,
        files=files,
        fingerprint=fingerprint,
        date=date,
        number=scorer.number,
    )


def _implicit_job(answers: _Answers, scorer: ScoredBy, moment: str | None, config: ScoreConfig) -> ImplicitJob:
    dpo, sft = scorer.location, scorer.sft or scorer.location
    config = replace(config, bos="template")  # it is for reward models
    engine, spec = _log_probs_engine(config)
    for flag, location in (("--dpo", dpo), ("--sft", sft)):
        _require_policy(flag, location, config)
    refuse_inside(Path(config.output_dir), dpo, sft, flag="--output-dir")
    require_same_vocabulary(sft, dpo)
    config = spec.call("settle", replace(config, engine_arg=(), tensor_parallel=None), dpo.path)
    tokenizer = _tokenizer(dpo, config)
    longest = _longest(config, dpo, sft)
    files = files_of(scorer, answers.file, answers.task, config)
    made_from = {**_made_from(answers.task, scorer, engine, tokenizer), **recorded(config, "rows")}
    fingerprint = Fingerprint(made_from, absent_values(config, "rows"))
    tokenizer, fingerprint, date = _dated(tokenizer, fingerprint, files, config, moment)
    read = partial(_answer_rows, tokenizer=tokenizer, longest=longest)
    rows = read(answers)
    return ImplicitJob(
        config=config,
        engine=engine,
        spec=spec,
        name=files.name,
        location=dpo,
        sft=sft,
        outputs=answers.file,
        rows=rows,
        all_rows=_all_rows(answers, config, read, rows),
        longest=longest,
        setup=LogProbSetup(config, dpo.path, sft.path),
        files=files,
        fingerprint=fingerprint,
        date=date,
        number=scorer.number,
    )


def _tokenizer(location: Location, config: ScoreConfig) -> RewardTokenizer:
    return RewardTokenizer(
        location.path,
        template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
        rows=embedding_rows(location.path),
    )


def _longest(config: ScoreConfig, *models: Location) -> int:
    """The longest conversation that is read, in tokens."""
    shortest = min(models, key=lambda model: context_length(model.path))
    longest = context_length(shortest.path)
    if config.max_length is not None and config.max_length > longest:
        log.warning("--max-length %d: %s takes at most %d tokens", config.max_length, shortest.label, longest)
    return min(config.max_length or longest, longest)


def _made_from(task: Task, scorer: ScoredBy, engine: str, tokenizer: ChatTokenizer) -> Row:
    """What is scored, and by whom; the settings come to it."""
    return {
        "task": task.name,
        **scorer.source,
        "engine": engine,
        "chat_template": sha256(tokenizer.template.encode()).hexdigest(),
    }


def _dated(
    tokenizer: AnyTokenizer,
    fingerprint: Fingerprint,
    files: RowFiles,
    config: ScoreConfig,
    moment: str | None = None,
) -> tuple[AnyTokenizer, Fingerprint, TemplateDate | None]:
    """With the date of a chat template that writes one, at which the tokenizer's clock then stands."""
    if not tokenizer.asks_for_time:
        return tokenizer, fingerprint, None
    date = find_date(files, fingerprint, overwrite=config.overwrite, moment=moment or config.template_date)
    return tokenizer.at(date.moment), fingerprint.with_entry(date.entry), date


def _say_cut_prompts(rows: Sequence[ScoreRow], tokenizer: ChatTokenizer, longest: int) -> None:
    """Warn of rows that are cut before their answer begins."""
    cut = [row.conversation.messages[:-1] for row in rows if row.truncated and not row.failed]
    if not cut:
        return
    prompts = tokenizer.encode(cut, generation_prompt=True)
    without = sum(len(prompt) >= longest for prompt in prompts)
    if without:
        log.warning(
            "%d of %d rows have a prompt that fills the maximum length of %d tokens: their answers are not scored",
            *(without, len(rows), longest),
        )


def _score_rows(
    answers: _Answers, tokenizer: RewardTokenizer | PairTokenizer, longest: int, unread: int | None
) -> tuple[ScoreRow, ...]:
    return tuple(score_rows(answers.conversations, tokenizer, longest, answers.file, unread, whole=answers.whole))


def _all_rows(
    answers: _Answers, config: ScoreConfig, read: Callable[[_Answers], tuple[AnyRow, ...]], rows: tuple[AnyRow, ...]
) -> Callable[[], tuple[AnyRow, ...]]:
    """Reads the rows of the whole file, once and only where they are needed."""
    if config.limit is None:
        return lambda: rows
    return cache(lambda: read(replace(answers, conversations=answers.whole)))


# --- the implicit reward ------------------------------------------------------------------------------------------


def _log_probs_engine(config: ScoreConfig) -> tuple[str, EngineSpec]:
    """The engine of the implicit reward; beside reward models, `--engine` is theirs where this has not that one."""
    beside = bool(config.reward_models) and config.engine not in LOG_PROBS
    if config.engine not in ("auto", *LOG_PROBS) and not beside:
        raise InputError(f"--implicit-reward runs with {', '.join(LOG_PROBS)}, not with --engine {config.engine}")
    engine, spec = find_engine(LOG_PROBS, "auto" if beside else config.engine)
    if not config.reward_models:  # else it may be theirs
        require_fitting(LOG_PROBS, config, engine)
    return engine, spec


def _require_policy(flag: str, location: Location, config: ScoreConfig) -> None:
    """Refuse what is no whole model that generates.

    Raises:
        InputError: It is an adapter, a reward model, unfinished, or lacks weights.
    """
    if is_adapter(location.path):
        raise InputError(
            f"{flag} {location.label} is an adapter: merge it with `expo extrapolate --sft BASE --dpo {location.path} "
            f"--alpha 0 --output MERGED`, and give {flag} MERGED"
        )
    require_generator(location.path)
    require_loadable(location.path)
    require_whole(location.path, location.label, None, trust_remote_code=config.trust_remote_code)


def _answer_rows(answers: _Answers, tokenizer: RewardTokenizer, longest: int) -> tuple[AnswerRow, ...]:
    """The rows, their token ids cut after the answer."""
    whole = list(score_rows(answers.conversations, tokenizer, UNLIMITED, answers.file, whole=answers.whole))
    asked, failed = [row.conversation.messages[:-1] for row in whole], [row.failed for row in whole]
    prompts = encode_answered(asked, failed, tokenizer, generation_prompt=True)
    ending = tokenizer.ending()
    rows, rewritten = [], 0
    for row, prompt in zip(whole, prompts, strict=True):
        start, end = answer_span(prompt, row.token_ids, None if ending is None else ending.id)
        rewritten += start + FEW_TOKENS < len(prompt)
        rows.append(
            AnswerRow(
                number=row.number,
                conversation=row.conversation,
                id=row.id,
                sample=row.sample,
                token_ids=row.token_ids[: min(end, longest)],
                truncated=end > longest,
                failed=row.failed or (end > longest and start >= longest),
                start=start,
            )
        )
    if rewritten:
        log.warning(
            "in %d of %d rows the chat template renders the prompt differently once it has an answer: the part that "
            "differs counts as part of the answer; see answer_tokens, or pass another --chat-template",
            *(rewritten, len(rows)),
        )
    return tuple(rows)
