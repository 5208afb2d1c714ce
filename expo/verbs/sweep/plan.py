"""The plan of a sweep, made from headers, prompts and small files: a job per α, and where each engine runs.

What is scored is planned when its answers are there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import psutil

from expo.checkpoint.folder import Location, find_folder, source_fingerprint
from expo.checkpoint.hub import locate
from expo.config import ScoreConfig, SweepConfig
from expo.config.logit_space import LOGITS
from expo.config.sweep import REWARD
from expo.engines import GENERATORS, find_engine
from expo.engines.torch_tools import find_device, gpu_bytes, own_dtype, visible_gpus
from expo.errors import EnvironmentFailure, InputError
from expo.files import Row
from expo.output.sweeps import MODULES, RECORD
from expo.rows import is_complete
from expo.settings import Fingerprint
from expo.theta.applied import why_not_applied
from expo.theta.names import theta_name
from expo.theta.pair import ThetaPlan, find_earlier
from expo.verbs.generate import GenerateJob
from expo.verbs.generate.plan import plan as plan_generate
from expo.verbs.score import ReadyModel, ScoreJob, find_reward_models
from expo.verbs.score.plan import plan as plan_score
from expo.verbs.sweep.placement import Model, Place, as_told, on_cpu, on_gpus
from expo.verbs.sweep.race_plan import RacePlan, plan_race
from expo.verbs.sweep.record import earlier_alphas
from expo.verbs.sweep.vector import Vector, Which

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a weight."""
SHARED_SEEDS = (
    "--seed-mode shared: answers to different prompts share random numbers and so are not independent, as "
    "intervals and p assume; --seed-mode row gives each row its own"
)
IN_LOGIT_SPACE = (
    "--space logits (exploratory): both models answer together, and α weighs what they say, so that there is no "
    "checkpoint of any α, and vLLM cannot serve one"
)
MORE_TOKENS = 1.25
"""A conversation's tokens for the reward model over those for the policy, at most as a rule."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPlan:
    """Everything a sweep will do."""

    config: SweepConfig
    folder: Path
    jobs: dict[float, GenerateJob]
    """α → its answers: α = 0 first, then in the order in which they are made."""
    reward_models: tuple[ReadyModel, ...]
    places: tuple[Place, ...]
    """Of the policy, and of each reward model."""
    race: RacePlan | None = None
    """With `--search race`; with `--search modules` the first of its races."""
    tries_adapters: bool = False
    """Whether the policy's engine may have all α in one batch, as adapters, if a trial shows that it can."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """With `--search modules`: class of tensors → what `--alpha-for` has them by."""
    vectors: dict[Vector, GenerateJob] = field(default_factory=dict)
    """The answers of vectors that are no α, as they are planned."""

    def job_of(self, which: float | Vector) -> GenerateJob:
        """The answers of an α, or a vector, to all prompts; it is planned now where it has not been.

        Raises:
            InputError: Its prompts have another date than those of α = 0.
        """
        if isinstance(which, Vector) and which.own:
            return self._planned(self.vectors, which, which.alpha, self._changes(which))
        alpha = which.alpha if isinstance(which, Vector) else which
        return self._planned(self.jobs, alpha, alpha, {})

    def _planned(
        self, jobs: dict[Which, GenerateJob], which: Which, alpha: float, changes: Mapping[str, object]
    ) -> GenerateJob:
        if which not in jobs:
            jobs[which] = _plan_alpha(self.config, alpha, self.folder, self.first, self.places[0], **changes)
            _require_same_prompts(self.first, jobs[which])
        return jobs[which]

    def _changes(self, which: Vector) -> dict[str, object]:
        """The settings of a vector's answers beside those of its α."""
        own = which.settings(self.patterns)
        name = theta_name(theta_of(self.first).dpo.name, which.alpha) + which.suffix
        return {"alpha_for": own["alpha_for"], "exclude": (*self.config.exclude, *own["exclude"]), "name": name}

    @property
    def begins_with(self) -> Mapping[float, GenerateJob]:
        """The answers that are needed first: all of them, or in a race those to its first slice."""
        if self.race is None:
            return self.jobs
        return {alpha: job.of(self.race.first_ids) for alpha, job in self.jobs.items()}

    @property
    def first(self) -> GenerateJob:
        """The job of α = 0."""
        return self.jobs[0.0]

    @cached_property
    def fingerprint(self) -> Row:
        """What the sweep is made from, and α = 0."""
        return fingerprint_of(self.config, self.first)

    @cached_property
    def to_generate(self) -> dict[float, GenerateJob]:
        """The α whose first answers are not all there.

        Raises:
            InputError: An output was made with other settings, and `--overwrite` is not given.
        """
        return {alpha: job for alpha, job in self.begins_with.items() if not is_complete(job)}

    def scoring(
        self, alpha: float | Vector, like: Sequence[ScoreJob] = (), folder: Path | None = None
    ) -> list[ScoreJob]:
        """The jobs of the reward models for an α, or a vector, whose answers are there.

        Args:
            alpha: The α.
            like: Those of another α, whose engines and dates these are to have.
            folder: Where the answers are, if not in the sweep's folder.

        Raises:
            InputError: There are none, or none to score.
        """
        device = device_in(self.places[1], self.config.reward_device)
        with flags_of_sweep(reward=True):
            first = plan_score(
                _score_config(self.config, self.job_of(alpha), str(folder or self.folder), device=device), like
            )
        room = int(MORE_TOKENS * self.first.setup.context_length)
        return [job.with_room(room, self.places[1 + job.number].gpu_share) for job in (first, *first.further)]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of how answers are made."""
        shared = self.config.seed_mode == "shared" and self.config.temperature != 0
        return [*([SHARED_SEEDS] if shared else []), *([IN_LOGIT_SPACE] if self.config.space == LOGITS else [])]

    @property
    def rows(self) -> int:
        """The answers of one α."""
        return len(self.first.keys)

    def describe(self) -> Row:
        """The plan as plain data."""
        labels = ["policy", *(f"reward model {model.location.label}" for model in self.reward_models)]
        engines = [self.first.engine, *(model.engine for model in self.reward_models)]
        return {
            "sft": str(theta_of(self.first).sft.path),
            "dpo": str(theta_of(self.first).dpo.path),
            "alphas": ", ".join(map(repr, self.jobs)),
            **({"space": self.config.space} if self.config.space == LOGITS else {}),
            **({"switch": "adapter, if a trial shows that it can be"} if self.tries_adapters else {}),
            **({"race": self.race.settings} if self.race else {}),
            "task": self.first.task.name,
            "rows_per_alpha": self.rows,
            "engines": [
                {"for": label, "engine": engine, "on": str(place), "bytes": place.nbytes}
                for label, engine, place in zip(labels, engines, self.places, strict=True)
            ],
            "output": str(self.folder),
        }


def plan(config: SweepConfig) -> SweepPlan:
    """Decide everything that can be decided before an answer is there; nothing is written.

    Raises:
        InputError: The pair, the task, a reward model or a setting is at fault.
        EnvironmentFailure: The hub cannot be reached.
    """
    folder = folder_of(config)
    _require_own_folder(config, folder)
    local = {name: spec for name, spec in GENERATORS.items() if "local" in spec.can}
    engine, _ = find_engine(local, config.engine, config)
    with flags_of_sweep():
        first = plan_generate(config.generating(0.0, str(folder), engine=engine))
    with flags_of_sweep(reward=True):
        models = tuple(find_reward_models(_score_config(config, first, str(folder))))
    places = _places(config, first, models)
    judges = [model.location.label for model in models]
    race = plan_race(config, first.prompts, judges) if config.search != "grid" else None
    made_of = fingerprint_of(config, first)
    there = earlier_alphas(folder, made_of, race.settings if race else None, overwrite=config.overwrite)
    found = SweepPlan(config, folder, {}, models, places, race, _tries_adapters(config, first, places[0]))
    for alpha in [0.0, *sorted({*config.alphas, *there} - {0.0}, key=lambda alpha: (alpha < 0, alpha))]:
        found.jobs[alpha] = _plan_alpha(config, alpha, folder, first, places[0])
        _require_same_prompts(found.first, found.jobs[alpha])
    for note in found.notes:
        log.warning("%s", note)
    return found


def _require_own_folder(config: SweepConfig, folder: Path) -> None:
    """Refuse a folder whose rows a search over modules has compared, and the other way round, `--overwrite` or not.

    Raises:
        InputError: It is one.
    """
    of_modules = config.search == "modules"
    file = folder / (RECORD if of_modules else MODULES)
    if file.is_file():
        made_by = "a sweep without --search modules" if of_modules else "a sweep with --search modules"
        raise InputError(f"{file} is of {made_by}, which has compared the rows in this folder: choose another --output")


def _tries_adapters(config: SweepConfig, first: GenerateJob, place: Place) -> bool:
    """Whether it is to be tried to have all α in one batch.

    Raises:
        InputError: It is asked for, and cannot be.
    """
    if config.switch == "reload" or config.search == "modules":
        return False
    why = why_not_applied(theta_of(first).pair)
    if "adapters" not in first.spec.can:
        why = f"the {first.engine} engine loads one α at a time"
    elif config.ray is not None:
        why = "on a cluster each engine loads one α at a time"
    elif config.checkpoint:
        why = "θ(T) of a training run is no adapter that is scaled"
    if why is not None and config.switch == "adapter":
        raise InputError(f"--switch adapter has all α in one batch as LoRA adapters: {why}; leave it out")
    return why is None and (config.switch == "adapter" or bool(place.gpus))


def fingerprint_of(config: SweepConfig, first: GenerateJob) -> Row:
    """What a sweep is made from, and α = 0: of a training run also its checkpoints, which α = 0 has nothing of."""
    if not config.checkpoint:
        return first.fingerprint
    theta = theta_of(first)
    models = (*find_earlier(config, allow_pickle=config.allow_pickle), theta.dpo)
    steps = [{"step": step, **source_fingerprint(one)} for (step, _), one in zip(config.course, models, strict=True)]
    absent = first.fingerprint.absent if isinstance(first.fingerprint, Fingerprint) else {}
    return Fingerprint({**first.fingerprint, "rule": config.rule, "course": steps}, {**absent, "course": None})


def _plan_alpha(
    config: SweepConfig, alpha: float, folder: Path, like: GenerateJob, place: Place, **others: object
) -> GenerateJob:
    """The answers of an α, with the engine and the template's date of another."""
    changes: dict[str, object] = {"engine": like.engine, "device": device_in(place, config.device), **others}
    if place.gpus and "tensor_parallel" in like.spec.can:
        changes["tensor_parallel"] = len(place.gpus)
    moment = like.date.moment if like.date else None
    with quiet(logging.CRITICAL), flags_of_sweep():
        job = plan_generate(config.generating(alpha, str(folder), **changes), moment)
    return job.with_gpu_share(place.gpu_share)


