"""`expo compare`: laws that hold for any runs, what is refused, and the command itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Result, run_expo, tree
from hypothesis import given, settings, strategies as st
from made_inputs import real
from runs import RM, write_outputs, write_rewards, write_run
from scipy import stats

from expo.cli import program as cli
from expo.config import CompareConfig
from expo.errors import InputError
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.figures import Comparison
from expo.verbs.compare.reading import read_runs
from expo.verbs.compare.run import RowKey, Run, RunRow, Scoring
from expo.verbs.compare.text import as_markdown, as_text
from expo.verbs.compare.verdict import verdict, verdicts

OTHER = "other/rm"


def made(
    name: str,
    rewards: Sequence[float | None],
    *,
    outputs: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    further: Sequence[float | None] | None = None,
    subsets: Sequence[str] | None = None,
) -> Run:
    """A run of these rewards; rows of one prompt are its samples."""
    prompts = prompts or [f"p{number}" for number in range(len(rewards))]
    outputs = outputs or ["words " * (number % 7) for number in range(len(rewards))]
    seen: dict[str, int] = {}
    rows = []
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        seen[prompt] = seen.get(prompt, -1) + 1
        key, subset = RowKey(prompt, seen[prompt]), subsets[number] if subsets else None
        rows.append(RunRow(key, prompt, prompt, (), output, subset, len(output) // 4, "stop"))
    of = {RM: tuple(rewards), **({OTHER: tuple(further)} if further is not None else {})}
    return Run(name, "prompts", tuple(rows), of, None, {model: Scoring(model, None) for model in of})


def random_runs(seed: int = 0, count: int = 2, prompts: int = 60, samples: int = 1) -> list[Run]:
    rng = np.random.default_rng(seed)
    names = [f"p{number}" for number in range(prompts) for _ in range(samples)]
    shared = rng.normal(size=prompts).repeat(samples)
    runs = []
    for number in range(count):
        lengths = rng.integers(1, 400, size=len(names))
        rewards = shared + 0.2 * number + 0.002 * lengths + rng.normal(0, 0.5, size=len(names))
        outputs = ["x" * length for length in lengths]
        subsets = [("one", "two")[int(name[1:]) % 2] for name in names]
        second = (rewards + rng.normal(size=len(names))).tolist()
        runs.append(
            made("ABCDEF"[number], rewards.tolist(), outputs=outputs, prompts=names, subsets=subsets, further=second)
        )
    return runs


def permuted(run: Run, order: Sequence[int]) -> Run:
    rewards = {model: tuple(values[number] for number in order) for model, values in run.rewards.items()}
    return replace(run, rows=tuple(run.rows[number] for number in order), rewards=rewards)


def figures(comparison: Comparison) -> dict:
    return comparison.describe()["models"][1]


# --- laws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_the_order_of_rows_changes_nothing(random, samples):
    runs = random_runs(count=3, prompts=20, samples=samples)
    expected = compare(runs).describe()
    for number in range(3):
        order = list(range(len(runs[0].rows)))
        random.shuffle(order)
        again = list(runs)
        again[number] = permuted(runs[number], order)
        assert compare(again).describe() == expected


def test_pairing_by_position_would_say_something_else() -> None:
    rewards = [float(number) for number in range(40)]
    first, second = made("A", rewards), made("B", [reward + 0.1 for reward in rewards])
    found = figures(compare([first, permuted(second, range(39, -1, -1))]))
    assert found["difference"] == pytest.approx(0.1)
    assert (found["win_rate"], found["p"]) == (1.0, 0.0001)
    by_position = stats.ttest_rel([*reversed(second.rewards[RM])], first.rewards[RM]).pvalue
    assert by_position > 0.9


def test_the_other_way_round_is_the_negative() -> None:
    runs = random_runs(count=2, samples=2)
    there, back = figures(compare(runs)), figures(compare(runs[::-1]))
    for key in ("difference", "interval"):
        assert np.negative(np.ravel(back[key]))[::-1] == pytest.approx(np.ravel(there[key]), abs=1e-12)
    for key in ("difference_at_equal_length", "characters_difference"):
        assert back[key]["difference"] == pytest.approx(-there[key]["difference"])
        assert np.negative(back[key]["interval"])[::-1] == pytest.approx(there[key]["interval"])
    assert back["win_rate"] == pytest.approx(1 - there["win_rate"])
    assert back["p"] == there["p"]
    assert set(back["flips"]) == set(there["flips"])


def test_a_constant_added_to_both_changes_no_difference() -> None:
    runs = random_runs(count=3)
    moved = [replace(run, rewards={RM: tuple(value + 1000 for value in run.rewards[RM])}) for run in runs]
    one, other = figures(compare(runs)), figures(compare(moved))
    assert other["mean"] == pytest.approx(one["mean"] + 1000)
    for key in ("difference", "interval", "p", "standardized_difference", "win_rate", "standard_error"):
        assert other[key] == pytest.approx(one[key], abs=1e-9)


def test_another_scale_changes_no_figure_that_has_no_unit() -> None:
    runs = random_runs(count=3)
    scaled = [replace(run, rewards={RM: tuple(value * 1e-6 for value in run.rewards[RM])}) for run in runs]
    one, other = figures(compare(runs)), figures(compare(scaled))
    for key in ("p", "standardized_difference", "win_rate"):
        assert other[key] == pytest.approx(one[key])
    assert np.array(other["interval"]) * 1e6 == pytest.approx(one["interval"])


def test_samples_that_repeat_one_another_are_no_evidence() -> None:
    first, second = random_runs()
    repeated = []
    for run in (first, second):
        rows = [replace(row, key=RowKey(row.key.prompt, sample)) for row in run.rows for sample in range(5)]
        values = tuple(value for value in run.rewards[RM] for _ in range(5))
        repeated.append(replace(run, rows=tuple(rows), rewards={RM: values}))
    one, many = figures(compare([first, second])), figures(compare(repeated))
    assert many["n"] == 5 * one["n"]
    for key in ("difference", "interval", "p", "win_rate", "win_rate_interval", "standard_error"):
        assert many[key] == pytest.approx(one[key])


def test_models_apart_are_compared_alone() -> None:
    """They neither widen the others' intervals nor are widened by them, in subsets too."""
    runs = random_runs(count=4)
    found, rest = compare(runs, apart=["C"]), compare([run for run in runs if run.name != "C"])
    _, first, apart, last = found.describe()["models"]
    assert [first, last] == rest.describe()["models"][1:]
    assert apart == figures(compare([runs[0], runs[2]]))
    assert (found.apart, found.together, found.simultaneous) == (("C",), 2, True)
    assert compare(runs[:3], apart=["B"]).simultaneous is False


