"""Push finished checkpoints to model repositories on the hub.

`find_destinations` asks the hub, before any work, whether the token may write to a repository and what it contains;
`push` uploads the files listed in the output's manifest, whatever else is in the folder, and removes those that only
an earlier manifest in the repository lists.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from expo.checkpoint.folder import read_json
from expo.checkpoint.hub import (
    HUB_TIMEOUT_S,
    OTHER_FORMATS,
    TOKEN_ADVICE,
    http_status,
    network_errors,
    require_usable_environment,
)
from expo.errors import EnvironmentFailure, ExpoError, InputError, first_line
from expo.files import Row
from expo.output.writer import MANIFEST_FILE
from expo.settings import require_same

T = TypeVar("T")

WEIGHTS = ("*.safetensors", *OTHER_FORMATS)

USERS_FAULT = (400, 402, 403, 404, 422)
"""HTTP statuses of a push that would fail again."""


@dataclass(frozen=True)
class Destination:
    """A model repository to push an output to."""

    repository: str
    """`owner/name`."""
    manifest: Row = field(default_factory=dict)
    """Its expo.json; empty if there is none."""

    def require_same_output(self, fingerprint: Row) -> None:
        """Refuse a repository with a different output of expo.

        Raises:
            InputError: It was made from something else; the message names what differs.
        """
        if "fingerprint" in self.manifest:
            require_same(self.repository, self.manifest["fingerprint"], fingerprint)


@dataclass(frozen=True)
class Pushed:
    """An output on the hub."""

    repository: str
    url: str
    """The commit's page."""
    commit: str


def find_destinations(repositories: Sequence[str], *, private: bool) -> list[Destination]:
    """Check whether models may be pushed to these repositories; nothing is created or changed.

    Args:
        repositories: `owner/name` each; they need not exist.
        private: Whether to require private repositories.

    Raises:
        InputError: No token, one without write access, or a repository with other weights.
        EnvironmentFailure: The hub cannot be reached.
    """
    if not repositories:
        return []  # before an import that takes half a second
    from huggingface_hub import HfApi

    account = _explained(HfApi().whoami, repositories[0])
    for name in repositories:
        _require_writer(account, name)
    return [_explained(partial(_find, name, private=private), name) for name in repositories]


def _find(repository: str, *, private: bool) -> Destination:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return Destination(repository)
    if private and not info.private:
        raise InputError(f"{repository} already exists and is public: make it private on the hub, or drop --private")
    files = [sibling.rfilename for sibling in info.siblings or []]
    manifest = _read_manifest(repository, info.sha) if MANIFEST_FILE in files else {}
    _require_no_other_weights(repository, files, manifest)
    return Destination(repository, manifest)


def _require_writer(account: Row, repository: str) -> None:
    name, owner = account["name"], repository.split("/")[0]
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"the hub token of {name} is read-only; pushing to {repository} needs one with write access")
    organisations = [one["name"] for one in account.get("orgs", []) if one.get("roleInOrg") != "read"]
    if owner.lower() not in {known.lower() for known in (name, *organisations)}:
        raise InputError(f"the hub token belongs to {name}, who may not write to {repository}; choose {name}/…")


def _read_manifest(repository: str, commit: str | None) -> Row:
    from huggingface_hub import hf_hub_download

    with TemporaryDirectory() as cache:
        file = Path(hf_hub_download(repository, MANIFEST_FILE, revision=commit, cache_dir=cache))
        try:
            return read_json(file)
        except InputError:
            return {}


def _require_no_other_weights(repository: str, files: list[str], manifest: Row) -> None:
    others = sorted(set(files) - set(manifest.get("files", [])))
    weights = [name for name in others if any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHTS)]
    if weights:
        raise InputError(
            f"{repository} contains weights that expo did not push ({weights[0]}); choose another repository"
        )


def make_repository(destination: Destination, *, private: bool) -> None:
    """Create the repository if it does not exist.

    Raises:
        InputError: The hub refuses it.
        EnvironmentFailure: The hub cannot be reached.
    """
    from huggingface_hub import HfApi

    name = destination.repository
    _explained(lambda: HfApi().create_repo(name, private=private or None, exist_ok=True), name)


def push(destination: Destination, folder: Path) -> Pushed:
    """Upload a finished output; files already there are not sent again.

    Args:
        destination: Where it goes; the repository exists.
        folder: The output folder, complete.

    Raises:
        InputError: The hub refuses it.
        EnvironmentFailure: The upload failed; calling again continues.
    """
    from huggingface_hub import HfApi

    manifest = read_json(folder / MANIFEST_FILE)
    files = {*manifest["files"], MANIFEST_FILE}
    stale = sorted(set(destination.manifest.get("files", [])) - files)
    commit = _explained(
        lambda: HfApi().upload_folder(
            repo_id=destination.repository,
            folder_path=folder,
            commit_message=f"ExPO with α = {manifest['alpha']!r}",
            allow_patterns=sorted(map(glob.escape, files)),
            delete_patterns=list(map(glob.escape, stale)) or None,
        ),
        destination.repository,
    )
    return Pushed(destination.repository, str(commit.commit_url), commit.oid)


def _explained(action: Callable[[], T], repository: str) -> T:
    """Run `action`, turning the hub's errors into one line each."""
    require_usable_environment()
    expected: tuple[type[Exception], ...] = (ValueError, *network_errors())
    try:
        return action()
    except expected as error:
        raise _explain(error, repository) from error


def _explain(error: Exception, repository: str) -> ExpoError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return InputError(f"pushing to {repository} needs a hub token; {TOKEN_ADVICE}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(f"pushing to {repository} needs the hub, and HF_HUB_OFFLINE is set")
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # an upload's thread
    status = http_status(cause)
    if status == 401:
        return InputError(f"the hub rejected the token; {TOKEN_ADVICE}")
    if status in USERS_FAULT or "README.md" in str(error):
        said = getattr(cause, "server_message", None) or str(cause)
        return InputError(f"the hub refuses the push to {repository}: {' '.join(said.split())}")
    return EnvironmentFailure(
        f"pushing to {repository} failed: {first_line(cause)}; rerun the same command to push again"
    )