def _require_same_prompts(first: GenerateJob, other: GenerateJob) -> None:
    """Refuse α whose prompts have another date than those of α = 0: their answers are not to the same questions.

    Raises:
        InputError: They have.
    """
    if first.date != other.date and [one.prompt_ids for one in first.requests] != [
        one.prompt_ids for one in other.requests
    ]:
        raise InputError(
            f"the chat template writes a date into prompts, and {first.files.final} and {other.files.final} have "
            "different ones: move one of them away, or start over with --overwrite"
        )


def folder_of(config: SweepConfig) -> Path:
    """Where a sweep writes.

    Raises:
        InputError: There is no such DPO model.
        EnvironmentFailure: The hub cannot be reached.
    """
    own = f"-{LOGITS}" if config.space == LOGITS else ""
    return Path(config.output or Path("sweeps") / f"{find_model(config.dpo).name}{own}")


def find_model(model: str) -> Location:
    """A model of the pair: a folder, or of the hub."""
    return find_folder(model) or locate(model)


def _score_config(config: SweepConfig, answers: GenerateJob, folder: str, **changes: object) -> ScoreConfig:
    """The settings of `expo score` for an α's answers; the questions of mtbench are not in its outputs."""
    questions = {"dataset": config.dataset} if answers.task.by_id else {}
    return config.scoring(answers.name, folder, **questions, **changes)


