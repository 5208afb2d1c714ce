"""A race on the page and in the picture: what its record says is there, and figures say which prompts they are of."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from made_races import RM, MadeRace, made_race
from matplotlib.backends.backend_agg import FigureCanvasAgg

from expo.config import ReportConfig
from expo.files import Row, json_text
from expo.output import charts
from expo.output.course import race_course
from expo.output.curves import OF_RACE, Confirmed, Estimate, alpha_curve
from expo.output.races import RaceRecord, read_race
from expo.output.sweeps import RECORD, read_sweep
from expo.verbs.compare.curve import curve_points
from expo.verbs.report.aligned import align
from expo.verbs.report.figures import COURSE, tracks_of
from expo.verbs.report.job import run
from expo.verbs.report.notes import sweep_notes
from expo.verbs.report.page import build
from expo.verbs.report.race import OF_ALL
from expo.verbs.report.verdict import verdict
from expo.verbs.sweep.picture import picture
from expo.verbs.sweep.text import as_text


def peak(alpha: float) -> float:
    return -2.0 if alpha > 5 else 0.39 - 0.12 * (alpha - 1.8) ** 2


@pytest.fixture(scope="module")
def made() -> MadeRace:
    """A race with α that are dropped, α that are added, and one that is confirmed."""
    found = made_race(peak, (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0), prompts=400, samples=1, refine=True)
    assert found.raced.best_alpha > 0
    assert len(found.raced.course.dropped) > 1
    assert any(look.added for look in found.raced.course.looks)
    return found


@pytest.fixture(scope="module")
def of_race(made: MadeRace) -> RaceRecord:
    found = read_race(made.record)
    assert found is not None
    return found


def bare(made: MadeRace, folder: Path, record: Row | None = None) -> str:
    """The page without its pictures."""
    (folder / RECORD).write_text(json.dumps(made.record if record is None else record))
    sweep, comparison = read_sweep(folder), made.choice.comparison
    aligned = align(made.runs, [RM], by_pairs=True)
    return build(aligned, comparison, verdict(aligned, comparison, sweep), [], [], sweep.race)


def page_of(folder: Path) -> str:
    run(ReportConfig(runs=(str(folder),), output=str(folder / "r.html"), overwrite=True))
    return (folder / "r.html").read_text()


def section(page: str, name: str) -> str:
    """The words of a section, its charts apart."""
    found = re.search(rf'<section[^>]* id="{name}".*?</section>|<section id="{name}".*?</section>', page, re.DOTALL)
    assert found, f"no section {name}"
    return re.sub(r"<svg.*?</svg>", "", found[0], flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(made: MadeRace, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(made.write(tmp_path_factory.mktemp("race")))


# --- what the record says is on the page ----------------------------------------------------------------------------


def test_the_record_is_read_as_it_was_written(made: MadeRace, of_race: RaceRecord) -> None:
    raced, looks = made.raced, made.raced.course.looks
    assert [(one.number, one.prompts, one.rows, dict(one.means)) for one in of_race.looks] == [
        (one.number, one.questions, one.rows, dict(one.means)) for one in looks
    ]
    for one, look in zip(of_race.looks, looks, strict=True):
        assert (one.leader, one.added, one.error, one.ends) == (look.leader, look.added, look.error, look.ends)
    assert dict(of_race.dropped) == dict(raced.course.dropped)
    assert (of_race.candidate, of_race.ended, of_race.share_of_grid) == (raced.candidate, raced.course.last.ends, 0.43)
    found, said = raced.confirmation, of_race.confirmation
    assert found is not None
    assert said is not None
    assert (said.difference, said.interval, said.p, said.level) == (found.difference, found.interval, found.p, 0.9)
    assert {alpha: of_race.answered[alpha].race for alpha in raced.course.dropped} == dict(raced.course.dropped)


def test_a_row_per_look_says_who_was_dropped_on_what_evidence(made: MadeRace, page: str) -> None:
    rows = re.findall(r'<tr><th scope="row">.*?</tr>', section(page, "race"), re.DOTALL)
    looks = made.raced.course.looks
    assert len(rows) == len(looks)
    for look, row in zip(looks, rows, strict=True):
        assert f"<td>{look.questions:,}<small>{look.rows:,} rows" in row
        assert f"limit δ = {look.error:.2g}" in row
        assert re.findall(r"<b>([^<]+)</b>", row) == [f"{one.alpha:g}" for one in look.dropped]
        for one in look.dropped:
            p = f"p = {one.p:.4f}" if one.p > 0.0001 else "p ≤ 0.0001"
            assert f"{one.lead.standardized:.2f} sd below α = {one.behind:g}, {p}" in row
        assert all(f"{alpha:g}" in row for alpha in (look.leader, *look.added, *look.means))
    assert f"The race ends here: {html.escape(looks[-1].ends)}." in section(page, "race")


def test_the_confirmation_is_told_with_its_prompts(made: MadeRace, page: str) -> None:
    found, words = made.raced.confirmation, section(page, "race")
    assert found is not None
    assert f"On the {found.questions} confirmation prompts, which the race did not see" in words
    assert f"{found.difference:+.2f}, 90\N{NO-BREAK SPACE}% interval" in words
    assert "It is confirmed." in words
    assert "43\N{NO-BREAK SPACE}% of the tokens that the grid would" in words


def test_the_first_screen_is_of_the_confirmation_alone(made: MadeRace, page: str) -> None:
    """The comparison's p and intervals are of prompts that chose: they prove nothing of the α that is chosen."""
    found, words = made.raced.confirmation, section(page, "verdict")
    assert found is not None
    assert f"<h1>α = {made.raced.best_alpha:g} is chosen</h1>" in words
    assert re.search(rf"<dt>Confirmed difference in reward</dt><dd>{re.escape(f'{found.difference:+.2f}')}", words)
    assert f"<dd>{found.questions:,}<small>prompts, which the race did not see" in words
    assert "Only longer?" not in words
    table = section(page, "table")
    assert not re.search(r'class="(gain|loss)"|>p</th>', table)


