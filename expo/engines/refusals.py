"""Brings the reason why a vLLM process refused to load θ(α) back to the process that started the engine.

vLLM's own error says only that one of its processes failed. The reason travels in a file that an environment variable
names, which child processes inherit, for all that they ever load; where they run on another machine, only vLLM's error
is left. Both sides import this module, and it imports neither.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from expo.errors import EnvironmentFailure, ExpoError, InputError

LOAD_FORMAT = "expo"
"""The load format of `vllm_loader.py`, and the name of its entry point."""

VARIABLE = "EXPO_REFUSAL"
"""Names the file; set in this process while an engine starts or takes other weights, in the engine's own for good."""


@contextmanager
def report_refusals() -> Iterator[None]:
    """Pass an `ExpoError` raised here on to the process that waits in `reraise_refusals`."""
    try:
        yield
    except ExpoError as error:
        if VARIABLE in os.environ:
            _write(error, Path(os.environ[VARIABLE]))
        raise


def _write(error: ExpoError, file: Path) -> None:
    own = file.with_name(f"{file.name}-{os.getpid()}")  # several ranks may refuse at the same time
    with suppress(OSError):  # the folder is gone where the process that started the engine is
        own.write_text(json.dumps({"input": isinstance(error, InputError), "reason": str(error)}), encoding="utf-8")
        own.replace(file)


@contextmanager
def reraise_refusals() -> Iterator[None]:
    """While an engine starts or takes other weights, raise what one of its processes reported in place of vLLM's error.

    Raises:
        InputError: The keys or the pair are at fault.
        EnvironmentFailure: Reading failed.
    """
    file = Path(_folder(os.getpid()).name) / "refusal"
    file.unlink(missing_ok=True)
    os.environ[VARIABLE] = str(file)
    try:
        yield
    except ExpoError:
        raise
    except Exception as error:
        if file.exists():
            raise _read(file) from error
        raise
    finally:
        del os.environ[VARIABLE]


@functools.cache
def _folder(_pid: int) -> TemporaryDirectory[str]:
    """This process's folder, removed at its end: a process that it forks has one of its own."""
    return TemporaryDirectory(prefix="expo-")


def _read(file: Path) -> ExpoError:
    content = json.loads(file.read_text(encoding="utf-8"))
    return (InputError if content["input"] else EnvironmentFailure)(content["reason"])