def test_endings_are_paired_where_both_are_known() -> None:
    """stop and length count; an error, or a reason that is not known, is neither."""
    ends = [["stop", "stop", "stop", "stop", "length", "stop"], ["length", "length", None, "stop", "stop", "error"]]
    runs = []
    for name, reasons in zip("AB", ends, strict=True):
        run = made(name, [1.0] * 6)
        rows = [replace(row, finish_reason=reason) for row, reason in zip(run.rows, reasons, strict=True)]
        runs.append(replace(run, rows=tuple(rows)))
    base, other = compare(runs).describe()["models"]
    assert (base["ended"], other["ended"]) == (5 / 6, 2 / 4)
    assert other["finish_reasons"] == {"error": 1, "length": 2, "stop": 2}
    differences = [-1.0, -1.0, 0.0, 1.0]
    assert other["ended_difference"]["difference"] == np.mean(differences)
    assert other["ended_difference"]["interval"] == pytest.approx(
        stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    )


def test_one_more_model_changes_no_difference_and_makes_no_p_smaller() -> None:
    runs = random_runs(count=4)
    pair, all_ = compare(runs[:2]), compare(runs)
    one, other = figures(pair), figures(all_)
    assert (pair.simultaneous, all_.simultaneous) == (False, True)
    for key in ("n", "difference", "standardized_difference", "win_rate", "difference_at_equal_length", "flips"):
        assert other[key] == one[key]
    assert other["p"] >= one["p"]
    assert other["interval"][0] <= one["interval"][0] < one["interval"][1] <= other["interval"][1]


