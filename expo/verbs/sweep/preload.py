"""Processes that import their engines while the sweep is still planned: on a CPU that takes as long as planning.

Not where there is a GPU: the plan says which GPUs a process sees, before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from expo.config import SweepConfig
from expo.config.logit_space import LOGITS
from expo.output.sweeps import MODULES, is_sweep
from expo.rows.worker import Worker
from expo.rows.workers import stop_all
from expo.verbs.sweep.lanes import environment_of
from expo.verbs.sweep.placement import Place

GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


@contextmanager
def preloaded(config: SweepConfig, folder: Path) -> Iterator[list[Worker]]:
    """The processes of the policy and of the first reward model, started; those that nobody took are stopped.

    None where a finished sweep is there, which may need no engine at all, and none for engines on other machines.
    """
    workers: list[Worker] = []
    try:
        there = is_sweep(folder) or (folder / MODULES).is_file()
        if config.ray is None and not there and not any(driver.exists() for driver in GPU_DRIVERS):
            auto = "vllm" if find_spec("vllm") and config.space != LOGITS else "transformers"
            policy = auto if config.engine == "auto" else config.engine
            reward = "transformers" if config.reward_engine == "auto" else config.reward_engine
            for verb, engine in (("generate", policy), ("score", reward)):
                workers.append(Worker(None, environment_of(Place((), 0)), stays=True))
                workers[-1].preload(verb, engine)
        yield workers
    finally:
        stop_all(workers)
