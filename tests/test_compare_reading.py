"""What words mean to `expo compare` and `expo report`, and what is read from the files of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from made_inputs import Inputs, on_real_inputs_too
from runs import RM, write_outputs, write_rewards, write_run

from expo.errors import InputError
from expo.verbs.compare.reading import read_runs

ROWS = [("why?", "because"), ("how?", "so"), ("who?", "me and you")]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A and B, with rewards."""
    write_run(tmp_path, "A", ROWS, [1.0, 2.0, 3.0])
    write_run(tmp_path, "B", ROWS, [2.0, 2.0, 0.0])
    return tmp_path


WORDS = [
    "A",
    "outputs_prompts/A.jsonl",
    "rewards_prompts/A.jsonl",
    "rewards_prompts/A.rows.jsonl",
    "outputs_prompts/A.meta.json",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_run_has_many_names(two: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two)
    (run,) = read_runs([word])
    assert (run.name, run.task, [row.output for row in run.rows]) == ("A", "prompts", [output for _, output in ROWS])
    assert run.rewards == {RM: (1.0, 2.0, 3.0)}
    assert [row.tokens for row in run.rows] == [1, 1, 3]
    assert [row.id for row in run.rows] == ["0", "1", "2"]


def test_a_file_in_the_folder_itself(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two / "outputs_prompts")
    assert read_runs(["A.jsonl"])[0].rewards == {RM: (1.0, 2.0, 3.0)}


def test_a_name_whose_checkpoint_lies_here_is_the_run(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two)
    (two / "A").mkdir()
    assert [run.name for run in read_runs(["A", "B"])] == ["A", "B"]
    (two / "C").mkdir()
    with pytest.raises(InputError, match="C is a folder"):
        read_runs(["C", "B"])


def test_every_reward_model_is_read_the_plain_name_first(two: Path) -> None:
    write_rewards(two / "outputs_prompts" / "A.jsonl", [7.0, 8.0, 9.0], rm="a/other", revision="c0ffee", further=True)
    (run,) = read_runs(["A"], output_dir=str(two))
    assert list(run.rewards.items()) == [(RM, (1.0, 2.0, 3.0)), ("a/other@c0ffee", (7.0, 8.0, 9.0))]
    for word in ("A@other", str(two / "rewards_prompts" / "A@other.jsonl")):
        (alone,) = read_runs([word], output_dir=str(two))
        assert (alone.name, alone.rewards) == ("A", {"a/other@c0ffee": (7.0, 8.0, 9.0)})


def test_an_output_whose_name_has_an_at_is_not_a_reward_model_of_another(two: Path) -> None:
    write_run(two, "A@main", ROWS, [4.0, 5.0, 6.0])
    first, second = read_runs(["A", "A@main"], output_dir=str(two))
    assert (list(first.rewards.values()), second.rewards) == ([(1.0, 2.0, 3.0)], {RM: (4.0, 5.0, 6.0)})


def test_what_was_asked_is_the_key_whatever_ids_and_order(tmp_path: Path) -> None:
    rows = [*ROWS, ("why?", "just so")]
    write_outputs(tmp_path, "A", rows, ids=list("abcd"))
    write_outputs(tmp_path, "B", rows[::-1], ids=list("wxyz"), meta=False)
    first, second = (run.rows for run in read_runs(["A", "B"], output_dir=str(tmp_path)))
    assert {row.key for row in first} == {row.key for row in second}
    assert [row.key.sample for row in first] == [0, 0, 0, 1], "the how-manieth answer to its question"
    assert len({row.key.prompt for row in first}) == 3
    assert [row.id for row in first] == list("abcd")


@on_real_inputs_too
def test_files_of_others(inputs: Inputs) -> None:
    files = sorted((inputs.data / "alpaca_eval").glob("*.json"))[:2]
    runs = read_runs(list(map(str, files)))
    assert [run.name for run in runs] == [file.stem for file in files]
    assert {run.task for run in runs} == {"alpaca"}
    assert len({frozenset(row.key for row in run.rows) for run in runs}) == 1
    assert [row.output for row in runs[0].rows] == [row["output"] for row in json.loads(files[0].read_text())]
    assert runs[0].rewards == {}


@on_real_inputs_too
def test_answers_in_fastchat_s_format(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = inputs.data / "mt_bench"
    words = sorted(map(str, (folder / "model_answer").glob("*.jsonl")))
    first, second = read_runs(words, dataset=str(folder / "question.jsonl"))
    assert (first.task, len(first.rows)) == ("mtbench", 160)
    assert [row.key for row in first.rows] == [row.key for row in second.rows]
    assert first.rows[1].key == (first.rows[0].key.prompt, 0, 1), "two turns of one question are of one cluster"
    assert {row.subset for row in first.rows} >= {"writing", "math"}
    assert first.rows[1].context[1] == ("assistant", first.rows[0].output)


def test_answers_whose_questions_are_out_of_reach_are_paired_by_id(
    alpaca_data: Path, hub: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from expo.errors import EnvironmentFailure

    def unreachable(*_: object) -> None:
        raise EnvironmentFailure("the hub is gone")

    monkeypatch.setattr("expo.verbs.compare.answers.load_prompts", unreachable)
    words = sorted(map(str, (alpaca_data / "mt_bench" / "model_answer").glob("*.jsonl")))
    first, second = read_runs(words)
    assert [row.key for row in first.rows] == [row.key for row in second.rows]
    assert len({row.key for row in first.rows}) == 160
    assert "the hub is gone" in caplog.text
    assert "paired by the ids" in caplog.text


def test_rewards_alone_are_paired_by_id(two: Path) -> None:
    before = [run.rewards for run in read_runs(["A", "B"], output_dir=str(two))]
    rows = two / "rewards_prompts" / "B.rows.jsonl"
    for file in (rows, two / "rewards_prompts" / "B.jsonl"):
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    shutil.rmtree(two / "outputs_prompts")
    first, second = read_runs(["A", "B"], output_dir=str(two))
    assert first.rewards == before[0]
    by_key = dict(zip((row.key for row in second.rows), second.rewards[RM], strict=True))
    assert [by_key[row.key] for row in first.rows] == [2.0, 2.0, 0.0]
    assert all(row.output is None for row in first.rows)


def test_one_with_outputs_and_one_with_rewards_alone(two: Path) -> None:
    (two / "outputs_prompts" / "B.jsonl").unlink()
    first, second = read_runs(["A", "B"], output_dir=str(two))
    assert [row.key for row in first.rows] == [row.key for row in second.rows]


def test_rewards_are_given_to_answers_by_id(two: Path) -> None:
    for name in ("B.rows.jsonl", "B.jsonl"):
        file = two / "rewards_prompts" / name
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert read_runs(["B"], output_dir=str(two))[0].rewards == {RM: (2.0, 2.0, 0.0)}


def test_a_file_of_bare_numbers_goes_by_its_order(tmp_path: Path) -> None:
    write_outputs(tmp_path, "A", ROWS, meta=False)
    (tmp_path / "rewards_prompts").mkdir()
    (tmp_path / "rewards_prompts" / "A.jsonl").write_text("1.5\nnull\nNaN\n")
    (run,) = read_runs(["A"], output_dir=str(tmp_path))
    ((model, rewards),) = run.rewards.items()
    assert rewards == (1.5, None, None), "NaN is no reward"
    assert run.scorings[model].model is None
    assert run.scorings[model].reasons == {2: "its reward in A.jsonl is nan"}


def test_rows_that_were_not_scored_say_so(tmp_path: Path) -> None:
    write_rewards(write_outputs(tmp_path, "A", ROWS), [1.0, 2.0])
    (run,) = read_runs(["A"], output_dir=str(tmp_path))
    assert run.rewards[RM] == (1.0, 2.0, None)
    assert run.scorings[RM].reasons == {2: "A.jsonl does not score it"}


def test_failed_and_truncated_rows_are_known(tmp_path: Path) -> None:
    write_rewards(write_outputs(tmp_path, "A", ROWS, errors=[1], alpha=0.3), [1.0, None, 2.0], truncated=[2])
    (run,) = read_runs(["A"], output_dir=str(tmp_path))
    assert run.rows[1].finish_reason == "error"
    assert run.scorings[RM].reasons == {1: "no finite number"}
    assert run.scorings[RM].truncated == {2}
    assert run.alpha == 0.3


def test_a_file_elsewhere_takes_no_rewards_of_other_answers(two: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "A.jsonl").write_text((two / "outputs_prompts" / "B.jsonl").read_text().replace("because", "why not"))
    assert read_runs([str(other / "A.jsonl")], task="prompts", output_dir=str(two))[0].rewards == {}
    shutil.copy(two / "outputs_prompts" / "A.jsonl", other / "A.jsonl")
    assert read_runs([str(other / "A.jsonl")], task="prompts", output_dir=str(two))[0].rewards == {RM: (1.0, 2.0, 3.0)}


GOLDEN = Path(__file__).parent / "golden"
SCORED = sorted((GOLDEN / "finished").glob("*/rewards_*/*.meta.json"))


@pytest.mark.parametrize("meta", SCORED, ids=[file.parents[1].name for file in SCORED])
def test_what_score_wrote_is_read(meta: Path) -> None:
    written = json.loads(meta.read_text())
    lines = meta.with_name(f"{written['name']}.jsonl").read_text().splitlines()
    task = meta.parent.name.removeprefix("rewards_")
    dataset = str(GOLDEN / "inputs" / "questions.jsonl") if task == "mtbench" else None
    folder = str(meta.parents[1])
    (run,) = read_runs([written["name"]], task=task, output_dir=folder, dataset=dataset)
    assert run.rewards == {written["reward_model"]: tuple(map(json.loads, lines))}
    assert all(row.output is not None and row.tokens is not None for row in run.rows)
    rows = meta.with_name(f"{written['name']}.rows.jsonl").read_text().splitlines()
    assert [row.id for row in run.rows] == [json.loads(row)["id"] for row in rows]


# --- refusals -------------------------------------------------------------------------------------------------------


def _replace(old: str, new: str):
    return lambda file: file.write_text(file.read_text().replace(old, new))


DAMAGES = {
    "another count": ("rewards_prompts/A.jsonl", lambda file: file.write_text("1.0\n"), "hold different rewards"),
    "another value": ("rewards_prompts/A.jsonl", _replace("3.0", "3.5"), "hold different rewards"),
    "no number": ("rewards_prompts/A.jsonl", _replace("3.0", '"3.0"'), "line 3 is not a reward .*: '3.0'"),
    "true": ("rewards_prompts/A.jsonl", _replace("3.0", "true"), "line 3 is not a reward .*: True"),
    "empty": ("rewards_prompts/A.jsonl", lambda file: file.write_text(""), "contains no rewards"),
    "twice": ("rewards_prompts/A.rows.jsonl", _replace('"id": "1"', '"id": "0"'), "names a row twice"),
    "no id": ("rewards_prompts/A.rows.jsonl", _replace('"id": "1"', '"id": 1'), "has no id, sample and turn"),
    "meta": ("rewards_prompts/A.meta.json", lambda file: file.write_text("{"), "is not valid JSON.*move it away"),
    "answers": ("outputs_prompts/A.jsonl", _replace("because", "no"), "does not score the answers .* score` again"),
    "per row": ("outputs_prompts/A.meta.json", _replace('"id": ["0", ', '"id": ['), "does not belong to A.jsonl"),
    "no rows": ("outputs_prompts/A.jsonl", lambda file: file.write_text(""), "contains no rows"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_does_not_fit_is_refused(two: Path, name: str, damage, message: str) -> None:
    damage(two / name)
    with pytest.raises(InputError, match=message) as caught:
        read_runs(["A", "B"], output_dir=str(two))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "BB"], r"no outputs or rewards of BB for any task in .*; did you mean B\?"),
        (["A", "A"], "A and A are the same run"),
        (["A", "{}/outputs_prompts/A.jsonl"], "are the same run .*: leave one out"),
        (["{}/rewards_prompts/A.jsonl", "A"], "are the same run .*: leave one out"),
        (["A", "{}/outputs_prompts/AA.jsonl"], r"no such file: .*; did you mean A.jsonl\?"),
        (["A", "{}"], "is a folder: give a file in it, or names with --output-dir"),
        (["{}/outputs_alpaca/C.json", "{}/outputs_prompts/A.jsonl"], "different tasks .*: alpaca .* and prompts"),
        (["{}/outputs_alpaca/C.json", "A"], "no outputs or rewards of A for the task alpaca"),
        (["A", "C"], "different tasks cannot be paired: A exists for prompts and C for alpaca"),
        (["{}/strange.json"], "is not an output file: its rows have 'foo', but no output with a prompt"),
        (["{}/empty.json"], "empty.json contains no rows"),
        (["{}/numbers.jsonl"], "contains only rewards and is not in a folder rewards_<task>: pass --task"),
        (["D", "D"], "D is not finished for prompts: `expo generate prompts` continues it"),
    ],
)
def test_words_that_mean_nothing_together(two: Path, words: list[str], message: str) -> None:
    write_outputs(two, "C", ROWS, task="alpaca")
    (two / "outputs_prompts" / ".D.journal.jsonl").write_text("{}\n")
    for name, text in (("strange.json", '[{"foo": 1}]'), ("empty.json", "[]"), ("numbers.jsonl", "1\n2\n")):
        (two / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_runs([word.format(two) for word in words], output_dir=str(two))


def test_a_name_of_two_tasks_needs_the_task(two: Path) -> None:
    for name in "AB":
        write_outputs(two, name, ROWS, task="alpaca")
    with pytest.raises(InputError, match="A exists for alpaca and prompts: pass --task"):
        read_runs(["A", "B"], output_dir=str(two))
    for task, read in (("alpaca", "alpaca"), ("prompts", "prompts"), ("some/prompts.jsonl", "prompts")):
        assert {run.task for run in read_runs(["A", "B"], output_dir=str(two), task=task)} == {read}
    with pytest.raises(InputError, match=re.escape("no task 'alpacca'")):
        read_runs(["A", "B"], output_dir=str(two), task="alpacca")


def test_rewards_alone_of_other_prompts_cannot_be_paired(tmp_path: Path) -> None:
    write_run(tmp_path, "A", ROWS, [1.0, 2.0, 3.0])
    write_run(tmp_path, "B", [("other?", "o"), *ROWS[1:]], [1.0, 2.0, 3.0])
    shutil.rmtree(tmp_path / "outputs_prompts")
    with pytest.raises(InputError, match="A and B do not answer the same prompts, and without the outputs of A"):
        read_runs(["A", "B"], output_dir=str(tmp_path))
    for file in (tmp_path / "rewards_prompts").glob("*.rows.jsonl"):
        file.unlink()
    with pytest.raises(InputError, match=r"nothing says which prompt a line of .*A.jsonl belongs to"):
        read_runs(["A", "B"], output_dir=str(tmp_path))


def test_bare_numbers_that_are_too_few_are_refused(tmp_path: Path) -> None:
    write_outputs(tmp_path, "A", ROWS)
    (tmp_path / "rewards_prompts").mkdir()
    (tmp_path / "rewards_prompts" / "A.jsonl").write_text("1\n2\n")
    with pytest.raises(InputError, match=r"has 2 rewards, and .* has 3 answers: they do not belong together"):
        read_runs(["A"], output_dir=str(tmp_path))
