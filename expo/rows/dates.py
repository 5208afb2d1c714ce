"""The date that a chat template writes into prompts: one for an output, kept by what continues, extends or shares it.

A template may ask for the time (`strftime_now`), so that the rows of a run that takes two days would differ. The moment
is taken when an output is begun, and is in its fingerprint. The parts of a run, which may begin on several machines at
once, agree on the first one's: a file beside theirs, created once, says it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from expo.errors import EnvironmentFailure, InputError
from expo.files import Row
from expo.locks import content_of, create_once
from expo.parts import DATE_NAME, FILE_NAME
from expo.rows.files import RowFiles
from expo.settings import Fingerprint

KEY = "template_date"
"""The date in a fingerprint."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TemplateDate:
    """The moment at which the clock of a chat template stands."""

    moment: str
    """In ISO 8601, local time."""
    entry: Row
    """What the fingerprint says of it: nothing for an output whose date was not recorded."""
    is_new: bool = False
    """Whether no output has it yet."""
    closed: str | None = None
    """Why no further rows may be made; None where they may."""


def find_date(files: RowFiles, made_from: Fingerprint, *, overwrite: bool, moment: str | None = None) -> TemplateDate:
    """The date of the output that is there, or of its parts, else the moment.

    Args:
        files: The files of the whole output.
        made_from: The fingerprint without a date.
        overwrite: Whether an output made with other settings is replaced.
        moment: That of other outputs which are compared with this one, in ISO 8601; None: now.

    Raises:
        InputError: What is there is damaged.
    """
    now = moment or datetime.now().isoformat(timespec="seconds")
    date = TemplateDate(now, {KEY: now}, is_new=True)
    for recorded in _recorded(files, made_from):
        entry = {KEY: recorded[KEY]} if KEY in recorded else {}
        is_same = made_from == _without_date(recorded)
        if not overwrite or (is_same and entry):
            closed = _closed(files.final) if is_same and not entry else None
            date = TemplateDate(_checked(entry.get(KEY, now), files.final), entry, closed=closed)
            break
    log.info("the chat template writes a date or time: all rows of this output get %s", date.moment)
    return date


def _recorded(files: RowFiles, made_from: Fingerprint) -> Iterator[Row]:
    """What the output, the agreement of its parts, and parts with these settings say they are made from."""
    if (whole := files.look().fingerprint) is not None:
        yield whole
    agreement = _agreement(files, made_from)
    if os.path.lexists(agreement):
        yield {**made_from, KEY: content_of(agreement)}
    names = sorted(path.name for path in files.parts_folder.iterdir()) if files.parts_folder.is_dir() else []
    for stem in dict.fromkeys(found[1] for found in map(FILE_NAME.fullmatch, names) if found):
        part = files.part(stem).look().fingerprint
        if part is not None and made_from == _without_date(part):
            yield part


def _without_date(fingerprint: Row) -> Row:
    return {key: value for key, value in fingerprint.items() if key != KEY}


def _checked(moment: object, output: Path) -> str:
    try:
        return datetime.fromisoformat(str(moment)).isoformat(timespec="seconds")
    except ValueError as error:
        raise InputError(f"{output} has no valid {KEY} in its fingerprint ({moment!r}): move it away") from error


def _closed(output: Path) -> str:
    return (
        f"{output} was started by a version of expo that did not record the date its chat template writes into "
        "prompts, so its remaining rows cannot get the same one; --overwrite makes all rows again with one date"
    )


def agree(files: RowFiles, fingerprint: Row, moment: str) -> str:
    """The moment on which the processes that share a run agree: that of the first to ask.

    Raises:
        EnvironmentFailure: It cannot be written.
    """
    path = _agreement(files, fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return moment if create_once(path, moment) else content_of(path)
    except OSError as error:
        raise EnvironmentFailure(f"writing {path} failed: {error.strerror}") from error


def _agreement(files: RowFiles, made_from: Row) -> Path:
    text = json.dumps(_without_date(made_from), sort_keys=True)
    return files.parts_folder / f"{DATE_NAME}{sha256(text.encode()).hexdigest()[:16]}"
