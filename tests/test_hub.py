"""Where models are: folders, and what the hub's answers become.

First what the library's errors turn into, then the program against a hub in this process (`hub_server.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import helpers
import huggingface_hub
import pytest
from helpers import UNHURRIED, Result, read_checkpoint_tensors
from hub_server import WRITER, FakeHub, read_folder
from huggingface_hub import ModelCard, constants, errors

from expo.checkpoint.hub import locate
from expo.errors import EnvironmentFailure, InputError

httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # or its successor

COMMIT = "0123456789abcdef0123456789abcdef01234567"

UNWANTED = {
    "pytorch_model.bin": b"the same weights once more",
    "sub/model.safetensors": b"a part no loader looks at",
    "original/consolidated.00.pth": b"the first release",
    "optimizer.pt": b"left from training",
}


def response(status: int) -> object:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


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
            errors.RepositoryNotFoundError("x", response=response(404)),
            InputError,
            "neither a local directory nor",
        ),
        (errors.RevisionNotFoundError("x", response=response(404)), InputError, "org/name has no revision 'v1'"),
        (
            errors.GatedRepoError("x", response=response(404)),
            InputError,
            "gated: accept its terms",
        ),
        (errors.LocalEntryNotFoundError("x"), EnvironmentFailure, "the hub cannot be reached"),
        (httpx.ConnectError("x"), EnvironmentFailure, "fetching org/name@v1 from the hub failed"),
        (errors.HfHubHTTPError("x", response=response(404)), EnvironmentFailure, "fetching org/name@v1 from the hub"),
        (errors.HfHubHTTPError("x", response=response(401)), InputError, "rejected the token"),
        (errors.HfHubHTTPError("x", response=response(403)), InputError, "denies access to org/name@v1: x"),
        (RuntimeError("CAS Client Error"), EnvironmentFailure, "fetching org/name@v1 from the hub failed: CAS"),
        (
            OSError(28, "No space left"),
            EnvironmentFailure,
            "fetching org/name@v1 .* failed: .* No space left",
        ),
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


@pytest.mark.parametrize("weights_only", [True, False])
def test_weights_below_the_models_folder_are_not_fetched(monkeypatch, tmp_path, weights_only):
    calls = answer(monkeypatch, tmp_path, files=["pytorch_model.bin", "sub/model.safetensors"])
    locate("org/name", weights_only=weights_only)
    unwanted = calls[0][1]["ignore_patterns"]
    assert "*.bin" not in unwanted, "weights in a folder below are none"
    assert "*/*.safetensors" in unwanted


def test_of_sft_only_the_bin_weights_are_fetched_where_there_are_no_others(monkeypatch, tmp_path):
    calls = answer(monkeypatch, tmp_path, files=["pytorch_model.bin", "tokenizer.json"])
    locate("org/name", weights_only=True)
    wanted = calls[0][1]["allow_patterns"]
    assert {"pytorch_model*.bin", "pytorch_model.bin.index.json", "config.json", "tokenizer.json"} <= set(wanted)
    assert "*.bin" not in wanted, "training_args.bin and the like are not weights"


@pytest.mark.parametrize("weights_only", [True, False])
def test_bin_weights_that_are_not_wanted_are_not_fetched(monkeypatch, tmp_path, weights_only):
    calls = answer(monkeypatch, tmp_path, files=["pytorch_model.bin"])
    with pytest.raises(InputError, match="org/name has no safetensors weights on the hub; --allow-pickle downloads"):
        locate("org/name", weights_only=weights_only, pickled=False)
    assert calls == []


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nope", "a/b/c", "../x", "~nobody/x", "~no-such-user/x", "org/é"]
)
def test_a_missing_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    calls = answer(monkeypatch, RuntimeError("asked"))
    with pytest.raises(InputError, match="no such directory"):
        locate(name)
    assert calls == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name/", "no such directory: org/name/ (did you mean the hub's org/name?)"),
        ("https://huggingface.co/org/name", "(did you mean the hub's org/name?)"),
        ("https://huggingface.co/org/name/tree/main", "(did you mean the hub's org/name?)"),
        ("hf://org/name", "(did you mean the hub's org/name?)"),
        ("org/name@", "org/name@ names no revision: leave out the @, or add a branch, tag or commit after it"),
        ("./here/zephyr-7b-sftt", "no such directory: ./here/zephyr-7b-sftt (did you mean here/zephyr-7b-sft?)"),
        ("./here/mistral", "no such directory: ./here/mistral"),
        ("", "the model's name is empty"),
        (" ", "the model's name is empty"),
        ("org--x/name", "no such directory: org--x/name"),
        ("org/name.git", "no such directory: org/name.git"),
        ("a" * 97, "no such directory: aaa"),
    ],
)
def test_what_an_odd_name_may_have_meant(monkeypatch, tmp_path, name, message):
    calls = answer(monkeypatch, RuntimeError("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "zephyr-7b-sft").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        locate(name)
    assert message in str(caught.value)
    assert calls == []


def test_a_mistyped_folder_that_could_be_on_the_hub(monkeypatch, tmp_path):
    answer(monkeypatch, errors.RepositoryNotFoundError("x", response=response(404)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "zephyr-sft").mkdir(parents=True)
    with pytest.raises(InputError, match=r"neither a local directory \(did you mean models/zephyr-sft\?\) nor"):
        locate("models/zephyr-stf")


def test_a_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file; give the checkpoint's directory"):
        locate(str(file))


@pytest.mark.parametrize("token", ["hf_two words", "hf_bell\a", "hf_é"])
def test_a_token_that_cannot_be_sent_is_not_shown(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    calls = answer(monkeypatch, RuntimeError("asked"))
    with pytest.raises(InputError, match="contains invalid characters") as caught:
        locate("org/name")
    assert token not in str(caught.value)
    assert calls == []


# --- the program and a hub ----------------------------------------------------------------------------------------

LOCATE = """
import json, sys, time
time.sleep = lambda _: None
from expo.errors import ExpoError
from expo.checkpoint.hub import locate
for model in sys.argv[1:]:
    try:
        print(json.dumps([0, locate(model).revision]))
    except ExpoError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


