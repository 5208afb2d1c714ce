"""Whatever happens to a run of `expo extrapolate`: inputs stay, nothing unfinished loads, the rerun ends the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import (
    Pair,
    Result,
    environment,
    mounted,
    random_pair,
    tree,
    without_clock,
    write,
    write_checkpoint,
)
from sizes import in_full, sized

from expo.errors import EnvironmentFailure

CRASHES = Path(__file__).with_name("crashes.py")
WITH_FLOCK = """
import os, signal
from expo.cli.program import main
from expo.output.shard import StagedShard

staged, shards = StagedShard.finish, iter(range(100))

def finish(shard):
    if next(shards) == 5:
        os.kill(os.getpid(), signal.SIGSTOP)
    return staged(shard)

StagedShard.finish = finish
main()
"""
"""The program, which stops itself in its sixth shard."""
NO_FLOCK = "import fcntl; fcntl.flock = lambda *_: None\n" + WITH_FLOCK


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair of 24 MB, DPO in 40 shards."""
    folder = tmp_path_factory.mktemp("large")
    sft, dpo = random_pair({f"layer.{number}": (300_001,) for number in range(40)})
    return (
        write_checkpoint(folder / "sft", sft, shards=3),
        write_checkpoint(folder / "dpo", dpo, shards=40, files={"tokenizer.json": "{}", "custom/model.py": "x = 1\n"}),
    )


def crash(kind: str, pair: Pair, folder: Path, *rest: int) -> list[dict[str, object]]:
    """Run `crashes.py`; all its results, which are shown where one is wrong."""
    command = [sys.executable, str(CRASHES), kind, *map(str, (*pair, folder, *rest))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    report = "\n".join([" ".join(command), *done.stdout.splitlines(), done.stderr])
    assert done.returncode == 0, report
    assert [result["trouble"] for result in results if result["trouble"]] == [], report
    return results


def times(folder: Path) -> list[tuple[str, int]]:
    return [(str(file), file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))]


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigkill_at_random_moments(large: Pair, tmp_path: Path) -> None:
    """After about half of them the run is done again to its end; after the others it is killed again."""
    before = [(tree(side), times(side)) for side in large]
    kills = sized(ci=6, full=20)
    results = crash("moments", large, tmp_path, 20_240_601, kills)
    assert Counter(result["code"] for result in results)[-signal.SIGKILL] == kills
    assert "writing" in {result["phase"] for result in results}, results
    assert [(tree(side), times(side)) for side in large] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "over_another", [in_full(False, id="into nothing"), pytest.param(True, id="over another output")]
)
def test_the_end_before_each_change_to_the_disk(pair: Pair, tmp_path: Path, over_another: bool) -> None:
    before = [(tree(side), times(side)) for side in pair]
    stride = sized(ci=3, full=1)
    results = crash("steps", pair, tmp_path, int(over_another), stride)
    assert {"begun", "writing", "renaming", "done"} <= {str(result["phase"]) for result in results}
    assert {result["code"] for result in results[:-1]} == {9}
    assert len(results) * stride > 40
    assert [(tree(side), times(side)) for side in pair] == before


# --- two at once ----------------------------------------------------------------------------------------------------


