"""Which α a sweep chooses: each test decides alone, order changes nothing, and what is not there is not chosen."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from expo.errors import InputError
from expo.output import charts
from expo.output.curves import CurvePoint, Estimate, alpha_curve
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.curve import curve_points
from expo.verbs.compare.run import RowKey, Run, RunRow
from expo.verbs.sweep.choice import choose
from expo.verbs.sweep.figures import Choice
from expo.verbs.sweep.picture import picture
from expo.verbs.sweep.text import as_text

RM, SECOND = "org/rm", "org/second"
PROMPTS = 40


def swept(
    gains: Mapping[float, float],
    *,
    second: Mapping[float, float] | None = None,
    longer: Mapping[float, float] | None = None,
    cut: Mapping[float, float] | None = None,
    prompts: int = PROMPTS,
    samples: int = 1,
    noise: float = 0.3,
    pays: float = 0.0,
    spread: float = 60.0,
    seed: int = 0,
) -> list[Run]:
    """A run per α: `gains` is its mean reward over that of α = 0, `longer` how many characters longer its answers are,
    `cut` the share of them that do not end; `pays` is the reward of a character more."""
    rng, runs = np.random.default_rng(seed), []
    keys = [RowKey(f"key {n}", sample) for n in range(prompts) for sample in range(samples)]
    quality = rng.normal(0, 1, prompts).repeat(samples)
    for alpha in {0.0: 0.0, **gains}:
        more = (longer or {}).get(alpha, 0.0)
        sizes = np.maximum(rng.normal(300, spread, len(keys)) + (rng.uniform(0.5, 1.5, len(keys)) * more), 1).astype(
            int
        )
        ends = np.arange(len(keys)) >= (cut or {}).get(alpha, 0.0) * len(keys)
        rows = tuple(
            RunRow(key, key.prompt[4:], "a prompt", (), "x" * size, None, int(size) // 4, "stop" if end else "length")
            for key, size, end in zip(keys, sizes, ends, strict=True)
        )
        rewards = {}
        for model, found in {RM: gains, SECOND: second}.items():
            if found is not None:
                values = quality + found.get(alpha, 0.0) + rng.normal(0, noise, len(keys)) + pays * (sizes - 300)
                rewards[model] = tuple(map(float, values))
        runs.append(Run(f"dpo-ExPO-a{alpha!r}", "prompts", rows, rewards, alpha))
    return runs


def without(run: Run, rows: Sequence[int]) -> Run:
    """A run some of whose rows failed."""
    lost = [replace(row, output="", finish_reason="error") if n in rows else row for n, row in enumerate(run.rows)]
    rewards = {
        model: tuple(None if n in rows else value for n, value in enumerate(values))
        for model, values in run.rewards.items()
    }
    return replace(run, rows=tuple(lost), rewards=rewards)


def entries(choice: Choice) -> dict[float, dict]:
    return {one["alpha"]: one for one in choice.describe()["alphas"]}


# --- each test alone ------------------------------------------------------------------------------------------------

RISES = {0.1: 0.5, 0.2: 1.0, 0.3: 0.4}


def test_the_highest_of_those_that_pass_is_chosen() -> None:
    choice = choose(swept(RISES))
    found = entries(choice)
    assert choice.best_alpha == 0.2
    assert [one["rejected"] for one in found.values()] == [None] * 4
    assert choice.verdict.startswith(f"α = 0.2 is best: {found[0.2]['difference']:+.3g} [")
    assert "The mean is highest at α = 0.2 and falls beyond it." in choice.verdict
    assert list(found) == [0.0, 0.1, 0.2, 0.3]
    assert found[0.2]["interval"][0] > 0
    assert found[0.0]["difference"] is found[0.0]["interval"] is found[0.0]["ended_difference"] is None


REJECTED: dict[str, tuple[list[Run], str, str]] = {
    "a gain that may be chance": (
        swept({0.1: 0.05, 0.2: -1.0}, noise=1.0, seed=3),
        "it is not significantly better than α = 0 (",
        "(the paper's N/A)",
    ),
    "a gain of length": (
        swept({0.1: 0.0, 0.2: -9.0}, longer={0.1: 100}, pays=0.01),
        "length alone may explain it (",
        "length alone may explain it",
    ),
    "a gain that the second does not see": (
        swept({0.1: 1.0, 0.2: -1.0}, second={0.1: 0.0}, seed=1),
        "org/second does not see the gain (",
        "org/second does not see the gain",
    ),
    "a gain that the second sees as a loss": (
        swept({0.1: 1.0, 0.2: -1.0}, second={0.1: -1.0}),
        "org/second does not see the gain (-",
        "org/second does not see the gain",
    ),
    "answers that no longer end": (
        swept({0.1: 1.0, 0.2: -1.0}, cut={0.1: 0.3}),
        "fewer answers end (-30.0 [",
        "fewer answers end",
    ),
}


@pytest.mark.parametrize(("runs", "why", "says"), REJECTED.values(), ids=REJECTED.keys())
def test_one_test_is_enough_to_reject(runs: list[Run], why: str, says: str) -> None:
    choice = choose(runs)
    found = entries(choice)
    assert found[0.1]["difference"] > 0
    assert found[0.1]["rejected"].startswith(why)
    assert found[0.2]["rejected"] is None  # it does not gain: there is nothing to reject
    assert choice.best_alpha == 0
    assert says in choice.verdict


def test_a_rejected_gain_gives_way_to_a_lower_one() -> None:
    choice = choose(swept({0.1: 0.5, 0.2: 1.0, 0.3: 0.8}, cut={0.2: 0.4, 0.3: 0.4}))
    assert choice.best_alpha == 0.1
    assert "α = 0.2 and 0.3 score higher but are rejected: fewer answers end." in choice.verdict


def test_a_gain_that_bends_with_length_is_one_of_length() -> None:
    """Rewards rise with length and fall again: a line through much longer answers says that shorter ones gain more."""
    runs = swept({2.0: 0.0}, longer={2.0: 110}, prompts=200, spread=5)
    bent = []
    for run in runs:
        sizes = np.array([len(row.output or "") for row in run.rows])
        values = np.array(run.rewards[RM]) * 0.2 + 2 - ((sizes - 370) / 100) ** 2
        bent.append(replace(run, rewards={RM: tuple(map(float, values))}))
    found = entries(choose(bent))[2.0]
    assert found["difference_at_equal_length"]["interval"][0] > 0
    assert found["difference_at_equal_length_curved"]["interval"][0] < 0
    assert found["rejected"].startswith("length alone may explain it (")


def test_endings_are_judged_where_most_of_the_first_end() -> None:
    runs = swept({0.1: 1.0}, cut={0.0: 0.55, 0.1: 1.0})
    choice = choose(runs)
    assert choice.best_alpha == 0.1
    assert entries(choice)[0.1]["ended_difference"]["interval"][1] < -0.05
    assert [note for note in choice.notes if "only 45 % of α = 0's answers end within --max-tokens" in note]
    unknown = [replace(run, rows=tuple(replace(row, finish_reason=None) for row in run.rows)) for run in runs]
    found = choose(unknown)
    assert (found.best_alpha, entries(found)[0.1]["ended"]) == (0.1, None)
    assert [note for note in found.notes if note.startswith("how answers ended is not known")]


@pytest.mark.parametrize(("lost", "best"), [(0.03, 0.1), (0.3, 0.0)])
def test_a_loss_of_endings_has_to_be_real(lost: float, best: float) -> None:
    assert choose(swept({0.1: 1.0}, cut={0.1: lost}, prompts=100)).best_alpha == best


def test_errors_are_neither_ended_nor_cut() -> None:
    base, first = swept({0.1: 1.0})
    found = entries(choose([base, without(first, range(10))]))[0.1]
    assert (found["finish_reasons"], found["ended"], found["n"]) == ({"error": 10, "stop": 30}, 1.0, 30)
    assert found["ended_difference"]["difference"] == 0


# --- rows -----------------------------------------------------------------------------------------------------------


def test_alphas_are_ranked_by_the_rows_that_all_have() -> None:
    """0.1 failed where rewards are low: by its own rows it would be the best."""
    runs = swept({0.1: 1.0, 0.2: 1.3})
    quality = np.array(runs[0].rewards[RM])
    runs[1] = without(runs[1], np.argsort(quality)[:15].tolist())
    choice = choose(runs)
    found = entries(choice)
    assert found[0.1]["mean"] > found[0.2]["mean"]
    assert found[0.1]["mean_on_shared_rows"] < found[0.2]["mean_on_shared_rows"]
    assert (choice.best_alpha, choice.shared_rows, [one["n"] for one in found.values()]) == (0.2, 25, [40, 25, 40])
    assert [note for note in choice.notes if note.startswith("α are ranked by 25 of 40 rows")]


def test_a_row_that_is_not_there_is_one_without_a_reward() -> None:
    """Rows of an α that lacks some, and of one that has more than α = 0."""
    runs = swept({0.1: 1.0, 0.2: 0.5})
    short = replace(runs[1], rows=runs[1].rows[7:], rewards={RM: runs[1].rewards[RM][7:]})
    whole = entries(choose([runs[0], short, runs[2]]))
    failed = entries(choose([runs[0], without(runs[1], range(7)), runs[2]]))
    names = ("difference", "interval", "p", "mean_on_shared_rows", "n", "rejected")
    assert [[one[name] for name in names] for one in whole.values()] == [
        [one[name] for name in names] for one in failed.values()
    ]
    less = [replace(run, rows=run.rows[5:], rewards={RM: run.rewards[RM][5:]}) for run in runs]
    assert entries(choose([less[0], *runs[1:]])) == entries(choose(less))


def test_an_alpha_without_rewards_does_not_keep_others_from_being_ranked() -> None:
    base, first, second = swept({0.1: 1.0, 0.2: 2.0})
    choice = choose([base, first, without(second, range(PROMPTS))])
    assert (choice.best_alpha, choice.shared_rows) == (0.1, PROMPTS)
    assert "cannot be compared" in entries(choice)[0.2]["rejected"]


def test_alphas_without_a_row_in_common_are_not_ranked() -> None:
    base, first, second = swept({0.1: 1.0, 0.2: 2.0})
    choice = choose([base, without(first, range(20)), without(second, range(20, 40))])
    assert (choice.best_alpha, choice.shared_rows) == (0.0, 0)
    assert "cannot be ranked" in choice.verdict


def test_order_changes_nothing() -> None:
    runs = swept({0.1: 0.5, 0.2: 0.8, -1.0: -0.5}, second={0.1: 0.3, 0.2: 0.4}, samples=2)
    order = np.random.default_rng(0).permutation(len(runs[0].rows))
    shuffled = [
        replace(
            run,
            rows=tuple(run.rows[n] for n in order),
            rewards={model: tuple(values[n] for n in order) for model, values in run.rewards.items()},
        )
        for run in runs[::-1]
    ]
    assert choose(shuffled).describe() == choose(runs).describe()


def test_a_pair_that_is_one_model_gives_no_alpha() -> None:
    base, *others = swept({0.1: 0.0, 0.2: 0.0})
    choice = choose([base, *(replace(run, rows=base.rows, rewards=base.rewards) for run in others)])
    assert choice.best_alpha == 0
    assert choice.verdict.startswith("No α is significantly better than α = 0 (the paper's N/A)")
    assert [one["difference"] for one in entries(choice).values()] == [None, 0, 0]


def test_the_smaller_alpha_of_two_that_are_alike() -> None:
    base, first, second = swept({0.1: 1.0, 0.2: 1.0})
    choice = choose([base, first, replace(second, rewards=first.rewards, rows=first.rows)])
    assert choice.best_alpha == 0.1


def test_figures_are_those_of_compare() -> None:
    """Samples of a prompt are one cluster, and intervals are simultaneous over the candidates."""
    runs = swept({0.1: 0.3, 0.2: 0.5}, samples=4)
    models = compare(runs).describe()["models"]
    found = list(entries(choose(runs)).values())
    for one, model in zip(found[1:], models[1:], strict=True):
        assert {name: model[name] for name in one.keys() & model.keys()} == {
            name: one[name] for name in one.keys() & model.keys()
        }
    assert choose(runs).describe()["prompts"] == PROMPTS


# --- references -----------------------------------------------------------------------------------------------------


def test_sft_is_compared_and_widens_nothing() -> None:
    runs = swept({-1.0: 3.0, 0.1: 0.5, 0.2: 0.8})
    with_sft, without_it = choose(runs), choose([run for run in runs if run.alpha != -1.0])
    found = entries(with_sft)
    assert with_sft.best_alpha == without_it.best_alpha == 0.2  # better than DPO as it is
    assert found.pop(-1.0)["interval"] == list(compare([runs[0], runs[1]]).tables[0].models[1].paired.interval or ())
    assert found == entries(without_it)
    assert with_sft.verdict == without_it.verdict


def test_without_candidates_nothing_is_chosen() -> None:
    choice = choose(swept({-1.0: 1.0}))
    assert (choice.best_alpha, choice.verdict) == (0.0, "No α above 0 was tried.")


# --- the curve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        (
            {0.1: 0.5, 0.5: 1.0},
            "The highest α tried, 0.5, has the highest mean: the curve may still rise; try larger α.",
        ),
        ({0.5: 1.0, 1.0: 0.5}, "The mean is highest at α = 0.5 and falls beyond it."),
        ({0.5: 1.0, 1.0: -1.0, 2.0: -2.0}, "falls beyond it; α = 1 and 2 are significantly worse than DPO."),
        ({0.5: -1.0}, "none that was tried scores higher. α = 0.5 is significantly worse than DPO."),
    ],
)
def test_the_verdict_says_how_the_curve_goes(gains: dict[float, float], says: str) -> None:
    assert choose(swept(gains)).verdict.endswith(says)


def test_no_effect_is_chosen_at_the_nominal_rate() -> None:
    """Of 100 sweeps over 5 α that do nothing: an interval of 95 % lies above 0 in one of 40."""
    found = [choose(swept(dict.fromkeys((0.1, 0.2, 0.3, 0.4, 0.5), 0.0), prompts=10, seed=seed)) for seed in range(100)]
    assert sum(choice.best_alpha > 0 for choice in found) <= 7  # 2.5 expected; more has p < 0.005
    assert all("N/A" in choice.verdict for choice in found if not choice.best_alpha)


# --- what is refused, and how it is said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (swept({0.1: 1.0})[1:], "it is not there"),
        (swept({0.1: 1.0})[:1], "no others are there"),
        ([*swept({0.1: 1.0}), *swept({0.1: 1.0})[1:]], "an α is there twice"),
        ([replace(run, alpha=None) for run in swept({0.1: 1.0})], "is of no α"),
        ([replace(run, rewards={}) for run in swept({0.1: 1.0})], "without rewards"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(runs: list[Run], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(runs)


def test_a_choice_as_data_and_as_text() -> None:
    runs = swept({-1.0: -1.0, 0.1: 0.4, 0.2: 0.9}, second={0.1: 0.5, 0.2: 0.0}, cut={0.1: 0.02})
    choice = choose(runs)
    found = json.loads(json.dumps(choice.describe(), allow_nan=False))
    assert found["best_alpha"] == 0.1
    assert (found["reward_model"], found["n"], found["prompts"], found["level"]) == (RM, PROMPTS, PROMPTS, 0.95)
    assert [one["alpha"] for one in found["further"][0]["alphas"]] == [-1.0, 0.0, 0.1, 0.2]
    assert {"tokens", "rejected"}.isdisjoint(found["further"][0]["alphas"][0])
    first, second, *words = as_text(choice).split("\n\n")
    marks = [line.split("  ")[-1].strip() for line in first.splitlines()[3:]]
    assert marks == ["SFT", "DPO", "chosen", "rejected: other reward"]
    assert "ended" in first
    assert "ended" not in second
    assert choice.verdict in " ".join(words[0].split())
    assert max(map(len, as_text(choice).splitlines())) <= 100


# --- the picture ----------------------------------------------------------------------------------------------------


def drawn(choice: Choice) -> tuple[list, list[str]]:
    """The panels of a choice's picture, and what is marked over them."""
    with charts.style():
        figure = alpha_curve(
            curve_points(choice.comparison.tables[0]),
            unit="tokens",
            chosen=choice.best_alpha,
            rejected={one.alpha for one in choice.alphas if one.rejections},
        )
    return figure.axes, [text.get_text() for text in figure.axes[0].texts]


