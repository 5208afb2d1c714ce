"""What a setting says of itself, said once; the fingerprints that follow from it; and the checks of settings' values.

A setting is a field of a config class, `name: Annotated[type, Setting("…")] = default`. Here is what is asked of such
fields; the fields themselves are in `config/`, and `cli/program.py` makes the options.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_type_hints
from urllib.parse import urlsplit

from expo.errors import InputError
from expo.files import Row, is_utf8, name_problem, shown
from expo.redact import without_secrets

POSITIONAL = "task"
"""The one setting that is an argument and no option."""

Change: TypeAlias = Literal["nothing", "rows", "batches", "weights"]


@dataclass(frozen=True)
class Setting:
    """A setting, beside its name, type and default."""

    help: str
    """The sentence that describes it, here and in `--help`."""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    """Further spellings of its flag."""
    changes: Change = "nothing"
    """What its value changes, and so is recorded for: rows, weights, or how rows are batched, which changes the rows of
    an engine that pads. What is recorded by its content (models, data sets, templates) is `nothing` here."""
    needs: str | None = None
    """What an engine must be capable of for it (`EngineSpec.can`); None: it goes with every engine."""
    absent: object = ...
    """The value that outputs were made with whose fingerprint lacks this setting: what was done before it existed. It
    never changes, whatever becomes of the default. An engine whose outputs differ says so (`EngineSpec.absent`)."""

    def __post_init__(self) -> None:
        """Check that the author of a setting thought of the outputs that exist already."""
        if (self.changes == "nothing") is not (self.absent is ...):
            raise TypeError(f"{self.help!r}: `absent` belongs to settings that change something, and to each of them")


def settings_of(kind: type) -> dict[str, Setting]:
    """A config class's settings: its own first, in the order they are written, then those it shares."""
    hints = get_type_hints(kind, include_extras=True)
    written = (name for base in kind.__mro__ for name in inspect.get_annotations(base))
    return {name: hints[name].__metadata__[0] for name in dict.fromkeys(written)}


def flag(name: str) -> str:
    """A setting as the command line spells it."""
    return name.upper() if name == POSITIONAL else f"--{name.replace('_', '-')}"


def changing(kind: type, *what: Change) -> tuple[str, ...]:
    """The settings that change something of these."""
    return tuple(name for name, setting in settings_of(kind).items() if setting.changes in what)


def recorded(config: object, *what: Change) -> Row:
    """The values of the settings that change something of these, as JSON has them."""
    return {name: _plain(getattr(config, name)) for name in changing(type(config), *what)}


def absent_values(config: object, *what: Change) -> Row:
    """What outputs were made with that say nothing of the settings that change something of these.

    Args:
        config: The config.
        what: What the settings change.
    """
    return {name: _plain(one.absent) for name, one in settings_of(type(config)).items() if one.changes in what}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


# --- fingerprints: what an output was made from, and whether that is what it would be made from now -----------------


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


# --- checks: each refuses a value that is out of its range in one line that names the flag ----------------------------

HUB_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""A user's, an organisation's or a repository's name on the hub."""


def is_hub_id(text: str) -> bool:
    """Whether the text is spelled as the hub spells a repository: `name` or `owner/name`."""
    parts = text.split("/")
    return len(parts) <= 2 and all(map(HUB_NAME.fullmatch, parts)) and not re.search(r"--|\.\.|\.git$", text)


MAX_NAME_BYTES = 200
"""Of an output's name, which has endings of its own; file systems take 255."""

OWN_ENDINGS = (".meta", ".rows")
"""Of the names of files that stand beside an output."""

MAX_ALPHA = 3.4028234663852886e38
"""The largest float32, in which the arithmetic is done."""


def require(condition: bool, message: str) -> None:
    """Refuse settings unless the condition holds.

    Raises:
        InputError: It does not.
    """
    if not condition:
        raise InputError(message)


def require_choice(flag: str, value: str, choices: object) -> None:
    """Refuse a value that is none of a Literal's.

    Raises:
        InputError: It is one; the message names the flag.
    """
    names = get_args(choices)
    require(value in names, f"{flag} must be one of {', '.join(names)}, not {value!r}")


