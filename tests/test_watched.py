"""Calls to an engine whose processes may die without its noticing."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest

from expo.engines import watched
from expo.engines.watched import WatchedCalls


@pytest.fixture
def process():
    """A process that lives until it is killed."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    yield process
    process.kill()
    process.join()


def test_calls_are_made_in_order_and_what_they_raise_comes_through(process):
    left = iter([1, 2, ValueError("three"), 4])

    def step():
        value = next(left)
        if isinstance(value, Exception):
            raise value
        return value

    watched_calls = WatchedCalls([process])
    assert (watched_calls(step), watched_calls(step)) == (1, 2)
    with pytest.raises(ValueError, match="three"):
        watched_calls(step)
    assert watched_calls(step) == 4


def test_a_call_that_waits_for_a_dead_process_ends(process, monkeypatch):
    monkeypatch.setattr(watched, "CHECK_EVERY_S", 0.01)
    watched_calls = WatchedCalls([process])
    threading.Timer(0.1, process.kill).start()
    with pytest.raises(
        ChildProcessError, match=rf"process {process.pid} ended \(signal 9: killed, perhaps because mem"
    ):
        watched_calls(threading.Event().wait)


def test_a_slow_call_of_living_processes_is_waited_for(process, monkeypatch):
    monkeypatch.setattr(watched, "CHECK_EVERY_S", 0.01)
    assert WatchedCalls([process])(lambda: time.sleep(0.1) or "made") == "made"


def test_without_processes_a_call_is_made_as_it_is():
    assert WatchedCalls([])(threading.current_thread) is threading.current_thread()
