"""An engine's steps while its processes live.

vLLM's engine runs in a process of its own on a GPU, and its offline client waits for ever where that process is killed
(by the kernel when memory runs out, say). Here a step is made in a thread, and whoever waits for it looks now and then
whether the processes are still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

LOOK_EVERY_S = 1.0

Result = TypeVar("Result")


class WatchedSteps(Generic[Result]):
    """Calls a step as long as some processes live.

    Args:
        step: What to call; it may never return once a process has died.
        processes: The processes it needs.
    """

    def __init__(self, step: Callable[[], Result], processes: Sequence[BaseProcess]) -> None:
        self._step = step
        self._processes = processes
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._made: SimpleQueue[tuple[Result | None, Exception | None]] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()  # one that never returns does not keep the program

    def _work(self) -> None:
        while True:
            self._asked.get()
            try:
                self._made.put((self._step(), None))
            except Exception as error:
                self._made.put((None, error))

    def __call__(self) -> Result:
        """One step.

        Raises:
            ChildProcessError: A process has died.
            Exception: What the step raised.
        """
        self._asked.put(None)
        while True:
            try:
                result, error = self._made.get(timeout=LOOK_EVERY_S)
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