@pytest.fixture
def locate_on_hub(hub: FakeHub, tmp_path: Path) -> Callable[..., list[list[object]]]:
    """`locate` in a process that talks to `hub`: for each model 0 and its commit, or the exit code and the message."""

    def run(*models: str, token: str | None = WRITER) -> list[list[object]]:
        done = helpers.run_python(LOCATE, *models, env=hub.environment(tmp_path / "home", token))
        assert done.code == 0, done.stderr
        assert token is None or token not in done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def on_hub(hub: FakeHub, pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """The pair, also as org/sft and org/dpo (which has a tag v1, and a branch main that has gone on)."""
    hub.add("org/sft", {**read_folder(pair[0]), **UNWANTED, "tokenizer.json": b"{}", "README.md": b"SFT's card"})
    dpo = hub.add("org/dpo", {**read_folder(pair[1]), **UNWANTED})
    dpo.refs["v1"] = dpo.refs["main"]
    dpo.commit({**dpo.files, "config.json": b'{"model_type": "tiny", "newer": true}'})
    return pair


def extrapolate_args(tmp_path: Path, sft: str = "org/sft", dpo: str = "org/dpo@v1") -> tuple[object, ...]:
    return ("extrapolate", "--sft", sft, "--dpo", dpo, "--alpha", 0.5, "--output", tmp_path / "out", "--no-fsync")


def test_a_pair_from_the_hub(
    hub: FakeHub, expo_on_hub: Callable[..., Result], on_hub: tuple[Path, Path], tmp_path: Path
) -> None:
    """Only what is needed is fetched, the commits are recorded, and a rerun fetches nothing, with a hub or without."""
    done = expo_on_hub(*extrapolate_args(tmp_path))
    assert (done.code, done.stderr) == (0, f"expo: α = 0.5: written: {tmp_path}/out\n")
    needed = ("config.json", "model.safetensors", "tokenizer.json")
    assert hub.fetched() == {*(f"org/sft/{n}" for n in needed), *(f"org/dpo/{n}" for n in read_folder(on_hub[1]))}
    assert {request.token for request in hub.requests if request.path.startswith("/store/")} == {None}
    assert {request.token for request in hub.requests if not request.path.startswith("/store/")} == {WRITER}

    sft, dpo = hub.model("org/sft").refs["main"], hub.model("org/dpo").refs["v1"]
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    assert manifest["sources"] == {
        "sft": {"name": "org/sft", "revision": sft},
        "dpo": {"name": "org/dpo", "revision": dpo},
    }
    assert (manifest["config"]["sft"], manifest["config"]["dpo"]) == ("org/sft", "org/dpo@v1")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--sft org/sft@{sft} --dpo org/dpo@{dpo}" in card
    said = ModelCard(card).data.to_dict()
    assert (said["base_model"], said["base_model_relation"]) == (["org/dpo", "org/sft"], "merge")
    assert "newer" not in (tmp_path / "out" / "config.json").read_text()

    for offline, asks in (("0", True), ("1", False)):
        hub.forget_requests()
        again = expo_on_hub(*extrapolate_args(tmp_path), HF_HUB_OFFLINE=offline)
        assert (again.code, again.stderr) == (0, f"expo: α = 0.5: already complete: {tmp_path}/out\n")
        assert hub.fetched() == set()
        assert bool(hub.requests) == asks


def test_offline_and_not_cached(expo_on_hub: Callable[..., Result], on_hub: tuple[Path, Path], tmp_path: Path) -> None:
    done = expo_on_hub(*extrapolate_args(tmp_path), HF_HUB_OFFLINE="1")
    message = "org/sft is neither a local directory nor complete in the hub cache, and HF_HUB_OFFLINE is set"
    assert (done.code, done.stderr) == (2, f"expo: error: {message}\n")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, on_hub: tuple[Path, Path], locate_on_hub) -> None:
    dpo = hub.model("org/dpo")
    dpo.refs["a/branch"] = dpo.refs["v1"]
    main, old = dpo.refs["main"], dpo.refs["v1"]
    wanted = {"org/dpo": main, "org/dpo@main": main, "org/dpo@v1": old, f"org/dpo@{old}": old, "org/dpo@a/branch": old}
    assert locate_on_hub(*wanted) == [[0, commit] for commit in wanted.values()]


