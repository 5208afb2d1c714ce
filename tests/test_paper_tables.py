"""The paper's tables from the files that its authors released: on made files with known sums, and on the real ones."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from made_inputs import real

from evaluations import released, tables
from expo import recipes
from expo.errors import InputError

ROOT = Path(__file__).parents[1]
PLACES = {"ours": 0, "clone": -1}
"""Which of `released.FOLDERS` a layout has."""
MODEL = "tulu-2-dpo-7b"
MEANS = {
    "LLaMA3-iterative-DPO-final": (70.59, 69.90),
    "Snorkel-Mistral-PairRM-DPO": (65.76, 65.65),
    "internlm2-chat-1_8b": (47.64, 47.63),
    "internlm2-chat-7b": (58.58, 59.27),
    "tulu-2-dpo-7b": (57.90, 58.71),
    "tulu-2-dpo-13b": (63.09, 64.28),
}
"""Of the six tasks, from the real files."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Made files of one pair, in the layout of the authors' repository."""
    return make(tmp_path / "clone", "clone")


def make(root: Path, layout: str) -> Path:
    folders = {name: root / places[PLACES[layout]] for name, places in released.FOLDERS.items()}
    for folder in folders.values():
        folder.mkdir(parents=True)
    leaderboard = [[MODEL, 8.5, 10.25, 4], [f"{MODEL}-ExPO", 11.5, 11.75, 7], ["zephyr_0.1_a8.0", 18, 16, 9]]
    with (folders["alpaca_eval"] / "leaderboard.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["", "win_rate", "length_controlled_winrate", "avg_length"], *leaderboard])
    for name, outputs in ((MODEL, ["four", "fünf+"]), (f"{MODEL}-ExPO", ["sevens 7", "sixsix"])):
        rows = [{"instruction": "?", "output": output, "generator": name} for output in outputs]
        (folders["alpaca_eval"] / f"{name}.json").write_text(json.dumps(rows))
    for name, right in ((MODEL, 0.25), (f"{MODEL}-ExPO", 0.5)):
        make_harness(folders["lm_eval"] / name, right)
        turns = [["a" * 10, "b" * 4], ["c" * 20, "d" * 8]]
        answers = [{"question_id": 81, "choices": [{"index": 0, "turns": one}]} for one in turns]
        lines = "".join(json.dumps(row) + "\n" for row in answers)
        (folders["mt_bench"] / f"{name}.jsonl").write_text(lines)
    return root


def make_harness(folder: Path, right: float) -> None:
    """Every task has that score, but of MMLU's 57 subjects the first three have 1, 0 and 1."""
    folder.mkdir()
    for task in released.HARNESS:
        names = [f"{task.result}{number}" for number in range(57)] if task.file == "mmlu" else [task.result]
        scores = dict.fromkeys(names, right) | (dict(zip(names[:3], (1, 0, 1), strict=True)) if names[1:] else {})
        results = {name: {task.metric: score, f"{task.metric}_stderr": 0.9} for name, score in scores.items()}
        config = {"num_fewshot": task.shots, "limit": None}
        (folder / f"{task.file}.json").write_text(json.dumps({"results": results, "config": config}))


def cell(table: tables.Table, model: str, key: str) -> tables.Cell:
    return dict(zip(table.column("model"), table.column(key), strict=True))[model]


def test_the_figures_are_those_that_one_can_count(clone: Path) -> None:
    made = tables.make(clone)
    assert cell(made["alpaca_eval_released"], MODEL, "win_rate") == (8.5, 11.5)
    assert cell(made["alpaca_eval_released"], MODEL, "length_controlled") == (10.25, 11.75)
    assert cell(made["alpaca_eval_controlled"], "zephyr_0.1", "win_rate") == (None, 18.0)
    mmlu = [100 * (2 + 54 * right) / 57 for right in (0.25, 0.5)]
    assert cell(made["open_llm_leaderboard"], MODEL, "mmlu") == pytest.approx(mmlu)
    mean = [(5 * 25 + mmlu[0]) / 6, (5 * 50 + mmlu[1]) / 6]
    assert cell(made["open_llm_leaderboard"], MODEL, "mean") == pytest.approx(mean)
    assert cell(made["mt_bench"], MODEL, "turn_1") == (15, 15)
    assert cell(made["mt_bench"], MODEL, "turn_2") == (6, 6)
    assert f"{MODEL} has answers to 2 of 80 questions" in made["mt_bench"].notes


def test_either_layout_gives_the_same_tables(tmp_path: Path) -> None:
    both = [tables.make(make(tmp_path / layout, layout)) for layout in PLACES]
    ours, clone = [{name: (table.columns, table.rows) for name, table in made.items()} for made in both]
    assert ours == clone
    assert list(ours) == list(tables.MAKERS)


def test_a_length_that_is_not_that_of_the_outputs_is_named(clone: Path) -> None:
    table = tables.make(clone)["alpaca_eval_released"]
    assert cell(table, MODEL, "length_recomputed") == (4, 7)  # of 4.5 characters the leaderboard has 4
    assert len(table.notes) == 1  # of the rows that are not there
    file = clone / "results_alpaca" / "leaderboard.csv"
    file.write_text(file.read_text().replace(f"{MODEL}-ExPO,11.5,11.75,7", f"{MODEL}-ExPO,11.5,11.75,8"))
    notes = tables.make(clone)["alpaca_eval_released"].notes
    assert notes[1:] == (f"{MODEL}, ExPO: characters 8, from the outputs 7",)


def test_a_win_rate_is_counted_from_the_verdicts_as_alpaca_eval_counts(clone: Path) -> None:
    verdicts = [{"preference": one} for one in (1.0, 1.25, 2.0, 0.0, 1.5, None, -1.0)]
    expected = 100 * (0 + 0.25 + 1 + 0.5 + 0.5) / 5  # what alpaca_eval.metrics.get_winrate gives
    (clone / "results_alpaca" / MODEL).mkdir()
    (clone / "results_alpaca" / MODEL / "annotations.json").write_text(json.dumps(verdicts))
    table = tables.make(clone)["alpaca_eval_released"]
    assert cell(table, MODEL, "win_rate_judged") == (pytest.approx(expected), None)
    assert table.notes[1:] == (f"{MODEL}, DPO: win rate % 8.50, from the verdicts {expected:.2f}",)


def test_a_published_figure_is_compared_at_the_digits_that_all_of_its_kind_have(clone: Path) -> None:
    file = clone / "results_alpaca" / "leaderboard.csv"
    lines = [file.read_text().splitlines()[0], "internlm2-chat-20b,36.14,24.0,5", "internlm2-chat-20b-ExPO,46.2,27.2,5"]
    lines += ["Starling-LM-7B-alpha,15.04,18.3,5", "Starling-LM-7B-alpha-ExPO,18.2,19.46,5"]
    file.write_text("\n".join(lines))
    notes = tables.make(clone)["alpaca_eval_released"].notes
    assert notes[1:] == ("internlm2-chat-20b, DPO: length-controlled % 24.00, published 24.9",)
    two = tables._published("p", "published", "open_llm_leaderboard", "c")  # 57.90 has two digits, not one
    table = tables.Table("t", clone, (tables.Column("model", "model"), tables.Column("c", "c"), two), (), ())
    for computed, notes in (((57.904, 58.71), []), ((57.94, 58.71), [f"{MODEL}, DPO: c 57.94, published 57.90"])):
        rows = ((MODEL, computed, (57.9, 58.71)),)
        assert tables._differences(dataclasses.replace(table, rows=rows), two) == notes


def test_rows_that_are_not_there_are_named(clone: Path) -> None:
    made = tables.make(clone)
    (note,) = made["alpaca_eval_released"].notes
    assert note.startswith("leaderboard.csv has no row of zephyr-7b-alpha, zephyr-7b-alpha-ExPO, zephyr-7b-beta, ")
    assert MODEL not in note
    note = made["alpaca_eval_controlled"].notes[0]
    assert "zephyr-7b-sft-full, zephyr_0.05, zephyr_0.05-ExPO, zephyr_0.1, zephyr_0.2, " in note


def test_a_missing_side_is_shown_as_missing() -> None:
    column = tables.Column("c", "c")
    assert tables._shown(column, (66.13, None)) == "66.13 → –"
    assert tables._shown(column, (None, 66.13)) == "– → 66.13"


def test_rows_that_no_table_has_and_hidden_folders_are_not_read(clone: Path) -> None:
    before = tables.make(clone)
    with (clone / "results_alpaca" / "leaderboard.csv").open("a") as stream:
        stream.write("another,nan,high,\n../../x,1,2,3\n")
    (clone / "results_lmeval" / ".git").mkdir()
    (clone / "results_lmeval" / "empty").mkdir()
    assert tables.make(clone) == before


def test_a_missing_file_is_named_with_the_next_step(clone: Path) -> None:
    (clone / "results_lmeval" / MODEL / "gsm8k.json").unlink()
    table = tables.make(clone)["open_llm_leaderboard"]
    assert f"{MODEL}: gsm8k.json is missing; copy results_lmeval/{MODEL}/gsm8k.json from https://" in table.notes[0]
    assert cell(table, MODEL, "gsm8k") == (None, 50)
    dpo, expo = cell(table, MODEL, "mean")
    assert (dpo, expo) == (None, pytest.approx((5 * 50 + 100 * 29 / 57) / 6))
    (clone / "results_alpaca" / "leaderboard.csv").unlink()
    with pytest.raises(InputError, match=r"leaderboard\.csv is missing; copy results_alpaca/leaderboard\.csv"):
        tables.make(clone)


@pytest.mark.parametrize(("setting", "value", "what"), [("num_fewshot", 4, "has 4 examples"), ("limit", 9, "first 9")])
def test_a_setting_that_is_not_the_leaderboards_is_named(clone: Path, setting: str, value: int, what: str) -> None:
    file = clone / "results_lmeval" / MODEL / "gsm8k.json"
    content = json.loads(file.read_text())
    content["config"][setting] = value
    file.write_text(json.dumps(content))
    assert what in tables.make(clone)["open_llm_leaderboard"].notes[0]


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        (f"results_lmeval/{MODEL}/arc.json", "{", "is not valid JSON"),
        (f"results_lmeval/{MODEL}/arc.json", '{"results": {"hellaswag": {"acc": 1}}}', "should have a result arc_"),
        (f"results_lmeval/{MODEL}/mmlu.json", '{"results": {"hendrycksTest-a": {"acc": 1}}}', "57 results hendrycks"),
        (f"results_lmeval/{MODEL}/gsm8k.json", '{"results": {"gsm8k": {"acc": 27.3}}}', "between 0 and 1, not 27.3"),
        (f"results_alpaca/{MODEL}.json", '[{"instruction": "?"}]', "has rows without an `output`"),
        ("results_alpaca/leaderboard.csv", f",win_rate\n{MODEL},high\n", "win_rate of 'tulu-2-dpo-7b' is no number"),
        ("results_alpaca/leaderboard.csv", f",win_rate\n{MODEL},nan\n", "should be from 0 to 100, not 'nan'"),
        ("results_alpaca/leaderboard.csv", f",win_rate\n{MODEL},101\n", "should be from 0 to 100, not '101'"),
        ("results_alpaca/leaderboard.csv", f",win_rate\n{MODEL},1\n{MODEL},1\n", "has 'tulu-2-dpo-7b' more than once"),
        ("results_alpaca/leaderboard.csv", ",win_rate\nanother,1\n", "has none of the paper's models"),
        (f"results_mtbench/mt_bench/model_answer/{MODEL}.jsonl", '{"choices": []}', "has no choices[0].turns"),
    ],
)
def test_a_wrong_file_ends_with_one_line(
    clone: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, what: str
) -> None:
    (clone / file).write_text(content)
    assert tables.main([str(clone)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"expo: error: {clone / file}")
    assert what in err
    assert err.count("\n") == 1


def test_a_folder_with_nothing_to_read_is_refused_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert tables.main([str(folder)]) == 2
        assert "git clone https://github.com/chujiezheng/LLM-Extrapolation" in capsys.readouterr().err


def test_the_script_prints_text_markdown_and_json(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "paper_tables.sh", clone.name, "--json"],
        cwd=clone.parent,
        env=os.environ | {"EXPO_VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert {name: table["title"] for name, table in figures.items()}.keys() == tables.MAKERS.keys()
    row = next(row for row in figures["alpaca_eval_released"]["rows"] if row["model"] == MODEL)
    assert row["win_rate"] == [8.5, 11.5]
    assert tables.main([str(clone)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{MODEL} "))
    assert line.split()[1:11] == ["0.5", "8.50", "→", "11.50", "8.5", "→", "11.5", "10.25", "→", "11.75"]
    assert tables.main([str(clone), "--markdown"]) == 0
    assert f"| {MODEL} | 0.5 | 8.50 → 11.50 | 8.5 → 11.5 | 10.25 → 11.75 |" in capsys.readouterr().out


@pytest.mark.skipif(real() is None or not (real().data / "lm_eval").exists(), reason="the released files are not here")
def test_the_released_files_give_the_known_figures() -> None:
    made = tables.make(real().data)
    mean = made["open_llm_leaderboard"]
    assert {name: tuple(round(one, 2) for one in cell(mean, name, "mean")) for name in mean.column("model")} == MEANS
    assert not any(" examples " in note or "missing" in note for note in mean.notes)
    alpaca = made["alpaca_eval_released"]
    assert None not in alpaca.column("win_rate")
    assert cell(alpaca, "Starling-LM-7B-beta", "length_recomputed") == (2015, 2215)
    assert cell(made["alpaca_eval_controlled"], "zephyr-7b-sft-full", "length_recomputed") == 862
    assert cell(made["mt_bench"], "zephyr-7b-beta", "questions") == (80, 80)
    assert not any("from the outputs" in note for table in made.values() for note in table.notes)


@pytest.mark.skipif(real() is None or not (real().data / "lm_eval").exists(), reason="the released files are not here")
def test_the_document_has_the_figures_of_the_released_files() -> None:
    made = tables.make(real().data)
    for name, heading in IN_DOCUMENT.items():
        printed = tables.markdown(made[name]).split("\n\n")[1].splitlines()
        found = [row for row in documented(heading) if not row.startswith("| internlm2-chat-20b | 62.71")]
        assert found == printed, "the 20b's harness files are in the repository only"


IN_DOCUMENT = {
    "alpaca_eval_released": "### AlpacaEval 2.0, released models",
    "alpaca_eval_controlled": "### AlpacaEval 2.0, DPO on part of the data",
    "open_llm_leaderboard": "### Open LLM Leaderboard, released files",
}
"""The headings of the tables in docs/reproduction.md."""


def documented(heading: str) -> list[str]:
    """The lines of the first table below a heading of the document."""
    below = (ROOT / "docs" / "reproduction.md").read_text().split(f"\n{heading}\n")[1].splitlines()
    start = next(place for place, line in enumerate(below) if line.startswith("|"))
    return list(takewhile(lambda line: line.startswith("|"), below[start:]))


def documented_cells(heading: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in documented(heading)[2:]]


def test_the_document_has_the_published_figures_of_the_recipes() -> None:
    shown = {name: [str(cell) for cell in row] for name, row in published("mt_bench", 2).items()}
    assert dict(zip(tables.RELEASED, documented_cells("### MT-Bench, published scores"), strict=True)) == shown
    rewards = {name.strip("`"): score for _data, name, score in documented_cells("## DPO on part of the data")[1:]}
    assert {name: [name, score] for name, score in rewards.items()} == published("reward", 2)
    means = {row[0]: [row[0], row[-1]] for row in documented_cells("### Open LLM Leaderboard, released files")}
    assert means == published("open_llm_leaderboard", 2)


def published(figure: str, digits: int) -> dict[str, list[str]]:
    """The recipes that have a figure, by name: the name, and both sides as they are printed."""
    found = {name: tables.printed(name, figure) for name in recipes.names()}
    shown = {name: [f"{side:.{digits}f}" for side in both] for name, both in found.items() if both}
    return {name: [name, " → ".join(both)] for name, both in shown.items()}