def paused(pair: Pair, output: Path, program: str) -> subprocess.Popen[str]:
    """A run in a process of its own, stopped in the middle of its work."""
    command = [sys.executable, "-c", program, "extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", "0.3"]
    process = subprocess.Popen([*command, "--output", output], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not all(map(is_stopped, Path(f"/proc/{process.pid}/task").iterdir())):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    assert len(list(output.glob(".expo-partial/*.partial"))) >= 5
    return process


def is_stopped(thread: Path) -> bool:
    """A thread stops when it comes out of the kernel: a write that has begun is ended first."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.slow
@pytest.mark.parametrize("program", [WITH_FLOCK, NO_FLOCK], ids=["flock", "no flock"])
def test_of_two_runs_at_once_the_second_is_refused(
    large: Pair, tmp_path: Path, program: str, expo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    if program == NO_FLOCK:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first = paused(large, tmp_path / "out", program)
    before = tree(tmp_path / "out")
    second = expo(large, "--alpha", "0.3", "--output", tmp_path / "out")
    assert (second.code, second.stdout) == (2, "")
    assert second.stderr.startswith("expo: error: another run ")
    assert second.stderr.endswith(
        "is writing " + f"{tmp_path}/out/.expo-partial; wait for it, or choose another output\n"
    )
    assert tree(tmp_path / "out") == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0, first.communicate()
    again = expo(large, "--alpha", "0.3", "--output", tmp_path / "out")
    assert (again.code, again.stderr) == (0, "")
    write(large, tmp_path / "whole", 0.3)
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_keeps_nobody_out(large: Pair, tmp_path: Path, stop: int) -> None:
    process = paused(large, tmp_path / "out", NO_FLOCK)
    process.send_signal(stop)
    process.send_signal(signal.SIGCONT)
    process.wait(60)
    lock = tmp_path / "out" / ".expo-partial" / "journal.jsonl.lock"
    assert os.path.lexists(lock) == (stop == signal.SIGKILL)
    write(large, tmp_path / "out", 0.3)
    assert not (tmp_path / "out" / ".expo-partial").exists()


def test_a_run_on_another_machine_is_respected_and_named(
    pair: Pair, tmp_path: Path, expo: Callable[..., Result]
) -> None:
    staging = tmp_path / "out" / ".expo-partial"
    staging.mkdir(parents=True)
    other = {"host": "node7", "machine": "m", "boot": "b", "pids": "", "pid": 7, "born": "1", "nonce": "abc"}
    (staging / "journal.jsonl.lock").symlink_to(json.dumps(other))
    refused = expo(pair, "--alpha", "0.3", "--output", tmp_path / "out")
    assert refused.code == 2
    assert "(process 7 on 'node7', last active 0:00:0" in refused.stderr
    assert f"if it is dead, remove {staging}/journal.jsonl.lock" in refused.stderr
    (staging / "journal.jsonl.lock").unlink()
    assert expo(pair, "--alpha", "0.3", "--output", tmp_path / "out").code == 0


def test_a_failed_run_keeps_nobody_out_of_the_same_process(pair: Pair, tmp_path: Path) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("pwrite", "fsync"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises((EnvironmentFailure, OSError), match="Input/output error"):
                write(pair, tmp_path / "out", fsync=True)
    write(pair, tmp_path / "out")


# --- inputs that change ---------------------------------------------------------------------------------------------


@pytest.fixture
def at_first_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let something happen to the inputs when the first weights have been read."""

    def arrange(action: Callable[[], object]) -> None:
        real, todo = os.preadv, [action]

        def preadv(*args: object) -> int:
            count = real(*args)  # type: ignore[arg-type]
            if todo:
                todo.pop()()
            return count

        monkeypatch.setattr(os, "preadv", preadv)

    return arrange


@pytest.mark.parametrize("side", ["sft", "dpo"])
def test_an_input_that_shrinks_during_the_run(
    large: Pair, tmp_path: Path, side: str, at_first_read: Callable[..., None], expo: Callable[..., Result]
) -> None:
    folders = {}
    for one in large:
        folders[one.name] = tmp_path / one.name
        shutil.copytree(one, tmp_path / one.name)
    victim = max(folders[side].glob("*.safetensors"))
    at_first_read(lambda: os.truncate(victim, 2000))
    result = expo(tuple(folders.values()), "--alpha", "0.3", "--output", tmp_path / "out")
    assert (result.code, len(result.stderr.splitlines())) == (1, 1)
    assert f"{victim} became shorter while it was read" in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    again = expo(tuple(folders.values()), "--alpha", "0.3", "--output", tmp_path / "out")
    assert again.code == 2
    assert "is truncated" in again.stderr or f"a different {side}" in again.stderr
    shutil.copy2(large[side == "dpo"] / victim.name, victim)
    assert expo(tuple(folders.values()), "--alpha", "0.3", "--output", tmp_path / "out").code == 0
    write(large, tmp_path / "whole", 0.3)
    for name, data in tree(tmp_path / "whole").items():
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == data


@pytest.mark.parametrize("side", ["sft", "dpo"])
def test_an_input_that_changes_during_the_run(
    pair: Pair, tmp_path: Path, side: str, at_first_read: Callable[..., None], expo: Callable[..., Result]
) -> None:
    victim = max((tmp_path / side).glob("*.safetensors"))

    def change() -> None:
        content = victim.read_bytes()
        time.sleep(0.02)  # file times are as coarse as the kernel's tick
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    at_first_read(change)
    result = expo(pair, "--alpha", "0.3", "--output", tmp_path / "out")
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert f"{tmp_path / side} changed while it was read; rerun the command" in result.stderr
    assert not (tmp_path / "out").exists()
    assert expo(pair, "--alpha", "0.3", "--output", tmp_path / "out").code == 0


# --- what cannot be read or written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft/model.safetensors", "dpo/config.json", "dpo/tokenizer.json"])
def test_a_file_that_may_not_be_read(
    pair: Pair, tmp_path: Path, name: str, expo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may read everything, so the kernel's answer is made up."""
    real = os.open

    def deny(path: object, *args: object, **named: object) -> int:
        if str(path) == str(tmp_path / name):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", deny)
    result = expo(pair, "--alpha", "0.3", "--output", tmp_path / "out")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"expo: error: {tmp_path / name} cannot be read: Permission denied\n"


@pytest.mark.parametrize("folder", ["sft", "dpo/custom"])
def test_a_folder_that_may_not_be_read(
    pair: Pair, tmp_path: Path, folder: str, expo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(real: Callable[[object], object]) -> Callable[[object], object]:
        def deny(path: object = ".") -> object:
            if str(path) == str(tmp_path / folder):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path)

        return deny

    monkeypatch.setattr(os, "listdir", denied(os.listdir))
    monkeypatch.setattr(os, "scandir", denied(os.scandir))  # by which pathlib lists since Python 3.13
    result = expo(pair, "--alpha", "0.3", "--output", tmp_path / "out")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"expo: error: {tmp_path / folder} cannot be read: Permission denied\n"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot be written."""
    with mounted(tmp_path / "disk", "ro,size=1m") as folder:
        yield folder


def test_an_unwritable_folder(pair: Pair, read_only: Path, expo: Callable[..., Result]) -> None:
    result = expo(pair, "--alpha", "0.3", "--output", read_only / "out")
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr == f"expo: error: cannot write to {read_only}/out: Read-only file system\n"


# --- what an earlier run left ---------------------------------------------------------------------------------------

JOURNALS: dict[str, Callable[[list[str]], list[str]]] = {
    "a torn last line": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "a line of nonsense": lambda lines: [lines[0], "\0\0\0\n", *lines[1:]],
    "a line that is no record": lambda lines: [lines[0], '{"shard": "x"}\n', *lines[1:]],
    "no header": lambda lines: lines[1:],
    "nothing": lambda lines: [],
}


@pytest.mark.parametrize("case", JOURNALS)
def test_a_damaged_journal_costs_time_and_nothing_else(pair: Pair, tmp_path: Path, case: str) -> None:
    write(pair, tmp_path / "whole")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(EnvironmentFailure):
            write(pair, tmp_path / "out")
    journal = tmp_path / "out" / ".expo-partial" / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines(keepends=True) if '"commit"' not in line]
    assert len(lines) > 2
    journal.write_text("".join(JOURNALS[case](lines)))
    write(pair, tmp_path / "out")
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "whole"))


def test_a_lock_that_cannot_be_made_is_the_environments_fault(pair: Pair, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "symlink_to", full)
        with pytest.raises(EnvironmentFailure, match=r"cannot write to .*/out: No space left on device"):
            write(pair, tmp_path / "out")
    write(pair, tmp_path / "out")
