"""Checks of settings: each refuses a value that is out of its range in one line that names the flag."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args
from urllib.parse import urlsplit

from expo.errors import EnvironmentFailure, InputError
from expo.files import is_utf8, name_problem, shown
from expo.redact import without_secrets

if TYPE_CHECKING:
    import torch

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
    require(value in names, f"{flag} is one of {', '.join(names)}, not {value!r}")


def require_device(value: str) -> None:
    """Refuse what is no device.

    Raises:
        InputError: It is one; the message names the flag.
    """
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None
    require(known, f"--device is auto, cpu, cuda or cuda:N, not {value!r}")


def find_device(name: str, *, prefer_gpu: bool) -> torch.device:
    """The torch device that a `--device` value means on this machine.

    Args:
        name: As `require_device` takes it.
        prefer_gpu: Whether auto is the GPU where there is one; otherwise it is always the CPU.

    Raises:
        EnvironmentFailure: CUDA is asked for and cannot be used.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if prefer_gpu and torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentFailure(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return torch.device(name)


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
    require(known, f"--base-url is a URL such as http://localhost:8000/v1, not {without_secrets(url)!r}")


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
    require(1 <= nbytes < math.inf, f"{flag} is a size such as 500MB or 5GB, not {shown(value)}")
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
        f"--alpha-for is REGEX=A with a finite number A, such as 'self_attn=0.5', not {value!r}",
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
    require(abs(alpha) <= MAX_ALPHA, f"{flag} {alpha!r} is more than float32 holds")


def require_repositories(repositories: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    """Refuse repositories that are misspelled, inputs, or one for several α.

    Raises:
        InputError: It is one; the message names the flag.
    """
    for repository in repositories:
        well_formed = "/" in repository and is_hub_id(repository)
        require(well_formed, f"--push-to-hub takes a hub id such as me/my-model, not {repository!r}")
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
        not name.endswith(OWN_ENDINGS), f"--name {shown(name)} ends as the files beside an output do; choose another"
    )
    length = len(name.encode())
    require(length <= MAX_NAME_BYTES, f"--name {shown(name)} has {length} bytes; a file name takes {MAX_NAME_BYTES}")


def require_text(flag: str, value: str | None) -> None:
    """Refuse what cannot be written down: a word of the command line may be no UTF-8.

    Raises:
        InputError: It is so; the message names the flag.
    """
    require(value is None or is_utf8(value), f"{flag} {shown(value)} is not UTF-8")
