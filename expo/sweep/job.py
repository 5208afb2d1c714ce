"""`expo sweep`: make the answers of every α and their rewards, each engine in a process that stays; then choose."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from expo import __version__, extrapolate, inspection
from expo.arguments import shown
from expo.checkpoint.folder import refuse_inside, source_fingerprint
from expo.compare.reading import read_runs
from expo.config import PAIR_SETTINGS, ExtrapolateConfig, InspectConfig, SweepConfig
from expo.errors import InputError
from expo.files import Row, json_text, write_atomic
from expo.output.findings import Inspection
from expo.output.sweeps import PICTURE, RECORD
from expo.rows import RowJob, is_complete
from expo.rows.files import RowFiles
from expo.rows.worker import Worker
from expo.score import ScoreJob
from expo.settings import require_same
from expo.sweep.choice import choose
from expo.sweep.lanes import Lane, Lanes, environment_of
from expo.sweep.picture import picture
from expo.sweep.plan import SweepPlan, find_model, folder_of, plan, quiet, theta_of
from expo.sweep.preload import preloaded
from expo.sweep.record import digest, is_current, made_from, plain, read_record
from expo.sweep.switch import prove
from expo.sweep.text import as_text
from expo.tasks import find_task
from expo.theta.names import theta_name

TRANSIENT = ("overwrite", "dry_run", "output", "write")
"""Settings of how a run is executed, not of what it finds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """The result of a sweep."""

    record: Row
    """As in sweep.json."""
    text: str
    """The table, the verdict and the command."""
    status: str
    """"written" or "already complete"."""
    file: Path
    checkpoint: Path | None = None
    """The checkpoint of the chosen α, where it was written."""
    failed: int = 0
    """How many rows failed."""
    reason: str | None = None
    can_retry: bool = False


def run(config: SweepConfig) -> Swept:
    """Make what is missing of every α, and choose.

    Raises:
        InputError: The settings or inputs are at fault, or the pair is one that ExPO does not suit.
        EnvironmentFailure: An engine, the disk or the network failed; calling again continues.
    """
    started = time.perf_counter()
    if is_one_model(config):
        dpo = source_fingerprint(find_model(config.dpo))
        return _of_equal_models(config, {"dpo": dpo}, "SFT and DPO are the same files, and so is θ(α) for every α")
    inspected = None
    with preloaded(config, folder_of(config)) as processes:
        job = plan(config)
        if job.to_generate:
            inspected = _inspect(config)
            if inspected.suits == "identical":
                return _of_equal_models(config, made_from(job.first.fingerprint), inspected.verdict)
            _require_suited(inspected, config)
        with Making(job, processes) as made:
            made.run()
            return _conclude(job, made, inspected, started)  # while the processes end


# --- before it costs anything -------------------------------------------------------------------------------------


def _inspect(config: SweepConfig) -> Inspection:
    return inspection.run(InspectConfig(sft=config.sft, dpo=config.dpo, allow_pickle=config.allow_pickle))


def _require_suited(found: Inspection, config: SweepConfig) -> None:
    """Refuse a pair that no α will improve, as far as norms can tell.

    Raises:
        InputError: It is one, and `--any-pair` is not given.
    """
    log.info("pair: %s: %s", found.suits, found.verdict)
    if found.suits == "suspect" and not config.any_pair:
        raise InputError(
            f"{found.dpo} is not a pair for ExPO with {found.sft}: {found.verdict}; --any-pair sweeps it all the same"
        )


# --- the run ------------------------------------------------------------------------------------------------------