def test_every_figure_names_its_prompts(made: MadeRace, page: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html.unescape(page), re.DOTALL)
    course = [one for one in captions if one.startswith("The race")]
    assert len(course) == 1
    assert f' id="{COURSE}-' in page  # its SVG; every chart of the page is a file of --figures
    assert "Of the race's prompts alone" in course[0]
    assert all(OF_ALL in one for one in captions if one not in course)
    assert len(captions) >= 5
    assert OF_ALL in section(page, "table")
    assert OF_RACE in section(page, "flips")
    assert OF_RACE in as_text(made.choice).replace("\n", " ")


def test_rows_that_an_alpha_was_not_asked_are_not_missing(page: str) -> None:
    assert "Texts of answers are missing" not in page
    assert "Lengths are in characters" not in page


# --- other ends -----------------------------------------------------------------------------------------------------


def test_a_gain_that_is_not_confirmed_is_not_chosen(tmp_path: Path) -> None:
    flat = made_race(lambda alpha: 0.0, (0.5, 1.0, 2.0), prompts=60, samples=1, indifference=0.2, seed=1)
    assert flat.raced.candidate is not None
    assert flat.raced.rejections
    page = bare(flat, tmp_path)
    assert "<h1>No α is chosen</h1>" in page
    assert "It is not chosen: its gain is not confirmed" in section(page, "race")
    assert "<dl" not in section(page, "verdict")


def test_no_candidate_is_no_confirmation(tmp_path: Path) -> None:
    falls = made_race(lambda alpha: -alpha, (1.0, 2.0), prompts=60, samples=1)
    page = bare(falls, tmp_path)
    assert "There was no α to confirm." in section(page, "race")
    assert "<h1>No α is chosen</h1>" in page


def test_an_unfinished_race_chooses_nothing(made: MadeRace, tmp_path: Path) -> None:
    page = html.unescape(bare(made, tmp_path, made.unfinished))
    assert "<h1>The race is not finished: no α is chosen yet</h1>" in page
    words, last = section(page, "race"), made.raced.course.looks[-2]
    assert words.count('<th scope="row">') == last.number
    assert "Nothing has been confirmed yet." in words
    assert f"After {last.questions} of the race's {made.raced.plan.rules.questions} prompts" in section(page, "verdict")
    assert "is better than" not in page


# --- what others wrote ----------------------------------------------------------------------------------------------

