"""Rows of results as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from expo.files import Row

if TYPE_CHECKING:
    from pandas import DataFrame

ENDS = ("low", "high")


def frame(rows: Iterable[Row], leave_out: Iterable[str] = ()) -> DataFrame:
    """A DataFrame with a row per row, and columns of single values where there is one in each.

    Args:
        rows: The rows; a mapping within one becomes a column per key (`finish_reasons_stop`), an interval two columns
            (`interval_low`, `interval_high`), and other lists stay lists.
        leave_out: Keys that get no column.
    """
    from pandas import DataFrame

    left_out = frozenset(leave_out)
    return DataFrame([_flat({key: value for key, value in row.items() if key not in left_out}) for row in rows])


def _flat(row: Row) -> Row:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith("interval"):
            low_and_high = (None, None) if value is None else value
            flat |= {f"{key}_{end}": one for end, one in zip(ENDS, low_and_high, strict=True)}
        elif isinstance(value, dict):
            flat |= {f"{key}_{inner}": one for inner, one in _flat(value).items()}
        else:
            flat[key] = value
    return flat
