"""`--data-parallel N`: the parts of a run as processes of their own, watched and taken up again, then joined.

Each process is `expo generate … --part i/N` with the resolved settings as flags and the GPUs of its group. It ends when
this process does, however that ended (`expo.orphans`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from types import TracebackType

from expo.config import GenerateConfig
from expo.engines.torch_tools import visible_gpus
from expo.errors import PARTLY_FAILED, EnvironmentFailure, InputError
from expo.generate.decide import Plan, plan, share
from expo.generate.gather import NotMade, answered, is_covered, read_part_file, require_same_cut, whole_rows
from expo.generate.join import join_parts
from expo.generate.loop import Generated
from expo.generate.turns import unanswerable
from expo.generate.worker import Worker
from expo.parts import all_parts
from expo.progress import rows_bar

MAX_STARTS = 4
"""How often the process of one part is started in one run."""
POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
"""How long workers that are told to stop may take to unwind."""

FINISHED = (0, PARTLY_FAILED)

log = logging.getLogger(__name__)


def run(config: GenerateConfig) -> Generated:
    """Generate the rows in `data_parallel` processes.

    Raises:
        InputError: The settings or inputs are at fault, or a worker says so.
        EnvironmentFailure: A part failed again and again; what was finished is kept.
    """
    count = config.data_parallel
    whole = plan(config)
    environments = worker_environments(whole.engine, config, visible_gpus())
    kept = whole_rows(whole)
    require_same_cut(whole, count)
    shares = [share(whole, part) for part in all_parts(count)]
    workers = [
        Worker(work, environment, sum(key in kept for key in work.keys))
        for work, environment in zip(shares, environments, strict=True)
        if not is_covered(work, kept) and not _is_made(work)
    ]
    if workers:
        log.info("%s: %d workers with %s", whole.name, len(workers), whole.engine)
        elsewhere = len(whole.keys) - sum(len(worker.work.keys) for worker in workers)
        with Crew(workers) as crew:
            crew.watch(len(whole.keys), elsewhere)
    return join_parts(whole, count)


def _is_made(work: Plan) -> bool:
    try:
        made = read_part_file(work)
    except NotMade:
        return False
    return bool(made.meta["failed"] == len(unanswerable(work, answered(made.rows.values()))))


def worker_environments(engine: str, config: GenerateConfig, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What is set for each worker: the GPUs of its group, or its share of the CPU's threads.

    Args:
        engine: The engine, chosen.
        config: The run's settings.
        gpus: The GPUs this process may use.

    Raises:
        InputError: There are not GPUs enough, or the engine does not run here.
    """
    count = config.data_parallel
    if engine not in ("vllm", "transformers"):
        raise InputError(f"--data-parallel is for engines that run here, and this run uses {engine}")
    if engine == "transformers" and config.device.startswith("cuda:"):
        raise InputError(f"--data-parallel {count} gives each worker a GPU of its own; leave out --device")
    if not gpus or (engine == "transformers" and config.device == "cpu"):
        threads = max(1, (os.cpu_count() or 1) // count)
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count
    size = (config.tensor_parallel or max(1, len(gpus) // count)) if engine == "vllm" else 1
    if count * size > len(gpus):
        raise InputError(
            f"--data-parallel {count} with --tensor-parallel {size} needs {count * size} GPUs, and there are "
            f"{len(gpus)}"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * size : (i + 1) * size])} for i in range(count)]


class Crew:
    """The workers of a run, started together; at the end of the `with` none is left running.

    Args:
        workers: One per part that is to be made.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._running: list[Worker] = []
        self._lost: list[str] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._running:
            worker.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._running:
            worker.wait(max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            worker.sweep()
            worker.close()

    def watch(self, total: int, elsewhere: int) -> None:
        """Start the workers and wait until all have ended, with one bar over the rows of all.

        Args:
            total: All rows of the run.
            elsewhere: Those of parts that are made already.

        Raises:
            InputError: A worker refuses its settings or inputs.
            EnvironmentFailure: A part failed again and again.
        """
        for worker in self._workers:
            self._start(worker)
        shown = elsewhere + sum(worker.rows() for worker in self._workers)
        progress = rows_bar(total, "generate", initial=shown)
        try:
            while self._running:
                time.sleep(POLL_SECONDS)
                for worker in list(self._running):
                    self._look_at(worker)
                now = elsewhere + sum(map(self._rows, self._workers))
                progress.update(max(0, now - shown))
                shown = max(shown, now)
        finally:
            progress.close()
        if self._lost:
            raise EnvironmentFailure(f"{'; '.join(self._lost)}; the same command goes on with the rest")

    def _rows(self, worker: Worker) -> int:
        return len(worker.work.keys) if worker.exit_code() in FINISHED else worker.rows()

    def _start(self, worker: Worker) -> None:
        self._running.append(worker)
        worker.start()

    def _look_at(self, worker: Worker) -> None:
        code = worker.exit_code()
        if code is None:
            return
        worker.sweep()
        self._running.remove(worker)
        if code == InputError.exit_code:
            raise InputError(worker.last_words())
        if code not in FINISHED:
            self._take_up(worker, code)

    def _take_up(self, worker: Worker, code: int) -> None:
        """Start a part again whose process died; one that fails before its first row would only do so again."""
        part, words = worker.work.part, worker.last_words()
        if worker.starts < MAX_STARTS and (code != EnvironmentFailure.exit_code or worker.has_come_further()):
            log.warning("part %s: %s; it is taken up again", part, words)
            self._start(worker)
        else:
            log.warning("part %s: %s", part, words)
            self._lost.append(f"part {part}: {words}")