class Making:
    """The lanes of a sweep, what goes from one to the next, and what was made.

    Args:
        job: The plan.
        processes: Of the policy and of the first reward model, where they have been started already; taken from here.
    """

    def __init__(self, job: SweepPlan, processes: list[Worker]) -> None:
        self.generated: list[float] = []
        """The α whose answers were made in this run."""
        self.rewards: dict[float, list[RowFiles]] = {}
        """α → the files of each reward model."""
        self.switch: Row | None = None
        """Whether the policy's engine could be switched, where it was asked."""
        self._job = job
        self._alpha_of = {one.files.final: alpha for alpha, one in job.jobs.items()}
        policy, *others = job.places
        self._policy = Lane("the policy", environment_of(policy), self._score)
        self._lanes = [
            Lane(model.location.label, environment_of(place), _say, fed_by=self._policy, waits=not place.side_by_side)
            for model, place in zip(job.reward_models, others, strict=True)
        ]
        for lane in (self._policy, *self._lanes):
            if processes:
                lane.use(processes.pop(0))
        self._is_asked = False
        self._running = Lanes([self._policy, *self._lanes])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    def run(self) -> None:
        """Generate and score what is missing.

        Raises:
            InputError: Settings or inputs are at fault.
            EnvironmentFailure: An engine, the disk or the network failed; finished rows are kept.
        """
        job, there = self._job, 0
        each = job.rows * (1 + len(self._lanes))
        for alpha, one in job.jobs.items():
            if alpha in job.to_generate:
                self._policy.add(one)
            else:
                there += each - self._add_rewards(alpha)
        if not self._running.is_over:
            self._prove(self._policy.waiting)
            self._running.run("sweep", each * len(job.jobs), there, _import_what_chooses)

    def _prove(self, waiting: Sequence[RowJob]) -> None:
        """Before rows depend on it: see that the policy's engine can go from one α to the next."""
        if len(waiting) < 2:
            return
        first = next(one for one in self._job.jobs.values() if one is waiting[0])
        proof = prove(lambda: self._new_policy(first), first)
        seconds = {"start_seconds": proof.start_seconds, "switch_seconds": proof.switch_seconds}
        known = {key: round(value, 3) for key, value in seconds.items() if value is not None}
        self.switch = {"proved": proof.proved, "reason": proof.reason, **known}
        if proof.worker is not None:
            self._policy.take_over(proof.worker)
        if proof.proved:
            log.info("switching α in the live engine: %s", proof.reason)
        else:
            log.warning("%s; so the engine is started for each α", proof.reason)
            self._policy.stays = False

    def _new_policy(self, first: RowJob) -> Worker:
        """A process for a proof; the one that comes after it imports its engine meanwhile."""
        worker = self._policy.new_worker(first)
        if not self._is_asked:
            self._is_asked = True
            self._policy.preload(self._job.first.verb, self._job.first.engine)
        return worker

    def _score(self, made: RowJob) -> None:
        """Hand an α's answers to the reward models."""
        alpha = self._alpha_of[made.files.final]
        self.generated.append(alpha)
        speed = made.files.look().meta["tokens_per_second"]
        log.info("α = %r: %d answers, %.0f tokens/s", alpha, len(made.keys), speed)
        self._add_rewards(alpha)

    def _add_rewards(self, alpha: float) -> int:
        """Queue the rewards that an α lacks, and say how many rows they are."""
        with quiet(logging.WARNING):
            jobs = self._job.scoring(alpha)
            missing = [job for job in jobs if not is_complete(job)]
        self.rewards[alpha] = [job.files for job in jobs]
        for job in missing:
            self._lanes[job.number].add(job)
        return sum(len(job.keys) for job in missing)


def _import_what_chooses() -> None:
    """While engines start: what is needed at the end takes seconds to import."""
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.special"):
        import_module(name)


def _say(scored: RowJob) -> None:
    """What a reward model thinks of an α, as soon as it is known."""
    meta = scored.files.look().meta
    if isinstance(scored, ScoreJob) and meta.get("mean") is not None:
        spread = "" if meta["standard_error"] is None else f" ± {meta['standard_error']:.3g}"
        log.info("%s: mean reward %.4g%s by %s", scored.config.name, meta["mean"], spread, scored.location.label)


# --- the end ------------------------------------------------------------------------------------------------------


def _conclude(job: SweepPlan, made: Making, inspected: Inspection | None, started: float) -> Swept:
    """Choose, and write what was found where that is new."""
    files = [str(job.jobs[alpha].files.final) for alpha in job.jobs]
    choice = choose(read_runs(files, task=job.config.task, dataset=job.config.dataset))
    metas = [file.look().meta for alpha in job.jobs for file in (job.jobs[alpha].files, *made.rewards[alpha])]
    earlier = read_record(job.folder)
    found = {**plain(choice.describe()), **_described(job, choice.best_alpha, made)}
    status = "already complete"
    record = earlier if earlier is not None and not made.generated and is_current(earlier, found) else None
    if record is None or not (job.folder / PICTURE).exists():
        status = "written"
        record = {
            **found,
            **_history(job, made, inspected, earlier or {}),
            "clock": _clock(made, metas, time.perf_counter() - started),
        }
        write_atomic(job.folder / PICTURE, picture(choice))
        write_atomic(job.folder / RECORD, json_text(record, indent=2) + "\n")
    failed = [meta for meta in metas if meta["failed"]]
    return Swept(
        record=record,
        text=as_text(choice),
        status=status,
        file=job.folder / RECORD,
        checkpoint=_write(job, choice.best_alpha) if job.config.write else None,
        failed=sum(meta["failed"] for meta in failed),
        reason=next((meta["errors"][0]["reason"] for meta in failed if meta["errors"]), None),
        can_retry=any(not error.get("lasting") for meta in failed for error in meta["errors"]),
    )


