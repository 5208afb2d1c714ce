"""Why the loading of θ(α) was refused in a process of vLLM's, told to the one that started the engine.

vLLM's own error there says only that one of its processes failed. The reason goes by a file that an environment
variable names, which the processes inherit; where they run elsewhere, vLLM's word is all there is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from expo.errors import EnvironmentFailure, ExpoError, InputError

VARIABLE = "EXPO_REFUSAL"
"""Names the file; set while an engine starts."""


@contextmanager
def told() -> Iterator[None]:
    """Tell the process that waits in `heard` why this one refuses."""
    try:
        yield
    except ExpoError as error:
        if VARIABLE in os.environ:
            _tell(error, Path(os.environ[VARIABLE]))
        raise


def _tell(error: ExpoError, file: Path) -> None:
    own = file.with_name(f"{file.name}-{os.getpid()}")  # ranks refuse at once
    with suppress(OSError):  # nobody waits: it was a live engine that loads again
        own.write_text(json.dumps({"input": isinstance(error, InputError), "reason": str(error)}), encoding="utf-8")
        own.replace(file)


@contextmanager
def heard() -> Iterator[None]:
    """While an engine starts: what one of its processes told is raised in the place of vLLM's error.

    Raises:
        InputError: The keys or the pair are at fault.
        EnvironmentFailure: Reading failed.
    """
    with TemporaryDirectory(prefix="expo-") as folder:
        file = Path(folder) / "refusal"
        os.environ[VARIABLE] = str(file)
        try:
            yield
        except ExpoError:
            raise
        except Exception as error:
            if file.exists():
                raise _refusal(file) from error
            raise
        finally:
            del os.environ[VARIABLE]


def _refusal(file: Path) -> ExpoError:
    content = json.loads(file.read_text(encoding="utf-8"))
    return (InputError if content["input"] else EnvironmentFailure)(content["reason"])
