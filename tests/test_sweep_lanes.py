"""Lanes: order, feeding, waiting, restarting, refusing, and that no process is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from test_generate import settings
from test_orphans import wait_until_gone

from expo.errors import EnvironmentFailure, InputError
from expo.parts import all_parts
from expo.rows import workers
from expo.rows.worker import MAX_STARTS, Worker
from expo.verbs import generate as verb
from expo.verbs.sweep import lanes
from expo.verbs.sweep.lanes import Lane, Lanes, environment_of, shared_gpus
from expo.verbs.sweep.placement import Place

STAYS = "for line in os.fdopen(JOBS): os.write(REPLIES, b'{\"exit_code\": 0}\\n')"
PARTLY = "for line in os.fdopen(JOBS): os.write(REPLIES, b'{\"exit_code\": 3}\\n')"
ONCE = "os.fdopen(JOBS).readline(); os.write(REPLIES, b'{\"exit_code\": 0}\\n')"
HANG = "time.sleep(60)"
KILLED = "os.kill(os.getpid(), 9)"
REFUSE = "print('talk\\nexpo: error: no such thing', file=sys.stderr); sys.exit(2)"
SAYS_WHY = "print('talk\\nexpo: error: the disk is full', file=sys.stderr, flush=True); "
FAILS_AND_HANGS = SAYS_WHY + "os.write(REPLIES, b'{\"exit_code\": CODE}\\n'); time.sleep(600)"
STAYS_FOREVER = STAYS + "\ntime.sleep(600)"
FAIL = "print('expo: error: the disk is full', file=sys.stderr); sys.exit(1)"


OPENS = """
def note(word):
    with open(FILE, "a") as stream:
        stream.write(word + "\\n")
note("NAME opens")
time.sleep(0.05)
for number, line in enumerate(os.fdopen(JOBS)):
    if number == 0:
        note("NAME is open")
        os.write(REPLIES, b'{"ready": true}\\n')
    if number == DIES:
        os.kill(os.getpid(), 9)
    os.write(REPLIES, b'{"exit_code": 0}\\n')
