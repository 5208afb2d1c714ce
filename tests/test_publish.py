"""`expo extrapolate --push-to-hub`: the program against a hub in this process (`hub_server.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Result, read_checkpoint_tensors, tree, write_checkpoint
from hub_server import READER, WRITER, FakeHub, User

from expo.config import ExtrapolateConfig
from expo.verbs import extrapolate

Push = Callable[..., Result]

ATTRIBUTES = ".gitattributes"
"""What the hub puts into a new repository itself."""


@pytest.fixture
def push(expo_on_hub: Callable[..., Result], pair: tuple[Path, Path], tmp_path: Path) -> Push:
    """`expo extrapolate … --push-to-hub me/model` on the pair, into tmp_path/out."""

    def run(*args: object, token: str | None = WRITER, **env: str) -> Result:
        inputs = ("--sft", pair[0], "--dpo", pair[1], "--output", tmp_path / "out")
        alpha = () if "--alpha" in args else ("--alpha", 0.5)
        to = () if "--push-to-hub" in args else ("--push-to-hub", "me/model")
        return expo_on_hub("extrapolate", *inputs, *alpha, *to, *args, token=token, **env)

    return run


def write(pair: tuple[Path, Path], tmp_path: Path, *alphas: float) -> Path:
    """The output of `push`, written in this process: what is left to do is the push."""
    settings = {"alpha": alphas or (0.5,), "output": str(tmp_path / "out"), "fsync": False}
    extrapolate.run(ExtrapolateConfig(sft=str(pair[0]), dpo=str(pair[1]), **settings))
    return tmp_path / "out"


@pytest.fixture
def finished(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return write(pair, tmp_path)


def pushed_files(hub: FakeHub, repository: str = "me/model") -> dict[str, bytes]:
    files = dict(hub.model(repository).files)
    files.pop(ATTRIBUTES, None)
    return files


def writes(hub: FakeHub) -> list[str]:
    return [str(request) for request in hub.requests if request.method not in ("GET", "HEAD")]


# --- what is pushed -----------------------------------------------------------------------------------------------


def test_an_output_is_written_and_pushed(hub: FakeHub, push: Push, tmp_path: Path) -> None:
    done = push("--json")
    assert done.code == 0
    commit = hub.model("me/model").refs["main"]
    url = f"{hub.endpoint}/me/model/commit/{commit}"
    [output] = json.loads(done.stdout)["outputs"]
    assert output["pushed"] == {"repository": "me/model", "url": url, "commit": commit}
    assert done.stderr == f"expo: α = 0.5: written: {tmp_path}/out\nexpo: α = 0.5: pushed: {url}\n"
    assert pushed_files(hub) == tree(tmp_path / "out")
    assert not hub.model("me/model").private
    assert hub.model("me/model").messages == ["", "ExPO with α = 0.5"], "one commit holds everything"


def test_what_is_pushed_names_no_local_path(hub: FakeHub, push: Push, finished: Path, pair: tuple[Path, Path]) -> None:
    assert push().code == 0
    for name, content in pushed_files(hub).items():
        for folder in (*pair, finished, Path.home()):
            assert str(folder).encode() not in content, name
    manifest = json.loads(pushed_files(hub)["expo.json"])
    assert (manifest["config"]["sft"], manifest["config"]["dpo"]) == ("sft", "dpo")


def test_only_what_expo_wrote_is_pushed(hub: FakeHub, push: Push, finished: Path) -> None:
    ours = tree(finished)
    (finished / "notes.txt").write_text("not for everyone")
    (finished / "[config].json").write_text("{}")
    assert push().code == 0
    assert pushed_files(hub) == ours


def test_a_private_repository(hub: FakeHub, push: Push, finished: Path) -> None:
    assert push("--private", "--push-to-hub", "team/model").code == 0
    assert hub.model("team/model").private
    assert push("--private", "--push-to-hub", "team/model").code == 0


def test_several_alphas_go_to_several_repositories(
    hub: FakeHub, push: Push, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    write(pair, tmp_path, 0.5, 2)
    done = push("--alpha", 0.5, "--alpha", 2, "--push-to-hub", "me/model-{alpha}")
    assert done.code == 0
    for alpha in ("0.5", "2.0"):
        assert pushed_files(hub, f"me/model-{alpha}") == tree(tmp_path / "out" / f"alpha-{alpha}")
        assert f"expo: α = {alpha}: pushed: {hub.endpoint}/me/model-{alpha}/commit/" in done.stderr


def test_the_librarys_other_way_of_uploading(hub: FakeHub, push: Push, finished: Path) -> None:
    hub.all_regular = True  # its storage server is not there, so nothing may be large
    assert push(HF_HUB_DISABLE_XET="0").code == 0
    assert pushed_files(hub) == tree(finished)


# --- again --------------------------------------------------------------------------------------------------------


def test_a_second_push_changes_nothing(hub: FakeHub, push: Push, finished: Path) -> None:
    first = push()
    hub.forget_requests()
    second = push()
    assert (second.code, second.stdout) == (0, first.stdout)
    assert second.stderr.splitlines()[-1] == first.stderr.splitlines()[-1], "the same commit"
    assert not any(line.startswith("PUT") or "/commit/" in line for line in writes(hub))


FAILING = {
    "a large file": ("PUT /store", {"status": 500}, 1, "pushing to me/model failed: Server error '500"),
    "the commit": ("POST .*/commit/main", {"status": 503}, 1, "pushing to me/model failed: Server error '503"),
    "no page but JSON": ("POST /api/validate", {}, 1, "pushing to me/model failed: "),
    "the card": (
        "POST /api/validate",
        {"status": 400, "body": {"errors": [{"message": '"license" must be one of [mit]'}]}},
        2,
        'the hub refuses the push to me/model: Invalid metadata in README.md. - "license" must be one of [mit]',
    ),
    "no room": (
        "POST .*/objects/batch",
        {"status": 403, "headers": {"X-Error-Message": "Private repository storage limit reached"}},
        2,
        "the hub refuses the push to me/model: Private repository storage limit reached",
    ),
}


@pytest.mark.parametrize(("pattern", "fault", "code", "message"), FAILING.values(), ids=FAILING.keys())
def test_a_push_that_fails(
    hub: FakeHub, push: Push, finished: Path, pattern: str, fault: dict[str, object], code: int, message: str
) -> None:
    failing = hub.fail(pattern, 1000, **fault)
    before = tree(finished)
    failed = push()
    assert (failed.code, failed.stdout) == (code, "")
    assert failed.stderr.splitlines()[-1].startswith(f"expo: error: {message}")
    assert tree(finished) == before
    if code == 1:
        assert failed.stderr.endswith("; rerun the same command to push again\n")
        failing.times = 0
        assert push().code == 0
        assert pushed_files(hub) == before


def test_another_output_replaces_the_pushed_one_on_request(
    hub: FakeHub, push: Push, finished: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    assert push().code == 0
    assert "model-00001-of-00002.safetensors" in pushed_files(hub)
    theirs = {"LICENSE": b"mine", "images/curve.png": b"\x89PNG"}
    hub.model("me/model").commit({**hub.model("me/model").files, **theirs})

    tensors = read_checkpoint_tensors(pair[1])
    shutil.rmtree(pair[1])
    write_checkpoint(pair[1], tensors)
    shutil.rmtree(finished)
    hub.forget_requests()
    refused = push()
    assert (refused.code, writes(hub), finished.exists()) == (2, [], False)
    assert refused.stderr.startswith("expo: error: me/model was made with a different dpo; --overwrite replaces it")

    write(pair, tmp_path)
    assert push("--overwrite").code == 0
    assert pushed_files(hub) == {**tree(finished), **theirs}
    assert "model-00001-of-00002.safetensors" not in pushed_files(hub), "loaders would read it beside the new ones"


# --- refused before any work --------------------------------------------------------------------------------------


def weights_of_others(hub: FakeHub) -> None:
    hub.add("me/model", {"README.md": b"# my model", "model.safetensors": b"weights", "expo.json": b"not ours"})


def public(hub: FakeHub) -> None:
    hub.add("me/model", {"README.md": b"# to come"})


def nothing(_: FakeHub) -> None:
    pass


REFUSED = {
    "no token": (nothing, (), None, "pushing to me/model needs a hub token; set HF_TOKEN or run `hf auth login`"),
    "a wrong token": (nothing, (), "hf_anotherHubsToken", "the hub rejected the token; set H"),
    "a reader's token": (nothing, (), READER, "the hub token of me is read-only; pushing to me/model needs one with"),
    "another's name": (
        nothing,
        ("--push-to-hub", "you/model"),
        WRITER,
        "the hub token belongs to me, who may not write to you/model; choose me/…",
    ),
    "other weights": (
        weights_of_others,
        (),
        WRITER,
        "me/model contains weights that expo did not push (model.safetensors); choose another repository",
    ),
    "public": (
        public,
        ("--private",),
        WRITER,
        "me/model already exists and is public: make it private on the hub, or drop",
    ),
}


@pytest.mark.parametrize(("prepare", "args", "token", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_before_any_work(
    hub: FakeHub, push: Push, tmp_path: Path, prepare, args: tuple[str, ...], token: str | None, message: str
) -> None:
    prepare(hub)
    done = push("--sft", "org/not-even-asked-for", *args, token=token)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"expo: error: {message}")
    assert writes(hub) == []
    assert not any("not-even-asked-for" in request.path for request in hub.requests)
    assert not (tmp_path / "out").exists()


def test_offline(hub: FakeHub, push: Push) -> None:
    done = push(HF_HUB_OFFLINE="1")
    message = "pushing to me/model needs the hub, and HF_HUB_OFFLINE is set"
    assert (done.code, done.stderr, hub.requests) == (2, f"expo: error: {message}\n", [])


def test_inputs_at_fault_leave_no_repository_behind(hub: FakeHub, push: Push, pair: tuple[Path, Path]) -> None:
    (pair[0] / "model.safetensors").write_bytes(b"")
    done = push()
    assert (done.code, hub.repositories) == (2, {})


def test_a_token_that_may_not_make_it_is_refused_before_the_work(hub: FakeHub, push: Push, tmp_path: Path) -> None:
    hub.users[WRITER] = User("me", "fineGrained", ("team",))
    hub.fail("POST /api/repos/create", status=403, headers={"X-Error-Message": "You don't have the rights"})
    done = push()
    assert done.code == 2
    assert done.stderr == "expo: error: the hub refuses the push to me/model: You don't have the rights\n"
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_repository_and_changes_nothing(hub: FakeHub, push: Push, tmp_path: Path) -> None:
    done = push("--dry-run", "--json")
    assert done.code == 0
    [output] = json.loads(done.stdout)["outputs"]
    assert output == {"alpha": 0.5, "path": f"{tmp_path}/out", "complete": False, "push_to": "me/model"}
    assert (writes(hub), hub.repositories) == ([], {})
