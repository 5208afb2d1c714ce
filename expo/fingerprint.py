"""What an output was made from, and whether that is what it would be made from now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expo.durable import Row
from expo.errors import InputError


def normalised(fingerprint: Row, absent: Row) -> Row:
    """A fingerprint without the settings that have the value of outputs that say nothing of them."""
    return {key: value for key, value in fingerprint.items() if key not in absent or value != absent[key]}


class Fingerprint(dict[str, Any]):
    """Every setting and source that changes an output, as its meta file has it.

    What has its `absent` value is left out. One read from a file, by this version of expo or one that wrote all values
    down, is a plain dict, and equal to this one where it says the same, so that no comparison can forget the rule.

    Args:
        values: The settings and sources.
        absent: Setting → the value that outputs without it were made with.
    """

    def __init__(self, values: Row, absent: Row) -> None:
        super().__init__(normalised(values, absent))
        self.absent = absent

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and normalised(other, self.absent) == dict(self)

    def __ne__(self, other: object) -> bool:
        return not self == other


def require_same(what: Path | str, old: Row, new: Row, *, advice: str = "--overwrite replaces it") -> None:
    """Refuse an output made with other settings.

    Raises:
        InputError: The fingerprints differ; the message names the first setting that does.
    """
    absent: Mapping[str, Any] = new.absent if isinstance(new, Fingerprint) else {}
    for key in sorted({*old, *new}):
        before, now = old.get(key, absent.get(key)), new.get(key, absent.get(key))
        if before != now:
            shown = "" if isinstance(now, dict) or isinstance(before, dict) else f" ({before!r} then, {now!r} now)"
            raise InputError(f"{what} was made with another {key.replace('_', '-')}{shown}; {advice}")
