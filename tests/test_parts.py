"""Parts of a run: how they are named, which rows they have, what an array job's environment says."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from expo.config import GenerateConfig
from expo.errors import InputError
from expo.parts import Part, all_parts, array_list, counts_in, read_part


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_parts_hold_every_item_once_and_evenly(items, count):
    parts = [part.of(items) for part in all_parts(count)]
    assert sorted(item for part in parts for item in part) == sorted(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(), max_size=50), st.integers(0, 50), st.integers(1, 9), st.data())
def test_a_larger_limit_only_adds_to_the_end_of_a_part(items, limit, count, data):
    part = Part(data.draw(st.integers(0, count - 1)), count)
    before, after = part.of(items[:limit]), part.of(items)
    assert after[: len(before)] == before


@pytest.mark.parametrize(("text", "part"), [("0/1", Part(0, 1)), ("3/8", Part(3, 8)), ("07/10", Part(7, 10))])
def test_parts_are_read(text, part):
    assert read_part(text, {}) == part
    assert read_part(str(part), {}) == part


BAD = [
    ("8/8", "--part 8/8: parts are counted from 0, so i is at most 7"),
    ("1/0", "--part must be 1 to 10000 parts, not 0"),
    ("0/10001", "--part must be 1 to 10000 parts, not 10001"),
    *((text, "--part must be i/N (such as 0/8), slurm or slurm/N, not ") for text in ("", "3", "-1/8", "1/8/2", "a/b")),
    *((text, f"not '{text}'") for text in ("Slurm", "slurm/", "slurm/x", "slurm/8/2", "1 / 8")),
    ("slurm/0", "--part must be 1 to 10000 parts, not 0"),
    ("slurm/10001", "--part must be 1 to 10000 parts, not 10001"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[repr(text) for text, _ in BAD])
def test_what_is_no_part_is_refused(text, message):
    with pytest.raises(InputError) as caught:
        GenerateConfig(task="alpaca", model="m", part=text)
    assert message in str(caught.value)


def array(task: object, first: object, count: object, step: object = None, last: object = None) -> dict[str, str]:
    values = {"ID": task, "MIN": first, "COUNT": count, "STEP": step, "MAX": last}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (array(0, 0, 8), "0/8"),
        (array(8, 1, 8), "7/8"),
        (array(30, 10, 5, 10), "2/5"),
        (array(5, 5, 1, 1), "0/1"),
        (array(3, 0, 4, 1, 3), "3/4"),
        (array(30, 10, 5, 10, 50), "2/5"),
    ],
)
def test_an_array_job_says_which_part(environment, part, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert GenerateConfig(task="alpaca", model="m", part="slurm").part == part


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "SLURM_ARRAY_TASK_ID is not set; submit an array job"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_MIN is not set"),
        (array(3, 0, None), "SLURM_ARRAY_TASK_COUNT is not set"),
        (array("x", 0, 4), "SLURM_ARRAY_TASK_ID is 'x', not a number"),
        (array(7, 0, 3), "task 7 of an array of 3 from 0 in steps of 1 is not a valid part; submit a plain range"),
        (
            array(1, 1, 2, 1, 5),
            "task 1 of an array of 2 from 1 in steps of 1 is not a valid part; submit a plain range",
        ),
        (array(1, 1, 2, 1, 5), "or give --part slurm/N to make some parts of N"),
        (array(5, 0, 3, 2), "task 5 of an array of 3 from 0 in steps of 2 is not a valid part"),
        (array(1, 2, 3), "is not a valid part"),
        (array(0, 0, 20000), "--part slurm must be 1 to 10000 parts, not 20000"),
    ],
)
def test_an_environment_without_a_part_is_refused(environment, message):
    with pytest.raises(InputError) as caught:
        read_part("slurm", environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("environment", [array(5, 1, 2, 1, 5), {"SLURM_ARRAY_TASK_ID": "5"}])
def test_with_its_number_given_a_part_may_be_one_of_any_array(environment, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert GenerateConfig(task="alpaca", model="m", part="slurm/8").part == "5/8"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "--part slurm/8: SLURM_ARRAY_TASK_ID is not set; submit an array job (sbatch --array=0-7), or give"),
        ({"SLURM_ARRAY_TASK_ID": "x"}, "--part slurm/8: SLURM_ARRAY_TASK_ID is 'x', not a number"),
        (array(8, 1, 8, 1, 8), "--part slurm/8: SLURM_ARRAY_TASK_ID is 8; submit --array=0-7, or some of these"),
    ],
)
def test_a_task_that_is_none_of_the_parts_is_refused(environment, message):
    with pytest.raises(InputError) as caught:
        read_part("slurm/8", environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def read_array(text: str) -> list[int]:
    """The indices that `sbatch --array=TEXT` makes."""
    spans = [item.partition("-") for item in text.split(",") if item]
    return [index for first, _, last in spans for index in range(int(first), int(last or first) + 1)]


@given(st.sets(st.integers(0, 40)).map(sorted))
def test_indices_are_written_as_sbatch_reads_them(indices):
    assert read_array(array_list(indices)) == indices


def test_consecutive_indices_are_a_range():
    assert [array_list(some) for some in ([], [3], [0, 1, 2], [1, 5], [0, 2, 3, 4, 9])] == [
        *("", "3", "0-2", "1,5", "0,2-4,9")
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part": "0/2", "join": 2}, "--part and --join cannot be combined: join once all parts are finished"),
        (
            {"part": "0/2", "data_parallel": 2},
            "--part and --data-parallel cannot be combined: --data-parallel makes and joins",
        ),
        ({"join": 2, "data_parallel": 2}, "--join and --data-parallel cannot be combined"),
        ({"join": 0}, "--join must be 1 to 10000 parts, not 0"),
        ({"data_parallel": 0}, "--data-parallel must be 1 to 10000 parts, not 0"),
    ],
)
def test_ways_to_cut_a_run_do_not_mix(values, message):
    with pytest.raises(InputError) as caught:
        GenerateConfig(task="alpaca", model="m", **values)
    assert message in str(caught.value)


def test_a_part_is_known_by_its_files_names():
    stem = Part(3, 8).file_stem
    names = [f"{stem}.jsonl", f"{stem}.meta.json", f".{stem}.journal.jsonl"]
    assert [counts_in([name]) for name in names] == [{8}] * 3
    assert counts_in([*names, "0-of-4.jsonl", "notes.txt", "a-of-b.jsonl", "1-of-2.json"]) == {8, 4}
