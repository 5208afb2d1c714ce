"""Where models are: folders, and what the hub's answers become. The hub itself is not asked."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from expo.errors import EnvironmentFailure, InputError
from expo.hub import locate

httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # or its successor

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
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
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


def test_of_sft_only_the_bin_weights_are_fetched_where_there_are_no_others(monkeypatch, tmp_path):
    calls = answer(monkeypatch, tmp_path, files=["pytorch_model.bin", "tokenizer.json"])
    locate("org/name", weights_only=True)
    assert calls[0][1]["allow_patterns"] == ["pytorch_model*.bin", "pytorch_model.bin.index.json", "config.json"]


@pytest.mark.parametrize("weights_only", [True, False])
def test_bin_weights_that_are_not_wanted_are_not_fetched(monkeypatch, tmp_path, weights_only):
    calls = answer(monkeypatch, tmp_path, files=["pytorch_model.bin"])
    with pytest.raises(InputError, match="org/name has no safetensors weights on the hub; --allow-pickle fetches"):
        locate("org/name", weights_only=weights_only, pickled=False)
    assert calls == []


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


def test_a_hub_that_is_not_there_is_one_line(run_expo, tmp_path):
    """Real requests, to a port of this machine where nobody listens."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = run_expo("extrapolate", "--sft", "a/b", "--dpo", "a/c", "--alpha", 0.3, env=nowhere)
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("expo: error: a/b is not a local directory, and the hub cannot be")
    assert "Traceback" not in done.stderr
