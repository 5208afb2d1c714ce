"""Folders that are whole or visibly unfinished, whatever happens and whenever."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash
from helpers import tree

from expo.errors import EnvironmentFailure, InputError
from expo.output.writer import ShardRecord, StagedOutput, finish_interrupted, is_complete

SHARDS = {"model-1.safetensors": b"first" * 100, "model-2.safetensors": b"second" * 100}
TEXTS = {
    "config.json": "{}",
    "model.safetensors.index.json": "{}",
    "README.md": "card",
    "custom/code.py": "x = 1",
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs that would not run after a real one, but closing files."""


def write(folder: Path, made_from: dict[str, object], texts: dict[str, str] = TEXTS) -> None:
    """Write an output as `extrapolate` does: what is recorded is kept, the rest is made."""
    if finish_interrupted(folder, made_from):
        return
    with StagedOutput(folder, made_from, fsync=False) as staged:
        staged.verify()
        for name, content in SHARDS.items():
            if name not in staged.records:
                shard = staged.start_shard(name, content[:10], len(content))
                shard.put(0, 10, memoryview(content)[10:], lambda: None)
                staged.record(ShardRecord(name, len(content), shard.finish(), 1.0, 2.0))
        for name, text in texts.items():
            staged.add_text(name, text)
        manifest = {
            "fingerprint": made_from,
            "files": sorted({*SHARDS, *texts}),
            "shards": {name: {"bytes": len(content)} for name, content in SHARDS.items()},
        }
        staged.add_text("expo.json", json.dumps(manifest))
        staged.commit()


def begin(folder: Path, made_from: dict[str, object], *shards: str, error: BaseException | None = None) -> None:
    """Write some shards and a config, then stop before the commit."""
    with StagedOutput(folder, made_from, fsync=False) as staged:
        for name in shards:
            staged.record(ShardRecord(name, 4, staged.start_shard(name, b"1234", 4).finish(), 0.1, 0.2))
        staged.start_shard("torn", b"12", 4).close()
        staged.add_text("config.json", "new")
        raise error or Killed


ONE, TWO = {"alpha": 1, "dtype": "auto"}, {"alpha": 2, "dtype": "auto"}


def test_a_finished_folder_holds_exactly_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    assert not is_complete(folder, ONE, overwrite=False)
    write(folder, ONE)
    content = tree(folder)
    assert content.keys() == {*SHARDS, *TEXTS, "expo.json"}
    assert all(content[name] == data for name, data in SHARDS.items())
    assert not any(name.startswith(".") for name in os.listdir(folder))
    assert is_complete(folder, ONE, overwrite=False)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_pieces_in_any_order_make_the_same_file(tmp_path: Path, order: tuple[int, ...]) -> None:
    pieces, freed = [b"ab", b"c", b"defg", b"h"], []
    content = b"head" + b"".join(pieces)
    with StagedOutput(tmp_path / "out", ONE) as staged:
        shard = staged.start_shard("a", b"head", len(content))
        for number in order:
            offset = 4 + len(b"".join(pieces[:number]))
            shard.put(number, offset, memoryview(pieces[number]), lambda number=number: freed.append(number))
        assert shard.finish() == xxhash.xxh3_128(content).hexdigest()
        assert (tmp_path / "out" / ".expo-partial" / "a.partial").read_bytes() == content
    assert freed == [0, 1, 2, 3], "in the order of the file"


def test_pieces_from_many_threads(tmp_path: Path) -> None:
    pieces = [bytes([number % 251]) * (1 + number % 7) for number in range(2000)]
    offsets = list(itertools.accumulate(map(len, pieces), initial=0))
    with StagedOutput(tmp_path / "out", ONE) as staged, ThreadPoolExecutor(8) as pool:
        shard = staged.start_shard("a", b"", offsets[-1])
        numbers = random.Random(0).sample(range(2000), 2000)
        list(pool.map(lambda n: shard.put(n, offsets[n], memoryview(pieces[n]), lambda: None), numbers))
        assert shard.finish() == xxhash.xxh3_128(b"".join(pieces)).hexdigest()
        assert (tmp_path / "out" / ".expo-partial" / "a.partial").read_bytes() == b"".join(pieces)


