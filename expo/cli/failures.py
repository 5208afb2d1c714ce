"""What is said on stderr when a command fails, and the exit code."""

from __future__ import annotations

import logging
import re
import sys
import traceback

from expo.errors import ExpoError
from expo.redact import without_secrets

CONTROL_CHARACTER = r"[\x00-\x08\x0b-\x1f\x7f]"

EXPECTED = (ExpoError, OSError, MemoryError)
"""What ends a command with one line; any other exception is a bug and keeps its traceback."""

log = logging.getLogger("expo")


def clean(text: str) -> str:
    """Untrusted text made safe for a terminal and a log: no secrets, no control characters."""
    return re.sub(CONTROL_CHARACTER, lambda found: repr(found[0])[1:-1], without_secrets(text))


def say(message: object) -> None:
    """Print one line."""
    print(clean(f"expo: {message}").replace("\n", "\\n"), file=sys.stderr)


def fail(error: Exception, message: str, code: int) -> int:
    """Say what an error means, after its traceback where logs are shown; the exit code."""
    if log.isEnabledFor(logging.DEBUG):
        print(clean("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    say(f"error: {message}")
    return code


def exit_code_of(error: ExpoError | OSError | MemoryError) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, ExpoError):
        return fail(error, str(error), error.exit_code)
    if isinstance(error, OSError):
        return fail(error, f"{error.filename or 'I/O'}: {error.strerror or error}", 1)
    return fail(error, "out of memory", 1)
