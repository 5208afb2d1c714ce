"""Where a model is: a local directory, or a hub id (`org/name`, `org/name@revision`) fetched into the cache.

Only the files that are needed are fetched. Nothing here reads weights; see `checkpoint.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from expo.errors import EnvironmentFailure, InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

HUB_TIMEOUT_S = 10.0

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
"""What is needed of a checkpoint whose weights alone are read."""

NOT_WEIGHTS = (
    *("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.npz"),
    *("consolidated*", "original/*", "checkpoint-*", "runs/*", "*.tfevents*", "global_step*", "optimizer*"),
)
"""What is never needed of a checkpoint."""

OTHER_FORMATS = (*NOT_WEIGHTS, "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""What is not needed of a checkpoint that has safetensors weights."""


@dataclass(frozen=True)
class Location:
    """A model on the local disk."""

    path: Path
    """The directory."""
    name: str
    """The model's short name: the last part of its hub id or path."""
    hub_id: str | None = None
    revision: str | None = None
    """The commit on the hub that `path` holds."""

    @property
    def label(self) -> str:
        """How a person names the model: its hub id, else the directory's name."""
        return self.hub_id or self.name


def refuse_inside(output: Path, *inputs: Location) -> None:
    """Refuse an output that is an input or lies inside one, also through links.

    Raises:
        InputError: It does.
    """
    resolved = output.resolve()
    for location in inputs:
        source = location.path.resolve()
        if source == resolved or source in resolved.parents:
            raise InputError(
                f"the output {output} is or lies inside the input {location.path}; choose another --output"
            )


def locate(model: str, *, weights_only: bool = False) -> Location:
    """Find a model, fetching it from the hub where it is not a local directory.

    Args:
        model: A directory, a hub id, or `id@revision`.
        weights_only: Fetch the safetensors files and config.json alone.

    Raises:
        InputError: No such directory or repository, or no access to it.
        EnvironmentFailure: The hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Location(path=path, name=path.resolve().name)
    if path.exists():
        raise InputError(f"{model} is a file; give the checkpoint's directory or a hub id")
    repository, _, revision = model.partition("@")
    if HUB_ID.fullmatch(repository) is None:
        raise InputError(f"no such directory: {model}")
    return _fetch(repository, revision or None, weights_only=weights_only)


def _fetch(repository: str, revision: str | None, *, weights_only: bool) -> Location:
    from huggingface_hub import snapshot_download

    def download() -> str:
        unwanted = OTHER_FORMATS if _has_safetensors(repository, revision) else NOT_WEIGHTS
        return snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(WEIGHT_FILES) if weights_only else None,
            ignore_patterns=list(unwanted),
        )

    path = Path(explain_hub_errors(download, repository, revision))
    return Location(path=path, name=repository.split("/")[-1], hub_id=repository, revision=path.name)


def _has_safetensors(repository: str, revision: str | None) -> bool:
    """Whether the repository has safetensors weights; taken for granted where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S).siblings or []
    except network_errors():
        return True
    return any(file.rfilename.endswith(".safetensors") for file in files)


def network_errors() -> tuple[type[BaseException], ...]:
    """What a request to the hub may raise: its HTTP library's errors, whichever library it uses, and `OSError`."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__


def explain_hub_errors(action: Callable[[], T], repository: str, revision: str | None = None) -> T:
    """Run `action`, turning the hub's errors into one line each.

    Raises:
        InputError: The repository or revision does not exist, is gated, or is not cached while offline.
        EnvironmentFailure: The hub cannot be reached.
    """
    from huggingface_hub import constants, errors

    wanted = repository if revision is None else f"{repository}@{revision}"
    try:
        return action()
    except errors.GatedRepoError as error:
        raise InputError(f"{wanted} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{wanted} is neither a local directory nor a repository on the hub (a private one needs HF_TOKEN)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{wanted} is neither a local directory nor in the hub cache, and HF_HUB_OFFLINE is set"
            ) from error
        raise EnvironmentFailure(
            f"{wanted} is not a local directory, and the hub cannot be reached to fetch it"
        ) from error
    except network_errors() as error:
        raise EnvironmentFailure(f"fetching {wanted} from the hub failed: {first_line(error)}") from error
