"""Where models are: folders, and what the hub's answers become. The hub itself is not asked."""

from __future__ import annotations

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from expo.errors import EnvironmentFailure, InputError
from expo.hub import locate

RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def answer(monkeypatch, result, *, files=("model.safetensors",)):
    """Let the hub give `result`: an exception, or the snapshot's folder. Returns the calls it got."""
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: list(files))
    return calls


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            errors.RepositoryNotFoundError("x", response=RESPONSE),
            InputError,
            "neither a local directory nor",
        ),
        (errors.RevisionNotFoundError("x", response=RESPONSE), InputError, "org/name has no revision 'v1'"),
        (
            errors.GatedRepoError("x", response=RESPONSE),
            InputError,
            "gated: accept its terms",
        ),
        (errors.LocalEntryNotFoundError("x"), EnvironmentFailure, "the hub cannot be reached"),
        (httpx.ConnectError("x"), EnvironmentFailure, "fetching org/name@v1 from the hub failed"),
        (errors.HfHubHTTPError("x", response=RESPONSE), EnvironmentFailure, "fetching org/name@v1 from the hub failed"),
    ],
)
def test_the_hubs_errors_are_one_line_each(monkeypatch, error, kind, message):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answer(monkeypatch, error)
    with pytest.raises(kind, match=message) as caught:
        locate("org/name@v1")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_offline_and_not_cached_is_the_users_fault(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer(monkeypatch, errors.LocalEntryNotFoundError("x"))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        locate("org/name")


def test_a_hub_model_is_known_by_its_commit(monkeypatch, tmp_path):
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    calls = answer(monkeypatch, snapshot)
    location = locate("org/name@v1")
    assert (location.name, location.hub_id, location.revision) == ("name", "org/name", COMMIT)
    assert location.label == "org/name"
    assert (calls[0][0], calls[0][1]["revision"]) == ("org/name", "v1")


@pytest.mark.parametrize(("files", "wanted"), [(["a.safetensors", "a.bin"], False), (["a.bin"], True)])
def test_bin_weights_are_fetched_only_where_there_are_no_others(monkeypatch, tmp_path, files, wanted):
    calls = answer(monkeypatch, tmp_path, files=files)
    locate("org/name")
    assert ("*.bin" not in calls[0][1]["ignore_patterns"]) == wanted


def test_of_sft_only_the_weights_are_fetched(monkeypatch, tmp_path):
    calls = answer(monkeypatch, tmp_path)
    locate("org/name", weights_only=True)
    assert "config.json" in calls[0][1]["allow_patterns"]
    assert not any("token" in pattern for pattern in calls[0][1]["allow_patterns"])


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "a/b/c", "../x", "~nobody/x"])
def test_a_missing_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    calls = answer(monkeypatch, RuntimeError("asked"))
    with pytest.raises(InputError, match="no such directory"):
        locate(name)
    assert calls == []


def test_a_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file; give the checkpoint's directory"):
        locate(str(file))