def test_figures_are_those_of_scipy_and_numpy() -> None:
    runs = random_runs(prompts=80)
    a, b = (np.array(run.rewards[RM]) for run in runs)
    baseline, found = compare(runs).describe()["models"]
    assert (baseline["name"], found["name"], found["n"]) == ("A", "B", 80)
    assert "difference" not in baseline
    assert (baseline["mean"], baseline["standard_error"]) == (pytest.approx(a.mean()), pytest.approx(stats.sem(a)))
    assert found["difference"] == pytest.approx((b - a).mean())
    assert found["standardized_difference"] == pytest.approx((b - a).mean() / a.std(ddof=1))
    assert found["win_rate"] == (b > a).mean()
    assert found["characters"] == np.mean([len(row.output) for row in runs[1].rows])
    assert found["tokens"] == np.mean([row.tokens for row in runs[1].rows])
    t = stats.ttest_rel(b, a)
    assert found["interval"] == pytest.approx(tuple(t.confidence_interval(0.95)), abs=0.02)
    assert found["p"] == pytest.approx(t.pvalue, abs=0.002)


def test_subsets_are_compared_for_themselves() -> None:
    runs = random_runs(count=3, prompts=50)
    found = figures(compare(runs))["subsets"]
    assert found.keys() == {"one", "two"}
    for name, part in found.items():
        rows = [number for number, row in enumerate(runs[0].rows) if row.subset == name]
        alone = figures(compare([permuted(run, rows) for run in runs]))
        assert {key: alone[key] for key in part if key != "baseline_mean"} == {
            key: value for key, value in part.items() if key != "baseline_mean"
        }


def test_the_rows_that_flip_are_the_largest_differences_of_each_sign() -> None:
    first = made("A", [0.0] * 8)
    second = made("B", [1.0, -5.0, 3.0, 0.0, -2.0, 4.0, -1.0, 0.5])
    found = figures(compare([first, second], flips=2))
    assert found["flips"] == ["p1", "p5", "p2", "p4"]
    assert found["flip_rows"][1] == {"id": "p5", "sample": 0, "difference": 4.0}
    assert figures(compare([first, second], flips=0))["flips"] == []
    assert len(figures(compare([first, second], flips=99))["flips"]) == 7, "a tie does not flip"


# --- rows that are left out -----------------------------------------------------------------------------------------


def test_a_row_without_a_reward_is_left_out_by_name() -> None:
    runs = random_runs(count=3)
    values = list(runs[1].rewards[RM])
    values[7] = None
    scoring = {RM: Scoring(RM, None, reasons={7: "no finite number"})}
    runs[1] = replace(runs[1], rewards={RM: tuple(values)}, scorings=scoring)
    found = compare(runs)
    baseline, one, other = found.describe()["models"]
    assert (baseline["n"], one["n"], other["n"]) == (60, 59, 60)
    assert found.describe()["left_out"] == [{"id": "p7", "sample": 0, "run": "B", "reason": "no finite number"}]
    rest = [number for number in range(60) if number != 7]
    alone = figures(compare([permuted(run, rest) for run in runs[:2]]))
    assert one["difference"] == pytest.approx(alone["difference"])
    assert found.notes[-1] == f"left out by {RM}: 1 row of B: no finite number (p7)"


def test_intersect_names_what_it_drops() -> None:
    first, second = random_runs(prompts=40)
    fewer = permuted(second, range(5, 40))
    more = permuted(first, range(35))
    found = compare([more, fewer], intersect=True)
    expected = compare([permuted(first, range(5, 35)), permuted(second, range(5, 35))])
    assert found.n == 30
    assert figures(found) == figures(expected)
    left = found.describe()["left_out"]
    assert [(row["id"], row["run"]) for row in left] == [
        *((f"p{number}", "B") for number in range(5)),
        *((f"p{number}", "A") for number in range(35, 40)),
    ]
    with pytest.raises(InputError) as caught:
        compare([more, fewer])
    assert str(caught.value) == (
        "A and B answer different prompts: 5 rows only in A: p0, p1, p2 and 2 more; 5 rows only in B: p35, p36, p37 "
        "and 2 more; --intersect compares the 30 that all share"
    )


def test_nothing_in_common_is_refused_either_way() -> None:
    first = made("A", [1.0, 2.0])
    second = made("B", [1.0, 2.0], prompts=["x", "y"])
    with pytest.raises(InputError, match="none is in both"):
        compare([first, second])
    with pytest.raises(InputError, match="A and B have no prompt in common"):
        compare([first, second], intersect=True)


def test_fewer_samples_are_another_set_of_rows() -> None:
    first, second = random_runs(prompts=5, samples=2)
    with pytest.raises(InputError, match="5 rows only in A: p0#1, p1#1, p2#1 and 2 more"):
        compare([first, permuted(second, range(0, 10, 2))])