def require_device(value: str) -> None:
    """Refuse what is no device.

    Raises:
        InputError: It is one; the message names the flag.
    """
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None
    require(known, f"--device must be auto, cpu, cuda or cuda:N, not {value!r}")


def require_base_url(url: str | None) -> None:
    """Refuse what is no URL of a server.

    Raises:
        InputError: It is one; the message names the flag.
    """
    if url is None:
        return
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    known = known and not parts.query and not parts.fragment and url.isascii() and url.isprintable() and " " not in url
    require(known, f"--base-url must be a URL such as http://localhost:8000/v1, not {without_secrets(url)!r}")


def require_regexes(flag: str, patterns: tuple[str, ...]) -> None:
    """Refuse what is no regular expression.

    Raises:
        InputError: It is one; the message names the flag.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{flag} {pattern!r} is not a regular expression: {error}") from error


BYTE_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)},
}


def read_bytes(flag: str, value: str) -> int:
    """A size such as 5GB (10⁹) or 5GiB (2³⁰) in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)", value, re.IGNORECASE)
    units = {name.upper(): size for name, size in BYTE_UNITS.items()}
    nbytes = float(found[1]) * units[found[2].upper()] if found and found[2].upper() in units else 0.0
    require(1 <= nbytes < math.inf, f"{flag} must be a size such as 500MB or 5GB, not {shown(value)}")
    return int(nbytes)


def read_alpha_for(value: str) -> tuple[str, float]:
    """`REGEX=A` as a pattern and a number; the last `=` counts."""
    pattern, equals, number = value.rpartition("=")
    try:
        alpha = float(number)
    except ValueError:
        alpha = math.nan
    require(
        bool(equals and pattern) and math.isfinite(alpha),
        f"--alpha-for must be REGEX=A with a finite number A, such as 'self_attn=0.5', not {value!r}",
    )
    require_alpha(alpha, f"--alpha-for {pattern!r}")
    require_regexes("--alpha-for", (pattern,))
    return pattern, alpha + 0.0


def require_alpha(alpha: float, flag: str = "--alpha") -> None:
    """Refuse an α that float32 cannot hold.

    Raises:
        InputError: It is one; the message names the flag.
    """
    require(math.isfinite(alpha), f"{flag} must be a finite number, not {alpha!r}")
    require(abs(alpha) <= MAX_ALPHA, f"{flag} {alpha!r} exceeds the range of float32")


def require_repositories(repositories: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    """Refuse repositories that are misspelled, inputs, or one for several α.

    Raises:
        InputError: It is one; the message names the flag.
    """
    for repository in repositories:
        well_formed = "/" in repository and is_hub_id(repository)
        require(well_formed, f"--push-to-hub must be a hub id such as me/my-model, not {repository!r}")
        known = [model.partition("@")[0].lower() for model in inputs]
        require(repository.lower() not in known, f"--push-to-hub {repository} is an input; choose another repository")
    if len(set(repositories)) < len(repositories):
        raise InputError(f"--push-to-hub {repositories[0]} takes one α; with several, put {{alpha}} in the name")


def require_name(name: str | None) -> None:
    """Refuse a name that is not a plain file name.

    Raises:
        InputError: It is one; the message names the flag.
    """
    if name is None:
        return
    plain = name == Path(name).name and not name.startswith(".") and name_problem(name) is None
    require(plain, f"--name {shown(name)} is not a plain file name")
    require(
        not name.endswith(OWN_ENDINGS),
        f"--name {shown(name)} has a suffix reserved for files beside an output; choose another",
    )
    length = len(name.encode())
    require(length <= MAX_NAME_BYTES, f"--name {shown(name)} has {length} bytes; the limit is {MAX_NAME_BYTES}")


def require_text(flag: str, value: str | None) -> None:
    """Refuse what cannot be written down: a word of the command line may be no UTF-8.

    Raises:
        InputError: It is so; the message names the flag.
    """
    require(value is None or is_utf8(value), f"{flag} {shown(value)} is not UTF-8")
