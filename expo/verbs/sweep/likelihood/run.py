"""A sweep of likelihoods: read the pairs under every α with one engine, and write what they say."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np

from expo import __version__
from expo.config import SweepConfig
from expo.errors import InputError
from expo.files import Row, json_text, read_json, read_rows, write_atomic
from expo.output import charts
from expo.output.charts import Estimate
from expo.output.likelihoods import LikelihoodPoint, likelihood_curve
from expo.output.sweeps import SweepRecord
from expo.rows import EngineKeeper, run as run_job
from expo.rows.job import Done
from expo.tasks import clusters_of
from expo.verbs.sweep.conclude import Swept
from expo.verbs.sweep.likelihood.figures import LINEAR, MEASURES, AlphaLikelihoods, Found, Likelihoods, figures
from expo.verbs.sweep.likelihood.plan import LikelihoodPlan, plan, theta_of
from expo.verbs.sweep.likelihood.text import as_text, verdict
from expo.verbs.sweep.record import made_from, plain, read_record

SIDES = ("chosen", "rejected")
COLUMNS = (*SIDES, "chosen_tokens", "rejected_tokens")
MARK = "made by expo sweep --likelihood"


def run(config: SweepConfig) -> Swept:
    """Read what is missing of every α, and say what the pairs speak for.

    Raises:
        InputError: The models, the pairs or a setting are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    started = time.perf_counter()
    job = plan(config)
    with closing(EngineKeeper()) as keeper:
        done = {alpha: run_job(one, keeper) for alpha, one in job.jobs.items()}
    read, clusters = _pairs_read(job, done)
    found = figures(read, {alpha: one.name for alpha, one in job.jobs.items()}, clusters)
    record = _record(job, found, done, time.perf_counter() - started)
    picture = job.record.with_suffix(".png")
    is_new = any(one.status == "written" for one in done.values()) or not picture.exists() or _differs(job, record)
    if is_new:
        write_atomic(picture, _picture(job, found))
        write_atomic(job.record, json_text(record, indent=2) + "\n")
    errors = [error for one in done.values() for error in one.meta["errors"]]
    return Swept(
        record=record,
        text=as_text(found, job.pairs),
        status="written" if is_new else "already complete",
        file=job.record,
        failed=len({error["id"] for error in errors}),
        reason=next((error["reason"] for error in errors), None),
        can_retry=False,
    )


def _pairs_read(job: LikelihoodPlan, done: Mapping[float, Done]) -> tuple[dict[float, Likelihoods], list[int]]:
    """The log-probabilities of the pairs that have some under every α, and the number of each one's prompt."""
    rows = {alpha: {row["id"]: row for row in read_rows(one.job.files.final)} for alpha, one in done.items()}
    kept = [
        one.pair
        for one in job.first.rows
        if all(of_alpha[one.pair.id][side] is not None for of_alpha in rows.values() for side in SIDES)
    ]
    if not kept:
        raise InputError(f"no pair of {job.config.likelihood} has a finite log-probability under every α")
    read = {}
    for alpha, of_alpha in rows.items():
        columns = ([float(of_alpha[pair.id][name]) for pair in kept] for name in COLUMNS)
        read[alpha] = Likelihoods(*(np.array(column) for column in columns))
    return read, clusters_of(kept)


def _record(job: LikelihoodPlan, found: Found, done: Mapping[float, Done], seconds: float) -> Row:
    """likelihood.json."""
    theta = theta_of(job.first)
    return {
        "verdict": verdict(found),
        "notes": _notes(read_record(job.folder)),
        "pairs": {"name": job.pairs, "source": job.config.likelihood, "read": found.pairs},
        "linear_up_to": found.linear_up_to,
        "linear_from": LINEAR,
        "highest": {name: found.highest(name) for name in MEASURES},
        "alphas": [plain(one.describe()) for one in found.alphas],
        **{
            side: {"name": one.label, "revision": one.revision}
            for side, one in (("sft", theta.sft), ("dpo", theta.dpo))
        },
        "fingerprint": dict(made_from(job.first.fingerprint)),
        "clock": {
            "seconds": round(seconds, 3),
            **{
                key: round(sum(one.meta[key] for one in done.values()), 3)
                for key in ("engine_start_seconds", "read_seconds")
            },
            "tokens": sum(one.meta["tokens"] for one in done.values()),
        },
        "versions": {"expo": __version__},
    }


def _notes(swept: SweepRecord | None) -> list[str]:
    """What the rewards in the same folder say, where a sweep has been there."""
    if swept is None or swept.best_alpha is None:
        return []
    return [f"the sweep in this folder chose α = {swept.best_alpha:g} by the rewards of answers"]


def _differs(job: LikelihoodPlan, record: Row) -> bool:
    """Whether likelihood.json says something else, apart from what it took."""
    there = read_json(job.record) if job.record.is_file() else {}
    return {**there, "clock": None} != {**plain(record), "clock": None}


def _picture(job: LikelihoodPlan, found: Found) -> bytes:
    points = [
        LikelihoodPoint(
            one.alpha,
            one.accuracy.mean,
            Estimate(one.accuracy_per_token.mean, *_around(found, one)),
            one.margin_per_token.mean,
            one.linear,
        )
        for one in found.alphas
    ]
    with charts.style():
        title = f"θ(α) on {found.pairs:,} preference pairs of {charts.short(job.pairs, 28)}"
        figure = likelihood_curve(points, linear=LINEAR, linear_up_to=found.linear_up_to, title=title)
        return charts.as_bytes(figure, ".png", MARK)


def _around(found: Found, one: AlphaLikelihoods) -> Sequence[float]:
    """The interval of a difference, standing on the share at α = 0."""
    base = next(other.accuracy_per_token.mean for other in found.alphas if other.alpha == 0)
    return [base + end for end in one.accuracy_per_token.interval or ()]
