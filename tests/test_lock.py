"""One writer at a time: real processes, killed ones, other machines, and file systems without links."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expo.errors import InputError
from expo.locks import Holder, RunLock, this_process

ME = dataclasses.replace(this_process(), nonce="0123456789abcdef")
ELSEWHERE = dataclasses.replace(ME, host="node7", machine="other", boot="other")
ENDED = dataclasses.replace(ME, born="1")
"""A process whose number belongs to another one by now."""

HOLD = """
import os, signal, sys, time
from pathlib import Path
from expo.locks import RunLock
lock = RunLock(Path(sys.argv[1]), alone_here=True)
print("held", flush=True)
time.sleep(60)
"""


def held_by(path: Path, holder: Holder, *, age_s: float = 0) -> Path:
    """A lock that a process has left or holds."""
    path.symlink_to(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (path.lstat().st_mtime - age_s,) * 2, follow_symlinks=False)
    return path


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["links", "no links"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock's name, on a file system with symbolic links and on one without."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    return tmp_path / "out" / "lock"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()


def test_it_is_held_by_one_and_leaves_nothing(lock: Path) -> None:
    first = RunLock(lock, alone_here=True)
    with pytest.raises(InputError, match=rf"another run \(process {os.getpid()}\) is writing .*/out; wait for it"):
        RunLock(lock, alone_here=True)
    first.beat()
    first.release()
    second = RunLock(lock, alone_here=True)
    first.release()
    assert os.path.lexists(lock), "who does not hold it does not release it"
    second.release()
    assert list(lock.parent.iterdir()) == []


def test_another_process_is_refused_until_the_first_is_killed(lock: Path) -> None:
    process = hold(lock)
    with pytest.raises(InputError, match=f"process {process.pid}"):
        RunLock(lock, alone_here=True)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has asked how: a zombie
    RunLock(lock, alone_here=True).release()
    process.wait()
    RunLock(lock, alone_here=True).release()
    assert list(lock.parent.iterdir()) == []


def test_a_stopped_process_is_not_dead(lock: Path) -> None:
    process = hold(lock)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="another run"):
        RunLock(lock, alone_here=True)
    process.kill()
    process.wait()


def test_a_process_number_that_is_used_again_is_not_the_holder(tmp_path: Path) -> None:
    RunLock(held_by(tmp_path / "out/lock", ENDED), alone_here=False).release()


def test_a_run_on_another_machine_is_never_taken_over(tmp_path: Path) -> None:
    lock = held_by(tmp_path / "out/lock", ELSEWHERE, age_s=3 * 3600 + 61)
    message = rf"process {ME.pid} on 'node7', last active 3:01:0\d ago\) is writing .*; if it is dead, remove {lock}$"
    with pytest.raises(InputError, match=message):
        RunLock(lock, alone_here=True)
    lock.unlink()
    RunLock(lock, alone_here=True).release()


def test_a_sign_of_life_is_the_locks_age(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "out/lock", alone_here=True)
    os.utime(tmp_path / "out/lock", (0, 0), follow_symlinks=False)
    lock.beat()
    assert (tmp_path / "out/lock").lstat().st_mtime > 1e9
    lock.release()


@pytest.mark.parametrize(("age_s", "taken"), [(0, False), (10**9, True)])
def test_after_a_restart_of_the_machine_a_lock_from_before_is_taken_over(
    tmp_path: Path, age_s: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer one belongs to another machine that has the same name."""
    monkeypatch.setattr("expo.locks.this_process", lambda: dataclasses.replace(ME, machine="m"))
    lock = held_by(tmp_path / "out/lock", dataclasses.replace(ME, machine="m", boot="before"), age_s=age_s)
    if taken:
        RunLock(lock, alone_here=True).release()
    else:
        with pytest.raises(InputError, match="if it is dead, remove"):
            RunLock(lock, alone_here=True)


@pytest.mark.parametrize("alone_here", [True, False])
def test_in_another_container_of_this_machine_flock_decides(tmp_path: Path, alone_here: bool) -> None:
    lock = held_by(tmp_path / "out/lock", dataclasses.replace(ME, host="c1", pids="pid:[1]"))
    if alone_here:
        RunLock(lock, alone_here=True).release()
    else:
        with pytest.raises(InputError, match=r"on 'c1'.* if it is dead, remove"):
            RunLock(lock, alone_here=False)


STRANGE: dict[str, Callable[[Path], object]] = {
    "an empty file": Path.touch,
    "a text": lambda lock: lock.write_text("mine"),
    "a link": lambda lock: lock.symlink_to("/etc"),
    "a folder": Path.mkdir,
    "other JSON": lambda lock: lock.write_text('{"pid": 1}'),
    "no texts": lambda lock: lock.write_text(json.dumps({**dataclasses.asdict(ME), "nonce": 5})),
    "a path": lambda lock: lock.write_text(json.dumps({**dataclasses.asdict(ENDED), "nonce": "../../x"})),
    "a terminal's commands": lambda lock: held_by(lock, dataclasses.replace(ELSEWHERE, host="\x1b[2J")),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_no_lock_of_ours_is_respected(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "out/lock")
    with pytest.raises(InputError, match="if it is dead, remove") as caught:
        RunLock(tmp_path / "out/lock", alone_here=True)
    assert str(caught.value).isprintable()
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["lock"]


def test_a_taker_that_was_killed_itself_stops_nobody(tmp_path: Path) -> None:
    lock = held_by(tmp_path / "out/lock", ENDED)
    held_by(tmp_path / f"out/lock.{ENDED.nonce}", dataclasses.replace(ENDED, nonce="fedc"))
    held_by(tmp_path / f"out/lock.{ENDED.nonce}.fedc", dataclasses.replace(ENDED, nonce="ba98"))
    RunLock(lock, alone_here=False).release()
    assert list((tmp_path / "out").iterdir()) == []


RACE = """
import os, random, sys, time
from pathlib import Path
from expo.errors import InputError
from expo.locks import RunLock

folder, seed, rounds, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), 6

def work(number, turn):
    chance = random.Random(f"{seed} {number} {turn}")
    while True:
        try:
            lock = RunLock(folder / "lock", alone_here=False)
        except InputError:
            time.sleep(chance.random() / 2000)
            continue
        try:
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os._exit(1)
        time.sleep(chance.random() / 2000)
        os.unlink(folder / "inside")
        if chance.random() < 0.5:
            os._exit(0)  # without a release, as a killed process
        lock.release()

def start(number, turn):
    child = os.fork()
    if not child:
        work(number, turn)
    return child

children = {start(number, 0): number for number in range(workers)}
codes = []
for turn in range(1, rounds + 1):
    child, status = os.wait()
    codes.append(status)
    children[start(children.pop(child), turn)] = 0
for child in children:
    os.kill(child, 9)
print(sum(code != 0 for code in codes), len(codes))
"""


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    """Six processes at a lock that dies with its holder again and again; `flock` plays no part."""
    (tmp_path / "race").mkdir()
    command = [sys.executable, "-c", RACE, str(tmp_path / "race"), "0", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.fullmatch(r"0 300\n", done.stdout), done.stdout + done.stderr
