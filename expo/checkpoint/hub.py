"""Finding a model: a local directory, or a hub id (`org/name`, `org/name@revision`) downloaded to the cache.

Only the files that are needed are downloaded. Every request to the hub goes through `explain_hub_errors`, which turns
its errors into one line each. Nothing here reads weights (`folder.py`) or uploads (`output/publish.py`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from expo.checkpoint.folder import Location, expand_user, find_folder
from expo.checkpoint.network import require_usable
from expo.errors import EnvironmentFailure, ExpoError, InputError, first_line
from expo.settings import is_hub_id

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

HUB_TIMEOUT_S = 10.0

TOKEN_ADVICE = "set HF_TOKEN or run `hf auth login`"

ADDRESS = re.compile(r"(?:https?://[^/]+/|hf://(?:models/)?)(?P<id>[^/]+/[^/]+)(?:/.*)?")
"""A model's web page or its hf:// path."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", *TOKENIZER_FILES)
"""The files needed to read a checkpoint's weights and compare its token ids with another's; adapter_config.json
identifies an adapter."""

PICKLED_WEIGHT_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "config.json", *TOKENIZER_FILES)
"""The same for a checkpoint that has only .bin weights."""

NOT_WEIGHTS = (
    *("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.npz"),
    *("consolidated*", "original/*", "checkpoint-*", "runs/*", "*.tfevents*", "global_step*", "optimizer*"),
    *("*/*.safetensors", "*/*.bin"),  # no loader looks for weights in subfolders
)
"""Files of a checkpoint that are never needed."""

OTHER_FORMATS = (*NOT_WEIGHTS, "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""Files that are not needed if there are safetensors weights."""


def locate(model: str, *, weights_only: bool = False, pickled: bool = True) -> Location:
    """Find a model, downloading it from the hub if it is not a local directory.

    Args:
        model: A directory, a hub id, or `id@revision`.
        weights_only: Download only the weights, config.json and the tokenizer.
        pickled: Download .bin weights if the hub has no safetensors.

    Raises:
        InputError: No such directory or repository, no access to it, or only .bin weights and `pickled` is false.
        EnvironmentFailure: The hub cannot be reached.
    """
    if (local := find_folder(model)) is not None:
        return local
    if not model.strip():
        raise InputError("the model's name is empty; give a directory or a hub id")
    if expand_user(model).exists():
        raise InputError(f"{model} is a file; give the checkpoint's directory or a hub id")
    repository, at, revision = model.partition("@")
    if not is_hub_id(repository):
        raise InputError(f"no such directory: {model}{_hint(model)}")
    if at and not revision:
        raise InputError(f"{model} names no revision: leave out the @, or add a branch, tag or commit after it")
    return _fetch(repository, revision or None, weights_only=weights_only, pickled=pickled)


def _hint(model: str) -> str:
    """A guess at what was meant by a name that is neither a directory nor a hub id; may be empty."""
    address = ADDRESS.fullmatch(model)
    meant = address["id"] if address else model.rstrip("/")
    if is_hub_id(meant):
        return f" (did you mean the hub's {meant}?)"
    return _near_folder(model)


def _near_folder(model: str) -> str:
    path = expand_user(model)
    try:
        folders = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, folders, n=1, cutoff=0.7)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _fetch(repository: str, revision: str | None, *, weights_only: bool, pickled: bool) -> Location:
    from huggingface_hub import snapshot_download

    def download() -> str:
        safe = _has_safetensors(repository, revision)
        if not safe and not pickled:
            raise InputError(
                f"{repository} has no safetensors weights on the hub; --allow-pickle downloads and reads .bin weights, "
                "which are pickles, with torch's weights_only loader"
            )
        return snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(WEIGHT_FILES if safe else PICKLED_WEIGHT_FILES) if weights_only else None,
            ignore_patterns=list(OTHER_FORMATS if safe else NOT_WEIGHTS),
        )

    path = Path(explain_hub_errors(download, repository, revision))
    return Location(path=path, name=repository.split("/")[-1], hub_id=repository, revision=path.name)


