"""The error tree: everything expo refuses or fails at, with the exit code it ends in.

A message is one line: what was wrong, with which value, and what to do next. The command line prints it
without a traceback. Anything that is not an `ExpoError` is a bug and keeps its traceback.
To add one, derive it from the class whose exit code it shares.
"""

from __future__ import annotations

from collections.abc import Iterable

PARTLY_FAILED = 3
"""The exit code of a run that finished, but for rows that failed and are marked."""


class ExpoError(Exception):
    """Base of all errors expo raises on purpose."""

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
        signal_number: The signal, 15 for SIGTERM; the process ends in 128 + this number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(title: str, items: Iterable[str]) -> list[str]:
    """One part of a message that lists mismatches: the title, the first three items and the number of the others.

    Returns:
        That part, or nothing where there are no items.
    """
    items = list(items)
    if not items:
        return []
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{title}: {', '.join(items[:3])}{more}"]
