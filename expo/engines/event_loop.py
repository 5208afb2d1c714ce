"""A coroutine's results in ordinary code: the event loop runs in a thread of its own, and an iterator yields.

Work that waits for a network goes on while the caller is busy with what it got, and a signal reaches the caller, not
the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def results(work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> Generator[list[T], None, None]:
    """Run a coroutine and yield what it hands over, as it does: all there is, at least one.

    Closing the generator cancels the coroutine and waits until it has ended.

    Args:
        work: Makes the coroutine; it is given the function that hands a result over.

    Raises:
        Exception: What the coroutine raised, after everything it handed over before.
    """
    handed: SimpleQueue[T | None] = SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(handed.put))
    task.add_done_callback(lambda _: handed.put(None))  # the last of all
    thread = Thread(target=_run, args=(loop, task), name="event loop", daemon=True)
    thread.start()
    try:
        while batch := _take(handed):
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


def _take(handed: SimpleQueue[T | None]) -> list[T]:
    """Wait for a result, and take those that are there with it; empty at the end."""
    taken = [handed.get()]
    while taken[-1] is not None:
        try:
            taken.append(handed.get_nowait())
        except Empty:
            break
    if len(taken) > 1 and taken[-1] is None:
        handed.put(None)
    return [one for one in taken if one is not None]
