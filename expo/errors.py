"""The error tree: what expo rejects or fails at, with the exit code.

A message is one line: what is wrong, with which value, and what to do next. The command line prints it without a
traceback. Any exception that is not an `ExpoError` is a bug and keeps its traceback. To add an error, derive it from
the class whose exit code it shares.
"""

from __future__ import annotations

from collections.abc import Iterable

PARTLY_FAILED = 3
"""The exit code of a finished run with rows that failed and are marked."""

EXIT_CODES = {
    0: "done, or already complete",
    1: "the environment failed (I/O, disk, memory, engine, network); the same command may work later",
    2: "the usage or an input is at fault, whenever it is noticed",
    PARTLY_FAILED: "finished, but some rows failed and are marked; the same command tries them again",
    130: "stopped by SIGINT; the same command continues",
    143: "stopped by SIGTERM; the same command continues",
}
"""Every exit code, and what it means."""


class ExpoError(Exception):
    """Base class of all errors that expo raises on purpose."""

    exit_code = 1


class InputError(ExpoError):
    """The usage or an input is at fault (exit code 2)."""

    exit_code = 2


class EnvironmentFailure(ExpoError):
    """I/O, disk, memory, engine or network failed; the same command may work later (exit code 1)."""


class MissingExtra(EnvironmentFailure):
    """An optional dependency is not installed; the message names the command that installs it."""


class Stopped(BaseException):
    """A termination signal arrived; raised in the main thread so that work unwinds and stays resumable.

    Args:
        signal_number: The signal, 15 for SIGTERM; the exit code is 128 + this number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class name where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(title: str, items: Iterable[str]) -> list[str]:
    """Part of a message that lists mismatches: the title, the first three items and how many more there are.

    Returns:
        A list with that part; empty where there are no items.
    """
    items = list(items)
    if not items:
        return []
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{title}: {', '.join(items[:3])}{more}"]
