"""Journals, atomic files and fingerprints."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from expo.errors import EnvironmentFailure, InputError
from expo.files import json_line, texts_sha256, write_atomic
from expo.journal import Journal, read_journal
from expo.settings import require_same

HEADER = {"fingerprint": {"a": 1}}


def test_a_journal_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        journal.append([{"row": 1}, {"row": 2}])
    with Journal(path, HEADER) as journal:
        assert journal.rows == [{"row": 1}, {"row": 2}]
        journal.append([{"row": 3}])
    assert read_journal(path) == [HEADER, {"row": 1}, {"row": 2}, {"row": 3}]


def test_rows_under_another_fingerprint_are_dropped(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        journal.append([{"row": 1}])
    with Journal(path, {"fingerprint": {"a": 2}}) as journal:
        assert journal.rows == []
    assert read_journal(path) == [{"fingerprint": {"a": 2}}]


def test_a_journal_cut_anywhere_keeps_its_whole_rows_and_can_go_on(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        journal.append([{"text": "θ\n"}, {"text": "b"}])
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(0, whole[:cut].count(b"\n") - 1)
        with Journal(path, HEADER) as journal:
            assert journal.rows == [{"text": "θ\n"}, {"text": "b"}][:kept]
            journal.append([{"text": "new"}])
        assert read_journal(path)[kept + 1 :] == [{"text": "new"}]


def test_the_rows_that_a_journal_is_begun_with_are_all_there_or_none(tmp_path, monkeypatch):
    path, rows, seen = tmp_path / "j", [{"row": row} for row in range(3)], []

    def seeing(call):
        def seen_before(*args):
            seen.append(read_journal(path))
            return call(*args)

        return seen_before

    with Journal(path, HEADER) as journal:
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, seeing(getattr(os, name)))
            journal.begin(rows)
        journal.append([{"row": 3}])
    begun = [{**HEADER, "kept": 3}, *rows]
    assert seen == [[HEADER], [HEADER], begun]
    assert read_journal(path) == [*begun, {"row": 3}]
    with Journal(path, HEADER) as journal:
        assert (journal.rows, journal.kept) == ([*rows, {"row": 3}], 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["j"]


def test_a_journal_that_cannot_be_begun_with_rows_is_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(EnvironmentFailure, match="No space left on device"):
                journal.begin([{"row": 1}])
        journal.append([{"row": 2}])
    assert read_journal(path) == [HEADER, {"row": 2}]


def test_a_journal_is_held_by_its_lock_on_the_file_too_once_it_was_begun_anew(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        journal.begin([{"row": 1}])
        path.with_name("j.lock").unlink()
        with pytest.raises(InputError, match=f"another run is writing {tmp_path}"):
            Journal(path, HEADER)


@pytest.mark.parametrize("successor", [None, "another"])
def test_a_journal_that_ended_before_it_was_locked_is_opened_anew(tmp_path, monkeypatch, successor):
    path, real = tmp_path / "j", fcntl.flock
    left = iter([True])

    def late(stream, kind):
        if next(left, None):
            path.unlink()
            if successor:
                path.write_text("".join(map(json_line, [HEADER, {"row": 1}])))
        real(stream, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(path, HEADER) as journal:
        journal.append([{"row": 2}])
    assert read_journal(path) == [HEADER, *([{"row": 1}] if successor else []), {"row": 2}]


def test_only_one_process_holds_a_journal(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER), pytest.raises(InputError, match="another run is writing"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()


@pytest.mark.parametrize("answer", [None, OSError(errno.ENOLCK, "No locks available")])
def test_only_one_process_holds_a_journal_where_flock_does_nothing(tmp_path, monkeypatch, answer):
    def flock(*_):
        if answer:
            raise answer

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "j"
    with Journal(path, HEADER), pytest.raises(InputError, match=f"another run .*is writing {tmp_path}"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["j"]


def test_a_journal_that_cannot_be_begun_keeps_nobody_out(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentFailure, match="No space left on device"):
            Journal(tmp_path / "j", HEADER)
    assert [entry.name for entry in tmp_path.iterdir()] == ["j"]
    Journal(tmp_path / "j", HEADER).close()


def test_rows_written_before_a_kill_are_there(tmp_path):
    script = (
        "import sys, os, signal; from pathlib import Path; from expo.rows.files import Journal\n"
        "journal = Journal(Path(sys.argv[1]), {'fingerprint': 1}, sync_every_s=60)\n"
        "for row in range(100): journal.append([{'row': row}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "j"])
    assert done.returncode == -signal.SIGKILL
    assert [row["row"] for row in read_journal(tmp_path / "j")[1:]] == list(range(100))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFailure, match="No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_that_cannot_be_written_is_the_environments_fault(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFailure, match=r"writing .*/file/inner failed: Not a directory"):
        write_atomic(tmp_path / "file" / "inner", "x")


def test_new_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@given(st.recursive(st.none() | st.integers() | st.text(st.characters()), lambda inner: st.lists(inner, max_size=3)))
def test_a_json_line_is_one_line_that_reads_back(value):
    line = json_line(value)
    assert line.count("\n") == 1
    assert json.loads(line.encode()) == value


def test_the_setting_that_differs_is_named():
    with pytest.raises(InputError, match=r"out was made with a different max-tokens \(5 then, 6 now\); --overwrite"):
        require_same(Path("out"), {"max_tokens": 5, "n": 1}, {"max_tokens": 6, "n": 1})
    with pytest.raises(InputError, match="a different model;"):
        require_same(Path("out"), {"model": {"size": 1}}, {"model": {"size": 2}})
    require_same(Path("out"), {"a": [1]}, {"a": [1]})


def test_hashes_tell_texts_apart():
    assert texts_sha256(["a", "b"]) != texts_sha256(["a\nb"])
    assert texts_sha256(["a", "b"]) != texts_sha256(["b", "a"])
    assert texts_sha256(iter(["a"])) == texts_sha256(("a",))
