"""An engine's steps, as long as its processes are alive.

On a GPU vLLM's engine runs in its own process, and its offline client waits forever if that process is killed (for
example by the kernel when memory runs out). Here a thread makes the step, and the caller, while it waits, checks
periodically that the processes are still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

CHECK_EVERY_S = 1.0

Result = TypeVar("Result")


class WatchedSteps(Generic[Result]):
    """Calls a step function as long as the processes it needs are alive.

    Args:
        step: The function to call; it may never return once a process has died.
        processes: The processes that the step needs.
    """

    def __init__(self, step: Callable[[], Result], processes: Sequence[BaseProcess]) -> None:
        self._step = step
        self._processes = processes
        self._requested: SimpleQueue[None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Result | None, Exception | None]] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()  # a step that never returns must not keep the program alive

    def _work(self) -> None:
        while True:
            self._requested.get()
            try:
                self._results.put((self._step(), None))
            except Exception as error:
                self._results.put((None, error))

    def __call__(self) -> Result:
        """One step.

        Raises:
            ChildProcessError: A process has died.
            Exception: What the step raised.
        """
        self._requested.put(None)
        while True:
            try:
                result, error = self._results.get(timeout=CHECK_EVERY_S)
            except Empty:
                self._require_alive()
                continue
            if error is not None:
                raise error
            return result  # type: ignore[return-value]

    def _require_alive(self) -> None:
        for process in self._processes:
            if not process.is_alive():
                raise ChildProcessError(f"its process {process.pid} ended ({_how(process.exitcode)})")


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}" + (": killed, perhaps because memory ran out" if code == -9 else "")
    return f"exit code {code}"
