"""The end of a sweep: choose, and write sweep.json and sweep.png where they say something new."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from expo import __version__
from expo.arguments import shown
from expo.checkpoint.folder import refuse_inside
from expo.config import ExtrapolateConfig, SweepConfig
from expo.config.logit_space import LOGITS
from expo.files import Row, json_text, write_atomic
from expo.output.frames import frame
from expo.output.sweeps import PICTURE, RECORD
from expo.settings import require_same
from expo.stats.resampling import LEVEL, RESAMPLES
from expo.tasks import find_task
from expo.theta.names import theta_name
from expo.verbs import extrapolate
from expo.verbs.compare.pairing import of_rows
from expo.verbs.compare.run import Run
from expo.verbs.sweep.choice import choose
from expo.verbs.sweep.figures import Raced, figures_of_equal
from expo.verbs.sweep.making import Making
from expo.verbs.sweep.picture import picture
from expo.verbs.sweep.plan import SweepPlan, find_model, folder_of, theta_of
from expo.verbs.sweep.record import EQUAL, digest, is_current, is_of_equal_models, made_from, plain, read_record
from expo.verbs.sweep.text import as_text
from expo.verbs.sweep.vector import Which

if TYPE_CHECKING:
    from pandas import DataFrame

TRANSIENT = ("overwrite", "dry_run", "output", "write", "data_parallel", "ray", "switch")
"""Settings of how a run is executed, not of what it finds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """The result of a sweep."""

    record: Row
    """As in sweep.json, likelihood.json, or modules.json."""
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

    def __str__(self) -> str:
        return self.text

    def __fspath__(self) -> str:
        return str(self.file.parent)

    @property
    def best_alpha(self) -> float:
        """The chosen α; 0 where none is better than DPO, or none is chosen: with `likelihood`, `search="modules"`."""
        return float(self.record.get("best_alpha", 0.0))

    @property
    def best_step(self) -> float | None:
        """Of a training run: the chosen step, or the last checkpoint's where none is better; None for a pair."""
        step: float | None = self.record.get("best_step")
        return step

    @property
    def verdict(self) -> str:
        """Why, in a sentence."""
        return str(self.record["verdict"])

    @property
    def picture(self) -> Path:
        """The curve over α; of a search over modules there is none."""
        return self.file.with_suffix(Path(PICTURE).suffix)

    def describe(self) -> Row:
        """As plain data: sweep.json, and where things are."""
        return {**self.record, "status": self.status, "file": self.file, "checkpoint": self.checkpoint}

    def to_pandas(self) -> DataFrame:
        """A row per α, or vector, with the figures that it has in sweep.json, or modules.json."""
        return frame(self.record["vectors" if "vectors" in self.record else "alphas"])


def conclude(job: SweepPlan, made: Making, raced: Raced | None, started: float) -> Swept:
    """Choose, and write what was found where that is new.

    Args:
        job: The plan.
        made: The lanes.
        raced: How the race went, where there was one.
        started: When the run began, by `time.perf_counter`.
    """
    runs = dict(zip(job.jobs, made.runs(tuple(job.jobs)), strict=True))
    if raced is not None:
        runs = {alpha: _asked(run, raced.asked_of(alpha)) for alpha, run in runs.items()}
    choice = choose(list(runs.values()), raced, job.config.last_step)
    metas = {alpha: [file.look().meta for file in (one.files, *made.rewards[alpha])] for alpha, one in job.jobs.items()}
    there = read_record(job.folder)
    earlier = None if there is None else there.content
    found = {**plain(choice.describe()), **_described(job, choice.best_alpha, made)}
    found["notes"] += job.notes
    if lost := _judges(earlier or {}) - _judges(found):
        log.warning("%s judged this sweep before and does not now: add it as a --reward-model", ", ".join(sorted(lost)))
    status = "already complete"
    record = earlier if earlier is not None and not made.generated and is_current(earlier, found) else None
    if record is None or not (job.folder / PICTURE).exists():
        status = "written"
        record = {
            **found,
            **history(job, made, earlier or {}),
            "clock": _clock(made, [meta for of_alpha in metas.values() for meta in of_alpha], started),
        }
        write_atomic(job.folder / PICTURE, picture(choice))
        write_atomic(job.folder / RECORD, json_text(record, indent=2) + "\n")
    errors = errors_of(metas)
    return Swept(
        record=record,
        text=as_text(choice),
        status=status,
        file=job.folder / RECORD,
        checkpoint=_write(job, choice.best_alpha) if job.config.write else None,
        failed=len(errors),
        reason=next((error["reason"] for error in errors), None),
        can_retry=any(not error.get("lasting") for error in errors),
    )


def _asked(run: Run, ids: Container[str]) -> Run:
    return of_rows(run, {row.key for row in run.rows if row.id in ids})


def _judges(record: Row) -> set[str]:
    """The reward models of a record."""
    tables = [record, *record.get("further", ())]
    return {table["reward_model"] for table in tables if table.get("reward_model")}


