"""`expo extrapolate` in parts: what is joined is what one run writes, and no part harms another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import Fork
from helpers import (
    Killed,
    Pair,
    Result,
    random_pair,
    stopped_in_shard,
    tree,
    without_clock,
    write,
    write_checkpoint,
)
from hypothesis import given, settings as hypothesis_settings, strategies as st

from expo.errors import InputError
from expo.journal import Journal
from expo.output.parts import share
from expo.parts import all_parts
from expo.theta.plan import ShardPlan
from expo.verbs.extrapolate import Extrapolated

SHARDS = 5


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A pair whose DPO side has five files."""
    sides = random_pair({f"layer.{number}.weight": (7 + number, 5) for number in range(8)})
    return write_checkpoint(tmp_path / "sft", sides[0], shards=2), write_checkpoint(
        tmp_path / "dpo", sides[1], shards=SHARDS
    )


def parts_folder(output: Path, part: str) -> Path:
    return output / ".expo-partial" / part.replace("/", "-of-")


def make(pair: Pair, output: Path, count: int, *alphas: float, **settings: object) -> Extrapolated:
    """All parts, in whatever order, and the join."""
    for part in reversed(all_parts(count)):
        write(pair, output, *alphas, part=str(part), **settings)
    return write(pair, output, *alphas, join=count, **settings)


# --- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, SHARDS, SHARDS + 2])
def test_what_is_joined_is_what_one_run_writes(pair: Pair, tmp_path: Path, count: int) -> None:
    whole = write(pair, tmp_path / "whole-{alpha}", 0.3, 0.0, -1.0)
    joined = make(pair, tmp_path / "joined-{alpha}", count, 0.3, 0.0, -1.0)
    for one, other in zip(whole, joined, strict=True):
        assert other.status == "written"
        assert without_clock(tree(one.path)) == without_clock(tree(other.path))
    again = write(pair, tmp_path / "joined-{alpha}", 0.3, 0.0, -1.0, join=count)
    assert [one.status for one in again] == ["already complete"] * 3
    assert [one.status for one in write(pair, tmp_path / "joined-{alpha}", 0.3, 0.0, -1.0)] == ["already complete"] * 3


def test_the_manifest_says_when_each_part_was_made(pair: Pair, tmp_path: Path) -> None:
    make(pair, tmp_path / "out", 2)
    clock = json.loads((tmp_path / "out" / "expo.json").read_text())["clock"]
    assert [one["part"] for one in clock["parts"]] == ["0/2", "1/2"]
    assert clock["combine_seconds"] == max(one["combine_seconds"] for one in clock["parts"])
    assert clock["started"] == min(one["started"] for one in clock["parts"])
    assert clock["join_seconds"] >= 0


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), count=st.integers(1, 12))
@hypothesis_settings(deadline=None)
def test_every_shard_is_in_one_part_and_parts_are_of_like_size(sizes: list[int], count: int) -> None:
    shards = [ShardPlan(f"s{number}", b"", (), size) for number, size in enumerate(sizes)]
    shares = [share(shards, part) for part in all_parts(count)]
    assert sorted(shard.name for one in shares for shard in one) == sorted(shard.name for shard in shards)
    loads = [sum(shard.nbytes for shard in one) for one in shares]
    assert max(loads) - min(loads) <= max(sizes), "the largest first, to whom has least"


def test_a_part_has_nothing_but_its_shards_and_no_final_name(pair: Pair, tmp_path: Path) -> None:
    (written,) = write(pair, tmp_path / "out", part="0/2")
    assert (written.status, written.part) == ("written", "0/2")
    names = sorted(tree(tmp_path / "out"))
    assert all(name.startswith(".expo-partial/0-of-2/") for name in names)
    assert len(names) == 1 + 3  # the journal, and its share of five shards
    (again,) = write(pair, tmp_path / "out", part="0/2")
    assert again.status == "already complete"


def test_parts_of_a_resharded_output_in_another_dtype(pair: Pair, tmp_path: Path) -> None:
    how = {"max_shard_size": "200B", "dtype": "float32", "exclude": ("^layer.0",), "alpha_for": ("layer.1=2",)}
    write(pair, tmp_path / "whole", **how)
    make(pair, tmp_path / "joined", 3, **how)
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(tmp_path / "joined"))


# --- kills and faults -----------------------------------------------------------------------------------------------


def test_a_stopped_part_goes_on_by_shard_and_the_others_are_left_alone(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "whole")
    output = tmp_path / "out"
    write(pair, output, part="1/2")
    other = tree(parts_folder(output, "1/2"))
    with stopped_in_shard(1):
        write(pair, output, part="0/2")
    with pytest.raises(InputError, match=r"1 of 2 parts .*: 0/2 \(unfinished, 1 shards\); to make one"):
        write(pair, output, join=2)
    done = next(parts_folder(output, "0/2").glob("*.partial"))
    before = done.stat().st_mtime_ns
    write(pair, output, part="0/2")
    assert done.stat().st_mtime_ns == before, "a complete shard is not made again"
    assert tree(parts_folder(output, "1/2")) == other
    write(pair, output, join=2)
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))