def device_in(place: Place, device: str) -> str:
    """`--device` for a process that sees only the GPUs of its place."""
    return "cuda" if place.gpus and device.startswith("cuda:") else device


def theta_of(job: GenerateJob) -> ThetaPlan:
    """The θ(α) that answers."""
    if job.setup.theta is None:
        raise InputError(f"{job.name} is no θ(α), and a sweep is of a pair")
    return job.setup.theta


SAID_OTHERWISE = {"name": "output", "output-dir": "output"}
"""Flags of `expo generate` and `expo score` → what they are in a sweep."""
SAID_OF_REWARDS = {
    field.name.removeprefix(REWARD).replace("_", "-"): field.name.replace("_", "-")
    for field in fields(SweepConfig)
    if field.name.startswith(REWARD) and field.name != "reward_model"
}
"""The same, of flags that are the policy's in a sweep."""


@contextmanager
def flags_of_sweep(*, reward: bool = False) -> Iterator[None]:
    """Have errors of `expo generate` and `expo score` name the flags as `expo sweep` has them.

    Args:
        reward: Whether a reward model's flags are meant.
    """
    try:
        yield
    except (InputError, EnvironmentFailure) as error:
        raise type(error)(in_sweep(str(error), reward=reward)) from error


def in_sweep(message: str, *, reward: bool) -> str:
    """A message with the flags that a sweep has."""
    table = {**SAID_OTHERWISE, **(SAID_OF_REWARDS if reward else {})}
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", lambda flag: f"--{table.get(flag[1], flag[1])}", message)


