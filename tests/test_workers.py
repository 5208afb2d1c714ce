"""`--data-parallel`: GPUs dealt out, workers watched, taken up again and stopped; the output is that of one process."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sizes import sized
from test_generate import settings
from test_orphans import is_alive, wait_until_gone

from expo import journal, locks
from expo.cli import program as cli, work
from expo.config import GenerateConfig
from expo.engines import GENERATORS, EngineSpec
from expo.engines.torch_tools import worker_environments
from expo.errors import EnvironmentFailure, InputError
from expo.parts import all_parts
from expo.rows import EngineKeeper, worker as worker_module, workers
from expo.rows.files import LineCount
from expo.rows.process import LocalProcess
from expo.rows.worker import MAX_STARTS, Worker
from expo.rows.workers import Crew
from expo.verbs import generate as verb


def config(**values) -> GenerateConfig:
    return GenerateConfig(task="alpaca", model="m", **values)


GPUS = ["0", "1", "2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("engine", "count", "values", "gpus", "groups"),
    [
        ("vllm", 8, {}, GPUS, GPUS),
        ("vllm", 2, {}, GPUS, ["0,1,2,3", "4,5,6,7"]),
        ("vllm", 4, {"tensor_parallel": 2}, GPUS, ["0,1", "2,3", "4,5", "6,7"]),
        ("vllm", 2, {"tensor_parallel": 1}, ["GPU-a", "GPU-b", "GPU-c"], ["GPU-a", "GPU-b"]),
        ("transformers", 2, {}, GPUS, ["0", "1"]),
    ],
)
def test_each_worker_has_gpus_of_its_own(engine, count, values, gpus, groups):
    made = worker_environments(engine, GENERATORS[engine], config(**values), count, gpus)
    assert made == [{"CUDA_VISIBLE_DEVICES": group} for group in groups]


@pytest.mark.parametrize(
    ("engine", "values", "gpus", "message"),
    [
        (
            "vllm",
            {"tensor_parallel": 4},
            GPUS[:6],
            "--data-parallel 2 with --tensor-parallel 4 needs 8 GPUs",
        ),
        ("vllm", {}, GPUS[:1], "--data-parallel 2 with --tensor-parallel 1 needs 2 GPUs, and there are 1"),
        ("transformers", {"device": "cuda:1"}, GPUS, "leave out --device"),
        (
            "other",
            {},
            GPUS,
            "--data-parallel works only with engines that run on this machine, and this run uses other",
        ),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(engine, values, gpus, message):
    with pytest.raises(InputError, match=message):
        worker_environments(engine, GENERATORS.get(engine, EngineSpec("")), config(**values), 2, gpus)


@pytest.mark.parametrize("values", [{"device": "cpu"}, {}])
def test_on_a_cpu_workers_share_its_threads(values, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))  # of 64, say
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    made = worker_environments("transformers", GENERATORS["transformers"], config(**values), 3, GPUS if values else [])
    assert made == [{"OMP_NUM_THREADS": "2"}] * 3


def test_lines_of_a_growing_file_are_counted_once(tmp_path):
    path = tmp_path / "journal"
    count = LineCount(path)
    assert count() == 0
    with path.open("w") as stream:
        for text, lines in (("a\nb", 1), ("\n", 2), ("", 2), ("c\nd\n", 4)):
            stream.write(text)
            stream.flush()
            assert count() == lines
    path.write_text("a\n")
    assert count() == 1
    path.unlink()
    assert count() == 1


# --- watching ------------------------------------------------------------------------------------------------------


@pytest.fixture
def crew_of(llama_pair, tmp_path, monkeypatch):
    """Workers that run small programs instead of expo: one text per part, or one per start of it."""
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    prompts = tmp_path / "q.jsonl"
    prompts.write_text('{"prompt": "w1"}\n' * 8)
    whole = verb.plan(settings(llama_pair[1], prompts, tmp_path))
    (tmp_path / "outputs_q" / "dpo.parts").mkdir(parents=True)

    def make(*programs: str | list[str]) -> Crew:
        parts = all_parts(len(programs))
        made = [Program(whole.share(part), texts) for part, texts in zip(parts, programs, strict=True)]
        return Crew(made, [(worker.job, 0) for worker in made])

    return make


class Program(Worker):
    def __init__(self, job, texts: str | list[str]) -> None:
        super().__init__(job, {})
        self._texts = [texts] * 99 if isinstance(texts, str) else texts

    def command(self, jobs: int, replies: int) -> list[str]:
        program = self._texts[self.starts - 1].replace("JOURNAL", repr(str(self.job.files.journal)))
        program = program.replace("REPLIES", str(replies))
        return [sys.executable, "-c", f"import os, sys, time\n{program}"]


DONE = "sys.exit(0)"
HANG = "time.sleep(60)"
KILLED = "os.kill(os.getpid(), 9)"
ROW = "open(JOURNAL, 'a').write('x\\n' * 2); "
REFUSE = "print('talk\\nexpo: error: no such thing', file=sys.stderr); sys.exit(2)"
FAIL = "print('expo: error: the disk is full', file=sys.stderr); sys.exit(1)"


def test_killed_workers_are_taken_up_again(crew_of, caplog):
    with crew_of(DONE, [KILLED, KILLED, "sys.exit(3)"]) as crew:
        crew.watch("generate", 8, 0)
    assert [worker.starts for worker in crew._workers] == [1, 3]


@pytest.mark.parametrize(
    ("program", "starts", "words"),
    [
        (KILLED, MAX_STARTS, "part 1/2: killed by SIGKILL"),
        (FAIL, 1, "part 1/2: the disk is full"),
        (ROW + FAIL, MAX_STARTS, "part 1/2: the disk is full"),
        ("sys.exit(7)", MAX_STARTS, "part 1/2: exit code 7"),
        ("print('one', flush=True); raise ValueError('a bug')", 1, "part 1/2: ValueError: a bug"),
    ],
)
def test_a_part_that_fails_again_and_again_ends_the_run_with_its_last_words(crew_of, program, starts, words):
    """The others are let finish first."""
    with pytest.raises(EnvironmentFailure) as caught, crew_of("time.sleep(0.5)", program) as crew:
        crew.watch("generate", 8, 0)
    assert str(caught.value) == f"{words}; rerun the same command to continue"
    assert [worker.starts for worker in crew._workers] == [1, starts]


def test_a_refusal_ends_all_at_once_with_its_one_line(crew_of):
    with pytest.raises(InputError) as caught, crew_of(HANG, REFUSE, HANG) as crew:
        crew.watch("generate", 8, 0)
    assert str(caught.value) == "no such thing"
    assert [worker.exit_code() for worker in crew._workers] == [-signal.SIGTERM, 2, -signal.SIGTERM]


VLLM_SAYS = """
(EngineCore pid=7) ERROR 11-27 20:01:02 [core.py:857] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-27 20:01:02 [core.py:857]     raise ValueError(
(EngineCore pid=7) ERROR 11-27 20:01:02 [core.py:857] ValueError: No memory is left for the cache.
Traceback (most recent call last):
RuntimeError: another
expo: error: vLLM does not start: Engine core initialization failed. See root cause above. Failed: {} (it)
"""


def test_what_vllm_logged_takes_the_place_of_a_reference_to_it(crew_of):
    words = r"initialization failed\. ValueError: No memory is left for the cache\. Failed: {} \(it\); rerun"
    program = f"print({VLLM_SAYS!r}, file=sys.stderr); sys.exit(1)"
    with pytest.raises(EnvironmentFailure, match=words), crew_of(program) as crew:
        crew.watch("generate", 8, 0)


def test_with_debug_workers_have_it_too_and_their_log_is_shown(crew_of, caplog):
    with crew_of(FAIL) as crew:
        worker = crew._workers[0]
        assert "--debug" not in Worker.command(worker, 3, 4)
        caplog.set_level(logging.DEBUG, "expo")
        assert Worker.command(worker, 3, 4)[:5] == [sys.executable, "-m", "expo", "--debug", "work"]
        with pytest.raises(EnvironmentFailure):
            crew.watch("generate", 8, 0)
    assert "what the process printed last:\nexpo: error: the disk is full\n" in caplog.messages


@pytest.mark.parametrize(("code", "kind"), [(1, EnvironmentFailure), (2, InputError)])
def test_why_a_part_failed_is_known_although_its_process_hangs(crew_of, monkeypatch, code, kind):
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.1)
    says = "print('expo: error: the disk is full', file=sys.stderr, flush=True); "
    hangs = f"os.write(REPLIES, b'{{\"exit_code\": {code}}}\\n'); {HANG}"
    with pytest.raises(kind, match="the disk is full"), crew_of(says + hangs) as crew:
        crew.watch("generate", 8, 0)
    assert crew._workers[0].exit_code() == -signal.SIGKILL


# --- jobs that are handed on ----------------------------------------------------------------------------------------

SERVES = """
def row():
    open(JOURNAL, 'a').write('x\\n' * 9)
for line in os.fdopen(JOBS):
    ACTION
    os.write(REPLIES, b'{"exit_code": 0}\\n')
"""
"""A worker that stays: for each job it does what it is made for, and says that it is done."""


class Elsewhere(LocalProcess):
    """A process as if it ran on another machine: where `lost`, nothing more than that is known at its end."""

    def __init__(self, *words, lost=None, placed=True) -> None:
        super().__init__(*words)
        self.is_placed = placed
        self.holder = locks.holder_of(self.pid)
        self._lost = lost

    @property
    def lost(self) -> str | None:
        return self._lost if self.exit_code() is not None else None


class Staying(Program):
    def __init__(self, action: str, **how) -> None:
        Worker.__init__(self, None, {}, stays=True)
        self._action, self._how, self.done = action, how, []

    def new_process(self, words):
        return Elsewhere(self.command, words, {}, **self._how)

    def start(self) -> None:
        self.done.append(str(self.job.part))
        super().start()

    def command(self, jobs: int, replies: int) -> list[str]:
        program = SERVES.replace("JOURNAL", repr(str(self.job.files.journal))).replace("ACTION", self._action)
        program = program.replace("REPLIES", str(replies)).replace("JOBS", str(jobs))
        return [sys.executable, "-c", f"import os, sys, time\n{program}"]


@pytest.fixture
def staying_crew(crew_of):
    """Workers that stay, each with its part, and further parts that wait."""

    def make(*made: Staying, waiting: int = 0) -> Crew:
        jobs = [worker.job for worker in crew_of(*[DONE] * (len(made) + waiting))._workers]
        for worker, job in zip(made, jobs, strict=False):
            worker.take(job)
        return Crew(made, [(job, 0) for job in jobs])

    return make


def test_whoever_is_free_takes_what_waits(staying_crew):
    one, two = Staying("row()"), Staying("time.sleep(0.2); row()")
    with staying_crew(one, two, waiting=4) as crew:
        crew.watch("generate", 8, 0)
    assert sorted(one.done + two.done) == [f"{number}/6" for number in range(6)]
    assert len(one.done) > len(two.done)


def test_the_job_of_a_lost_machine_is_taken_up_elsewhere(staying_crew, caplog):
    lost, other = Staying(KILLED, lost="its machine is gone"), Staying("row()")
    with staying_crew(lost, other) as crew:
        crew.watch("generate", 8, 0)
    assert "part 0/2: its machine is gone; another process takes it up" in caplog.messages
    assert other.done == ["1/2", "0/2"]


def test_a_job_that_always_loses_its_machine_ends_the_run(staying_crew, monkeypatch):
    monkeypatch.setattr(workers, "MAX_GIVEN_BACK", 2)
    lost = Staying(KILLED, lost="its machine is gone")
    with staying_crew(lost) as crew, pytest.raises(EnvironmentFailure, match="part 0/1: its machine is gone; rerun"):
        crew.watch("generate", 8, 0)
    assert lost.done == ["0/1"] * 3


def test_a_job_for_which_no_machine_has_room_is_taken_by_whoever_is_free(staying_crew):
    nowhere, other = Staying(HANG, placed=False), Staying("row()")
    with staying_crew(nowhere, other) as crew:
        crew.watch("generate", 8, 0)
    assert other.done == ["1/2", "0/2"]
    assert nowhere in crew._idle, "it may find a machine for a later job"


def test_that_nobody_has_room_is_said_once(staying_crew, monkeypatch, caplog):
    monkeypatch.setattr(workers, "ROOM_SECONDS", 0.1)
    nowhere = Staying("time.sleep(0.6); row()", placed=False)
    with staying_crew(nowhere) as crew:
        crew.watch("generate", 8, 0)
    assert caplog.messages.count("no machine has room for a process; waiting until one has") == 1


def test_nothing_is_said_of_room_while_only_a_lock_is_waited_for(staying_crew, monkeypatch, caplog):
    monkeypatch.setattr(workers, "ROOM_SECONDS", 0.0)
    crew, room = staying_crew(Staying("row()")), workers.RoomWatch()
    crew._waiting[0] = replace(crew._waiting[0], is_free=lambda: False)
    for _ in range(3):
        crew.step()
        room.look([crew])
        time.sleep(0.01)
    assert not crew.is_over
    assert caplog.messages == []


def test_the_job_of_a_straggler_is_given_to_one_that_is_free(staying_crew, monkeypatch, caplog):
    monkeypatch.setattr(workers, "STRAGGLER_SECONDS", 0.5)
    slow, other = Staying(HANG), Staying("row()")
    with staying_crew(slow, other) as crew:
        crew.watch("generate", 8, 0)
    assert other.done == ["1/2", "0/2"]
    assert "part 0/2: is far slower than the others (0 of 4 are done); another process takes it up" in caplog.messages


def test_one_that_is_slow_but_soon_done_is_left_alone(staying_crew, monkeypatch):
    monkeypatch.setattr(workers, "STRAGGLER_SECONDS", 30.0)
    slow, other = Staying("time.sleep(1); row()"), Staying("row()")
    with staying_crew(slow, other) as crew:
        crew.watch("generate", 8, 0)
    assert (slow.done, other.done) == (["0/2"], ["1/2"])


def test_a_lost_job_waits_until_its_process_lets_go_or_is_overdue(staying_crew, monkeypatch, tmp_path):
    """A machine that is not heard of may still write for some seconds; its lock says so, until it is known as dead."""
    worker = Staying(KILLED, lost="its machine is gone")
    staying_crew(worker)
    path = worker.job.files.journal
    worker.start()
    while worker.exit_code() is None:
        time.sleep(0.01)
    far_away = replace(worker._process.holder, boot="another", machine="another", nonce="1")
    worker._process.holder = replace(far_away, nonce="")
    lock = path.with_name(path.name + locks.LOCK_SUFFIX)
    for overdue in (False, True):
        locks.create_once(lock, json.dumps(asdict(far_away)))
        monkeypatch.setattr(worker_module, "RELEASE_SECONDS", 0.0 if overdue else 60.0)
        assert worker.release()() is overdue
        assert lock.is_symlink() is not overdue
    locks.create_once(lock, json.dumps(asdict(replace(far_away, pid=1, nonce="2"))))
    assert worker.release()() is False, "another process's lock is not removed"
    lock.unlink()
    assert worker.release()() is True
    with path.open("a") as stream:  # as a file server may hold it
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert worker.release()() is False
    assert worker.release()() is True
    worker.close()


def test_a_process_whose_lock_was_given_to_another_writes_no_more(tmp_path):
    header = {"fingerprint": {"a": 1}}
    with journal.Journal(tmp_path / "j", header) as held:
        held.append([{"row": 1}])
        lock = tmp_path / "j.lock"
        lock.unlink()
        held.append([{"row": 2}])
        locks.create_once(lock, json.dumps(asdict(replace(locks.this_process(), boot="another", nonce="1"))))
        with pytest.raises(EnvironmentFailure, match="another run has taken over"):
            held.append([{"row": 3}])
    assert [row.get("row") for row in journal.read_journal(tmp_path / "j")[1:]] == [1, 2]
    assert lock.is_symlink(), "the other's lock stays"


IGNORES = "import signal; signal.signal(15, signal.SIG_IGN); " + HANG
SPAWNS = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "


@pytest.mark.parametrize("program", [HANG, IGNORES, SPAWNS + HANG])
def test_no_process_is_left_when_the_run_is_stopped(crew_of, program, monkeypatch):
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.3)
    crew = crew_of(program, program)
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), crew:
        crew.watch("generate", 8, 0)
    for worker in crew._workers:
        assert worker.exit_code() in (-signal.SIGTERM, -signal.SIGKILL)
        group = worker._process.pid
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            if in_group(pid, group):  # a grandchild that was killed just now
                wait_until_gone(pid)


def in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


# --- the whole way -------------------------------------------------------------------------------------------------


def test_a_worker_ends_when_the_other_end_of_its_pipe_is_gone(llama_pair, tmp_path):
    """As it is when the process that started it was killed."""
    prompts = tmp_path / "q.jsonl"
    prompts.write_text('{"prompt": "w1"}\n')
    whole = verb.plan(settings(llama_pair[1], prompts, tmp_path, max_tokens=100))
    worker = Worker(whole.share(all_parts(1)[0]), {})
    worker.start()
    worker._process._process.stdin.close()
    worker.wait(60)
    assert worker.exit_code() == 128 + signal.SIGTERM
    worker.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [(InputError("no such thing"), "expo: error: no such thing"), (ValueError("a bug"), "ValueError: a bug")],
)
def test_an_error_is_told_before_the_engine_is_closed(monkeypatch, capfd, error, said):
    jobs, to_jobs = os.pipe()
    replies, to_replies = os.pipe()
    seen: list[str] = []

    def close(_keeper: EngineKeeper) -> None:
        seen.extend((capfd.readouterr().err.splitlines()[-1], os.read(replies, 100).decode()))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(EngineKeeper, "close", close)
    monkeypatch.setattr(work, "_do", fail)
    os.write(to_jobs, b"{}\n")
    code = getattr(error, "exit_code", 1)
    assert cli.run(["work", f"--jobs={jobs}", f"--replies={to_replies}"]) == code
    assert seen == [said, f'{{"exit_code": {code}}}\n']
    os.close(to_jobs)
    os.close(replies)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(trained, alpaca_data, tmp_path, capsys, caplog):
    dataset = alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"
    limit = sized(ci=40, full=120)
    others = {"dataset": str(dataset), "limit": limit, "max_tokens": 32, "batch_tokens": 400, "temperature": 0.7}
    whole = verb.run(settings(trained / "tiny-dpo", "alpaca", tmp_path / "whole", **others)).output.read_bytes()
    arguments = ["generate", "alpaca", "--dataset", dataset, "--model", trained / "tiny-dpo", "--limit", limit]
    arguments += ["--engine", "transformers", "--max-tokens", 32, "--batch-tokens", 400, "--dtype", "float32"]
    arguments += ["--data-parallel", 2, "--output-dir", tmp_path / "out"]
    folder = tmp_path / "out" / "outputs_alpaca"
    journal = folder / "tiny-dpo.parts" / ".1-of-2.journal.jsonl"

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_holder, journal)
        assert cli.run(list(map(str, arguments))) == 0
        killed.result()
    assert "part 1/2: killed by SIGKILL; restarting" in caplog.text
    assert capsys.readouterr().out == f"{folder / 'tiny-dpo.json'}\n"
    assert (folder / "tiny-dpo.json").read_bytes() == whole
    assert sorted(path.name for path in folder.iterdir()) == ["tiny-dpo.json", "tiny-dpo.meta.json"]
    meta = json.loads((folder / "tiny-dpo.meta.json").read_text())
    assert [part["part"] for part in meta["parts"]] == ["0/2", "1/2"]
    assert meta["repeatable"] is True


def kill_holder(journal: Path) -> None:
    """Kill the process that is making a part, when it has made some rows."""
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") <= 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(holder(journal), signal.SIGKILL)


def holder(journal: Path) -> int:
    """The process that is making a part."""
    pid = json.loads(str(journal.with_name(journal.name + ".lock").readlink()))["pid"]
    assert is_alive(pid)
    return int(pid)
