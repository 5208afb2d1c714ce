"""A coroutine's results in synchronous code: the event loop runs in its own thread, and an iterator yields.

Network requests proceed while the caller handles earlier results, and a signal reaches the caller, not the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def results(work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> Generator[list[T], None, None]:
    """Run a coroutine and yield its results in batches as they arrive: all that are there, at least one.

    Closing the generator cancels the coroutine and waits until it has ended.

    Args:
        work: Makes the coroutine; its argument is the function that delivers a result.

    Raises:
        Exception: What the coroutine raised, after all results that it delivered before.
    """
    delivered: SimpleQueue[T | None] = SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(delivered.put))
    task.add_done_callback(lambda _: delivered.put(None))  # the end
    thread = Thread(target=_run, args=(loop, task), name="event loop", daemon=True)
    thread.start()
    try:
        while batch := _take(delivered):
            yield batch
        task.result()
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    loop.run_until_complete(asyncio.wait({task}))
    loop.run_until_complete(loop.shutdown_asyncgens())


def _take(delivered: SimpleQueue[T | None]) -> list[T]:
    """Wait for a result and take all that are there by then; empty at the end."""
    taken = [delivered.get()]
    while taken[-1] is not None:
        try:
            taken.append(delivered.get_nowait())
        except Empty:
            break
    if len(taken) > 1 and taken[-1] is None:
        delivered.put(None)
    return [one for one in taken if one is not None]
