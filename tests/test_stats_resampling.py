"""Intervals and p by resampling: against scipy, a plain loop, and what they promise, by simulation."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from expo.stats import resampling
from expo.stats.means import Sums, cluster_sums, clustered_mean_and_standard_error
from expo.stats.resampling import bootstrap_intervals, sign_flip_p, student_intervals


def sums_of(*models: np.ndarray, clusters: np.ndarray | None = None) -> Sums:
    of = np.arange(len(models[0])) if clusters is None else clusters
    return cluster_sums([(values, of) for values in models], int(of.max(initial=-1)) + 1)


# --- means ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 9)), min_size=3, max_size=60))
def test_the_clustered_standard_error_is_that_of_statsmodels(rows):
    import statsmodels.api as sm

    values, clusters = (np.array(column) for column in zip(*rows, strict=True))
    mean, error = clustered_mean_and_standard_error(values, clusters)
    assert mean == pytest.approx(values.mean(), abs=1e-9)
    if len(set(clusters.tolist())) < 2:
        assert error is None
        return
    fitted = sm.OLS(values, np.ones((len(values), 1))).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert error == pytest.approx(fitted.bse[0], rel=1e-6, abs=1e-7)


def test_without_clusters_it_is_the_plain_one():
    values = np.random.default_rng(0).normal(size=20)
    _, error = clustered_mean_and_standard_error(values, np.arange(20))
    assert error == pytest.approx(stats.sem(values))
    assert clustered_mean_and_standard_error(values[:0], np.arange(0)) == (None, None)
    assert clustered_mean_and_standard_error(values[:1], np.arange(1)) == (values[0], None)


# --- bootstrap ------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(25), rng.integers(1, 5, size=25))
    values = rng.exponential(size=len(clusters)) + rng.normal(size=25)[clusters]
    weights = np.concatenate(list(resampling._draws(25, 400, seed=1)))
    assert (weights.sum(axis=1) == 25).all()
    mean, error = clustered_mean_and_standard_error(values, clusters)
    t = []
    for drawn in weights:
        chosen = [np.flatnonzero(clusters == c) for c, times in enumerate(drawn) for _ in range(int(times))]
        again = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(chosen)])
        m, se = clustered_mean_and_standard_error(values[np.concatenate(chosen)], again)
        t.append((m - mean) / se)
    low, high = sorted(t)[9], sorted(t)[-10]
    student = stats.t.ppf(0.975, 24)
    expected = mean - max(high, student) * error, mean - min(low, -student) * error
    ((*found,),) = bootstrap_intervals(sums_of(values, clusters=clusters), resamples=400, seed=1)
    assert found == pytest.approx(expected, rel=1e-9)


SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
    "heavy tails": lambda rng, n: rng.standard_t(3, size=n),
    "ties": lambda rng, n: rng.choice([-1.0, 0.0, 0.0, 1.0], size=n),
}


@pytest.mark.parametrize("samples", [1, 4], ids=["one sample", "four samples"])
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_of_thirty_prompts_cover(shape: str, samples: int) -> None:
    rng = np.random.default_rng(11)
    clusters = np.repeat(np.arange(30), samples)
    covered = 0
    for seed in range(500):
        values = SHAPES[shape](rng, 30)[clusters]
        if samples > 1:
            values = values + SHAPES[shape](rng, len(clusters))
        ((low, high),) = bootstrap_intervals(sums_of(values, clusters=clusters), resamples=399, seed=seed)
        covered += low <= 0 <= high
    assert 0.93 <= covered / 500 <= 0.975


def test_intervals_of_several_models_cover_at_once() -> None:
    rng = np.random.default_rng(5)
    all_covered = single = 0
    for seed in range(500):
        shared = rng.normal(size=60)
        models = [0.7 * shared + rng.normal(size=60) for _ in range(4)]
        intervals = bootstrap_intervals(sums_of(*models), resamples=399, seed=seed)
        alone = bootstrap_intervals(sums_of(models[0]), resamples=399, seed=seed)[0]
        all_covered += all(low <= 0 <= high for low, high in intervals)
        single += alone[0] <= 0 <= alone[1]
        assert intervals[0][0] <= alone[0] < alone[1] <= intervals[0][1]
    assert 0.93 <= all_covered / 500 <= 0.97
    assert 0.93 <= single / 500 <= 0.97


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 30])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_equal_differences_have_an_interval_of_no_width(count: int, value: float) -> None:
    (interval,) = bootstrap_intervals(sums_of(np.full(count, value)))
    if count < 2:
        assert interval is None
    else:
        assert interval == pytest.approx((value, value), rel=1e-9)


def test_a_few_prompts_have_student_s_interval() -> None:
    values = np.array([1.0, 2.0, 4.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert bootstrap_intervals(sums_of(values))[0] == pytest.approx(tuple(expected))
    assert student_intervals(sums_of(values))[0] == pytest.approx(tuple(expected))


@pytest.mark.parametrize("others", [1, 2, 5])
def test_few_rows_that_differ_give_a_finite_interval(others: int) -> None:
    values = np.zeros(300)
    values[:others] = 1.0
    ((low, high),) = bootstrap_intervals(sums_of(values))
    assert np.isfinite([low, high]).all()
    assert low < values.mean() < high


def test_a_model_without_rows_has_no_figures_and_changes_no_other() -> None:
    values, of = np.random.default_rng(0).normal(0.3, size=40), np.arange(40)
    both = cluster_sums([(values, of), (values[:0], of[:0])], 40)
    alone = cluster_sums([(values, of)], 40)
    assert bootstrap_intervals(both) == [*bootstrap_intervals(alone), None]
    assert sign_flip_p(both) == [*sign_flip_p(alone), None]


def test_draws_depend_on_nothing_but_the_seed_and_negate_with_the_data() -> None:
    values = np.random.default_rng(2).exponential(size=50)
    first, again = (bootstrap_intervals(sums_of(values))[0] for _ in range(2))
    negated = bootstrap_intervals(sums_of(-values))[0]
    assert first == again
    assert (-negated[1], -negated[0]) == pytest.approx(first, rel=1e-12)


def test_memory_does_not_grow_with_the_number_of_draws() -> None:
    values = np.random.default_rng(2).normal(size=4000)
    peaks = []
    for resamples in (1_000, 4_000):
        tracemalloc.start()
        bootstrap_intervals(sums_of(values), resamples=resamples)
        sign_flip_p(sums_of(values), resamples=resamples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], "a thousand draws are two blocks, four thousand eight"


def test_very_many_prompts_are_drawn_in_groups() -> None:
    rng = np.random.default_rng(8)
    models = [rng.normal(mean, 1, size=30_000) for mean in (0.0, 0.012, 0.05)]
    for values, p in zip(models, sign_flip_p(sums_of(*models)), strict=True):
        expected = stats.ttest_1samp(values, 0)
        ((low, high),) = bootstrap_intervals(sums_of(values))
        assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=0.0006)
        assert p >= expected.pvalue - 0.01
        assert sign_flip_p(sums_of(values))[0] == pytest.approx(expected.pvalue, abs=0.015)


# --- sign flips -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=9))
def test_few_prompts_are_exact_as_scipy_s(values):
    differences = np.array(values)
    (p,) = sign_flip_p(sums_of(differences))
    found = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert p == pytest.approx(min(found.pvalue, 1.0))


def test_many_prompts_are_as_scipy_s() -> None:
    differences = np.random.default_rng(1).normal(0.25, 1, size=60)
    (p,) = sign_flip_p(sums_of(differences))
    found = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=19_999, rng=0)
    assert p == pytest.approx(found.pvalue, rel=0.15)


def test_p_is_never_zero() -> None:
    assert sign_flip_p(sums_of(np.ones(500))) == [1 / 10_000]
    assert sign_flip_p(sums_of(np.ones(5))) == [2 / 32], "exact: all signs equal"


@pytest.mark.parametrize(("values", "p"), [([], None), ([0.0], 1.0), ([0.0] * 50, 1.0), ([3.0], 1.0)])
def test_p_of_almost_nothing(values: list[float], p: float | None) -> None:
    assert sign_flip_p(sums_of(np.array(values))) == [p]


def test_samples_of_a_prompt_change_their_sign_together() -> None:
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(8), 3)
    values = rng.normal(0.5, 1, size=24)
    whole = np.bincount(clusters, weights=values)
    assert sign_flip_p(sums_of(values, clusters=clusters)) == sign_flip_p(sums_of(whole))


def test_several_models_are_tested_at_once() -> None:
    rng = np.random.default_rng(9)
    models = [rng.normal(mean, 1, size=80) for mean in (0.0, 0.3, 0.5)]
    together, alone = sign_flip_p(sums_of(*models)), [sign_flip_p(sums_of(one))[0] for one in models]
    assert all(one >= single for one, single in zip(together, alone, strict=True))
    twice = sign_flip_p(sums_of(models[1], models[1] * 3))
    assert twice == [alone[1], alone[1]], "the same model twice, on another scale, is one"


def test_false_alarms_over_several_models_are_as_promised() -> None:
    rng = np.random.default_rng(6)
    alarms = 0
    for seed in range(600):
        shared = rng.normal(size=40)
        models = [shared + rng.normal(size=40) for _ in range(4)]
        alarms += min(sign_flip_p(sums_of(*models), resamples=199, seed=seed)) <= 0.05
    assert 0.03 <= alarms / 600 <= 0.07


def test_paired_rows_find_what_unpaired_ones_do_not() -> None:
    """1,000 questions: both right on 606, one model alone on 74, the other alone on 110."""
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [606, 74, 110, 210])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [606, 74, 110, 210])
    unpaired = stats.ttest_ind(second, first).pvalue
    (paired,) = sign_flip_p(sums_of(second - first))
    ((low, high),) = bootstrap_intervals(sums_of(second - first))
    assert unpaired == pytest.approx(0.080, abs=0.005)
    assert paired == pytest.approx(0.009, abs=0.003)
    assert 0 < low < 0.036 < high
