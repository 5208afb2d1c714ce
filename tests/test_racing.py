"""The statistics of a race: against plain loops, scipy, a library of anytime-valid tests, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats
from ville import AsymptoticCS

from expo.stats.racing import Lead, lead, one_sided_sign_flip_p, pairwise_sign_flip_p, shared_sums
from expo.verbs.sweep.confirm import LEVEL, confirm
from expo.verbs.sweep.race import Rules

SUMS = st.lists(st.integers(-5, 5), min_size=2, max_size=9)


# --- p by flipping signs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_p_of_all_pairs_is_that_of_a_plain_loop(seed: int) -> None:
    sums = np.random.default_rng(seed).integers(-3, 5, size=(8, 4)).astype(float)
    pairs = list(itertools.combinations(range(4), 2))

    def statistics(signs: tuple[int, ...]) -> list[float]:
        found = []
        for i, j in pairs:
            differences = [sums[c, i] - sums[c, j] for c in range(8)]
            total = sum(sign * one for sign, one in zip(signs, differences, strict=True))
            found.append(abs(total) / math.sqrt(sum(one**2 for one in differences)))
        return found

    largest = [max(statistics(signs)) for signs in itertools.product((1, -1), repeat=8)]
    p = pairwise_sign_flip_p(sums)
    for (i, j), observed in zip(pairs, statistics((1,) * 8), strict=True):
        assert p[i, j] == p[j, i] == sum(one >= observed - 1e-9 for one in largest) / 2**8
    assert (np.diag(p) == 1).all()


@settings(deadline=None, max_examples=40)
@given(SUMS)
def test_p_of_a_pair_is_that_of_scipy(values):
    sums = np.array(values, dtype=float)
    either, greater = (
        stats.permutation_test(
            (sums, np.zeros(len(sums))),
            lambda one, other: (one - other).sum(),
            permutation_type="samples",
            alternative=alternative,
            n_resamples=np.inf,
        ).pvalue
        if sums.any()
        else 1.0
        for alternative in ("two-sided", "greater")
    )
    assert pairwise_sign_flip_p(np.stack([sums, 0 * sums], axis=1))[0, 1] == pytest.approx(either)
    assert one_sided_sign_flip_p(sums) == pytest.approx(greater)


def test_drawn_signs_give_nearly_the_exact_p() -> None:
    sums = np.random.default_rng(1).normal(0.4, 1, size=(12, 3))
    exact, drawn = (pairwise_sign_flip_p(sums, resamples=count) for count in (4095, 3999))
    assert np.abs(exact - drawn).max() < 0.03
    assert abs(one_sided_sign_flip_p(sums[:, 0], resamples=3999) - one_sided_sign_flip_p(sums[:, 0])) < 0.03


def test_models_that_do_the_same_are_alike() -> None:
    sums = np.repeat(np.random.default_rng(0).normal(size=(30, 1)), 3, axis=1)
    assert (pairwise_sign_flip_p(sums) == 1).all()
    assert one_sided_sign_flip_p(np.zeros(30)) == 1
    assert (pairwise_sign_flip_p(np.zeros((0, 2))) == 1).all()


WORLDS = {
    "all alike": ([0.0] * 5, [1.0] * 5),
    "others worse": ([0.0, 0.0, 0.0, -1.0, -2.0], [1.0] * 5),
    "unequal noise": ([0.0, 0.0, 0.0, -1.0, -2.0], [0.5, 1.0, 4.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("world", WORLDS)
def test_few_pairs_that_are_alike_are_told_apart(world: str) -> None:
    means, spreads = (np.array(values) for values in WORLDS[world])
    alike = np.flatnonzero(means == 0)
    rng, found, runs = np.random.default_rng(5), 0, 400
    for _ in range(runs):
        sums = rng.normal(size=(40, 1)) + means + spreads * rng.normal(size=(40, 5))
        found += pairwise_sign_flip_p(sums, resamples=199)[np.ix_(alike, alike)].min() <= 0.05
    assert found <= stats.binom.ppf(0.999, runs, 0.05)


def test_one_sided_p_is_uniform_where_nothing_is_gained() -> None:
    rng = np.random.default_rng(2)
    p = [one_sided_sign_flip_p(rng.normal(size=30), resamples=199) for _ in range(400)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


# --- how far ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "error", "clusters"), [(0.1, 0.1, 12), (-0.3, 0.2, 3), (2.0, 0.1, 40), (0, 1, 9)]
)
def test_the_expected_loss_is_the_integral(difference: float, error: float, clusters: int) -> None:
    posterior = stats.t(clusters - 1, loc=difference, scale=error)
    loss, _ = integrate.quad(lambda true: -true * posterior.pdf(true), -np.inf, 0)
    assert Lead(difference, error, 2.0, clusters).expected_loss == pytest.approx(loss / 2, rel=1e-5, abs=1e-12)


def test_the_expected_loss_where_there_is_nothing_to_measure_by() -> None:
    assert Lead(1.0, 0.1, 1.0, 2).expected_loss == math.inf
    assert Lead(0.0, 0.0, 0.0, 9).expected_loss == 0
    assert Lead(-1.0, 0.0, 0.0, 9).expected_loss == math.inf
    nothing = np.full(4, np.nan)
    assert lead(nothing, nothing, np.arange(4)).expected_loss == math.inf


def test_a_lead_is_over_the_rows_that_both_have() -> None:
    ahead, behind = np.array([1.0, 2.0, np.nan, 4.0, 6.0]), np.array([0.0, np.nan, 1.0, 1.0, 2.0])
    found = lead(ahead, behind, np.array([0, 0, 1, 1, 2]))
    assert (found.difference, found.clusters) == (pytest.approx(8 / 3), 3)
    assert found.spread == pytest.approx(np.std([1, 3, 4], ddof=1))
    assert found.standard_error == pytest.approx(stats.sem([1, 3, 4]))


def test_shared_sums_are_over_the_rows_that_all_have() -> None:
    columns = [np.array([1.0, 2.0, np.nan, 4.0]), np.array([1.0, 1.0, 1.0, 1.0])]
    sums, rows = shared_sums(columns, np.array([0, 0, 1, 2]))
    assert (sums.tolist(), rows) == ([[3.0, 2.0], [4.0, 1.0]], 3)


# --- the confirmation -----------------------------------------------------------------------------------------------

DRAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
    "skewed down": lambda rng, n: 1 - rng.exponential(size=n),
}


@pytest.mark.parametrize("shape", DRAWS)
def test_the_interval_covers_and_few_are_shown_to_gain_that_do_not(shape: str) -> None:
    rng, clusters, runs = np.random.default_rng(8), np.repeat(np.arange(40), 2), 500
    covered = shown = 0
    for _ in range(runs):
        differences = DRAWS[shape](rng, 40)[clusters] + 0.5 * rng.normal(size=80)
        found = confirm(1.0, differences, np.zeros(80), clusters, resamples=399)
        assert found.interval is not None
        covered += found.interval[0] <= 0 <= found.interval[1]
        shown += found.is_shown
    assert covered >= stats.binom.ppf(0.01, runs, LEVEL) - 0.02 * runs
    assert shown <= stats.binom.ppf(0.999, runs, 0.05)


def test_a_gain_is_shown_and_what_cannot_be_measured_is_not() -> None:
    rng = np.random.default_rng(0)
    zero, clusters = rng.normal(size=30), np.arange(30)
    found = confirm(2.5, zero + 0.5 + 0.5 * rng.normal(size=30), zero, clusters)
    assert found.is_shown
    assert (found.candidate, found.questions, found.rows) == (2.5, 30, 30)
    assert found.standardized == pytest.approx(found.difference / found.spread)
    for same in (zero, np.full(30, np.nan)):
        assert not confirm(2.5, same, zero, clusters).is_shown
    assert not confirm(2.5, zero[:1] + 9, zero[:1], clusters[:1]).is_shown


# --- looking often --------------------------------------------------------------------------------------------------

LOOKS = np.arange(10, 101, 10)
RULES = Rules(100, 0, 10, 0.95, 0.0, refine=False, resamples=999)


def looks_of(values: np.ndarray) -> np.ndarray:
    """(looks,): p at each look of a pair whose paired differences these are."""
    both = np.stack([values, np.zeros(len(values))], axis=1)
    return np.array([pairwise_sign_flip_p(both[:end], resamples=RULES.resamples)[0, 1] for end in LOOKS])


def sequence_excludes_zero(values: np.ndarray) -> np.ndarray:
    """(looks,): whether the library's confidence sequence for the mean excludes 0 at each look."""
    found = AsymptoticCS(alpha=0.05, t_opt=50, min_samples=30).fit(values)
    return ((found.lower_ > 0) | (found.upper_ < 0))[LOOKS - 1]


def test_with_many_looks_as_few_are_wrong_as_with_an_anytime_valid_test() -> None:
    rng, runs = np.random.default_rng(11), 200
    ours = naive = theirs = 0
    for _ in range(runs):
        values = rng.normal(size=100)
        p = looks_of(values)
        ours += (p <= RULES.error(10)).any()
        naive += (p <= 0.05).any()
        theirs += sequence_excludes_zero(values).any()
    most = stats.binom.ppf(0.999, runs, 0.05)
    assert max(ours, theirs) <= most < naive


def test_what_an_anytime_valid_test_sees_is_seen() -> None:
    rng = np.random.default_rng(12)
    for _ in range(40):
        values = rng.normal(0.8, 1, size=100)
        theirs = sequence_excludes_zero(values)
        assert theirs[-1]
        assert (looks_of(values) <= RULES.error(10))[theirs].all()
