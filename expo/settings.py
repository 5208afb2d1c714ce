"""The metadata of settings, the fingerprints derived from it, and the checks of their values.

A setting is a field of a config class, `name: Annotated[type, Setting("…")] = default`. The fields
themselves are in `config/`, and `cli/program.py` turns them into options.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args, get_type_hints
from urllib.parse import urlsplit

from expo.errors import InputError
from expo.files import Row, is_utf8, name_problem, shown
from expo.redact import without_secrets

Change: TypeAlias = Literal["nothing", "rows", "batches", "weights"]


@dataclass(frozen=True)
class Setting:
    """A setting's metadata, beside its name, type and default."""

    help: str
    """Its description, here and in `--help`."""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    """Further spellings of its flag."""
    positional: bool = False
    """Whether it is an argument, or, where its type is a tuple, several, instead of an option."""
    changes: Change = "nothing"
    """What its value changes, and is recorded for: rows, weights, or how rows are batched, which changes the rows of an
    engine that pads. `nothing` if the content is recorded instead (models, data sets, templates)."""
    needs: str | None = None
    """The capability it needs of an engine (`EngineSpec.can`); None: it works with every engine."""
    absent: object = ...
    """The value to assume for outputs whose fingerprint lacks this setting: the behaviour before it existed. It never
    changes, even if the default does. An engine whose outputs differ overrides it (`EngineSpec.absent`)."""

    def __post_init__(self) -> None:
        """Check that the author of a setting has considered existing outputs."""
        if (self.changes == "nothing") is not (self.absent is ...):
            raise TypeError(f"{self.help!r}: `absent` belongs to settings that change something, and to each of them")


changes_rows = partial(Setting, changes="rows")
changes_weights = partial(Setting, changes="weights")


def settings_of(kind: type) -> Mapping[str, Setting]:
    """A config class's settings: its own first, in definition order, then inherited ones."""
    return _settings_of(kind)


@cache  # to read the hints takes milliseconds, and each check of a value names its setting
def _settings_of(kind: type) -> Mapping[str, Setting]:
    hints = get_type_hints(kind, include_extras=True)
    written = (name for base in kind.__mro__ for name in inspect.get_annotations(base))
    return MappingProxyType({name: hints[name].__metadata__[0] for name in dict.fromkeys(written)})


def headings_of(kind: type) -> Mapping[str, str]:
    """Under which heading each setting of a config class is listed: that of the class which defines it (`HEADING`)."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        heading = "Options" if base is kind else getattr(base, "HEADING", "")
        found = {**dict.fromkeys(inspect.get_annotations(base), heading), **found}
    return found


def flag(name: str) -> str:
    """A setting that is an option, as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def spelling(kind: type, name: str) -> str:
    """A setting of a config class as the command line spells it: a flag, or an argument's metavar."""
    setting = settings_of(kind)[name]
    return setting.metavar or name.upper() if setting.positional else flag(name)


def changing(kind: type, *what: Change) -> tuple[str, ...]:
    """The settings that change any of these."""
    return tuple(name for name, setting in settings_of(kind).items() if setting.changes in what)


def recorded(config: object, *what: Change) -> Row:
    """The values of the settings that change any of these, as in JSON."""
    return {name: _plain(getattr(config, name)) for name in changing(type(config), *what)}


def absent_values(config: object, *what: Change) -> Row:
    """The values to assume for outputs that do not record the settings that change any of these.

    Args:
        config: The config.
        what: What the settings change.
    """
    return {name: _plain(one.absent) for name, one in settings_of(type(config)).items() if one.changes in what}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


# --- fingerprints: what an output was made from, and whether that is still the same --------------------------------


class _AnyValue:
    """Equal to every value, so that an entry of a fingerprint which has it is left out and never differs."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


ANY = _AnyValue()
"""The `absent` value of an entry that older outputs have and that no longer changes what is made."""


def normalised(fingerprint: Row, absent: Row) -> Row:
    """A fingerprint without the settings that have their `absent` value."""
    return {key: value for key, value in fingerprint.items() if key not in absent or value != absent[key]}


class Fingerprint(dict[str, Any]):
    """Every setting and source that changes an output, as recorded in its meta file.

    Settings with their `absent` value are left out. A fingerprint read from a file is a plain dict, which may have all
    values written out; it compares equal to this one if it means the same.

    Args:
        values: The settings and sources.
        absent: Setting → the value to assume for outputs without it.
    """

    def __init__(self, values: Row, absent: Row) -> None:
        super().__init__(normalised(values, absent))
        self.absent = absent

    def with_entry(self, entry: Row) -> Fingerprint:
        """The same with another source, which not every output has."""
        return Fingerprint({**self, **entry}, self.absent)

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
            raise InputError(f"{what} was made with a different {key.replace('_', '-')}{shown}; {advice}")


# --- checks: each refuses a value that is out of its range in one line that names the flag ----------------------------

HUB_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""A user's, an organisation's or a repository's name on the hub."""


def is_hub_id(text: str) -> bool:
    """Whether the text is spelled as the hub spells a repository: `name` or `owner/name`."""
    parts = text.split("/")
    return len(parts) <= 2 and all(map(HUB_NAME.fullmatch, parts)) and not re.search(r"--|\.\.|\.git$", text)


MAX_NAME_BYTES = 200
"""Of an output's name, to which suffixes are added; file systems allow 255."""

OWN_ENDINGS = (".meta", ".rows")
"""Suffixes in the names of files beside an output."""

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
    """Refuse a value that is not one of a Literal's.

    Raises:
        InputError: It is not; the message names the flag.
    """
    names = get_args(choices)
    require(value in names, f"{flag} must be one of {', '.join(names)}, not {value!r}")


def require_device(value: str, flag: str = "--device") -> None:
    """Refuse an invalid device.

    Raises:
        InputError: It is invalid; the message names the flag.
    """
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None
    require(known, f"{flag} must be auto, cpu, cuda or cuda:N, not {value!r}")


def require_base_url(url: str | None) -> None:
    """Refuse an invalid URL of a server.

    Raises:
        InputError: It is invalid; the message names the flag.
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
    """Refuse invalid regular expressions.

    Raises:
        InputError: One is invalid; the message names the flag.
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
    """Split `REGEX=A` at the last `=` into a pattern and a number."""
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
    """Refuse an α that float32 cannot represent.

    Raises:
        InputError: It is not finite or too large; the message names the flag.
    """
    require(math.isfinite(alpha), f"{flag} must be a finite number, not {alpha!r}")
    require(abs(alpha) <= MAX_ALPHA, f"{flag} {alpha!r} exceeds the range of float32")


def require_repositories(repositories: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    """Refuse repositories that are malformed, an input, or shared by several α.

    Raises:
        InputError: One is; the message names the flag.
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
        InputError: It is not; the message names the flag.
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
    """Refuse text that cannot be encoded: an argument on the command line may be invalid UTF-8.

    Raises:
        InputError: It cannot; the message names the flag.
    """
    require(value is None or is_utf8(value), f"{flag} {shown(value)} is not UTF-8")