@contextmanager
def quiet(least: int) -> Iterator[None]:
    """Without messages below a level: planning the first α has said them."""
    root = logging.getLogger("expo")
    level = root.level
    root.setLevel(max(level, least))
    try:
        yield
    finally:
        root.setLevel(level)


def _places(config: SweepConfig, first: GenerateJob, models: tuple[ReadyModel, ...]) -> tuple[Place, ...]:
    """Where the policy and each reward model run, as the settings and the sizes say."""
    models_at_once = 2 if first.setup.in_logit_space else 1
    policy = Model(
        models_at_once * _loaded_bytes(first.model.path, first.config.dtype, theta_of(first).pair.nbytes),
        spreads="tensor_parallel" in first.spec.can,
        tensor_parallel=first.config.tensor_parallel,
    )
    rewards = [
        Model(
            _loaded_bytes(model.body, model.config.dtype, _weights_bytes(model.body)),
            spreads="tensor_parallel" in model.spec.can,
            tensor_parallel=model.config.tensor_parallel,
        )
        for model in models
    ]
    if config.ray is not None:
        return tuple(Place((), model.nbytes, on_cluster=True) for model in (policy, *rewards))
    gpus, devices = visible_gpus(), [first.config.device, *(model.config.device for model in models)]
    for number, device in enumerate(devices):
        with flags_of_sweep(reward=number > 0):
            find_device(device, prefer_gpu=True)
    if not gpus or set(devices) == {"cpu"}:
        return tuple(on_cpu(policy, rewards, psutil.virtual_memory().available))
    if set(devices) <= {"auto", "cuda"}:
        return tuple(on_gpus(policy, rewards, gpus, gpu_bytes()))
    return tuple(as_told(policy, rewards, devices, gpus, gpu_bytes()))


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _loaded_bytes(folder: Path, dtype: str, stored: int) -> int:
    """What weights take in the data type that they run in."""
    own = own_dtype(folder)
    runs_in = own if dtype == "auto" else dtype
    return stored * BYTES.get(runs_in, 4) // BYTES.get(own, 4)
