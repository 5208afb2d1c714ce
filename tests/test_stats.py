"""Statistics against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo.stats import mean_and_standard_error


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_mean_and_standard_error(values):
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), rel=1e-6, abs=1e-6)


def test_too_few_values_have_no_figure():
    assert mean_and_standard_error([]) == (None, None)
    assert mean_and_standard_error([2.5]) == (2.5, None)