def errors_of(metas: Mapping[Which, Sequence[Row]]) -> list[Row]:
    """Why rows failed, once for a row of an α, or a vector: what has no answer has no reward either."""
    found: dict[tuple[object, int], Row] = {}
    for alpha, of_alpha in metas.items():
        for error in (error for meta in of_alpha for error in meta["errors"]):
            found.setdefault((alpha, error["row"]), error)
    return list(found.values())


def _described(job: SweepPlan, best_alpha: float, made: Making) -> Row:
    """What sweep.json says besides the choice, the same for the same rows."""
    rows = (file.final for alpha in job.jobs for file in (job.jobs[alpha].files, *made.rewards[alpha]))
    sides = {"sft": theta_of(job.first).sft, "dpo": theta_of(job.first).dpo}
    return {
        "search": job.config.search,
        **({"space": job.config.space} if job.config.space == LOGITS else {}),
        **{side: {"name": location.label, "revision": location.revision} for side, location in sides.items()},
        "command": _command(job, best_alpha),
        "fingerprint": dict(made_from(job.fingerprint)),
        "rows_xxh3": digest(rows),
    }


def history(job: SweepPlan, made: Making, earlier: Row) -> Row:
    """What a run that makes no rows does not know, and goes on saying."""
    labels = ["policy", *(model.location.label for model in job.reward_models)]
    engines = [job.first.engine, *(model.engine for model in job.reward_models)]
    config = {name: value for name, value in asdict(job.config).items() if name not in TRANSIENT}
    return {
        "config": config,
        **{name: earlier.get(name) for name in ("pair", "switch")},
        **made.known,
        "engines": [
            {"for": label, "engine": engine, "on": str(place)}
            for label, engine, place in zip(labels, engines, job.places, strict=True)
        ],
        "versions": {"expo": __version__},
    }


def _clock(made: Making, metas: Sequence[Row], started: float) -> Row:
    """What this run took, and what the rows took in whatever run."""
    sums = ("engine_start_seconds", "generate_seconds", "score_seconds")
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "alphas_generated": made.generated,
        **{key: round(sum(meta.get(key, 0.0) for meta in metas), 3) for key in sums},
    }


def _extrapolation(job: SweepPlan, alpha: float) -> ExtrapolateConfig:
    own = job.config.theta_settings(alpha)
    step = {"target_step": (own["target_step"],)} if "target_step" in own else {}
    last = job.config.last_step if step else None
    folder = job.folder / "checkpoints" / theta_name(theta_of(job.first).dpo.name, alpha, last)
    return ExtrapolateConfig(**{**own, **step, "alpha": (alpha,), "output": str(folder)})


def _command(job: SweepPlan, alpha: float) -> str | None:
    """What makes use of an α: its checkpoint, or its answers where there is none; None of DPO itself."""
    if not alpha:
        return None
    if job.config.space == LOGITS:
        return shown("generate", job.config.generating(alpha, "."))
    return shown("extrapolate", _extrapolation(job, alpha))


def _write(job: SweepPlan, alpha: float) -> Path | None:
    if not alpha:
        log.info("no checkpoint is written: α = 0 is %s itself", job.config.dpo)
        return None
    config = replace(_extrapolation(job, alpha), overwrite=job.config.overwrite)
    return extrapolate.run(config)[0].path


# --- nothing to choose from -------------------------------------------------------------------------------------------


def of_equal_models(config: SweepConfig, fingerprint: Row, why: str) -> Swept:
    """A sweep of a pair whose sides are equal: every θ(α) is DPO itself, so nothing need be generated."""
    sides = {side: find_model(model) for side, model in (("sft", config.sft), ("dpo", config.dpo))}
    names = {alpha: theta_name(sides["dpo"].name, alpha, space=config.space) for alpha in config.alphas}
    record: Row = {
        "best_alpha": 0.0,
        "verdict": f"No α is better than α = 0: {why}.",
        "notes": ["nothing was generated"],
        "task": find_task(config.task).name,
        "reward_model": None,
        "revision": None,
        "baseline": names[0.0],
        "n": 0,
        "prompts": 0,
        "shared_rows": 0,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "alphas": [figures_of_equal(alpha, name) for alpha, name in names.items()],
        "further": [],
        "search": config.search,
        **{side: {"name": location.label, "revision": location.revision} for side, location in sides.items()},
        "command": None,
        "fingerprint": dict(fingerprint),
        "pair": {"suits": EQUAL, "verdict": why},
        "versions": {"expo": __version__},
    }
    folder = folder_of(config)
    refuse_inside(folder, *sides.values(), flag="--output")
    there = read_record(folder)
    earlier = None if there is None else there.content
    if earlier is not None and not config.overwrite and not is_of_equal_models(earlier):
        require_same(folder / RECORD, earlier["fingerprint"], fingerprint)
    status = "already complete" if earlier == plain(record) else "written"
    if status == "written":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PICTURE).unlink(missing_ok=True)
        write_atomic(folder / RECORD, json_text(record, indent=2) + "\n")
    return Swept(record, str(record["verdict"]), status, folder / RECORD)
