"""What a process is asked of its engine before rows depend on it: answers to a probe, and what the engine holds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from expo.engines import Probed, Prober
from expo.engines.shared import SharedGenerator
from expo.engines.switching import BATCH, Reply, probe_prompts
from expo.errors import InputError
from expo.rows import EngineKeeper
from expo.verbs.generate.job import GenerateJob


def probe_engine(jobs: Sequence[GenerateJob], keeper: EngineKeeper) -> None:
    """Open the engine, or switch it, as for the jobs' rows, and write what it answers into each job's file.

    Args:
        jobs: One, or several of an engine that has room for them in one batch. Where they are timed, each is told what
            a batch takes in which all have an equal share, and not what the engine holds.
        keeper: Has the engine.

    Raises:
        InputError: The engine does not run here.
        EnvironmentFailure: It failed.
    """
    first = jobs[0]
    if "local" not in first.spec.can or first.model.tokenizer is None:
        raise InputError(f"the {first.engine} engine does not run here: what it was given cannot be probed")
    clock = time.perf_counter()
    engine: Prober = keeper.engine_for(first)
    ready = time.perf_counter()
    block, ids = engine.block_tokens, first.model.tokenizer.text_ids
    prompts, new_tokens = probe_prompts(ids, first.setup.context_length, block)
    answers = _answers(engine, jobs, prompts, new_tokens)
    batch_seconds = None
    if first.timed:
        began = time.perf_counter()
        _answers(engine, jobs, prompts * (BATCH // len(prompts) // len(jobs)), new_tokens)
        batch_seconds = time.perf_counter() - began
    for job, of_job in zip(jobs, answers, strict=True):
        assert job.probe is not None
        Reply(
            answers=of_job,
            held=[] if job.timed else engine.held(),
            pid=os.getpid(),
            opened=keeper.opened,
            fills_block=len(prompts[0]) > block,
            ready_seconds=ready - clock,
            probe_seconds=time.perf_counter() - ready,
            batch_seconds=batch_seconds,
        ).write(job.probe)


def _answers(
    engine: Prober, jobs: Sequence[GenerateJob], prompts: Sequence[tuple[int, ...]], new_tokens: int
) -> list[list[Probed]]:
    if len(jobs) == 1:
        return [engine.probe(prompts, new_tokens)]
    shared: SharedGenerator = engine  # type: ignore[assignment]  # or the jobs were not given together
    return shared.probe_together(prompts, new_tokens, [job.setup for job in jobs])