HOSTILE = "<script>window.hit = 1</script>"
NOT_A_NUMBER = json.loads("NaN")
DAMAGED: dict[str, Row] = {
    "not an object": {"race": "x"},
    "none": {"race": None},
    "empty": {"race": {}},
    "looks are no list": {"race": {"looks": {"a": 1}}},
    "looks of nothing": {"race": {"looks": [None, 1, {}, {"prompts": -1}, {"prompts": 10}]}},
    "means without α = 0": {"race": {"looks": [{"prompts": 10, "means": [{"alpha": 1, "mean": 2}]}]}},
    "kinds": {
        "race": {
            "settings": [],
            "looks": [
                {
                    "prompts": 10,
                    "look": "1",
                    "leader": HOSTILE,
                    "error": [],
                    "means": [{"alpha": 0, "mean": 1}, {"alpha": 1, "mean": 10**400}, {"alpha": 2.0, "mean": 3}, 7],
                    "dropped": [{"alpha": 2.0, "p": HOSTILE, "behind": None}, {"p": 1}],
                    "added": [HOSTILE, True, 3],
                    "expected_loss": NOT_A_NUMBER,
                    "ends": HOSTILE,
                }
            ],
            "ended": HOSTILE,
            "candidate": HOSTILE,
            "passed_over": [{"alpha": 1.0, "why": HOSTILE}, None],
        },
        "confirmation": {"alpha": 2.0, "interval": [1], "difference": "x", "rejected": HOSTILE},
    },
    "confirmation": {"confirmation": []},
    "confirmation of no α": {"confirmation": {"difference": 1.0}},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[MadeRace, Path]:
    found = made_race(lambda alpha: 0.5 * (alpha > 0), (1.0, 2.0), prompts=40, samples=1)
    return found, found.write(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("part", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_race_breaks_no_page(small: tuple[MadeRace, Path], tmp_path: Path, part: Row) -> None:
    made, _ = small
    page = bare(made, tmp_path, {**made.record, **part})
    race = read_sweep(tmp_path).race
    assert race is not None
    tracks_of(race, made.choice.comparison.tables[0])
    assert "<h2>The race</h2>" in page
    assert HOSTILE not in page
    assert "nan" not in section(page, "race").lower()


@pytest.mark.parametrize("record", ["damaged", "unfinished"])
def test_the_whole_page_is_made_of_what_is_there(small: tuple[MadeRace, Path], record: str) -> None:
    made, folder = small
    damaged = {**made.record, **DAMAGED["kinds"]}
    (folder / RECORD).write_text(json.dumps(damaged if record == "damaged" else made.unfinished))
    page = page_of(folder)
    assert HOSTILE not in page
    assert "<h2>The race</h2>" in page
    assert "Texts of answers are missing" not in page


def test_a_sweep_over_a_grid_has_no_race(small: tuple[MadeRace, Path], tmp_path: Path) -> None:
    made, _ = small
    record = {key: value for key, value in made.record.items() if key not in ("race", "confirmation")}
    page = bare(made, tmp_path, {**record, "search": "grid"})
    assert read_sweep(tmp_path).race is None
    assert 'id="race"' not in page
    assert OF_ALL not in page


def test_notes_leave_the_dropped_to_the_race(made: MadeRace, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json_text(made.record))
    sweep = read_sweep(tmp_path)
    assert set(sweep.rejected) == set(made.raced.course.dropped)
    assert sweep_notes(sweep) == list(made.choice.notes)


# --- the pictures ---------------------------------------------------------------------------------------------------


def test_the_course_has_a_line_per_alpha_that_ends_where_it_was_dropped(made: MadeRace, of_race: RaceRecord) -> None:
    tracks = {track.alpha: track for track in tracks_of(of_race, made.choice.comparison.tables[0])}
    assert set(tracks) == set(made.raced.course.alphas) - {0.0}
    for look in made.raced.course.looks:
        for alpha in set(look.means) - {0.0}:
            at = list(tracks[alpha].prompts).index(look.questions)
            assert tracks[alpha].differences[at] == pytest.approx(look.means[alpha] - look.means[0.0])
    assert {alpha: track.prompts[-1] for alpha, track in tracks.items() if track.dropped} == dict(of_race.dropped)
    assert [alpha for alpha, track in tracks.items() if track.emphasised] == [made.raced.candidate]
    added = {alpha: look.questions for look in made.raced.course.looks for alpha in look.added}
    assert all(tracks[alpha].prompts[0] > at for alpha, at in added.items())
    with charts.style():
        figure = race_course(list(tracks.values()))
        FigureCanvasAgg(figure).draw()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [*(f"α = {alpha:g}" for alpha in sorted(tracks)), "dropped"]
    (axes,) = figure.axes
    assert axes.get_ylim()[0] > tracks[8.0].differences[0]  # a cliff does not flatten the others
    assert any(text.get_text().startswith("α = 8: ") for text in axes.texts)


def test_the_curve_has_the_confirmation_beside_its_alpha(made: MadeRace) -> None:
    found = made.raced.confirmation
    assert found is not None
    assert found.interval is not None
    points = curve_points(made.choice.comparison.tables[0])
    confirmed = Confirmed(found.candidate, Estimate(found.difference, *found.interval), 0.9, found.questions)
    with charts.style():
        figure = alpha_curve(points, unit="tokens", dropped=made.raced.course.dropped, confirmed=confirmed, of=OF_RACE)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [
        f"95 % band of the difference from DPO, {OF_RACE}",
        "dropped in the race",
        f"α = {found.candidate:g} on the confirmation, {found.questions} prompts, 90 % interval",
    ]
    base = points[0].reward.value
    heights = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert [pytest.approx(base + end) for end in found.interval] in heights
    assert [pytest.approx(base + found.difference)] in heights
    crosses = next(line for line in figure.axes[0].lines if line.get_marker() == "X")
    assert set(crosses.get_xdata()) == set(made.raced.course.dropped)
    content = picture(made.choice)
    assert content.startswith(b"\x89PNG")
    assert content == picture(made.choice)
