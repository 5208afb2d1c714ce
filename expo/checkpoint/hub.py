"""Finding a model: a local directory, or a hub id (`org/name`, `org/name@revision`) downloaded to the cache.

Only the files that are needed are downloaded. Every request to the hub goes through `explain_hub_errors`, which turns
its errors into one line each. Nothing here reads weights (`folder.py`) or uploads (`output/publish.py`).
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from expo.checkpoint.elsewhere import elsewhere
from expo.checkpoint.folder import (
    BIN_FILE,
    BIN_INDEX_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    Location,
    expand_user,
    find_folder,
)
from expo.checkpoint.header import is_text_map
from expo.checkpoint.network import require_usable
from expo.errors import EnvironmentFailure, ExpoError, InputError, first_line
from expo.files import read_json
from expo.settings import is_hub_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import ModelInfo

T = TypeVar("T")

HUB_TIMEOUT_S = 10.0

TOKEN_ADVICE = "set HF_TOKEN or run `hf auth login`"

ADDRESS = re.compile(r"(?:https?://[^/]+/|hf://(?:models/)?)(?P<id>[^/]+/[^/]+)(?:/.*)?")
"""A model's web page or its hf:// path."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)

SMALL_FILES = ("*.safetensors.index.json", "config.json", "adapter_config.json", *TOKENIZER_FILES)
"""The files needed, beside the weights, to read these and compare a checkpoint's token ids with another's;
adapter_config.json identifies an adapter."""

WEIGHT_FILES = ("*.safetensors", *SMALL_FILES)

PICKLED_WEIGHT_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "config.json", *TOKENIZER_FILES)
"""The same for a checkpoint that has only .bin weights."""

NOT_WEIGHTS = (
    *("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.npz"),
    *("consolidated*", "original/*", "checkpoint-*", "runs/*", "*.tfevents*", "global_step*", "optimizer*", "*.distcp"),
    *("*/*.safetensors", "*/*.bin"),  # no loader looks for weights in subfolders
)
"""Files of a checkpoint that are never needed."""