def _described(job: SweepPlan, best_alpha: float, made: Making) -> Row:
    """What sweep.json says besides the choice, the same for the same rows."""
    rows = (file.final for alpha in job.jobs for file in (job.jobs[alpha].files, *made.rewards[alpha]))
    sides = {"sft": theta_of(job.first).sft, "dpo": theta_of(job.first).dpo}
    return {
        "search": job.config.search,
        **{side: {"name": location.label, "revision": location.revision} for side, location in sides.items()},
        "command": _command(job, best_alpha),
        "fingerprint": dict(made_from(job.first.fingerprint)),
        "rows_xxh3": digest(rows),
    }


def _history(job: SweepPlan, made: Making, inspected: Inspection | None, earlier: Row) -> Row:
    """What a run that makes no rows does not know, and goes on saying."""
    pair = {"suits": inspected.suits, "verdict": inspected.verdict} if inspected else earlier.get("pair")
    labels = ["policy", *(model.location.label for model in job.reward_models)]
    engines = [job.first.engine, *(model.engine for model in job.reward_models)]
    config = {name: value for name, value in asdict(job.config).items() if name not in TRANSIENT}
    return {
        "config": config,
        "pair": pair,
        "switch": made.switch or earlier.get("switch"),
        "engines": [
            {"for": label, "engine": engine, "on": str(place)}
            for label, engine, place in zip(labels, engines, job.places, strict=True)
        ],
        "versions": {"expo": __version__},
    }


def _clock(made: Making, metas: Sequence[Row], seconds: float) -> Row:
    """What this run took, and what the rows took in whatever run."""
    sums = ("engine_start_seconds", "generate_seconds", "score_seconds")
    return {
        "seconds": round(seconds, 3),
        "alphas_generated": made.generated,
        **{key: round(sum(meta.get(key, 0.0) for meta in metas), 3) for key in sums},
    }


def is_one_model(config: SweepConfig) -> bool:
    """Whether both sides of the pair are one folder."""
    return find_model(config.sft).path.resolve() == find_model(config.dpo).path.resolve()


def _of_equal_models(config: SweepConfig, fingerprint: Row, why: str) -> Swept:
    """A sweep of a pair whose sides are equal: every θ(α) is DPO itself, so nothing need be generated."""
    sides = {side: find_model(model) for side, model in (("sft", config.sft), ("dpo", config.dpo))}
    nothing: Row = {"mean": None, "standard_error": None, "n": 0, "tokens": None, "finish_reasons": {}}
    same: Row = {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0, "win_rate": 0.5}
    name = sides["dpo"].name
    record: Row = {
        "best_alpha": 0.0,
        "verdict": f"No α is better than α = 0: {why}.",
        "notes": ["nothing was generated"],
        "task": find_task(config.task).name,
        "alphas": [
            {"alpha": alpha, "name": theta_name(name, alpha), **nothing, **(same if alpha else {})}
            for alpha in config.alphas
        ],
        "search": config.search,
        **{side: {"name": location.label, "revision": location.revision} for side, location in sides.items()},
        "command": None,
        "fingerprint": dict(fingerprint),
        "pair": {"suits": "identical", "verdict": why},
        "versions": {"expo": __version__},
    }
    folder = folder_of(config)
    refuse_inside(folder, *sides.values(), flag="--output")
    earlier = read_record(folder)
    if earlier is not None and not config.overwrite:
        require_same(folder / RECORD, earlier["fingerprint"], fingerprint)
    status = "already complete" if earlier == plain(record) else "written"
    if status == "written":
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RECORD, json_text(record, indent=2) + "\n")
    return Swept(record, str(record["verdict"]), status, folder / RECORD)


def _extrapolation(job: SweepPlan, alpha: float) -> ExtrapolateConfig:
    own: dict[str, Any] = {name: getattr(job.config, name) for name in PAIR_SETTINGS}
    folder = job.folder / "checkpoints" / theta_name(theta_of(job.first).dpo.name, alpha)
    return ExtrapolateConfig(sft=job.config.sft, dpo=job.config.dpo, alpha=(alpha,), output=str(folder), **own)


def _command(job: SweepPlan, alpha: float) -> str | None:
    return shown("extrapolate", _extrapolation(job, alpha)) if alpha else None


def _write(job: SweepPlan, alpha: float) -> Path | None:
    if not alpha:
        log.info("no checkpoint is written: α = 0 is %s itself", job.config.dpo)
        return None
    return extrapolate.run(_extrapolation(job, alpha))[0].path
