"""A refusal in a process of vLLM's is what the program says, with its exit code; vLLM's own word is the last resort."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress
from multiprocessing.connection import Connection

import pytest

from expo.engines.refusals import VARIABLE, report_refusals, reraise_refusals
from expo.errors import EnvironmentFailure, ExpoError, InputError

VLLM_SAYS = "WorkerProc initialization failed due to an exception in a background process"


def worker(error: Exception) -> None:
    with report_refusals():
        raise error


def engine(*errors: Exception) -> None:
    """Start processes that fail so, and fail as vLLM does."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(error,)) for error in errors]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    raise RuntimeError(VLLM_SAYS)


@pytest.mark.parametrize("kind", [InputError, EnvironmentFailure])
def test_what_every_process_refuses_is_raised_in_the_one_that_started_them(kind: type[ExpoError]) -> None:
    with pytest.raises(kind, match="w holds NaN; τ") as caught, reraise_refusals():
        engine(kind("w holds NaN; τ"), kind("w holds NaN; τ"))
    assert type(caught.value) is kind
    assert VARIABLE not in os.environ


def test_what_is_no_refusal_stays_vllms_error() -> None:
    with pytest.raises(RuntimeError, match=VLLM_SAYS), reraise_refusals():
        engine(RuntimeError("out of memory"))


def test_a_refusal_of_this_process_is_raised_as_it_is() -> None:
    with pytest.raises(InputError, match="here"), reraise_refusals(), report_refusals():
        raise InputError("here")


def live_engine(loads: Connection) -> None:
    """Refuse whatever is to be loaded."""
    while loads.recv():
        with suppress(InputError), report_refusals():
            raise InputError("not at this α")
        loads.send("failed")


def test_a_live_engine_that_refuses_other_weights_says_why_each_time() -> None:
    ours, theirs = multiprocessing.Pipe()
    with reraise_refusals():
        process = multiprocessing.get_context("spawn").Process(target=live_engine, args=(theirs,))
        process.start()
    for _ in range(2):
        with pytest.raises(InputError, match="not at this α"), reraise_refusals():
            load_again(ours)
    with pytest.raises(RuntimeError, match=VLLM_SAYS), reraise_refusals():
        raise RuntimeError(VLLM_SAYS)
    ours.send(False)
    process.join()


def load_again(engine: Connection) -> None:
    engine.send(True)
    raise RuntimeError(f"{VLLM_SAYS}: {engine.recv()}")


def test_nobody_waits_for_a_live_engine_that_loads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="again"), report_refusals():
        raise InputError("again")
    monkeypatch.setenv(VARIABLE, "/no such folder/refusal")
    with pytest.raises(InputError, match="again"), report_refusals():
        raise InputError("again")