def _has_safetensors(repository: str, revision: str | None) -> bool:
    """Whether the repository has safetensors weights; assumed if the hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S).siblings or []
    except network_errors():
        return True
    return any(file.rfilename.endswith(".safetensors") and "/" not in file.rfilename for file in files)


def fetch_file(repository: str, file: str, revision: str | None, *, kind: str) -> Path:
    """One file of a repository, downloaded unless it is cached.

    Args:
        repository: The hub id.
        file: The file's name in the repository.
        revision: A branch, tag or commit; None for the main branch.
        kind: model, dataset or space.

    Raises:
        InputError: No such repository, revision or file, or no access to it.
        EnvironmentFailure: The hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def download() -> str:
        try:
            return hf_hub_download(repository, file, repo_type=kind, revision=revision)
        except RemoteEntryNotFoundError as error:
            raise InputError(f"{repository} has no {file} on the hub") from error

    return Path(explain_hub_errors(download, repository, revision))


def network_errors() -> tuple[type[Exception], ...]:
    """The exceptions that a call to the hub may raise.

    The HTTP library's errors, whichever library it is, `OSError`, and `RuntimeError`, which hf_xet raises when the
    transfer of a large file fails.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, RuntimeError)


def require_usable_environment() -> None:
    """Refuse a token, a proxy or certificates that the HTTP library cannot use; its own error would reveal the token.

    Raises:
        InputError: The token contains white space, a control character or a letter outside ASCII, or a variable is
            unusable.
        MissingExtra: A proxy needs a package that is not installed.
    """
    from huggingface_hub import constants, get_token

    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        raise InputError(f"the hub token contains invalid characters; {TOKEN_ADVICE}")
    if not is_offline():
        require_usable(constants.ENDPOINT, all_proxies=True)


def explain_hub_errors(action: Callable[[], T], repository: str, revision: str | None = None) -> T:
    """Run `action`, turning the hub's errors into one-line messages.

    Raises:
        InputError: The repository or revision does not exist, is gated, or is not cached while offline.
        EnvironmentFailure: The hub cannot be reached.
    """
    require_usable_environment()
    try:
        return action()
    except network_errors() as error:
        raise explain(error, repository, revision) from error


def explain(error: BaseException, repository: str, revision: str | None) -> ExpoError:
    """The `ExpoError` for an exception of a call to the hub."""
    from huggingface_hub import errors

    wanted = repository if revision is None else f"{repository}@{revision}"
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{wanted} is gated: accept its terms on the hub, and {TOKEN_ADVICE}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repository} has no revision {revision!r} on the hub")
    if isinstance(error, errors.RepositoryNotFoundError):
        here = f"neither a local directory{_near_folder(repository)} nor a repository on the hub"
        return InputError(f"{wanted} is {here} (a private one needs HF_TOKEN)")
    if http_status(error) == 401:
        return InputError(f"the hub rejected the token for {wanted}; {TOKEN_ADVICE}")
    if http_status(error) == 403:
        return InputError(f"the hub denies access to {wanted}: {first_line(error)}")
    if isinstance(error, errors.LocalEntryNotFoundError) or is_offline():
        return _explain_not_cached(error, repository, revision)
    return EnvironmentFailure(f"fetching {wanted} from the hub failed: {first_line(error)}")


def _explain_not_cached(error: BaseException, repository: str, revision: str | None) -> ExpoError:
    wanted = repository if revision is None else f"{repository}@{revision}"
    cause = error.__cause__ or error
    if is_offline():
        here = "neither a local directory nor complete in the hub cache"
        return InputError(f"{wanted} is {here}, and HF_HUB_OFFLINE is set")
    if http_status(cause) is not None:
        return explain(cause, repository, revision)
    reason = first_line(cause)
    return EnvironmentFailure(f"{wanted} is not a local directory, and the hub cannot be reached to fetch it: {reason}")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def http_status(error: BaseException) -> int | None:
    """The HTTP status of an error's response; None if there was no response."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None