def test_runs_that_share_little_say_little() -> None:
    for count in (1, 2, 3):
        found = compare(random_runs(prompts=count))
        text = json.dumps(found.describe(), allow_nan=False)
        assert json.loads(text)["n"] == count
        assert as_text(found)
    none = [replace(run, rewards={RM: (None, None)}) for run in random_runs(prompts=2)]
    found = figures(compare(none))
    assert [found[key] for key in ("n", "mean", "difference", "interval", "p", "win_rate")] == [0, *[None] * 5]
    assert found["subsets"]["one"]["n"] == 0


# --- reward models --------------------------------------------------------------------------------------------------


def test_each_reward_model_has_a_table_of_its_own() -> None:
    runs = random_runs(count=3)
    found = compare(runs).describe()
    assert (found["reward_model"], [one["reward_model"] for one in found["further"]]) == (RM, [OTHER])
    alone = compare([replace(run, rewards={OTHER: run.rewards[OTHER]}) for run in runs]).describe()
    further = found["further"][0]
    assert further == {key: alone[key] for key in further}
    assert [one["name"] for one in found["agreement"]] == ["B", "C"]
    assert all(one["reward_models"] == [RM, OTHER] for one in found["agreement"])
    d, e = (np.subtract(runs[1].rewards[model], runs[0].rewards[model]) for model in (RM, OTHER))
    assert found["agreement"][0]["correlation"] == pytest.approx(np.corrcoef(d, e)[0, 1])
    assert found["agreement"][0]["same_sign"] == np.mean(np.sign(d) == np.sign(e))


def test_a_reward_model_that_not_all_have_is_left_aside() -> None:
    first, second = random_runs()
    found = compare([first, replace(second, rewards={RM: second.rewards[RM]})])
    assert [table.key for table in found.tables] == [RM]
    assert found.notes == (f"rewards by {OTHER} are ignored: not all runs have them",)


def test_rewards_of_different_reward_models_are_refused() -> None:
    first, second = random_runs()
    with pytest.raises(InputError, match=f"different reward models cannot be compared: A by {RM}; B by {OTHER}"):
        compare([replace(one, rewards={model: one.rewards[model]}) for one, model in ((first, RM), (second, OTHER))])
    kinds = [{RM: Scoring(RM, None, settings={"reward_model": {"headers_xxh3": one}})} for one in ("a", "b")]
    with pytest.raises(InputError, match=f"two reward models that are both called {RM}"):
        compare([replace(run, scorings=kind) for run, kind in zip((first, second), kinds, strict=True)])


def test_other_settings_of_scoring_are_said() -> None:
    runs = random_runs()
    kinds = [{RM: Scoring(RM, None, settings={"dtype": one, "task": one})} for one in ("float32", "bfloat16")]
    found = compare([replace(run, scorings=kind) for run, kind in zip(runs, kinds, strict=True)])
    assert f"A and B were scored by {RM} with a different dtype" in found.notes
    names = [{RM: Scoring(RM, None, settings={"dtype": "float32", "output": one})} for one in ("A", "B")]
    found = compare([replace(run, scorings=name) for run, name in zip(runs, names, strict=True)])
    assert found.notes == (), "whose rewards a further reward model's file has is no setting"


def test_cut_conversations_are_counted() -> None:
    first, second = random_runs()
    found = compare([first, replace(second, scorings={RM: Scoring(RM, None, truncated=frozenset({0, 3}))})])
    assert found.describe()["models"][1]["truncated"] == 2
    assert f"B: 2 of 60 conversations were cut at the maximum length by {RM}" in found.notes


def test_without_rewards_lengths_are_compared() -> None:
    first, second = random_runs()
    found = compare([first, replace(second, rewards={})])
    one = figures(found)
    assert one["characters"] is not None
    assert one["characters_difference"]["interval"] is not None
    nothing = (
        "mean",
        "difference",
        "interval",
        "p",
        "win_rate",
        "difference_at_equal_length",
        "standardized_difference",
    )
    assert [one[key] for key in nothing] == [None] * len(nothing)
    assert found.describe()["reward_model"] is None
    assert found.notes[0] == "without rewards: B: only lengths are compared; `expo score` makes rewards"