REFUSED = {
    "org/gated": (2, "org/gated is gated: accept its terms on the hub, and set HF_TOKEN or run `hf auth login`"),
    "org/missing": (2, "org/missing is neither a local directory nor a repository on the hub (a private one needs"),
    "org/private": (2, "org/private is neither a local directory nor a repository on the hub (a private one needs"),
    "org/sft@v9": (2, "org/sft has no revision 'v9' on the hub"),
    "org/sft@../../x": (2, "org/sft has no revision '../../x' on the hub"),
    "org/denied": (2, "the hub denies access to org/denied: 403 Forbidden: not from here"),
    "org/busy": (1, "fetching org/busy from the hub failed: 429 Too Many Requests"),
    "org/down": (1, "fetching org/down from the hub failed: Server error '503 Service Unavailable'"),
    "org/gone": (1, "fetching org/gone from the hub failed: 404"),
}


def test_what_the_hub_refuses(hub: FakeHub, on_hub: tuple[Path, Path], locate_on_hub) -> None:
    hub.add("org/gated", on_hub[0], gated=True)
    hub.add("org/private", on_hub[0], private=True)
    for name in ("org/denied", "org/busy", "org/down", "org/gone"):
        hub.add(name, on_hub[0])
    hub.fail("/org/denied", 99, status=403, body={"error": "x"}, headers={"X-Error-Message": "not from here"})
    hub.fail("/org/busy", 99, status=429, headers={"Retry-After": "1"})
    hub.fail("/org/down", 99, status=503)
    hub.fail("/org/gone/resolve/.*/model.safetensors", 99, status=404, headers={"X-Error-Code": "EntryNotFound"})
    answers = dict(zip(REFUSED, locate_on_hub(*REFUSED), strict=True))
    for name, (code, message) in REFUSED.items():
        assert answers[name][0] == code, answers[name]
        assert str(answers[name][1]).startswith(message)
        assert "\n" not in str(answers[name][1])


@pytest.mark.parametrize(
    ("token", "code", "said"),
    [
        (WRITER, 0, ""),
        (
            None,
            2,
            "team/private is neither a local directory nor a repository on the hub (a private one needs HF_TOKEN)",
        ),
        ("hf_anotherHubsToken", 2, "the hub rejected the token for team/private; set HF_TOKEN"),
    ],
)
def test_a_private_model_needs_its_owners_token(
    hub: FakeHub, pair: tuple[Path, Path], locate_on_hub, token, code, said
) -> None:
    hub.add("team/private", pair[0], private=True)
    [[found, message]] = locate_on_hub("team/private", token=token)
    assert found == code
    assert message.startswith(said)


def test_a_token_is_not_shown_with_debug(expo_on_hub: Callable[..., Result], tmp_path: Path) -> None:
    done = expo_on_hub(*extrapolate_args(tmp_path), "--debug", token="hf_anotherHubsToken", HF_DEBUG="1")
    assert done.code == 2
    assert "Traceback" in done.stderr


