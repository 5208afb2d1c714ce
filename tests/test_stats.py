"""Statistics against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from expo.stats.changes import cosine_distance, relative_change
from expo.stats.means import mean_and_standard_error


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_mean_and_standard_error(values):
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), rel=1e-6, abs=1e-6)


def test_too_few_values_have_no_figure():
    assert mean_and_standard_error([]) == (None, None)
    assert mean_and_standard_error([2.5]) == (2.5, None)


@given(
    st.lists(st.tuples(*2 * [st.floats(-10, 10)]), min_size=1, max_size=20),
    st.sampled_from([1.0, 1e-3, 1e-6]),
)
def test_change_and_angle(pairs, step):
    first, direction = np.array(pairs).T
    second = first + step * direction
    squares = [float(np.sum(side**2)) for side in (second - first, first, second)]
    if min(squares[1:]) < 1e-3:
        return
    assert relative_change(*squares[:2]) == pytest.approx(np.sqrt(squares[0] / squares[1]))
    units = [side / np.linalg.norm(side) for side in (first, second)]
    expected = np.sum((units[0] - units[1]) ** 2) / 2
    assert cosine_distance(*squares) == pytest.approx(expected, rel=1e-6, abs=1e-13)


def test_changes_without_a_number():
    assert relative_change(0.0, 0.0) == 0.0
    assert relative_change(1.0, 0.0) is None
    assert cosine_distance(1.0, 0.0, 1.0) is None
    assert cosine_distance(1.0, 1.0, 0.0) is None
    assert cosine_distance(0.0, 4.0, 4.0) == 0.0
    assert cosine_distance(4.0, 1.0, 1.0) == 2.0, "opposite"
    assert cosine_distance(1e-30, 1.0, 1.0 + 1e-7) == 0.0, "no less than 0, whatever the rounding"