@pytest.mark.skipif(real() is None, reason="AlpacaEval's outputs and leaderboard are not on this machine")
def test_lengths_are_those_of_the_leaderboard() -> None:
    folder = real().data / "alpaca_eval"
    with (folder / "leaderboard.csv").open() as stream:
        published = {row[""]: int(row["avg_length"]) for row in csv.DictReader(stream)}
    files = sorted(map(str, folder.glob("*.json")))
    found = {one["name"]: one["characters"] for one in compare(read_runs(files)).describe()["models"]}
    assert len(found) == 5
    assert {name: int(mean) for name, mean in found.items()} == {name: published[name] for name in found}, (
        "cut, not rounded"
    )


# --- in words -------------------------------------------------------------------------------------------------------


def judged(gain: float, per_character: float, longer: int) -> str:
    rng = np.random.default_rng(2)
    lengths = rng.integers(300, 600, size=200)
    more = lengths + longer + rng.integers(-100, 100, size=200)
    base = rng.normal(size=200)
    first = made("A", base.tolist(), outputs=["x" * n for n in lengths])
    rewards = base + gain + per_character * (more - lengths) + rng.normal(0, 0.1, size=200)
    found = compare([first, made("B", rewards.tolist(), outputs=["x" * n for n in more])])
    return verdict(found.tables[0], found.tables[0].others[0])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ((0.5, 0.0, 150), ["B beats A (+0.", "characters longer. It is not only longer: at equal length"]),
        ((0.0, 0.002, 150), ["B beats A (+0.", "Length alone may explain it: at equal length"]),
        ((-0.2, 0.004, 150), ["B beats A (+0.", "It is only longer: at equal length the difference is -0."]),
        ((0.5, 0.0, 0), ["B beats A", "Its answers are about as long. At equal length"]),
        ((-0.5, 0.0, 150), ["B loses to A (-0.", "characters longer. At equal length"]),
        ((-0.5, 0.0, -150), ["B loses to A", "characters shorter. It is not only shorter: at equal length"]),
        ((0.0, 0.0, 150), ["B is not distinguishable from A", "characters longer. At equal length"]),
    ],
)
def test_a_verdict_says_who_wins_and_whether_it_is_only_longer(case: tuple, says: list[str]) -> None:
    sentence = judged(*case)
    assert all(part in sentence for part in says), sentence


def test_a_verdict_on_two_reward_models() -> None:
    first = made("A", [0.0] * 20, further=[0.0] * 20)
    both = verdicts(compare([first, made("B", [1.0] * 20, further=[2.0] * 20)]))
    assert both[-1] == f"{RM} and {OTHER} both prefer B; they prefer the same answer on 100.0% of 20 rows."
    one = verdicts(compare([first, made("B", [1.0] * 20, further=[-2.0] * 20)]))
    assert one[-1] == (f"Of B and A, {RM} prefers B and {OTHER} A; they prefer the same answer on 0.0% of 20 rows.")


def test_tables_fit_a_terminal_and_names_are_text() -> None:
    runs = random_runs(count=3)
    runs[1] = replace(runs[1], name="an-organisation-model-of-a-long-name-that-goes-on-and-on-ExPO-a0.3\x1b[31m")
    runs[2] = replace(runs[2], name="a|b_c_`d`<script>")
    found = compare(runs)
    text, markdown = as_text(found), as_markdown(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text + markdown
    assert "ExPO-a0.3\\x1b[31m" in text
    assert r"a\|b\_c\_\`d\`\<script>" in markdown
    assert "\n| A | 60 |" in markdown


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*args: object) -> Result:
        code = cli.run(["compare", *map(str, args)])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [(f"question {number}?", "word " * int(rng.integers(1, 30))) for number in range(40)]
    for number, name in enumerate("ABC"):
        outputs = write_run(tmp_path, name, rows, rng.normal(0.5 * number, 1, size=40).tolist())
        write_rewards(outputs, rng.normal(size=40).tolist(), rm=OTHER, further=True)
    return tmp_path


KEYS = [
    "name", "n", "mean", "standard_error", "difference", "interval", "p", "standardized_difference", "win_rate",
    "tokens", "characters", "difference_at_equal_length", "subsets", "flips",
]  # fmt: skip
"""The contract's."""


