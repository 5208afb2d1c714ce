"""The plan of a sweep of likelihoods: the pairs, and a job per α."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from expo.config import GenerateConfig, SweepConfig
from expo.config.sweep import SFT_ALPHA
from expo.engines import EngineSpec, GeneratorSetup, find_engine, require_fitting
from expo.engines.log_probs import THETA_LOG_PROBS
from expo.errors import InputError
from expo.files import Row, texts_sha256
from expo.rows.dates import find_date
from expo.rows.files import RowFiles, refuse_replacing
from expo.settings import Fingerprint, absent_values, recorded
from expo.tasks import Preference, load_preferences
from expo.theta.pair import ThetaPlan
from expo.verbs.generate.model import Model, find_model
from expo.verbs.sweep.likelihood.job import LikelihoodJob, PairRow, pair_rows
from expo.verbs.sweep.pair import is_one_model
from expo.verbs.sweep.plan import folder_of, quiet

RECORD = "likelihood.json"
FLAG = "--likelihood"
DECIDING = ("dtype", "batch_tokens")
"""The settings of a policy that change log-probabilities; its chat template is in its fingerprint."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LikelihoodPlan:
    """Everything it will do."""

    config: SweepConfig
    folder: Path
    pairs: str
    """The name of the set of pairs."""
    jobs: dict[float, LikelihoodJob]
    """By α: 0 first, then −1, then the others in order."""

    @property
    def first(self) -> LikelihoodJob:
        """The job of α = 0."""
        return self.jobs[0.0]

    @property
    def record(self) -> Path:
        """Where what is found goes."""
        return self.folder / RECORD

    def describe(self) -> Row:
        """The plan as plain data."""
        rows = self.first.rows
        return {
            "sft": str(theta_of(self.first).sft.path),
            "dpo": str(theta_of(self.first).dpo.path),
            "alphas": ", ".join(map(repr, self.jobs)),
            "pairs": self.config.likelihood,
            "rows_per_alpha": len(rows),
            "tokens_per_alpha": sum(len(row.chosen.token_ids) + len(row.rejected.token_ids) for row in rows),
            "truncated": sum(row.truncated for row in rows),
            "engine": self.first.engine,
            "output": str(self.record),
        }


def plan(config: SweepConfig) -> LikelihoodPlan:
    """Decide everything from the pairs and from headers; nothing is written.

    Raises:
        InputError: The models, the pairs or a setting are at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    if is_one_model(config):
        raise InputError("SFT and DPO are the same files: every θ(α) is DPO, and gives the pairs one likelihood")
    name, pairs = load_preferences(config.likelihood or "", FLAG)
    if config.engine not in ("auto", *THETA_LOG_PROBS):
        raise InputError(f"{FLAG} runs with {', '.join(THETA_LOG_PROBS)}, not with --engine {config.engine}")
    engine, spec = find_engine(THETA_LOG_PROBS, config.engine)
    folder = folder_of(config)
    record = folder / RECORD
    refuse_replacing(Path(config.likelihood or ""), (record, record.with_suffix(".png")))
    of_alpha = partial(_job, config, folder / f"likelihood_{name}", pairs, engine, spec)
    first = of_alpha(0.0)
    jobs = {0.0: first}
    for alpha in sorted({SFT_ALPHA, *config.alphas} - {0.0}):
        with quiet(logging.CRITICAL):
            jobs[alpha] = of_alpha(alpha, first)
    return LikelihoodPlan(config, folder, name, jobs)


def _job(
    config: SweepConfig,
    folder: Path,
    pairs: Sequence[Preference],
    engine: str,
    spec: EngineSpec,
    alpha: float,
    like: LikelihoodJob | None = None,
) -> LikelihoodJob:
    """One α, of the same tokens as another one."""
    own = replace(config.generating(alpha, str(folder), engine=engine), task=FLAG)
    require_fitting(THETA_LOG_PROBS, own, engine)
    model = find_model(own, spec)
    own = spec.call("settle", own, model.path) or own
    files = RowFiles(folder / f"{model.name}.jsonl", model.name, "pairs_sha256")
    refuse_replacing(Path(config.likelihood or ""), (files.final, files.meta))
    fingerprint = _fingerprint(own, engine, model, pairs)
    date = None
    if model.asks_for_time:
        moment = None if like is None or like.date is None else like.date.moment
        date = find_date(files, fingerprint, overwrite=own.overwrite, moment=moment)
        model, fingerprint = model.at(date.moment), fingerprint.with_entry(date.entry)
    if like is not None and date is not None and like.date is not None and date.moment != like.date.moment:
        raise InputError(
            f"the chat template writes a date into prompts, and {like.files.final} and {files.final} have different "
            "ones: move one of them away, or start over with --overwrite"
        )
    rows, every = _read(model, pairs, config.limit) if like is None else (like.rows, like.all_rows)
    return LikelihoodJob(
        config=own,
        engine=engine,
        spec=spec,
        name=model.name,
        alpha=alpha,
        record=model.record,
        rows=rows,
        all_rows=every,
        setup=GeneratorSetup(own, model.path, (), 0, model.context_length, model.theta),
        files=files,
        fingerprint=fingerprint,
        date=date,
    )


def _read(
    model: Model, pairs: Sequence[Preference], limit: int | None
) -> tuple[tuple[PairRow, ...], Callable[[], tuple[PairRow, ...]]]:
    """The pairs as token ids: up to `--limit`, and, once they are needed, all of them."""
    assert model.tokenizer is not None  # its engine runs here
    rows = pair_rows(pairs[:limit], model.tokenizer, model.context_length)
    if len(rows) == len(pairs):
        return rows, lambda: rows
    return rows, cache(partial(pair_rows, pairs, model.tokenizer, model.context_length))


def _fingerprint(config: GenerateConfig, engine: str, model: Model, pairs: Sequence[Preference]) -> Fingerprint:
    """What log-probabilities are made from; none of how answers would be sampled."""
    deciding = {**recorded(config, "rows"), **recorded(config, "batches")}
    return Fingerprint(
        {
            "pairs_sha256": texts_sha256(pair.source for pair in pairs),
            "engine": engine,
            **model.fingerprint,
            **{name: deciding[name] for name in DECIDING},
        },
        absent_values(config, "weights"),
    )


def theta_of(job: LikelihoodJob) -> ThetaPlan:
    """The θ(α) that reads."""
    assert job.setup.theta is not None
    return job.setup.theta