RENAMES = SHARDS + 4
"""The shards, card, manifest, index and config."""


@pytest.mark.parametrize("count", range(RENAMES))
def test_a_join_stopped_between_any_two_renames_is_continued(pair: Pair, tmp_path: Path, count: int) -> None:
    write(pair, tmp_path / "whole")
    output, calls = tmp_path / "out", iter(range(count))
    for part in all_parts(2):
        write(pair, output, part=str(part))
    real = os.replace

    def stopping(*names: object) -> object:
        if next(calls, None) is None:
            raise Killed
        return real(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(Killed):
            write(pair, output, join=2)
    assert not (output / "config.json").exists()
    (written,) = write(pair, output, **({"join": 2} if count % 2 else {"part": "0/2"}))
    assert written.status == "already complete"
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))


def test_a_damaged_shard_is_found_by_its_checksum_and_made_again(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "whole")
    output = tmp_path / "out"
    for part in all_parts(2):
        write(pair, output, part=str(part))
    file = sorted(parts_folder(output, "1/2").glob("*.safetensors.partial"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"1/2 \(damaged, .* has a different checksum\)"):
        write(pair, output, join=2)
    with pytest.raises(InputError, match=r"1/2 \(damaged, .* is missing\)"):
        write(pair, output, join=2)
    assert write(pair, output, part="0/2")[0].status == "already complete"
    assert write(pair, output, part="1/2")[0].status == "written"
    write(pair, output, join=2)
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))


