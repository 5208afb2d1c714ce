"""What the smoke runs share: tiny models, an environment without a network, and checks that say what they saw."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expo.errors import ExpoError

NOWHERE = "http://127.0.0.1:9"
"""A proxy that nobody is: whatever asks the network through it fails at once."""


class CheckFailed(ExpoError):
    """A smoke run's scores are not what they must be."""


def check(what: str, holds: bool, seen: object = "") -> None:
    """Say that something holds.

    Raises:
        CheckFailed: It does not; the message has what was seen.
    """
    if not holds:
        raise CheckFailed(f"smoke: not so: {what} ({seen})")
    print(f"checked: {what}", file=sys.stderr)


def models() -> Path:
    """A folder with tiny-sft and tiny-dpo, trained here the first time (about half a minute)."""
    from tests import made_inputs

    return Path(made_inputs.made().models)


@contextmanager
def without_network(**more: str) -> Iterator[None]:
    """This process and its children see no network but this machine's."""
    no_proxy = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    proxies = {name: NOWHERE for one in ("http", "https", "all") for name in (f"{one}_proxy", f"{one.upper()}_PROXY")}
    wanted = {**proxies, **no_proxy, "OMP_NUM_THREADS": "1", **more}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
