"""Progress bars on stderr: shown on a terminal, silent in a log file."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a verb tells about its progress."""

    def update(self, count: int) -> object:
        """`count` more units are done."""

    def close(self) -> object:
        """The work has ended."""


def bytes_bar(total: int, label: str) -> Progress:
    """A bar in bytes, with GB/s and the time left."""
    from tqdm import tqdm

    bar: Progress = tqdm(total=total, desc=label, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
    return bar


def rows_bar(total: int, label: str, initial: int = 0) -> Progress:
    """A bar in rows, with rows/s and the time left."""
    from tqdm import tqdm

    bar: Progress = tqdm(total=total, desc=label, unit="row", initial=initial, dynamic_ncols=True, disable=None)
    return bar
