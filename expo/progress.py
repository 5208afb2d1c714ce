"""Progress on stderr: bars on a terminal and in a notebook; in a log file nothing, or a line per minute of rows."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

LOG_EVERY_S = 60.0

log = logging.getLogger(__name__)


class Progress(Protocol):
    """What a verb reports its progress to."""

    def update(self, count: int) -> object:
        """Add `count` finished units."""

    def close(self) -> object:
        """The work has ended."""


def _disabled() -> bool | None:
    """Whether bars are off, as tqdm takes it: None is where stderr is no terminal; but in a notebook they are on."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return False if shell is not None and "IPKernelApp" in shell.config else None


def bytes_bar(total: int, label: str, *, initial: int = 0, shown: bool = True) -> Progress:
    """A bar in bytes, with GB/s and the time left; never drawn where `shown` is false."""
    from tqdm import tqdm

    off = _disabled() if shown else True
    bar: Progress = tqdm(
        total=total, desc=label, unit="B", initial=initial, unit_scale=True, dynamic_ncols=True, disable=off
    )
    return bar


def rows_bar(total: int, label: str, initial: int = 0) -> Progress:
    """A bar in rows, with rows/s and the time left."""
    from tqdm import tqdm

    bar: Progress = tqdm(total=total, desc=label, unit="row", initial=initial, dynamic_ncols=True, disable=_disabled())
    return bar


class RowsProgress:
    """Rows done of all, tokens per second, the time left, and when the first row came.

    Args:
        bar: Shown on a terminal; disabled elsewhere, where one log line per minute says the same.
        total: The number of all rows.
        initial: The number of rows from earlier runs.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        bar: Any,  # noqa: ANN401 - tqdm
        total: int,
        initial: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bar = bar
        self._total = total
        self._initial = initial
        self._rows = initial
        self._tokens = 0
        self._first_row_s: float | None = None
        self._clock = clock
        self._started = clock()
        self._logged_s = 0.0

    def update(self, rows: int, tokens: int | None = None) -> None:
        """More rows are done, with so many tokens, where that is known."""
        elapsed_s = self._clock() - self._started
        if rows and self._first_row_s is None:
            self._first_row_s = elapsed_s
        self._rows, self._tokens = self._rows + rows, self._tokens + (tokens or 0)
        speed = f"{self._tokens / max(elapsed_s, 1e-9):.0f} tokens/s, first row after {self._first_row_s or 0.0:.1f} s"
        if tokens is None:
            speed = f"{(self._rows - self._initial) / max(elapsed_s, 1e-9):.1f} rows/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(rows)
        if self._bar.disable and elapsed_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = elapsed_s
            left_s = elapsed_s * (self._total - self._rows) / max(1, self._rows - self._initial)
            log.info("%d of %d rows, %s, %s left", self._rows, self._total, speed, timedelta(seconds=round(left_s)))

    def close(self) -> None:
        """The work has ended."""
        self._bar.close()


def rows_progress(label: str, total: int, initial: int = 0) -> RowsProgress:
    """The progress of `total` rows, of which `initial` are there already."""
    from tqdm import tqdm

    layout = "{desc}: {n_fmt}/{total_fmt} rows |{bar}| {elapsed}, {remaining} left{postfix}"
    bar = tqdm(total=total, desc=label, initial=initial, bar_format=layout, dynamic_ncols=True, disable=_disabled())
    return RowsProgress(bar, total, initial)