def stop_after(patch: pytest.MonkeyPatch, function: str, count: int, error: type[BaseException]) -> None:
    """Let os.`function` work `count` times on the output's files, then raise."""
    real, calls = getattr(os, function), iter(range(count))

    def limited(*args: object, **options: object) -> object:
        if any("journal" in str(arg) for arg in args) or next(calls, None) is not None:
            return real(*args, **options)
        raise error(5, "stopped here")

    patch.setattr(os, function, limited)


RENAMES = len(SHARDS) + len(TEXTS) + 1


@pytest.mark.parametrize("error", [Killed, OSError])
@pytest.mark.parametrize("count", range(RENAMES))
def test_a_commit_stopped_between_any_two_renames_is_continued(
    tmp_path: Path, count: int, error: type[BaseException]
) -> None:
    write(tmp_path / "whole", ONE)
    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "replace", count, error)
        with pytest.raises(Killed if error is Killed else EnvironmentFailure):
            write(folder, ONE)
    assert (folder / ".expo-partial").is_dir()
    assert not (folder / "config.json").exists(), "config.json is the last to come"
    if (folder / "model.safetensors.index.json").exists():
        assert all((folder / name).exists() for name in SHARDS)
    assert not is_complete(folder, ONE, overwrite=False)
    write(folder, ONE)
    assert tree(folder) == tree(tmp_path / "whole")
    assert is_complete(folder, ONE, overwrite=False)


def test_no_name_is_final_before_all_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        begin(folder, ONE, *SHARDS)
    names = tree(folder)
    assert all(name.startswith(".expo-partial/") for name in names)
    assert not any(name.endswith((".safetensors", ".json")) for name in names)


def test_recorded_shards_are_kept_and_damaged_ones_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        begin(folder, ONE, "a", "b", "c", "d")
    (folder / ".expo-partial" / "b.partial").write_bytes(b"1235")
    (folder / ".expo-partial" / "c.partial").write_bytes(b"123")
    (folder / ".expo-partial" / "d.partial").unlink()
    with StagedOutput(folder, ONE) as staged:
        staged.verify()
        assert list(staged.records) == ["a"]
        assert staged.records["a"] == ShardRecord("a", 4, xxhash.xxh3_128(b"1234").hexdigest(), 0.1, 0.2)
    assert [record.args for record in caplog.records] == [("b",), ("c",), ("d",)]


def test_shards_staged_from_other_weights_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = ({"sft": {"a": number}, "dpo": {"a": "3"}} for number in "12")

    def staged(weights: dict[str, dict[str, str]] | None, *shards: str) -> list[str]:
        with StagedOutput(tmp_path, ONE, weights=weights, fsync=False) as output:
            kept = sorted(output.records)
            for name in shards:
                output.record(ShardRecord(name, 4, output.start_shard(name, b"1234", 4).finish(), 0.1, 0.2))
        return kept

    assert staged(None, "a", "b") == []
    assert staged(None) == ["a", "b"]
    assert staged(old, "a", "b") == []
    assert staged(old) == ["a", "b"]
    assert len(caplog.messages) == 1
    assert staged(new, "a") == []
    assert staged(None) == staged(new) == ["a"]
    assert len(caplog.messages) == 2
    assert caplog.messages[1].endswith("may come from other weights; rebuilding them")


def test_a_torn_last_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Killed):
        begin(folder, ONE, "a")
    journal = folder / ".expo-partial" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"shard": "b", "nby')
    with StagedOutput(folder, ONE) as staged:
        assert list(staged.records) == ["a"]
        assert journal.read_bytes() == whole


def test_an_input_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        begin(tmp_path / "a" / "b" / "out", ONE, "x", error=InputError("NaN"))
    assert list(tmp_path.iterdir()) == []


def test_an_input_error_leaves_the_old_output_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, ONE)
    before = tree(folder)
    with pytest.raises(InputError):
        begin(folder, TWO, "model-1.safetensors", error=InputError("NaN"))
    assert tree(folder) == before
    assert is_complete(folder, ONE, overwrite=False)