LOOK = """
import json, os, sys
from pathlib import Path
from huggingface_hub import constants
from expo.errors import ExpoError
from expo.checkpoint.hub import locate
for constants.HF_HUB_OFFLINE in (False, True):
    try:
        path = locate("org/model", **json.loads(sys.argv[1])).path
        print(json.dumps([0, sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())]))
    except ExpoError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""

ANY, PICKLED, SAFE = {}, {"pickled": True}, {"pickled": False}
SHARDED = ("model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors")
SHARDED_BIN = ("pytorch_model.bin.index.json", "pytorch_model-1.bin", "pytorch_model-2.bin")
BIN, STRAY, VARIANT = "pytorch_model.bin", "model-4bit-128g.safetensors", "model.fp16.safetensors"

WEIGHTS: dict[str, tuple[dict[str, bool], tuple[str, ...], tuple[str, ...] | str]] = {
    "a quantized copy beside .bin": (PICKLED, (BIN, STRAY), (BIN,)),
    "a variant beside .bin": (PICKLED, (BIN, VARIANT, "pytorch_model.fp16.bin"), (BIN,)),
    "consolidated weights beside .bin": (PICKLED, (BIN, "consolidated.safetensors"), (BIN,)),
    "SFT with a quantized copy beside .bin": ({**PICKLED, "weights_only": True}, (BIN, STRAY), (BIN,)),
    "an engine's model with a quantized copy beside .bin": (ANY, (BIN, STRAY), (BIN,)),
    "sharded .bin": (PICKLED, (*SHARDED_BIN, STRAY, "pytorch_model-3.bin", "training_args.bin"), SHARDED_BIN),
    "SFT's sharded .bin": ({**PICKLED, "weights_only": True}, (*SHARDED_BIN, "pytorch_model-3.bin"), SHARDED_BIN),
    "both kinds": (PICKLED, ("model.safetensors", BIN), ("model.safetensors",)),
    "both kinds, sharded": (PICKLED, (*SHARDED, *SHARDED_BIN), SHARDED),
    "both kinds, one sharded": (PICKLED, (*SHARDED, BIN), SHARDED),
    "safetensors and strays": (SAFE, ("model.safetensors", STRAY, VARIANT, "x.pt", "y.pth"), ("model.safetensors",)),
    "shards and strays": (SAFE, (*SHARDED, "model-3.safetensors", VARIANT, "consolidated.safetensors"), SHARDED),
    "SFT's shards and strays": ({**SAFE, "weights_only": True}, (*SHARDED, STRAY), SHARDED),
    "a single file beside an index": (SAFE, ("model.safetensors", *SHARDED), ("model.safetensors", *SHARDED)),
    "an adapter": (
        SAFE,
        ("adapter_config.json", "adapter_model.safetensors", "training_args.bin"),
        ("adapter_config.json", "adapter_model.safetensors"),
    ),
    "an adapter beside the model": (
        SAFE,
        ("adapter_config.json", "adapter_model.safetensors", "model.safetensors", STRAY),
        ("adapter_config.json", "adapter_model.safetensors", "model.safetensors"),
    ),
    "training states": (SAFE, ("model.safetensors", "fsdp_0/__0_0.distcp", "optimizer_0/x"), ("model.safetensors",)),
    "an engine's model under another name": (ANY, (STRAY, "x.bin"), (STRAY,)),
    "only .bin": (SAFE, (BIN, STRAY), "org/model has no safetensors weights on the hub; --allow-pickle downloads"),
    "only sharded .bin": (
        SAFE,
        SHARDED_BIN,
        "org/model has no safetensors weights on the hub; --allow-pickle downloads",
    ),
    "a pickled adapter": (PICKLED, ("adapter_config.json", "adapter_model.bin"), "load it with peft and save it again"),
    "only a variant": (
        PICKLED,
        (VARIANT,),
        "it has model.fp16.safetensors, a variant; if it is not quantized, rename it",
    ),
    "only a quantized copy": (
        SAFE,
        (STRAY,),
        f"but {STRAY}; if it is the whole model, unquantized, it needs that name",
    ),
    "a trainer's output": (
        SAFE,
        ("checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors"),
        "org/model has no weights on the hub (model.safetensors or model.safetensors.index.json): its folder "
        "checkpoint-10 is a checkpoint; give model/checkpoint-10 (the last of 2 such folders); `hf download org/model "
        "--local-dir model` fetches it",
    ),
    "GGUF": (
        PICKLED,
        ("model-Q4.gguf",),
        "it has GGUF weights (model-Q4.gguf); give the checkpoint they were made from",
    ),
}


@pytest.mark.parametrize(("how", "files", "expected"), WEIGHTS.values(), ids=WEIGHTS)
def test_which_weights_are_fetched(
    how: dict[str, bool], files: tuple[str, ...], expected: tuple[str, ...] | str, hub: FakeHub, tmp_path: Path
) -> None:
    """And what was fetched is complete without the hub."""
    content = dict.fromkeys(files, b"x") | {"config.json": b"{}"}
    for index in (SHARDED, SHARDED_BIN):
        if index[0] in files:
            content[index[0]] = json.dumps({"weight_map": dict(zip("ab", index[1:], strict=True))}).encode()
    hub.add("org/model", content)
    done = helpers.run_python(LOOK, json.dumps(how), env=hub.environment(tmp_path / "home", WRITER))
    online, offline = map(json.loads, done.stdout.splitlines())
    if isinstance(expected, str):
        assert online[0] == offline[0] == 2
        assert expected in online[1]
        assert not [name for name in hub.fetched() if not name.endswith("index.json")]
    else:
        assert online == offline == [0, sorted(["config.json", *expected])]


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 1}', b'{"weight_map": {"a": 1}}'])
def test_of_a_damaged_index_everything_is_fetched(index: bytes, hub: FakeHub, tmp_path: Path) -> None:
    """The message is that of a folder."""
    hub.add("org/model", {**dict.fromkeys(SHARDED, b"x"), SHARDED[0]: index})
    done = helpers.run_python(LOOK, json.dumps(SAFE), env=hub.environment(tmp_path / "home", WRITER))
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, sorted(SHARDED)]] * 2


def test_a_download_that_breaks_goes_on(hub: FakeHub, locate_on_hub, tmp_path: Path) -> None:
    content = bytes(range(256)) * (21 << 12)  # the library writes pieces of 10 MiB; one of them comes through
    commit = hub.add("org/large", {"model.safetensors": content}).refs["main"]
    hub.fail("GET /store/")
    assert locate_on_hub("org/large") == [[0, commit]]
    assert [request.range for request in hub.requests if request.range] == ["bytes=10485760-"]
    [file] = (tmp_path / "home").rglob("model.safetensors")
    assert file.read_bytes() == content


def test_a_download_that_keeps_breaking_is_done_by_the_next_run(
    hub: FakeHub, expo_on_hub: Callable[..., Result], on_hub: tuple[Path, Path], tmp_path: Path
) -> None:
    fault = hub.fail("GET /store/", 1000)
    args = (*extrapolate_args(tmp_path), "--dry-run")
    broken = expo_on_hub(*args)
    assert (broken.code, broken.stdout) == (1, "")
    assert broken.stderr.splitlines()[-1].startswith("expo: error: fetching org/sft from the hub failed: ")
    fault.times = 0
    assert expo_on_hub(*args).code == 0


def test_a_killed_download_keeps_what_is_whole(
    hub: FakeHub, expo_on_hub: Callable[..., Result], on_hub: tuple[Path, Path], tmp_path: Path
) -> None:
    args = (*extrapolate_args(tmp_path), "--dry-run", "--json")
    second_shard = hub.model("org/dpo").files["model-00002-of-00002.safetensors"]
    fault = hub.fail(f"GET /store/{hashlib.sha256(second_shard).hexdigest()}", stall=threading.Event())
    command = [sys.executable, "-c", UNHURRIED, *map(str, args)]
    env = helpers.environment(**hub.environment(tmp_path / "home", WRITER))
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert fault.seen.wait(60)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    fault.stall.set()
    hub.forget_requests()
    done = expo_on_hub(*args)
    assert done.code == 0
    assert "org/sft/model.safetensors" not in hub.fetched(), "SFT was whole"
    plan = json.loads(done.stdout)
    fetched, original = read_checkpoint_tensors(Path(plan["dpo"])), read_checkpoint_tensors(on_hub[1])
    assert {name: tensor.tolist() for name, tensor in fetched.items()} == {n: t.tolist() for n, t in original.items()}


def test_a_hub_that_is_not_there_is_one_line(run_expo, tmp_path):
    """Real requests, to a port of this machine where nobody listens."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = run_expo("extrapolate", "--sft", "a/b", "--dpo", "a/c", "--alpha", 0.3, env=nowhere)
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("expo: error: a/b is not a local directory, and the hub cannot be")
    assert "Traceback" not in done.stderr
