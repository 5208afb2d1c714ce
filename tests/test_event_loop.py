"""A coroutine's results in ordinary code."""

from __future__ import annotations

import asyncio
import threading

import pytest

from expo.engines.event_loop import results


def test_results_come_as_they_are_handed_over_and_an_error_comes_last():
    async def work(hand) -> None:
        for number in range(5):
            hand(number)
            await asyncio.sleep(0)
        raise ValueError("the end")

    taken: list[int] = []
    with pytest.raises(ValueError, match="the end"):
        taken.extend(one for batch in results(work) for one in batch)
    assert taken == list(range(5))


def test_closing_cancels_what_is_under_way():
    ended = []

    async def work(hand) -> None:
        hand(1)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    batches = results(work)
    assert next(batches) == [1]
    batches.close()
    assert ended == [True]
    assert not [thread for thread in threading.enumerate() if thread.name == "event loop"]


def test_no_results_are_no_batches():
    async def work(hand) -> None:
        pass

    assert list(results(work)) == []
