"""What an output was made from, and whether that is what it would be made from now."""

from __future__ import annotations

from pathlib import Path

from expo.durable import Row
from expo.errors import InputError


def require_same(what: Path | str, old: Row, new: Row, *, advice: str = "--overwrite replaces it") -> None:
    """Refuse an output made with other settings.

    Raises:
        InputError: The fingerprints differ; the message names the first setting that does.
    """
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if before != now:
            shown = "" if isinstance(now, dict) or isinstance(before, dict) else f" ({before!r} then, {now!r} now)"
            raise InputError(f"{what} was made with another {key.replace('_', '-')}{shown}; {advice}")
