"""Calls to an engine, as long as its processes are alive.

On a GPU vLLM's engine runs in its own process, and its offline client waits forever if that process is killed (for
example by the kernel when memory runs out). Here a thread makes the call, and the caller, while it waits, checks
periodically that the processes are still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

CHECK_EVERY_S = 1.0

Result = TypeVar("Result")


class WatchedCalls:
    """Makes calls, one after the other, as long as the processes they need are alive.

    Args:
        processes: The processes that the calls need; where there are none, calls are made as they are.
    """

    def __init__(self, processes: Sequence[BaseProcess]) -> None:
        self._processes = processes
        self._requested: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        if processes:  # a call that never returns must not keep the program alive
            Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            action = self._requested.get()
            try:
                self._results.put((action(), None))
            except Exception as error:
                self._results.put((None, error))
            del action  # it holds the engine

    def __call__(self, action: Callable[[], Result]) -> Result:
        """One call.

        Args:
            action: What to call; it may never return once a process has died.

        Raises:
            ChildProcessError: A process has died.
            Exception: What the call raised.
        """
        if not self._processes:
            return action()
        self._requested.put(action)
        while True:
            try:
                result, error = self._results.get(timeout=CHECK_EVERY_S)
            except Empty:
                self._require_alive()
                continue
            if error is not None:
                raise error
            return result  # type: ignore[no-any-return]

    def _require_alive(self) -> None:
        for process in self._processes:
            if not process.is_alive():
                raise ChildProcessError(f"its process {process.pid} ended ({_how(process.exitcode)})")


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}" + (": killed, perhaps because memory ran out" if code == -9 else "")
    return f"exit code {code}"