def test_the_picture_shows_what_was_tested() -> None:
    choice = choose(swept({-1.0: -1.0, 0.1: 0.5, 0.4: 1.0}, cut={0.4: 0.4}))
    (reward, length, ended), marks = drawn(choice)
    assert marks == ["SFT", "DPO", "α = 0.1 is chosen"]
    found = entries(choice)
    line = max(reward.lines, key=lambda one: len(one.get_xdata()))
    assert list(line.get_xdata()) == [-1.0, 0.0, 0.1, 0.4]
    assert np.allclose(line.get_ydata(), [one["mean"] for one in found.values()])
    band = reward.collections[0].get_paths()[0].vertices
    ends = [found[0.0]["mean"] + end for alpha in (0.1, 0.4) for end in found[alpha]["interval"]]
    assert all(np.isclose(band[:, 1], end).any() for end in ends)
    assert band[:, 0].min() == 0  # SFT is not simultaneous with the others
    assert [list(one.lines[0].get_ydata()) for one in (length, ended)] == [
        [one[name] for one in found.values()] for name in ("tokens", "ended")
    ]


def test_none_is_marked_where_none_is_chosen() -> None:
    assert drawn(choose(swept({0.1: -0.5, 0.2: -1.0})))[1] == ["DPO: no α is chosen"]


@pytest.mark.parametrize("alphas", [(0.0, 0.1), (-1.0, 0.0, 0.1, 0.5), (-1.0, 0.0, 0.1, 1.0, 25.0), (0.0, 0.05, 25.0)])
def test_marks_do_not_touch(alphas: tuple[float, ...]) -> None:
    points = [CurvePoint(alpha, Estimate(alpha, alpha - 0.1, alpha + 0.1), None, None) for alpha in alphas]
    with charts.style():
        figure = alpha_curve(points, unit="tokens", chosen=sorted(alphas)[alphas.index(0.0) + 1])
        FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 3 - (-1.0 not in alphas)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert all(box.x1 <= figure.bbox.x1 and box.x0 >= 0 for box in boxes)


@pytest.mark.filterwarnings("error")
def test_the_picture_is_a_png_and_the_same_again() -> None:
    choice = choose(swept({0.1: 0.5}))
    content = picture(choice)
    assert content == picture(choice)
    with Image.open(io.BytesIO(content)) as image:
        assert 800 < image.size[0] < 1000 < image.size[1] < 1300
