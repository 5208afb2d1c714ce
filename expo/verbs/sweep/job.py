"""`expo sweep`: see that the pair is one, make the answers of every α and their rewards, and choose."""

from __future__ import annotations

import time

from expo.checkpoint.folder import source_fingerprint
from expo.config import SweepConfig
from expo.verbs.sweep import likelihood, modules
from expo.verbs.sweep.conclude import Swept, conclude, of_equal_models
from expo.verbs.sweep.making import Making
from expo.verbs.sweep.pair import inspect_pair, is_one_model
from expo.verbs.sweep.plan import find_model, folder_of, plan
from expo.verbs.sweep.preload import preloaded
from expo.verbs.sweep.racing import run_race
from expo.verbs.sweep.record import EQUAL, made_from


def run(config: SweepConfig) -> Swept:
    """Make what is missing of every α, and choose.

    Raises:
        InputError: The settings or inputs are at fault, or the pair is one that ExPO does not suit.
        EnvironmentFailure: An engine, the disk or the network failed; calling again continues.
    """
    if config.likelihood is not None:
        return likelihood.run(config)
    if config.search == "modules":
        return modules.run(config)
    started = time.perf_counter()
    if is_one_model(config):
        dpo = source_fingerprint(find_model(config.dpo))
        return of_equal_models(config, {"dpo": dpo}, "SFT and DPO are the same files, so every θ(α) is DPO")
    inspected = None
    with preloaded(config, folder_of(config)) as processes:
        job = plan(config)
        if job.to_generate:
            inspected = inspect_pair(config)
            if inspected.suits == EQUAL:
                return of_equal_models(config, made_from(job.fingerprint), inspected.verdict)
        with Making(job, processes, inspected) as made:
            raced = None if job.race is None else run_race(job, job.race, made)
            if raced is None:
                made.make(job.jobs)
            return conclude(job, made, raced, started)  # while the processes end
