"""What is asked of the disk in advance and in the background."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from expo import disk


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(inode, offset) of everything that is read ahead."""
    calls: list[tuple[int, int]] = []

    def record(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (length, advice) == (disk.AHEAD_STEP_BYTES, os.POSIX_FADV_WILLNEED)
        calls.append((os.fstat(descriptor).st_ino, offset))

    monkeypatch.setattr(os, "posix_fadvise", record)
    return calls


def sparse(path: Path, nbytes: int) -> Path:
    with path.open("wb") as stream:
        stream.truncate(nbytes)
    return path


def read_all_ahead(files: list[Path]) -> None:
    """The body ends when the reader has."""
    with disk.reading_ahead(files):
        for thread in threading.enumerate():
            if thread.name == "read ahead":
                thread.join(30)


def test_files_are_read_ahead_in_order_and_only_so_far(
    tmp_path: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = disk.AHEAD_STEP_BYTES
    monkeypatch.setattr(disk, "MOST_AHEAD_BYTES", 4 * step)
    first, empty, second, third = (
        sparse(tmp_path / name, size) for name, size in (("a", 2 * step + 1), ("e", 0), ("b", 5 * step), ("c", step))
    )
    read_all_ahead([first, tmp_path / "missing", empty, second, third])
    assert asked == [(first.stat().st_ino, n * step) for n in range(3)] + [
        (second.stat().st_ino, n * step) for n in range(2)
    ]


def test_reading_ahead_ends_with_its_body(
    tmp_path: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        begun.set()
        go_on.wait(30)
        asked.append((0, 0))

    monkeypatch.setattr(os, "posix_fadvise", wait)
    with (  # noqa: PT012 - the body is what is tested
        pytest.raises(ValueError, match="the body"),
        disk.reading_ahead([sparse(tmp_path / "a", 9 * disk.AHEAD_STEP_BYTES)]),
    ):
        assert begun.wait(30)
        threading.Timer(0.05, go_on.set).start()
        raise ValueError("the body")
    assert len(asked) == 1, "nothing is asked for after the body has ended"


def test_nothing_is_read_ahead_where_the_system_has_no_such_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[object] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    monkeypatch.delattr(os, "posix_fadvise")
    read_all_ahead([sparse(tmp_path / "a", 1)])
    assert not broken
