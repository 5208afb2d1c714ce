"""The plan of a sweep, made from headers, prompts and small files: a job per α, and where each engine runs.

What is scored is planned when its answers are there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from expo.checkpoint.folder import Location, find_folder
from expo.checkpoint.hub import locate
from expo.config import ScoreConfig, SweepConfig
from expo.engines import GENERATORS, find_engine
from expo.engines.torch_tools import find_device, gpu_bytes, own_dtype, visible_gpus
from expo.errors import InputError
from expo.files import Row
from expo.generate import GenerateJob, plan as plan_generate
from expo.rows import is_complete
from expo.score import ReadyModel, ScoreJob, find_reward_models, plan as plan_score
from expo.sweep.placement import Model, Place, as_told, on_cpu, on_gpus
from expo.sweep.record import earlier_alphas
from expo.theta.pair import ThetaPlan

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a weight."""
MORE_TOKENS = 1.25
"""A conversation's tokens for the reward model over those for the policy, at most as a rule."""


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

    @property
    def first(self) -> GenerateJob:
        """The job of α = 0."""
        return self.jobs[0.0]

    @cached_property
    def to_generate(self) -> dict[float, GenerateJob]:
        """The α whose answers are not all there.

        Raises:
            InputError: An output was made with other settings, and `--overwrite` is not given.
        """
        return {alpha: job for alpha, job in self.jobs.items() if not is_complete(job)}

    def scoring(self, alpha: float) -> list[ScoreJob]:
        """The jobs of the reward models for an α whose answers are there.

        Raises:
            InputError: There are none, or none to score.
        """
        device = device_in(self.places[1], self.config.reward_device)
        first = plan_score(scoring(self.config, self.jobs[alpha], str(self.folder), device=device))
        room = int(MORE_TOKENS * self.first.setup.context_length)
        return [job.with_room(room, self.places[1 + job.number].gpu_share) for job in (first, *first.further)]

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
    engine, _ = find_engine({name: spec for name, spec in GENERATORS.items() if "local" in spec.can}, config.engine)
    first = plan_generate(config.generating(0.0, str(folder), engine=engine))
    models = tuple(find_reward_models(scoring(config, first, str(folder))))
    places = _places(first, models)
    wanted = {*config.alphas, *earlier_alphas(folder, first.fingerprint, overwrite=config.overwrite)}
    changes: dict[str, object] = {"engine": engine, "device": device_in(places[0], config.device)}
    if places[0].gpus and "tensor_parallel" in first.spec.can:
        changes["tensor_parallel"] = len(places[0].gpus)
    jobs = {}
    with quiet(logging.CRITICAL):
        for alpha in [0.0, *sorted(wanted - {0.0}, key=lambda alpha: (alpha < 0, alpha))]:
            own = config.generating(alpha, str(folder), **changes)
            jobs[alpha] = plan_generate(own).with_gpu_share(places[0].gpu_share)
    return SweepPlan(config, folder, jobs, models, places)


def folder_of(config: SweepConfig) -> Path:
    """Where a sweep writes.

    Raises:
        InputError: There is no such DPO model.
        EnvironmentFailure: The hub cannot be reached.
    """
    return Path(config.output or Path("sweeps") / find_model(config.dpo).name)


def find_model(model: str) -> Location:
    """A model of the pair: a folder, or of the hub."""
    return find_folder(model) or locate(model)


def scoring(config: SweepConfig, answers: GenerateJob, folder: str, **changes: object) -> ScoreConfig:
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


def _places(first: GenerateJob, models: tuple[ReadyModel, ...]) -> tuple[Place, ...]:
    """Where the policy and each reward model run, as the settings and the sizes say."""
    policy = Model(
        _loaded_bytes(first.model.path, first.config.dtype, theta_of(first).pair.nbytes),
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
    gpus, devices = visible_gpus(), [first.config.device, *(model.config.device for model in models)]
    for device in devices:
        find_device(device, prefer_gpu=True)
    if not gpus or set(devices) == {"cpu"}:
        return tuple(on_cpu(policy, rewards, psutil.virtual_memory().available))
    if set(devices) <= {"auto", "cuda"}:
        return tuple(on_gpus(policy, rewards, gpus, gpu_bytes()))
    return tuple(as_told(policy, rewards, devices, gpus))


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _loaded_bytes(folder: Path, dtype: str, stored: int) -> int:
    """What weights take in the data type that they run in."""
    own = own_dtype(folder)
    runs_in = own if dtype == "auto" else dtype
    return stored * BYTES.get(runs_in, 4) // BYTES.get(own, 4)
