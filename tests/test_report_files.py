"""`expo report` without a browser: what it reads, writes and refuses, and what it says of what it found."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import helpers
import pytest
from made_runs import RM, made_runs, write_files
from PIL import Image
from sizes import sized

from expo.cli import program as cli
from expo.config import ReportConfig
from expo.output import charts
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.run import RowKey, Run, RunRow
from expo.verbs.report.aligned import align
from expo.verbs.report.figures import charts_of
from expo.verbs.report.job import plan
from expo.verbs.report.notes import notes
from expo.verbs.report.page import build
from expo.verbs.report.text import digits_for, number, percent, probability, shown_interval, signed, visible
from expo.verbs.report.verdict import decimals, verdict

NAMES = ("dpo", "dpo-ExPO-a0.3", "dpo-ExPO-a0.5")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Output files of three runs, with rewards beside them."""
    return write_files(tmp_path / "work", made_runs(20, NAMES, characters=120))


def report(capsys: pytest.CaptureFixture[str], *words: object) -> helpers.Result:
    code = cli.run(["report", *map(str, words)])
    return helpers.Result(code, *capsys.readouterr())


def test_it_prints_the_path_and_writes_the_same_page_again(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "folder" / "report.html"
    before = helpers.tree(tmp_path / "work")
    done = report(capsys, *files, "--output", page)
    assert (done.code, done.stdout) == (0, f"{page}\n")
    first = page.read_bytes()
    assert report(capsys, *files, "--output", page).code == 0
    assert page.read_bytes() == first
    assert list(page.parent.iterdir()) == [page]
    assert helpers.tree(tmp_path / "work") == before


def test_json_is_one_object(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = report(capsys, *files, "--output", tmp_path / "r.html", "--figures", tmp_path / "figures", "--json")
    found = json.loads(done.stdout)
    assert found["page"] == str(tmp_path / "r.html")
    assert found["bytes"] == (tmp_path / "r.html").stat().st_size
    assert found["runs"] == list(NAMES)
    assert found["rows"] == 20
    assert found["verdict"] in (tmp_path / "r.html").read_text()
    assert sorted(map(str, (tmp_path / "figures").iterdir())) == sorted(found["figures"])


def test_a_dry_run_writes_nothing(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = report(capsys, *files, "--output", tmp_path / "r.html", "--figures", tmp_path / "f", "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert [run["alpha"] for run in found["runs"]] == [0.0, 0.3, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize("target", ["page", "figure"])
def test_what_others_wrote_is_kept(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    page, figures = tmp_path / "r.html", tmp_path / "figures"
    other = page if target == "page" else figures / "rewards.png"
    words = (*files[:2], "--output", page, "--figures", figures)
    other.parent.mkdir(exist_ok=True)
    other.write_text("<!DOCTYPE html><p>whose? about expo report</p>")
    done = report(capsys, *words)
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert f"{other} exists and expo report did not write it; --overwrite replaces it" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "work" not in path.parts] == [other]
    assert report(capsys, *words, "--overwrite").code == 0
    assert "whose?" not in other.read_text(errors="replace")


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "r.html"
    assert report(capsys, *files[:2], "--output", page).code == 0
    old = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    done = report(capsys, *files, "--output", page)
    assert (done.code, page.read_bytes()) == (1, old)
    assert "No space left on device" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "work"] == ["r.html"]


REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "no run": ((), "report takes two or more runs, or the folder of a sweep with its sweep.json, not none"),
    "one run": (("{dpo}",), "report takes two or more runs"),
    "not a page": (("{dpo}", "{expo}", "--output", "{folder}/r.jsonl"), "--output must end in .html"),
    "a folder": (("{dpo}", "{expo}", "--output", "{folder}/folder.html"), "is a folder; name a file in it"),
    "figures in a file": (("{dpo}", "{expo}", "--figures", "{dpo}"), "is a file, not a folder"),
    "an empty sweep": (("{folder}/sweep",), "lists no alphas"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_one_line(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"alphas": []}')
    before = sorted(tmp_path.rglob("*"))
    done = report(capsys, *(word.format(dpo=files[0], expo=files[1], folder=tmp_path) for word in words))
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sweeps_folder_stands_for_its_runs(tmp_path: Path) -> None:
    """α = 0 first, then in the order of α; outputs of an α that sweep.json does not list are left alone."""
    alphas = (0.5, -1.0, 0.0, 0.1, 0.9)
    runs = made_runs(20, [f"zephyr-ExPO-a{alpha}" for alpha in alphas], characters=120)
    write_files(tmp_path, runs)
    listed = [{"alpha": alpha, "mean": 0.1} for alpha in alphas[:4]]
    (tmp_path / "sweep.json").write_text(json.dumps({"best_alpha": 0.5, "verdict": "…", "alphas": listed}))
    found = plan(ReportConfig(runs=(str(tmp_path),))).describe()["runs"]
    assert [(one["name"], one["alpha"]) for one in found] == [
        (f"zephyr-ExPO-a{alpha}", alpha) for alpha in (0.0, -1.0, 0.1, 0.5)
    ]


def test_outputs_that_are_not_the_sweeps_are_left_alone(tmp_path: Path) -> None:
    """Of another DPO model, or another task, which lie in its folder since before it was begun anew."""
    for name in ("aaa", "zephyr", "zzz"):
        write_files(tmp_path, made_runs(20, [f"{name}-ExPO-a{alpha}" for alpha in (0.0, 0.5)], characters=120))
    shutil.copytree(tmp_path / "outputs_made", tmp_path / "outputs_other")
    listed = [{"alpha": alpha, "name": f"zephyr-ExPO-a{alpha}"} for alpha in (0.0, 0.5)]
    (tmp_path / "sweep.json").write_text(json.dumps({"best_alpha": 0.5, "task": "made", "alphas": listed}))
    job = plan(ReportConfig(runs=(str(tmp_path),)))
    assert [run.name for run in job.runs] == ["zephyr-ExPO-a0.0", "zephyr-ExPO-a0.5"]
    assert {run.task for run in job.runs} == {"made"}


def swept(folder: Path, chosen: float, rejected: str | None) -> list[Run]:
    """The folder of a sweep over 0.1 and 0.5, with SFT."""
    alphas = (0.0, -1.0, 0.1, 0.5)
    runs = made_runs(20, [f"zephyr-ExPO-a{alpha}" for alpha in alphas], characters=120, alphas=alphas)
    write_files(folder, runs)
    listed = [{"alpha": alpha, "rejected": rejected if alpha == 0.1 else None} for alpha in sorted(alphas)]
    record = {"best_alpha": chosen, "verdict": "What the sweep says.", "alphas": listed, "notes": ["A note of it."]}
    (folder / "sweep.json").write_text(json.dumps(record))
    return runs


def test_the_page_of_a_sweep_says_what_the_sweep_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = swept(tmp_path, 0.5, "length alone may explain it")
    done = report(capsys, tmp_path, "--output", tmp_path / "r.html", "--json")
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["verdict"] == "What the sweep says."
    assert said["notes"][:2] == ["α = 0.1 is not chosen: length alone may explain it", "A note of it."]
    page = (tmp_path / "r.html").read_text()
    assert "<h1>α = 0.5 is chosen</h1>" in page
    assert "What the sweep says." in page
    assert "<dt>Difference in reward" in page
    assert "Reward and length against α" in page
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert {"SFT", "DPO", "α = 0.5 is chosen", "higher, but rejected"} <= set(re.findall(r">([^<]+)<", picture))
    table = compare(runs, apart=["zephyr-ExPO-a-1.0"]).tables[0]
    assert shown_interval(table.models[3].paired.interval, decimals(table)) in page  # SFT widens nothing
    assert "hold for all models but zephyr-ExPO-a-1.0 at once" in page


def test_the_page_of_a_sweep_that_chose_none_has_no_figures_of_one(tmp_path: Path) -> None:
    swept(tmp_path, 0.0, None)
    job = plan(ReportConfig(runs=(str(tmp_path),)))
    comparison = compare(job.runs)
    aligned = align(job.runs, [table.key or "" for table in comparison.tables])
    found = verdict(aligned, comparison, job.sweep)
    assert (found.headline, found.sentences) == ("No α is chosen", ("What the sweep says.",))
    assert "<dt>Difference in reward" not in build(aligned, comparison, found, [], [])


def test_what_a_sweep_chose_has_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept(tmp_path, 0.5, None)
    (tmp_path / "outputs_made" / "zephyr-ExPO-a0.5.jsonl").unlink()
    assert "no outputs of α = 0.5, which its sweep.json chose" in report(capsys, tmp_path).stderr
    record = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(record | {"best_alpha": 0.7}))
    assert "chose an α that it does not list: 0.7" in report(capsys, tmp_path).stderr


# --- words ----------------------------------------------------------------------------------------------------------


def runs_of(
    changes: Sequence[float], *, longer: float = 1.0, length_pays: float = 0.0, models: Sequence[str] = (RM,)
) -> list[Run]:
    """A baseline, and a model for each change of the mean reward; `length_pays` for each character beyond 100."""
    import numpy as np

    rng, runs = np.random.default_rng(0), []
    for place, change in enumerate((0.0, *changes)):
        sizes = (rng.uniform(60, 140, 300) * (longer if place else 1)).astype(int)
        rows = tuple(
            RunRow(RowKey(str(n), 0), str(n), f"prompt {n}", (), "x" * size, None, int(size), "stop")
            for n, size in enumerate(sizes)
        )
        values = change + length_pays * (sizes - 100) + rng.normal(0, 0.5, 300)
        rewards = {model: tuple(map(float, values * (-1) ** n)) for n, model in enumerate(models)}
        runs.append(Run("base" if place == 0 else f"m{place}", "task", rows, rewards))
    return runs


VERDICTS: dict[str, tuple[list[Run], str, Sequence[str]]] = {
    "better": (runs_of([0.5]), "m1 is better than base", ["higher", "Only longer? No"]),
    "worse": (runs_of([-0.5]), "m1 is worse than base", ["lower", "There is no gain to explain."]),
    "nothing shown": (runs_of([0.01]), "m1 is not shown to be better than base", ["There is no gain to explain."]),
    "only longer": (
        runs_of([0.0], longer=1.5, length_pays=0.02),
        "m1 scores higher than base, but perhaps only by being longer",
        ["It may be: at equal length no gain is shown.", "longer ("],
    ),
    "half of it": (
        runs_of([0.5], longer=1.5, length_pays=0.02),
        "m1 is better than base",
        ["of the gain is left at equal length"],
    ),
    "worse but longer": (runs_of([-1.0], longer=2.0, length_pays=0.02), "m1", ["Yes: at equal length it is worse."]),
    "the best of several": (
        runs_of([0.3, 0.9, -0.5]), "m2 is better than base", ["1 of the other 2 models is better and 1 is worse."],
    ),
    "all worse": (runs_of([-0.3, -0.9]), "Every model is worse than base", ["the other model is worse."]),
    "none shown": (runs_of([0.0, 0.01]), "No model is shown to be better than base", ["not shown to differ"]),
    "a second opinion": (
        runs_of([0.5], models=(RM, "other/rm")),
        "m1 is better than base",
        ["other/rm says that it is worse: −0.", "the two prefer the same answer on 0\N{NO-BREAK SPACE}%"],
    ),
    "no rewards": (runs_of([0.5], models=()), "No rewards", ["Mean tokens of an answer: base 10"]),
}  # fmt: skip


@pytest.mark.parametrize(("runs", "headline", "sentences"), VERDICTS.values(), ids=VERDICTS.keys())
def test_the_verdict_says_what_the_figures_say(runs: list[Run], headline: str, sentences: Sequence[str]) -> None:
    found = verdict(align(runs, list(runs[0].rewards)), compare(runs))
    assert found.headline.startswith(headline)
    assert [sentence for sentence in sentences if sentence not in " ".join(found.sentences)] == []
    paired = compare(runs).tables[0].models[found.best].paired
    if paired and paired.difference is not None:
        assert f"{abs(paired.difference):.2f}" in found.sentences[0]
        assert percent(paired.win_rate) in found.sentences[0]


def test_what_is_missing_is_said() -> None:
    whole, other = runs_of([0.5])
    rows = [*other.rows]
    rows[0] = RunRow(rows[0].key, "0", "p", (), "x", None, None, "length")
    rows[1] = RunRow(rows[1].key, "1", "p", (), "", None, 0, "error")
    found = notes(align([whole, Run("m1", "task", tuple(rows), other.rewards)], [RM]))
    assert found == [
        "Lengths are in characters: there are no token counts for m1.",
        "m1: 1 of 300 answers is cut at the token limit.",
        "m1: 1 of 300 answers is empty, because generating failed.",
    ]
    rows = [RunRow(row.key, row.id, "", (), None, None, None, None) for row in whole.rows]
    alone = [replace(run, rows=tuple(rows)) for run in (whole, other)]
    assert notes(align(alone, [RM])) == ["The answers' texts are missing: these are reward files."]


def test_numbers_and_texts() -> None:
    assert [number(value) for value in (None, 0.0, -0.001, 1234.5, -1.005, float("nan"))] == [
        "–", "0.00", "0.00", "1,234.50", "−1.00", "–",
    ]  # fmt: skip
    assert [signed(value) for value in (0.5, -0.5, 0.0, 0.004, None)] == ["+0.50", "−0.50", "0.00", "0.00", "–"]
    assert [digits_for(values) for values in ([0.36], [0.04], [12], [123], [], [None, 0.0])] == [2, 3, 0, 0, 2, 2]
    assert [probability(p) for p in (0.0001, 0.0123, 0.5, None)] == ["p < 0.001", "p = 0.012", "p = 0.50", ""]
    assert visible("a\x00b\r\nc\u202ed\x7f\ud800") == "a␀b\nc[U+202E]d␡[U+D800]"
    assert visible("tab\tline\n 😀 é \u200d") == "tab\tline\n 😀 é \u200d"


# --- figures --------------------------------------------------------------------------------------------------------

LONG = [f"{'organization/' * 4}a-model-{place}-ExPO-a0.33333{place}" for place in range(sized(ci=4, full=8))]


CHARTS: dict[str, list[Run]] = {
    "several": made_runs(30, NAMES, characters=120),
    "many and long": made_runs(8, LONG, characters=60, alphas=[place / 10 for place in range(len(LONG))]),
    "constant": [replace(run, rewards={RM: (1.0,) * 300}) for run in runs_of([0.0])],
    "names that are no formulas": made_runs(40, ("$x^2$ <b> & \"q' #0072b2 3.14159", "日本 \x00\u202e"), characters=60),
}


@pytest.mark.parametrize("runs", CHARTS.values(), ids=CHARTS.keys())
@pytest.mark.filterwarnings("error")
def test_figures_are_whole(runs: list[Run]) -> None:
    drawn = charts_of(align(runs, list(runs[0].rewards)), compare(runs))
    assert len({chart.name for chart in drawn}) == len(drawn) >= 4
    for chart in drawn:
        svg, png = (charts.as_bytes(chart.figure, suffix, "a mark") for suffix in (".svg", ".png"))
        assert b"a mark" in svg[:4096]
        assert b"a mark" in png[:4096]
        ElementTree.fromstring(svg)
        with Image.open(io.BytesIO(png)) as picture:
            assert 800 < picture.size[0] < 1200
            assert 100 < picture.size[1] < 4000
        inline = chart.svg
        ElementTree.fromstring(inline.replace("xlink:href", "href"))
        assert len(inline) < 150_000
        tags = "".join(re.findall(r"<[^>]*>", inline))
        assert re.findall(r"#[0-9a-f]{6}\b|https?:|<script|<style|\d\.\d{3}", tags) == []
    labels = "".join(re.findall(r">([^<]*)<", drawn[0].svg))
    assert "0.33" not in labels or "0.333" in labels  # a name is not rounded


def test_the_same_figures_give_the_same_files() -> None:
    """Also where a figure was saved before."""
    runs = CHARTS["several"][:2]
    first, second = (charts_of(align(runs, [RM]), compare(runs)) for _ in range(2))
    svg = [chart.svg for chart in first]
    for suffix in (".svg", ".png"):
        files = [[charts.as_bytes(chart.figure, suffix, "m") for chart in drawn] for drawn in (first, second)]
        assert files[0] == files[1]
    assert [chart.svg for chart in second] == svg


def test_the_colours_of_the_page_are_those_of_the_figures() -> None:
    css = (Path(charts.__file__).parents[1] / "verbs" / "report" / "page.css").read_text()
    light = css[: css.index("@media")]
    wanted = {name: colour for colour, name in charts.VARIABLES.items()}
    assert {name: value for name, value in re.findall(r"(--[\w-]+): (#\w+)", light) if name in wanted} == wanted
    dark = css[css.index("@media (prefers-color-scheme: dark)") :].split("}")[0]
    assert set(wanted) <= set(re.findall(r"--[\w-]+", dark))