"""


@pytest.fixture
def jobs(llama_pair, tmp_path):
    """Five jobs, which no process here does."""
    prompts = tmp_path / "q.jsonl"
    prompts.write_text('{"prompt": "w1"}\n' * 10)
    whole = verb.plan(settings(llama_pair[1], prompts, tmp_path))
    return [whole.share(part) for part in all_parts(5)]


class Program(Worker):
    """Runs small programs instead of expo: one text, or one per start."""

    texts: str | list[str] = STAYS

    def command(self, jobs: int, replies: int) -> list[str]:
        text = self.texts if isinstance(self.texts, str) else self.texts[self.starts - 1]
        text = text.replace("JOBS", str(jobs)).replace("REPLIES", str(replies))
        return [sys.executable, "-c", f"import os, sys, time\n{text}"]


@pytest.fixture
def lane_of(monkeypatch):
    """A function that makes a lane whose process runs these texts."""
    made = []

    def make(texts, after=lambda job: None, **how) -> Lane:
        class Own(Program):
            def __init__(self, *words, **others) -> None:
                super().__init__(*words, **others)
                self.texts = texts
                made.append(self)

            def _spawn(self, *words: str) -> None:
                super()._spawn(*words)
                make.pids.append(self._process.pid)

        lane = Lane("a lane", {}, after, **how)
        monkeypatch.setattr(lane, "new_worker", lambda job: Own(job, {}, stays=lane.stays))
        return lane

    monkeypatch.setattr(lanes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(workers, "STOP_SECONDS", 2.0)
    make.made, make.pids = made, []
    return make


def test_an_engine_on_a_cpu_has_the_threads_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment_of(Place((), 0)) == {"OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert environment_of(Place((), 0)) == {"OMP_NUM_THREADS": "2"}
    assert environment_of(Place(("0", "2"), 0)) == {"CUDA_VISIBLE_DEVICES": "0,2"}


def test_the_gpus_of_which_an_engine_has_a_share():
    assert shared_gpus(Place(("0", "2"), 0, gpu_share=0.4)) == {"0", "2"}
    assert shared_gpus(Place(("0",), 0)) == shared_gpus(Place((), 0)) == frozenset()


def run(*some: Lane) -> None:
    with Lanes(some) as running:
        running.run("test", 10, 0)


def test_one_process_does_all_jobs_in_order(lane_of, jobs):
    done = []
    lane = lane_of(STAYS, done.append)
    for job in jobs:
        lane.add(job)
    run(lane)
    assert done == jobs
    assert len(lane_of.made) == 1
    assert lane.rows == 10


def test_rows_that_failed_are_no_reason_to_stop(lane_of, jobs):
    lane = lane_of(PARTLY)
    for job in jobs:
        lane.add(job)
    run(lane)
    assert lane.rows == 10


def test_a_lane_that_does_not_stay_starts_a_process_for_each_job(lane_of, jobs):
    lane = lane_of(ONCE)
    lane.stays = False
    for job in jobs:
        lane.add(job)
    run(lane)
    assert len(set(lane_of.pids)) == len(jobs)


def test_a_process_that_is_there_already_is_used(lane_of, jobs):
    lane = lane_of(STAYS)
    worker = lane.new_worker(jobs[0])
    worker.start()
    while worker.outcome() is None:
        pass
    lane.take_over(worker)
    for job in jobs:
        lane.add(job)
    run(lane)
    assert lane_of.made == [worker]


@pytest.mark.parametrize("waits", [False, True])
def test_a_fed_lane_goes_on_until_the_other_is_over(lane_of, jobs, waits):
    order = []

    def fed(job) -> None:
        order.append(("one", job.part.index))
        second.add(job)

    first = lane_of(STAYS, fed)
    second = lane_of(STAYS, lambda job: order.append(("two", job.part.index)), fed_by=first, waits=waits)
    for job in jobs:
        first.add(job)
    run(first, second)
    assert [number for lane, number in order if lane == "two"] == list(range(5))
    if waits:
        assert [lane for lane, _ in order] == ["one"] * 5 + ["two"] * 5


def test_a_lane_that_waits_starts_when_the_first_has_given_back_its_memory(lane_of, jobs):
    codes = []
    first = lane_of(STAYS)
    second = lane_of(STAYS, lambda _: codes.append(first._worker.exit_code()), waits=True)
    for lane in (first, second):
        lane.add(jobs[0])
    run(first, second)
    assert codes == [0]


@pytest.mark.parametrize("waits", [False, True])
def test_processes_stay_for_further_jobs_unless_memory_is_for_one_of_them(lane_of, jobs, waits):
    """As the looks of a race: answers, then their rewards, then again."""
    scored, alive = [], []
    rewards = lane_of(STAYS, scored.append, waits=waits)
    policy = lane_of(STAYS, rewards.add)
    rewards._fed_by = policy
    with Lanes([policy, rewards]) as running:
        for number, job in enumerate(jobs[:3]):
            policy.add(job)
            running.run(f"look {number}", 4, 0, more=number < 2)
            alive.append([worker.exit_code() is None for worker in lane_of.made])
    assert scored == jobs[:3]
    assert (policy.rows, rewards.rows) == (6, 6)
    assert len(lane_of.pids) == (6 if waits else 2)
    assert alive[:2] == ([[False, False]] * 2 if waits else [[True, True]] * 2)
    for pid in lane_of.pids:
        wait_until_gone(pid)


def test_a_process_that_does_not_end_by_itself_is_killed_and_the_next_lane_starts(lane_of, jobs, monkeypatch, caplog):
    monkeypatch.setattr(lanes, "STOP_SECONDS", 0.1)
    codes = []
    first = lane_of(STAYS_FOREVER)
    second = lane_of(STAYS, lambda _: codes.append(first._worker.exit_code()), waits=True)
    for lane in (first, second):
        lane.add(jobs[0])
    run(first, second)
    assert codes == [-signal.SIGKILL]
    assert "a lane: its process does not exit by itself and is killed" in caplog.messages


@pytest.mark.parametrize(("code", "kind"), [(1, EnvironmentFailure), (2, InputError)])
def test_why_a_job_failed_is_known_although_its_process_hangs(lane_of, jobs, monkeypatch, code, kind):
    monkeypatch.setattr(lanes, "STOP_SECONDS", 0.1)
    lane = lane_of(FAILS_AND_HANGS.replace("CODE", str(code)))
    lane.add(jobs[0])
    with pytest.raises(kind, match="the disk is full"):
        run(lane)
    assert [worker.starts for worker in lane_of.made] == [1]
    wait_until_gone(lane_of.pids[0])


def test_a_killed_process_is_started_again_with_the_same_job(lane_of, jobs, caplog):
    lane = lane_of([KILLED, KILLED, STAYS])
    lane.add(jobs[0])
    lane.add(jobs[1])
    run(lane)
    assert lane.rows == 4
    assert [record.message for record in caplog.records if "restarting" in record.message] == [
        "a lane: killed by SIGKILL; restarting"
    ] * 2


def opens(name: str, file: Path, dies: int = -1) -> str:
    """A program that takes its time to open an engine, and notes it; it dies of the job of this number."""
    return OPENS.replace("NAME", name).replace("FILE", repr(str(file))).replace("DIES", str(dies))


def test_engines_that_share_a_gpu_are_opened_one_after_the_other(lane_of, jobs, tmp_path):
    """Also when one dies, and is opened again."""
    file = tmp_path / "notes"
    programs = {"a": [opens("a", file, dies=1), opens("a", file)], "b": opens("b", file), "c": opens("c", file)}
    some = [lane_of(programs[name], shares=shares) for name, shares in (("a", "01"), ("b", "1"), ("c", "0"))]
    for lane in some:
        lane.add(jobs[0])
        lane.add(jobs[1])
    run(*some)
    notes = [line.split() for line in file.read_text().splitlines()]
    of_b, of_c = ([note for note in notes if note[0] in ("a", name)] for name in "bc")
    for found in (of_b, of_c):
        assert len(found) == 6
        for begin, end in zip(found[::2], found[1::2], strict=True):
            assert (begin[1], end[1:]) == ("opens", ["is", "open"])
            assert begin[0] == end[0]


@pytest.mark.parametrize(("shares", "begun"), [("1", [True, False]), ("", [True, True])])
def test_who_shares_no_gpu_waits_for_nobody(lane_of, jobs, tmp_path, shares, begun):
    go = tmp_path / "go"
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    some = [lane_of(wait + STAYS, shares="1"), lane_of(STAYS, shares=shares)]
    for lane in some:
        lane.add(jobs[0])
    seen = []

    def look() -> None:
        seen.extend(worker.starts > 0 for worker in lane_of.made)
        go.touch()

    with Lanes(some) as running:
        running.run("test", 4, 0, look)
    assert seen == begun
    assert [lane.rows for lane in some] == [2, 2]


@pytest.mark.parametrize(("text", "starts"), [(KILLED, MAX_STARTS), (FAIL, 1)])
def test_one_that_fails_again_and_again_ends_the_run(lane_of, jobs, text, starts):
    lane, other = lane_of(text), lane_of(HANG)
    lane.add(jobs[0])
    other.add(jobs[1])
    with pytest.raises(EnvironmentFailure, match=r"^a lane: .*; rerun the same command to continue$"):
        run(other, lane)
    by_text = {worker.texts: worker for worker in lane_of.made}
    assert by_text[text].starts == starts
    assert by_text[HANG].exit_code() == -signal.SIGTERM


def test_a_refusal_ends_the_run_with_its_one_line(lane_of, jobs):
    lane, other = lane_of(REFUSE), lane_of(HANG)
    lane.add(jobs[0])
    other.add(jobs[1])
    with pytest.raises(InputError, match=r"^no such thing$"):
        run(other, lane)
    assert [worker.exit_code() for worker in lane_of.made if worker.texts == HANG] == [-signal.SIGTERM]


def test_no_process_is_left_when_the_run_is_stopped(lane_of, jobs):
    first, second = lane_of(HANG), lane_of(HANG)
    first.add(jobs[0])
    second.add(jobs[1])
    started = threading.Event()

    def stop() -> None:
        while len(lane_of.made) < 2 or any(worker._process is None for worker in lane_of.made):
            pass
        started.set()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        run(first, second)
    assert started.is_set()
    for worker in lane_of.made:
        assert worker.exit_code() in (-signal.SIGTERM, -signal.SIGKILL)
        wait_until_gone(worker._process.pid)
