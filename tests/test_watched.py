"""Steps of an engine whose processes may die without its noticing."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest

from expo.engines import watched
from expo.engines.watched import WatchedSteps


@pytest.fixture
def process():
    """A process that lives until it is killed."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    yield process
    process.kill()
    process.join()


def test_steps_are_made_in_order_and_what_they_raise_comes_through(process):
    left = iter([1, 2, ValueError("three"), 4])

    def step():
        value = next(left)
        if isinstance(value, Exception):
            raise value
        return value

    steps = WatchedSteps(step, [process])
    assert (steps(), steps()) == (1, 2)
    with pytest.raises(ValueError, match="three"):
        steps()
    assert steps() == 4


def test_a_step_that_waits_for_a_dead_process_ends(process, monkeypatch):
    monkeypatch.setattr(watched, "CHECK_EVERY_S", 0.01)
    steps = WatchedSteps(threading.Event().wait, [process])
    threading.Timer(0.1, process.kill).start()
    with pytest.raises(
        ChildProcessError, match=rf"process {process.pid} ended \(signal 9: killed, perhaps because mem"
    ):
        steps()


def test_a_slow_step_of_living_processes_is_waited_for(process, monkeypatch):
    monkeypatch.setattr(watched, "CHECK_EVERY_S", 0.01)
    assert WatchedSteps(lambda: time.sleep(0.1) or "made", [process])() == "made"