OTHER_FORMATS = (*NOT_WEIGHTS, "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""Files that are not needed if there are safetensors weights."""


ADAPTER_WEIGHTS = "adapter_model.safetensors"

STRAYS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
"""What may be weights beside those that are read: quantized copies, variants, another format's."""


def locate(model: str, *, weights_only: bool = False, pickled: bool | None = None) -> Location:
    """Find a model, downloading it from the hub if it is not a local directory.

    Args:
        model: A directory, a hub id, or `id@revision`.
        weights_only: Download only the weights, config.json and the tokenizer.
        pickled: Whether .bin weights are read if the hub has no safetensors; None if an engine reads the model, which
            may find weights of any name.

    Raises:
        InputError: No such directory or repository, no access to it, or no weights that are read.
        EnvironmentFailure: The hub cannot be reached.
    """
    if (local := find_folder(model)) is not None:
        return local
    return _fetch(*_read_id(model), weights_only=weights_only, pickled=pickled)


def locate_small_files(model: str, *, pickled: bool) -> tuple[Location, tuple[str, ...]]:
    """Find a model on the hub, downloading what its weights' layout and token ids need, and no weights.

    Args:
        model: A hub id, or `id@revision`.
        pickled: Whether .bin weights would be read.

    Returns:
        The model, and the names of its weight files, which are on the hub only; no names if all of it is in the cache.

    Raises:
        InputError: No such repository, no access to it, or no safetensors weights.
        EnvironmentFailure: The hub cannot be reached.
    """
    repository, revision = _read_id(model)

    def download() -> tuple[Location, tuple[str, ...]]:
        try:
            info = _ask(repository, revision)
        except network_errors() as error:
            with suppress(ExpoError):  # should the hub answer now, the weights are not fetched either
                return _fetch(repository, revision, weights_only=True, pickled=pickled, cached=True), ()
            raise error
        listing = _list(repository, info.sha, info, pickled=pickled)
        if not listing.safe:
            raise InputError(
                f"{repository} has only .bin weights on the hub, which --stream-sft cannot read: leave it out to "
                "download them"
            )
        names = listing.weights
        if all(isinstance(_cached(repository, name, info.sha), str) for name in names):
            return _fetch(repository, info.sha, weights_only=True, pickled=pickled), ()
        return _location(_snapshot(repository, info.sha, SMALL_FILES, listing), repository), names

    return explain_hub_errors(download, repository, revision)


def _read_id(model: str) -> tuple[str, str | None]:
    """The repository and the revision that a hub id names.

    Raises:
        InputError: It is not spelled as one.
    """
    if not model.strip():
        raise InputError("the model's name is empty; give a directory or a hub id")
    if expand_user(model).exists():
        raise InputError(f"{model} is a file; give the checkpoint's directory or a hub id")
    repository, at, revision = model.partition("@")
    if not is_hub_id(repository):
        raise InputError(f"no such directory: {model}{_hint(model)}")
    if at and not revision:
        raise InputError(f"{model} names no revision: leave out the @, or add a branch, tag or commit after it")
    return repository, revision or None


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


def _fetch(
    repository: str, revision: str | None, *, weights_only: bool, pickled: bool | None, cached: bool = False
) -> Location:
    """Download what is not in the cache; with `cached`, nothing is asked of the hub."""

    def download() -> str:
        info = None if cached else _look_up(repository, revision)
        listing = _list(repository, revision, info, pickled=pickled)
        wanted = WEIGHT_FILES if listing.safe else PICKLED_WEIGHT_FILES
        return _snapshot(repository, revision, wanted if weights_only else None, listing, cached=cached)

    return _location(explain_hub_errors(download, repository, revision), repository)


def _location(folder: str, repository: str) -> Location:
    path = Path(folder)
    return Location(path=path, name=repository.split("/")[-1], hub_id=repository, revision=path.name)


@dataclass(frozen=True)
class _Listing:
    """Which files of a repository are read."""

    files: list[str]
    safe: bool
    """Whether its weights are safetensors."""
    ignored: tuple[str, ...]
    """Patterns of the others."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The safetensors files that are read."""
        return tuple(name for name in fnmatch.filter(self.files, "*.safetensors") if not _matches(name, self.ignored))


def _list(repository: str, revision: str | None, info: ModelInfo | None, *, pickled: bool | None) -> _Listing:
    files = _cached_files(repository, revision) if info is None else [one.rfilename for one in info.siblings or []]
    safe = files is None or _has_safetensors(repository, files, pickled)
    strays = [] if files is None else _strays(repository, revision, info, files, safe=safe)
    return _Listing(files or [], safe, (*(OTHER_FORMATS if safe else NOT_WEIGHTS), *map(glob.escape, strays)))


def _snapshot(
    repository: str,
    revision: str | None,
    wanted: tuple[str, ...] | None,
    listing: _Listing,
    *,
    cached: bool = False,
) -> str:
    from huggingface_hub import snapshot_download

    patterns = None if wanted is None else list(wanted)
    return snapshot_download(
        repository,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=list(listing.ignored),
        local_files_only=cached,
    )


def _cached(repository: str, file: str, revision: str | None) -> object:
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(repository, file, revision=revision)


def _look_up(repository: str, revision: str | None) -> ModelInfo | None:
    """What the hub says of a repository; None if it does not answer, which is said where files are fetched."""
    try:
        return _ask(repository, revision)
    except network_errors():
        return None


def _ask(repository: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi

    return HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S)


def _cached_files(repository: str, revision: str | None) -> list[str] | None:
    """The repository's files, as the cache remembers them; None if it does not."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # versions without it do not ask whether what is cached is complete
        return None
    try:
        return [file.path for file in get_cached_repo_tree(repository, revision=revision)]
    except CachedRepoTreeNotFoundError:
        return None


def _has_safetensors(repository: str, files: list[str], pickled: bool | None) -> bool:
    """Whether safetensors weights are read, and not .bin.

    Raises:
        InputError: There are no weights that are read.
    """
    if {SINGLE_FILE, INDEX_FILE, ADAPTER_WEIGHTS} & set(files):
        return True
    has_bin = bool({BIN_FILE, BIN_INDEX_FILE} & set(files))
    if has_bin and pickled is False:
        raise InputError(
            f"{repository} has no safetensors weights on the hub; --allow-pickle downloads and reads .bin weights, "
            "which are pickles, with torch's weights_only loader"
        )
    if not has_bin and pickled is not None:
        raise InputError(
            f"{repository} has no weights on the hub ({SINGLE_FILE} or {INDEX_FILE}){_there(repository, files)}"
        )
    return not has_bin and any(name.endswith(".safetensors") and "/" not in name for name in files)


def _there(repository: str, files: list[str]) -> str:
    folder = repository.split("/")[-1]
    if there := elsewhere(files, folder):
        return f": {there}; `hf download {repository} --local-dir {folder}` fetches it"
    others = [name for name in files if _is_weights(name)]
    return f", but {others[0]}; if it is the whole model, unquantized, it needs that name" if others else ""


def _is_weights(name: str) -> bool:
    return _matches(name, STRAYS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _strays(
    repository: str, revision: str | None, info: ModelInfo | None, files: list[str], *, safe: bool
) -> list[str]:
    """The files that look like weights and are not those that are read."""
    single, index = (SINGLE_FILE, INDEX_FILE) if safe else (BIN_FILE, BIN_INDEX_FILE)
    shards = _shards(repository, revision, info, index) if index in files else []
    if shards is None or not {single, index} & set(files):
        return []
    read = {single, *shards, ADAPTER_WEIGHTS}
    return [name for name in files if _is_weights(name) and name not in read]


def _shards(repository: str, revision: str | None, info: ModelInfo | None, index: str) -> list[str] | None:
    """The files that an index names; None if it is damaged or not there, which is said where it is read."""
    from huggingface_hub import hf_hub_download

    if info is None:
        file = _cached(repository, index, revision)
    else:
        file = hf_hub_download(
            repository, index, revision=info.sha
        )  # of a commit, so that a cached one is not asked for
    try:
        weight_map = read_json(Path(file)).get("weight_map") if isinstance(file, str) else None
    except InputError:
        return None
    return list(weight_map.values()) if is_text_map(weight_map) else None


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