# --- other settings, other people's files -----------------------------------------------------------------------


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, ONE)
    with pytest.raises(InputError, match=r"a different alpha \(1 then, 2 now\)"):
        is_complete(tmp_path, TWO, overwrite=False)
    with pytest.raises(InputError, match=r"a different dtype \('auto' then, 'float32' now\)"):
        is_complete(tmp_path, {**ONE, "dtype": "float32"}, overwrite=False)
    assert not is_complete(tmp_path, TWO, overwrite=True)


def test_other_settings_are_refused_for_unfinished_outputs_too(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        begin(tmp_path, ONE, "a")
    with pytest.raises(InputError, match="a different alpha"):
        is_complete(tmp_path, TWO, overwrite=False)
    assert not is_complete(tmp_path, TWO, overwrite=True)
    with StagedOutput(tmp_path, TWO) as staged:
        assert staged.records == {}


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "model-9.safetensors", ".hidden"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_folders_with_other_contents_are_refused(tmp_path: Path, name: str, overwrite: bool, finished: bool) -> None:
    if finished:
        write(tmp_path, ONE)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="contains files expo did not write") as caught:
        is_complete(tmp_path, TWO, overwrite=overwrite)
    assert name in str(caught.value)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_manifest_says_what_to_do(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "expo.json").write_text("{")
    with pytest.raises(InputError, match=r"expo\.json is not valid JSON.*: remove .*, or choose another"):
        is_complete(tmp_path, {}, overwrite=overwrite)


def test_somebody_elses_expo_json_is_not_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "expo.json").write_text('{"expo": {"name": "a mobile app"}}')
    with pytest.raises(InputError, match=r"did not write \(expo\.json\)"):
        is_complete(tmp_path, ONE, overwrite=True)


def test_the_output_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        is_complete(tmp_path / "out", ONE, overwrite=True)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", Path.unlink),
        ("model-2.safetensors", Path.unlink),
        ("model-2.safetensors", lambda file: os.truncate(file, 3)),
    ],
)
def test_a_finished_output_that_lost_something_is_not_complete(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write(tmp_path, ONE)
    damage(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} is missing or damaged; --overwrite"):
        is_complete(tmp_path, ONE, overwrite=False)
    assert not is_complete(tmp_path, ONE, overwrite=True)
    write(tmp_path, ONE)
    assert is_complete(tmp_path, ONE, overwrite=False)


def test_weights_are_compared_by_their_checksums_where_those_are_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, ONE)
    manifest = json.loads((tmp_path / "expo.json").read_text())
    for name, content in SHARDS.items():
        manifest["shards"][name]["xxh3"] = xxhash.xxh3_128_hexdigest(content)
    (tmp_path / "expo.json").write_text(json.dumps(manifest))
    weights = {"sft": {"a": "1"}, "dpo": {"a": "2"}}
    assert is_complete(tmp_path, ONE, overwrite=False, weights=weights)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        f"only sizes and times of {side} are compared" for side in weights
    ]
    manifest["sources"] = {side: {"xxh3": files} for side, files in weights.items()}
    (tmp_path / "expo.json").write_text(json.dumps(manifest))
    assert is_complete(tmp_path, ONE, overwrite=False, weights=weights)
    other = {**weights, "dpo": {"a": "3"}}
    with pytest.raises(InputError, match=r"different weights of dpo \(a has a different checksum\); --overwrite"):
        is_complete(tmp_path, ONE, overwrite=False, weights=other)
    assert not is_complete(tmp_path, ONE, overwrite=True, weights=other)
    for odd in ([], {"sft": None, "dpo": {"xxh3": ["a"]}}):
        (tmp_path / "expo.json").write_text(json.dumps({**manifest, "sources": odd}))
        assert is_complete(tmp_path, ONE, overwrite=False, weights=weights)
    damaged = tmp_path / "model-2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert is_complete(tmp_path, ONE, overwrite=False)
    with pytest.raises(InputError, match=r"model-2.safetensors is missing or damaged; --overwrite"):
        is_complete(tmp_path, ONE, overwrite=False, weights=weights)