def test_a_part_that_is_refused_takes_nothing_of_the_others_with_it(pair: Pair, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    output = tmp_path / "out"
    file = sorted(pair[1].glob("model-*.safetensors"))[-1]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    states = []
    for part in all_parts(SHARDS):
        try:
            states.append(write(pair, output, part=str(part))[0].status)
        except InputError as error:
            assert "finite" in str(error)  # noqa: PT017 - of one part only
            states.append("refused")
    assert sorted(states) == ["refused"] + ["written"] * (SHARDS - 1)
    assert len(list((output / ".expo-partial").iterdir())) == SHARDS - 1


def test_a_part_that_is_still_running_is_not_joined(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for part in all_parts(2):
        write(pair, output, part=str(part))
    journal = parts_folder(output, "1/2") / "journal.jsonl"
    header = json.loads(journal.read_text().splitlines()[0])
    with (
        Journal(journal, header),
        pytest.raises(InputError, match=r"1 of 2 parts cannot be joined yet: 1/2 \(still running\)"),
    ):
        write(pair, output, join=2)
    assert write(pair, output, join=2)[0].status == "written"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_another_number_of_parts_is_refused(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(pair, output, part="0/2")
    for other in ({"part": "0/3"}, {"join": 3}, {}, {"data_parallel": 3}):
        with pytest.raises(InputError, match=r"has parts of 2.*--part i/2 .* and --join 2, or start over with"):
            write(pair, output, **other)
    assert write(pair, output, overwrite=True)[0].status == "written"
    assert not (output / ".expo-partial").exists()


def test_parts_of_other_settings_are_refused_and_replaced(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(pair, output, part="0/2")
    for way in ({"part": "0/2"}, {"join": 2}):
        with pytest.raises(InputError, match="made with a different dtype"):
            write(pair, output, dtype="float32", **way)
    write(pair, output, part="0/2", dtype="float32", overwrite=True)
    write(pair, output, part="1/2", dtype="float32", overwrite=True)
    write(pair, output, join=2, dtype="float32")
    write(pair, tmp_path / "whole", dtype="float32")
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))


def test_an_output_of_other_settings_stays_until_the_join(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(pair, output, 0.1)
    before = tree(output)
    with pytest.raises(InputError, match="made with a different alpha"):
        write(pair, output, 0.2, part="0/2")
    for part in all_parts(2):
        write(pair, output, 0.2, part=str(part), overwrite=True)
    assert {name: content for name, content in tree(output).items() if not name.startswith(".expo")} == before
    write(pair, output, 0.2, join=2, overwrite=True)
    write(pair, tmp_path / "whole", 0.2)
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"part": "2/2"}, "parts are counted from 0"),
        ({"part": "x"}, "--part must be i/N"),
        ({"join": 0}, "--join must be 1 to"),
        ({"part": "0/2", "join": 2}, "--part and --join cannot be combined"),
        ({"data_parallel": 2, "join": 2}, "--data-parallel makes and joins the parts itself"),
    ],
)
def test_what_makes_no_sense_is_refused(pair: Pair, tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        write(pair, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_nothing_to_join(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 2 parts .*: 0/2 \(not started\), 1/2 \(not started\)"):
        write(pair, tmp_path / "out", join=2)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_which_parts_are_to_be_made(pair: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    output = tmp_path / "out"
    write(pair, output, part="1/4")
    words = ("--alpha", "0.5", "--output", output, "--join", "4", "--dry-run", "--json")
    said = json.loads(expo(pair, *words).stdout)
    states = ["not started", "finished", "not started", "not started"]
    assert [one["state"] for one in said["parts"]] == states
    assert (said["parts_to_make"], said["joined"]) == ("0,2-3", False)
    for part in ("0/4", "2/4", "3/4"):
        write(pair, output, part=part)
    assert json.loads(expo(pair, *words).stdout)["parts_to_make"] == ""
    write(pair, output, join=4)
    said = json.loads(expo(pair, *words).stdout)
    assert (said["parts_to_make"], said["joined"]) == ("", True)


def test_parts_made_without_verify_are_not_joined_with_it(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for part in all_parts(2):
        write(pair, output, part=str(part), verify=part.index == 0)
    with pytest.raises(InputError, match=r"1 of 2 parts .*: 1/2 \(made without --verify\)"):
        write(pair, output, join=2, verify=True)
    write(pair, output, part="1/2", verify=True)
    write(pair, output, join=2, verify=True)
    write(pair, tmp_path / "whole", verify=True)
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))


def test_what_a_part_staged_before_other_weights_were_found_is_not_joined(pair: Pair, tmp_path: Path) -> None:
    """A finished part that is begun again with --verify, and killed, is not finished with it."""
    output = tmp_path / "out"
    for part in all_parts(2):
        write(pair, output, part=str(part), verify=part.index == 1)
    with stopped_in_shard(0):
        write(pair, output, part="0/2", verify=True)
    for verify in (True, False):
        with pytest.raises(InputError, match=r"1 of 2 parts .*: 0/2 \(unfinished, 0 shards\)"):
            write(pair, output, join=2, verify=verify)


def test_a_shard_that_no_part_recorded_is_noticed(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for part in all_parts(2):
        write(pair, output, part=str(part))
    journal = parts_folder(output, "1/2") / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"1 of 2 parts .*: 1/2 \(damaged, \d of \d shards are recorded\)"):
        write(pair, output, join=2)
    assert not (output / "config.json").exists()
    assert write(pair, output, part="1/2")[0].status == "written"
    assert write(pair, output, join=2)[0].status == "written"


def test_equal_sides_are_refused_when_they_are_joined(pair: Pair, tmp_path: Path) -> None:
    same = pair[1], pair[1].parent / "copy"
    write_checkpoint(same[1], {"w": torch.ones(4)}, shards=1)
    write_checkpoint(tmp_path / "twin", {"w": torch.ones(4)}, shards=1)
    sides = same[1], tmp_path / "twin"
    write(sides, tmp_path / "out", part="0/1")
    with pytest.raises(InputError, match="same weights in every tensor"):
        write(sides, tmp_path / "out", join=1)


# --- processes ------------------------------------------------------------------------------------------------------


def test_processes_share_the_shards(pair: Pair, tmp_path: Path, forked_workers: type[Fork]) -> None:
    whole = write(pair, tmp_path / "whole-{alpha}", 0.3, 8.0)
    shared = write(pair, tmp_path / "shared-{alpha}", 0.3, 8.0, data_parallel=2)
    for one, other in zip(whole, shared, strict=True):
        assert other.status == "written"
        assert without_clock(tree(one.path)) == without_clock(tree(other.path))


def test_a_process_that_is_killed_is_started_again(pair: Pair, tmp_path: Path, forked_workers: type[Fork]) -> None:
    write(pair, tmp_path / "whole")
    mark = tmp_path / "killed"

    def killed_once() -> None:
        from expo.output.shard import StagedShard

        real = StagedShard.finish

        def finish(shard: StagedShard) -> str:
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return real(shard)
            os.kill(os.getpid(), 9)
            raise AssertionError

        StagedShard.finish = finish  # type: ignore[method-assign]

    forked_workers.before = staticmethod(killed_once)
    write(pair, tmp_path / "out", data_parallel=2)
    assert mark.exists()
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(tmp_path / "out"))


def test_a_worker_that_refuses_its_part_ends_the_run(pair: Pair, tmp_path: Path, forked_workers: type[Fork]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("")
    with pytest.raises(InputError, match="contains files expo did not write"):
        write(pair, output, data_parallel=2)


# --- the program ----------------------------------------------------------------------------------------------------


def test_an_array_job_by_the_program(
    pair: Pair, tmp_path: Path, expo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(pair, tmp_path / "whole")
    output = tmp_path / "out"
    words = ("--alpha", "0.5", "--output", output, "--json")

    def task(number: int) -> Result:
        array = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_COUNT": 2}
        for name, value in array.items():
            monkeypatch.setenv(name, str(value))
        return expo(pair, *words, "--part", "slurm")

    made = task(2)
    assert made.code == 0
    assert json.loads(made.stdout)["outputs"][0]["part"] == "1/2"
    early = expo(pair, *words, "--join", "2")
    assert early.code == 2
    assert "0/2 (not started)" in early.stderr
    assert "--array=0 and --part slurm/2" in early.stderr
    assert task(1).code == 0
    joined = expo(pair, *words, "--join", "2")
    assert joined.code == 0
    assert json.loads(joined.stdout)["outputs"][0]["status"] == "written"
    assert without_clock(tree(tmp_path / "whole")) == without_clock(tree(output))
