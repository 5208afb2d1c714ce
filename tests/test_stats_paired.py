"""What paired rows say beyond their mean difference, against statsmodels, scipy, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from expo.stats.agreement import agreement, correlation
from expo.stats.paired import at_zero, standardized_difference, win_rate

ROWS = st.lists(
    st.tuples(st.floats(-10, 10), st.integers(-2000, 2000).map(float), st.integers(0, 12)), min_size=5, max_size=60
)


# --- equal length ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ROWS)
def test_the_difference_at_equal_length_is_that_of_statsmodels(rows):
    import statsmodels.api as sm

    y, x, clusters = (np.array(column) for column in zip(*rows, strict=True))
    count = len(set(clusters.tolist()))
    if np.ptp(x) == 0 or count < 3:
        return
    fitted = sm.OLS(y, sm.add_constant(x)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    line = at_zero(y, x, clusters)
    assert line.intercept == pytest.approx(fitted.params[0], rel=1e-6, abs=1e-6)
    assert line.slope == pytest.approx(fitted.params[1], rel=1e-6, abs=1e-9)
    assert line.standard_error == pytest.approx(fitted.bse[0], rel=1e-5, abs=1e-6)
    assert line.interval == pytest.approx(tuple(fitted.conf_int()[0]), rel=1e-5, abs=1e-5)


def test_a_reward_that_only_counts_characters_leaves_nothing_at_equal_length():
    rng = np.random.default_rng(0)
    longer = rng.normal(200, 300, size=400)
    line = at_zero(0.002 * longer + rng.normal(0, 0.1, size=400), longer, np.arange(400))
    assert line.slope == pytest.approx(0.002, abs=1e-4)
    assert line.interval[0] < 0 < line.interval[1]


@pytest.mark.parametrize(
    ("y", "x", "expected"),
    [
        ([], [], None),
        ([1.0, 2.0], [5.0, 5.0], None),
        ([1.0], [7.0], None),
        ([1.0], [0.0], (1.0, None, None)),
        ([1.0, 2.0], [0.0, 0.0], (1.5, None, "interval")),
        ([1.0, 2.0], [0.0, 1.0], (1.0, 1.0, None)),
        ([1.0, 1.0, 1.0], [0.0, 1.0, 5.0], (1.0, 0.0, "interval")),
    ],
)
def test_too_little_for_a_line(y, x, expected):
    line = at_zero(np.array(y), np.array(x), np.arange(len(y)))
    if expected is None:
        assert line is None
        return
    intercept, slope, interval = expected
    assert line.intercept == pytest.approx(intercept)
    assert line.slope == (None if slope is None else pytest.approx(slope, abs=1e-12))
    assert (line.interval is None) is (interval is None)


def test_a_parabola_at_equal_length_is_that_of_statsmodels() -> None:
    import statsmodels.api as sm

    rng, clusters = np.random.default_rng(3), np.arange(60) // 3
    x = rng.integers(-50, 900, size=60).astype(float)
    y = 0.5 + 0.004 * x - 6e-6 * x**2 + rng.normal(size=60)
    powers = np.stack([np.ones(60), x, x**2], axis=1)
    fitted = sm.OLS(y, powers).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    line = at_zero(y, x, clusters, curved=True)
    assert (line.intercept, line.slope) == pytest.approx(tuple(fitted.params[:2]), rel=1e-6)
    assert line.standard_error == pytest.approx(fitted.bse[0], rel=1e-5)
    assert line.interval == pytest.approx(tuple(fitted.conf_int()[0]), rel=1e-5)


def test_a_parabola_follows_a_bend_that_misleads_a_line() -> None:
    """Nothing is there at equal length; rewards rise with length and fall again."""
    rng, longer = np.random.default_rng(0), np.linspace(20, 200, 300)
    y = 1 - ((longer - 80) / 80) ** 2 + rng.normal(0, 0.1, size=300)
    line, bend = (at_zero(y, longer, np.arange(300), curved=curved) for curved in (False, True))
    assert line.interval[0] > 1
    assert bend.interval[0] < 0 < bend.interval[1]


@pytest.mark.parametrize("x", [[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0]])
def test_a_parabola_needs_three_points(x: list[float]) -> None:
    y = np.array([1.0, 2.0, 4.0, 0.0])
    assert at_zero(y, np.array(x), np.arange(4), curved=True) == at_zero(y, np.array(x), np.arange(4))


@pytest.mark.parametrize(("samples", "curved"), [(1, False), (4, False), (1, True)])
def test_intervals_at_equal_length_cover(samples: int, curved: bool) -> None:
    rng = np.random.default_rng(12)
    clusters = np.repeat(np.arange(40), samples)
    covered = 0
    for _ in range(800):
        x = rng.gamma(2, 50, size=40)[clusters] - 80 + rng.normal(0, 20, size=len(clusters))
        y = 0.3 + 0.01 * x + rng.standard_t(4, size=40)[clusters] + rng.normal(size=len(clusters))
        low, high = at_zero(y, x, clusters, curved=curved).interval
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 800 <= 0.97


# --- wins -----------------------------------------------------------------------------------------------------------


def test_wins_count_ties_as_half():
    rate, interval = win_rate(np.array([1.0, 2.0, 0.0, -1.0]), np.arange(4))
    assert rate == 2.5 / 4
    assert interval[0] < rate < interval[1]


@settings(deadline=None)
@given(st.integers(2, 200), st.floats(0, 1))
def test_without_ties_the_interval_is_wilson_s(n, share):
    from statsmodels.stats.proportion import proportion_confint

    wins = round(n * share)
    if wins in (0, n):
        return
    rate, interval = win_rate(np.repeat([1.0, -1.0], [wins, n - wins]), np.arange(n))
    alpha = 2 * stats.norm.sf(stats.t.ppf(0.975, n - 1))
    expected = proportion_confint(rate * (n - 1), n - 1, alpha=alpha, method="wilson")
    assert interval == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("value", "rate"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_where_all_rows_are_alike_the_interval_still_has_a_width(value: float, rate: float) -> None:
    found, (low, high) = win_rate(np.full(50, value), np.arange(50))
    assert found == rate
    assert 0 <= low <= rate <= high <= 1
    assert 0.05 < high - low < 0.35


def test_no_rows_win_nothing():
    assert win_rate(np.zeros(0), np.arange(0)) == (None, None)
    assert win_rate(np.ones(1), np.arange(1)) == (1.0, None)
    assert win_rate(np.ones(3), np.zeros(3, dtype=int)) == (1.0, None), "one prompt"


@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_of_win_rates_cover(samples: int) -> None:
    rng = np.random.default_rng(13)
    clusters, covered = np.repeat(np.arange(30), samples), 0
    for _ in range(800):
        leaning = rng.choice([0.9, 0.5], size=30)[clusters]
        differences = np.where(rng.random(len(clusters)) < leaning, 1.0, -1.0)
        differences[rng.random(len(clusters)) < 0.2] = 0.0
        low, high = win_rate(differences, clusters)[1]
        covered += low <= 0.8 * 0.7 + 0.1 <= high
    assert 0.93 <= covered / 800 <= 0.97


# --- standard deviations --------------------------------------------------------------------------------------------


def test_the_unit_is_the_baseline_s_standard_deviation():
    baseline = np.array([1.0, 2.0, 4.0])
    assert standardized_difference(0.5, baseline) == pytest.approx(0.5 / np.std(baseline, ddof=1))
    assert standardized_difference(5.0, 10 * baseline + 3) == pytest.approx(standardized_difference(0.5, baseline))
    for constant in (np.full(5, 0.1), np.ones(1), np.zeros(0), np.zeros(4)):
        assert standardized_difference(1.0, constant) is None


def test_one_row_that_differs_in_both_says_nothing_of_equal_length():
    """A line goes through all points: no rounding error is an interval that lies above 0."""
    y, x = np.zeros(16), np.zeros(16)
    y[9], x[9] = 0.30078125, 7.0
    for scale in (1.0, 1e-9, 1e9):
        line = at_zero(scale * y, x, np.arange(16))
        assert (line.intercept, line.interval) == (0.0, (0.0, 0.0))
    assert at_zero(y + 0.1, x, np.arange(16)).intercept == pytest.approx(0.1)


# --- two reward models ----------------------------------------------------------------------------------------------


def test_a_gain_is_cut_into_what_both_see_and_what_one_sees():
    first, second = np.array([2.0, 1.0, -1.0, 4.0]), np.array([1.0, -1.0, -2.0, 0.0])
    found = agreement(first, second)
    assert (found.n, found.same_sign) == (4, 0.5)
    one, other = found.gains
    assert (one.difference, one.seen_by_both, one.only_here) == (1.5, 0.25, 1.25)
    assert one.share_only_here == pytest.approx(1.25 / 1.5)
    assert (other.difference, other.seen_by_both, other.only_here) == (-0.5, -0.25, -0.25)
    assert found.correlation == pytest.approx(stats.pearsonr(first, second).statistic)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=40))
def test_the_parts_of_a_gain_add_up(rows):
    found = agreement(*(np.array(column) for column in zip(*rows, strict=True)))
    for gain in found.gains:
        assert gain.seen_by_both + gain.only_here == pytest.approx(gain.difference, abs=1e-9)


def test_reward_models_that_agree_and_that_do_not():
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, size=4000)
    same = agreement(d, 3 * d)
    assert (same.correlation, same.same_sign) == (pytest.approx(1.0), 1.0)
    assert [gain.only_here for gain in same.gains] == [0.0, 0.0]
    coin = agreement(d, rng.permutation(d) - 0.2)
    assert coin.gains[0].share_only_here == pytest.approx(0.5, abs=0.1)
    assert agreement(d, -d).gains[0].share_only_here == 1.0


def test_agreement_about_nothing():
    assert agreement(np.zeros(0), np.zeros(0)).gains is None
    found = agreement(np.zeros(3), np.array([1.0, 2.0, 3.0]))
    assert (found.correlation, found.same_sign, found.gains[0].share_only_here) == (None, 0.0, None)
    assert correlation(np.full(3, 0.1), np.array([1.0, 2.0, 3.0])) is None