# --- overwriting ------------------------------------------------------------------------------------------------


def test_overwriting_removes_the_old_files_and_only_those(tmp_path: Path) -> None:
    write(tmp_path, ONE, {**TEXTS, "only_in_one.txt": "1"})
    write(tmp_path, TWO)
    assert tree(tmp_path).keys() == {*SHARDS, *TEXTS, "expo.json"}
    assert is_complete(tmp_path, TWO, overwrite=False)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    folder, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_text("mine")
    write(folder, ONE)
    manifest = json.loads((folder / "expo.json").read_text())
    manifest["files"] += ["../precious", str(precious)]
    (folder / "expo.json").write_text(json.dumps(manifest))
    write(folder, TWO)
    assert precious.read_text() == "mine"
    assert is_complete(folder, TWO, overwrite=False)


def test_the_old_output_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    write(tmp_path, ONE)
    before = tree(tmp_path)
    with pytest.raises(Killed):
        begin(tmp_path, TWO, *SHARDS)
    now = {name: data for name, data in tree(tmp_path).items() if not name.startswith(".expo-partial")}
    assert now == before


@pytest.mark.parametrize("function", ["replace", "unlink"])
@pytest.mark.parametrize("count", range(RENAMES))
def test_overwriting_stopped_anywhere_is_continued(tmp_path: Path, function: str, count: int) -> None:
    write(tmp_path / "whole", TWO)
    folder = tmp_path / "out"
    write(folder, ONE, {**TEXTS, "only_in_one.txt": "1"})
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, function, count, Killed)
        with pytest.raises(Killed):
            write(folder, TWO)
    assert not (folder / "config.json").exists() or (function, count) == ("unlink", 0)
    assert not is_complete(folder, TWO, overwrite=False)
    write(folder, TWO)
    assert tree(folder) == tree(tmp_path / "whole")


@pytest.mark.parametrize("count", [0, 3, 6])
def test_a_third_setting_after_a_stopped_overwrite_leaves_no_remains(tmp_path: Path, count: int) -> None:
    three = {"alpha": 3, "dtype": "auto"}
    folder = tmp_path / "out"
    write(folder, ONE, {**TEXTS, "only_in_one.txt": "1"})
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "replace", count, Killed)
        with pytest.raises(Killed):
            write(folder, TWO, {**TEXTS, "only_in_two.txt": "2"})
    assert not is_complete(folder, three, overwrite=True)
    write(folder, three)
    assert tree(folder).keys() == {*SHARDS, *TEXTS, "expo.json"}


# --- two runs at once -------------------------------------------------------------------------------------------


def test_a_second_run_is_kept_out_and_harms_nothing(tmp_path: Path) -> None:
    with StagedOutput(tmp_path, ONE) as staged:
        staged.record(ShardRecord("a", 4, staged.start_shard("a", b"1234", 4).finish(), 0.1, 0.2))
        with pytest.raises(InputError, match="another run is writing"):
            StagedOutput(tmp_path, ONE)
        assert (tmp_path / ".expo-partial" / "a.partial").exists()


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    source = tmp_path / "source"
    source.write_text("x")
    source.chmod(0o400)
    old = os.umask(umask)
    try:
        with StagedOutput(tmp_path / "out", ONE) as staged:
            staged.add_copy("side.txt", source)
            staged.add_text("sub/config.json", "{}")
            staged.record(ShardRecord("a", 4, staged.start_shard("a", b"1234", 4).finish(), 0.1, 0.2))
            staged.commit()
    finally:
        os.umask(old)
    out = tmp_path / "out"
    modes = {str(path.relative_to(out)): path.stat().st_mode & 0o777 for path in out.rglob("*")}
    assert modes == {"side.txt": file_mode, "a": file_mode, "sub": folder_mode, "sub/config.json": file_mode}
    assert out.stat().st_mode & 0o777 == folder_mode


def test_a_folder_that_cannot_be_written_is_the_environments_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="cannot write to"):
        StagedOutput(tmp_path / "file" / "out", ONE)