def test_json_is_the_contract_s_object_and_nothing_is_written(folder: Path) -> None:
    before = tree(folder)
    result = run_expo("compare", "A", "B", "C", "--json", "--flips", 2, "--output-dir", folder)
    assert result.code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    found = json.loads(result.stdout)
    assert {"task", "reward_model", "baseline", "n", "models"} <= found.keys()
    assert (found["task"], found["reward_model"], found["baseline"], found["n"]) == ("prompts", RM, "A", 40)
    assert [one["name"] for one in found["models"]] == ["A", "B", "C"]
    assert all(set(KEYS) <= one.keys() for one in found["models"][1:])
    assert found["models"][1]["difference_at_equal_length"].keys() == {"difference", "interval"}
    assert (len(found["models"][1]["flips"]), found["simultaneous"], len(found["verdicts"])) == (4, True, 6)
    assert [one["reward_model"] for one in found["further"]] == [OTHER]
    assert tree(folder) == before


def test_the_table_has_no_colour_and_needs_no_file_names(folder: Path, run: Callable[..., Result]) -> None:
    result = run("B", "A", "--output-dir", folder)
    assert (result.code, "\x1b" in result.stdout) == (0, False)
    assert result.stdout.startswith(f"prompts, rewards by {RM}: 40 rows, 40 prompts\nmodel")
    assert "A loses to B" in result.stdout or "A is not distinguishable from B" in result.stdout
    markdown = run("B", "A", "--output-dir", folder, "--markdown").stdout
    assert "| model | n | mean reward | s.e. | tokens | characters | longer by |\n| :-- | --: |" in markdown


def test_what_a_dry_run_says(folder: Path, run: Callable[..., Result]) -> None:
    result = run("A", "B", "--output-dir", folder, "--dry-run", "--json")
    found = json.loads(result.stdout)
    assert (found["baseline"], found["rows"], found["reward_models"]) == ("A", 40, f"{RM}, {OTHER}")
    assert [Path(file).name for file in found["runs"][1]["rewards"]] == ["B.jsonl", "B@rm.jsonl"]


def test_words_can_stand_in_a_config_file(folder: Path, run: Callable[..., Result]) -> None:
    file = folder / "expo.toml"
    file.write_text(f'[compare]\nruns = ["A", "B"]\nflips = 1\noutput-dir = "{folder}"\n')
    found = json.loads(run("--config", file, "--json").stdout)
    assert [one["name"] for one in found["models"]] == ["A", "B"]
    found = json.loads(run("C", "B", "--config", file, "--json").stdout)
    assert [one["name"] for one in found["models"]] == ["C", "B"], "words count before the file's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A"], "compare takes two or more runs, not 1: a baseline, and what to compare with it"),
        ([], "compare takes two or more runs, not 0"),
        (["A", "A"], "are the same run"),
        (["A", "D"], "no outputs or rewards of D"),
        (["A", "B", "--flips", "-1"], "--flips must be 0"),
        (["A", "short"], "A and short answer different prompts: 38 rows only in A: 2, 3, 4 and 35 more"),
        (["A", "alone"], f"cannot be compared: A by {RM}, {OTHER}; alone by strange/rm@c0ffee"),
    ],
)
def test_a_refusal_is_one_line(folder: Path, run: Callable[..., Result], words: list[str], message: str) -> None:
    rows = [(f"question {number}?", "x") for number in range(40)]
    write_run(folder, "short", rows[:2], [1.0, 2.0])
    write_rewards(write_outputs(folder, "alone", rows), [1.0] * 40, rm="strange/rm", revision="c0ffee")
    result = run(*words, "--output-dir", folder)
    assert (result.code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_intersect_says_what_it_drops(
    folder: Path, run: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(f"question {number}?", "x") for number in range(40)]
    write_run(folder, "short", rows[:30], [1.0] * 30)
    found = json.loads(run("A", "short", "--intersect", "--json", "--output-dir", folder).stdout)
    assert (found["n"], len(found["left_out"])) == (30, 10)
    assert found["left_out"][0] == {"id": "30", "sample": 0, "run": "short", "reason": "short has no such row"}
    assert "10 rows of short: short has no such row (30, 31, 32, … and 7 more)" in caplog.text


def test_python_users_compare_too(folder: Path) -> None:
    from expo.verbs import compare as verb

    found = verb.run(CompareConfig(runs=("A", "B"), output_dir=str(folder)))
    assert found.comparison.tables[0].others[0].name == "B"
