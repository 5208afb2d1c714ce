"""How much of what is repeated the tests do: some of it in CI, all of it with EXPO_TEST_FULL=1 (`tools/full_check.sh`).

Each law, fault and engine has a test in CI; only how often, on how many families or on how large a grid differs.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import pytest

FULL = os.environ.get("EXPO_TEST_FULL") == "1"

Size = TypeVar("Size")


def sized(*, ci: Size, full: Size) -> Size:
    """A size of a test: in CI, and in the full check."""
    return full if FULL else ci


def in_full(*values: Any, id: str | None = None) -> Any:
    """A parameter that repeats on another case what is in CI: left to the full check."""
    return pytest.param(*values, marks=pytest.mark.full, id=id)
