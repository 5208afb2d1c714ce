"""The plan of `expo generate`, made from the prompts and the model's small files, and its run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expo.config import DEFAULT_TEMPERATURE, GenerateConfig
from expo.engines import (
    GENERATORS,
    GeneratorSetup,
    find_engine,
    require_fitting,
)
from expo.engines.shared import Seats
from expo.errors import InputError
from expo.files import Row, read_rows, texts_sha256
from expo.output.frames import frame
from expo.parts import read_part
from expo.rows import EngineKeeper, kept_or_own, plan_to_run, run as run_job
from expo.rows.dates import find_date
from expo.rows.files import RowFiles, refuse_replacing
from expo.rows.job import Done
from expo.rows.together import run_together as run_jobs_together
from expo.settings import Fingerprint, absent_values, recorded, require_name
from expo.tasks import find_task, load_prompts
from expo.verbs.generate.job import GenerateJob
from expo.verbs.generate.model import find_model, require_server
from expo.verbs.generate.probing import probe_engine
from expo.verbs.generate.requests import RequestBuilder, require_one_system_message

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Generated:
    """The result of a run."""

    output: Path
    meta: Path
    status: str
    """"written" or "already complete"."""
    rows: int
    failed: int
    reason: str | None = None
    """Why the first failed row failed."""
    can_retry: bool = False
    """Whether the same command tries failed rows again, which may help."""

    def __fspath__(self) -> str:
        return str(self.output)

    def describe(self) -> Row:
        """The result as plain data."""
        return asdict(self)

    def to_pandas(self) -> DataFrame:
        """A row per row of the output file, with its fields: those of the task's format."""
        return frame(read_rows(self.output))


def run(
    config: GenerateConfig,
    keeper: EngineKeeper | None = None,
    **options: Any,  # noqa: ANN401 - of `job_of`
) -> Generated:
    """Generate every missing row.

    Args:
        config: The settings.
        keeper: Keeps the engine open after this run; without one, the engine is closed at the end.
        options: What a process is given beside the settings (`GenerateJob.worker_options`); see `job_of`.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    job = job_of(config, **options)
    if job.probe is not None:
        with kept_or_own(keeper) as engines:
            probe_engine([job], engines)
        return _probed(job)
    return _generated(run_job(job, keeper))


def run_together(
    given: Sequence[tuple[GenerateConfig, Mapping[str, Any]]], keeper: EngineKeeper
) -> Iterator[tuple[int, Generated]]:
    """Generate the missing rows of several θ(α) of a LoRA pair in one engine's batch.

    Args:
        given: The settings of each, and the options of `job_of`; each has `room`.
        keeper: Keeps the engine open after this run.

    Yields:
        The number of each that has ended, and its result.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; calling again continues.
    """
    jobs = [job_of(config, **options) for config, options in given]
    if jobs[0].probe is not None:
        probe_engine(jobs, keeper)
        yield from enumerate(map(_probed, jobs))
        return
    for number, done in run_jobs_together(jobs, Seats(keeper)):
        yield number, _generated(done)


def job_of(
    config: GenerateConfig,
    *,
    moment: str | None = None,
    prompts: Collection[str] | None = None,
    gpu_share: float | None = None,
    room: int | None = None,
    probe: str | None = None,
    timed: bool = False,
) -> GenerateJob:
    """The plan of a run, with what a process is given beside the settings.

    Args:
        config: The settings.
        moment: As `plan` has it.
        prompts: As `plan` has it.
        gpu_share: The engine's share of each GPU's memory, where it is not alone there.
        room: For a LoRA pair: how many α the engine, which applies the adapter while it answers, has room for in a
            batch; None for one that loads θ(α).
        probe: A file for what the engine answers to a probe; then no rows are made.
        timed: Whether the probe says how long a batch takes.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The hub cannot be reached, or the disk failed.
    """
    planned = plan_to_run(partial(plan, moment=moment, prompts=prompts), config).with_gpu_share(gpu_share)
    planned = planned if room is None else planned.with_adapter(room)
    return replace(planned, probe=None if probe is None else Path(probe), timed=timed)


def _probed(job: GenerateJob) -> Generated:
    return Generated(job.files.final, job.files.meta, "probed", rows=0, failed=0)


def _generated(done: Done) -> Generated:
    files, meta = done.job.files, done.meta
    return Generated(files.final, files.meta, done.status, meta["rows"], meta["failed"], done.reason, done.can_retry)


def plan(config: GenerateConfig, moment: str | None = None, prompts: Collection[str] | None = None) -> GenerateJob:
    """Decide everything from the prompts and the model's small files; nothing is written.

    Args:
        config: The settings.
        moment: At which the clock of a chat template stands, in ISO 8601, if the output is begun now; None: now.
        prompts: The ids of the only prompts to answer, of those up to `--limit`; None: all of them. They are no
            setting: the output of one run is that of several which have its prompts between them.

    Raises:
        InputError: The model, the task or a setting is at fault, or there is no prompt with one of the ids.
        EnvironmentFailure: The hub cannot be reached.
    """
    engine, spec = find_engine(GENERATORS, config.engine, config)
    require_fitting(GENERATORS, config, engine)
    require_server(config, engine, spec)
    task = find_task(config.task)
    if config.n > 1 and not task.samples:
        raise InputError(f"--n above 1 is not supported for {task.name}: its format holds one answer per prompt")
    if config.temperature is None and not task.temperatures:
        config = replace(config, temperature=DEFAULT_TEMPERATURE)
    model = find_model(config, spec)
    config = spec.call("settle", config, model.path) or config
    all_prompts = load_prompts(task, config.dataset)
    require_one_system_message(all_prompts, config)
    dataset_sha256 = texts_sha256(prompt.source if task.by_id else prompt.asked(0) for prompt in all_prompts)
    limited = all_prompts[: config.limit]
    name = config.name or model.name
    require_name(name)
    files = RowFiles(Path(config.output_dir) / f"outputs_{task.name}" / f"{name}{task.suffix}", name, "prompts_sha256")
    if isinstance(file := config.dataset or task.source, str | Path):
        refuse_replacing(Path(file), (files.final, files.meta))
    made_from = {
        "task": task.name,
        "dataset_sha256": dataset_sha256,
        "engine": engine,
        **model.fingerprint,
        **recorded(config, "rows"),
        **(recorded(config, "batches") if spec.pads else {}),
        **({"temperature": dict(task.temperatures)} if config.temperature is None else {}),
    }
    fingerprint = Fingerprint(made_from, {**absent_values(config, "rows", "batches", "weights"), **spec.absent})
    date = None
    if model.asks_for_time:
        moment = moment or config.template_date
        date = find_date(files, fingerprint, overwrite=config.overwrite, moment=moment)
        model, fingerprint = model.at(date.moment), fingerprint.with_entry(date.entry)
    builder, first = RequestBuilder.begin(config, task, model, limited)
    stop_ids = model.stop_ids(config.stop_token_id)
    needed = max((builder.token_budgets[request.id] for request in first.requests), default=1)
    whole = GenerateJob(
        config=config,
        engine=engine,
        spec=spec,
        model=model,
        task=task,
        prompts=tuple(limited),
        all_prompts=tuple(all_prompts),
        builder=builder,
        first=first,
        planned=first,
        setup=GeneratorSetup(config, model.path, stop_ids, model.pad_id(stop_ids), needed, model.theta),
        files=files,
        name=name,
        fingerprint=fingerprint,
        date=date,
    )
    whole = whole if prompts is None else whole.of(prompts)
    return whole if config.part is None else whole.share(read_part(config.part, {}))
