"""SFT read from the hub by byte ranges while DPO lies on the disk: what is written and fetched, and what goes wrong.

First whole runs against the tests' own hub, then one file's ranges and their faults, then the reading ahead by itself.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from pathlib import Path

import helpers
import pytest
import torch
from adapters import CASES, Maker
from helpers import Result, stopped_in_shard, tree, without_clock, write, write_checkpoint
from hub_server import WRITER, Answer, FakeHub, read_folder
from huggingface_hub import constants

from expo.checkpoint import ranges, read_ahead, remote
from expo.checkpoint.folder import read_checkpoint, read_shard
from expo.checkpoint.header import TensorInfo
from expo.checkpoint.ranges import HubFile
from expo.checkpoint.read_ahead import ReadAhead
from expo.config import ExtrapolateConfig
from expo.errors import EnvironmentFailure, ExpoError, InputError
from expo.verbs import extrapolate

MIB = 1 << 20
SHAPES = {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(5)
    for name, shape in (("mlp", (1024, 2048)), ("norm", (1024,)), ("query", (512, 2048)), ("value", (512, 2048)))
}


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def here(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, talked to by this process, with a cache of the test's own."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for name, value in hub.environment(tmp_path / "home", WRITER).items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of 42 MB a side in three shards, so that headers are a small part of it."""
    folder = tmp_path_factory.mktemp("large")
    sides = zip(("sft", "dpo"), helpers.random_pair(SHAPES), strict=True)
    sft, dpo = (write_checkpoint(folder / name, tensors, shards=3) for name, tensors in sides)
    return sft, dpo


def streamed(dpo: Path, output: Path, sft: str = "org/sft", **settings: object) -> tuple[extrapolate.Written, ...]:
    """`expo extrapolate --stream-sft`, run in this process."""
    return write((sft, dpo), output, stream_sft=True, **settings)  # type: ignore[arg-type]


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in read_checkpoint(folder).tensors.values())


def header_bytes(folder: Path) -> int:
    return sum(len(shard.header) for shard in read_checkpoint(folder).shards)


def weights_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > MIB]


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_that_of_a_download(here: FakeHub, large: tuple[Path, Path], tmp_path: Path) -> None:
    """Every file, but for the clock; no more is fetched than SFT has, and nothing of it is kept."""
    sft = here.add("org/sft", {**read_folder(large[0]), "tokenizer.json": b"{}", "README.md": b"SFT's card"})
    streamed(large[1], tmp_path / "streamed", alpha=(0.3, -1))
    assert tensor_bytes(large[0]) <= here.sent_of("org/sft") <= 1.01 * tensor_bytes(large[0])
    assert weights_in(tmp_path / "home") == []
    assert here.fetched() == {f"org/sft/{name}" for name in read_folder(large[0])} | {"org/sft/tokenizer.json"}
    assert {request.token for request in here.requests if request.path.startswith("/store/")} == {None}
    of_files = [request.path for request in here.requests if "/resolve/" in request.path]
    assert all(sft.refs["main"] in path for path in of_files)

    write(("org/sft", large[1]), tmp_path / "downloaded", alpha=(0.3, -1))  # type: ignore[arg-type]
    assert len(weights_in(tmp_path / "home")) >= 3, "the small files that were there stand in nobody's way"
    for alpha in (0.3, -1.0):
        one, other = (without_clock(tree(tmp_path / how / f"alpha-{alpha}")) for how in ("streamed", "downloaded"))
        assert one == other


LAYOUTS: dict[str, dict[str, object]] = {
    "one shard each": {"shards": (1, 1)},
    "more of SFT's": {"shards": (5, 2)},
    "more of DPO's": {"shards": (1, 4)},
    "shards by size": {"shards": (2, 1), "max_shard_size": "300KB"},
    "another order": {"shards": (1, 2), "reverse": True},
    "some excluded": {"shards": (2, 2), "exclude": ("layers.1",)},
    "data type": {"shards": (1, 2), "dtype": "float32"},
    "several workers": {"shards": (1, 1), "workers": 5},
    "one worker": {"shards": (2, 2), "workers": 1},
    "another alpha for some": {"shards": (1, 1), "alpha_for": ("norm=0",)},
    "copied beside what is made": {"shards": (1, 1), "alpha": (0.0, 0.5)},
}


@pytest.mark.parametrize("how", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("blocks", [(3, 5000), (12, 16 * MIB)], ids=["small blocks", "large blocks"])
def test_whatever_the_layouts(
    how: dict[str, object], blocks: tuple[int, int], here: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as from the disk, each fetched once: as many as the plan says, and the headers."""
    monkeypatch.setattr(remote, "ReadAhead", partial(ReadAhead, blocks=blocks[0], block_bytes=blocks[1]))
    settings = dict(how)
    shards, reverse = settings.pop("shards"), settings.pop("reverse", False)
    shapes = {name: (shape[0] // 8, *(size // 16 for size in shape[1:])) for name, shape in SHAPES.items()}
    sft, dpo = helpers.random_pair(shapes)
    sft = dict(reversed(sft.items())) if reverse else sft
    pair = (
        write_checkpoint(tmp_path / "sft", sft, shards=shards[0]),
        write_checkpoint(tmp_path / "dpo", dpo, shards=shards[1]),
    )
    here.add("org/sft", pair[0])
    planned = extrapolate.plan(
        ExtrapolateConfig(sft="org/sft", dpo=str(pair[1]), stream_sft=True, **{"alpha": (0.5,), **settings})
    ).describe()["sft_bytes_fetched"]
    here.forget_requests()
    streamed(pair[1], tmp_path / "streamed", **settings)
    write(pair, tmp_path / "local", **settings)
    for file in (tmp_path / "local").rglob("*.safetensors"):
        assert (tmp_path / "streamed" / file.relative_to(tmp_path / "local")).read_bytes() == file.read_bytes()
    assert here.sent_of("org/sft") == planned + header_bytes(pair[0])


def test_each_part_fetches_its_own_share(here: FakeHub, large: tuple[Path, Path], tmp_path: Path) -> None:
    here.add("org/sft", large[0])
    sent = []
    for part in ("0/2", "1/2"):
        here.forget_requests()
        streamed(large[1], tmp_path / "out", part=part)
        sent.append(here.sent_of("org/sft") - header_bytes(large[0]))
    here.forget_requests()
    streamed(large[1], tmp_path / "out", join=2)
    assert here.sent_of("org/sft") == header_bytes(large[0])
    assert sum(sent) == tensor_bytes(large[0])
    assert min(sent) > tensor_bytes(large[0]) / 4
    write(large, tmp_path / "local")
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_head_of_dpos_alone_is_combined_with_sfts_embedding(here: FakeHub, tmp_path: Path) -> None:
    """Which is read twice."""
    sft, dpo = helpers.random_pair({"model.embed_tokens.weight": (64, 32), "norm": (32,)})
    dpo["lm_head.weight"] = dpo["model.embed_tokens.weight"] * 1.01
    configs = [{"config.json": json.dumps({"tie_word_embeddings": tied})} for tied in (True, False)]
    pair = (
        write_checkpoint(tmp_path / "sft", sft, files=configs[0]),
        write_checkpoint(tmp_path / "dpo", dpo, files=configs[1]),
    )
    here.add("org/sft", pair[0])
    streamed(pair[1], tmp_path / "streamed")
    write(pair, tmp_path / "local")
    name = "model.safetensors"
    assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert here.sent_of("org/sft") == header_bytes(pair[0]) + tensor_bytes(pair[0]) + 64 * 32 * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "saved modules"])
def test_of_the_base_of_an_adapter_only_what_is_needed_is_read(
    here: FakeHub, made: Maker, tmp_path: Path, case: str
) -> None:
    """For `--as-adapter`: headers, and the tensors that the adapter stores whole."""
    sft, lora = made(CASES[case], torch.float32)
    here.add("org/base", read_folder(sft))
    write((sft, lora), tmp_path / "local", 0.5, as_adapter=True)
    write(("org/base", lora), tmp_path / "out", 0.5, as_adapter=True)  # type: ignore[arg-type]
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "local"))
    assert ours == theirs
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    stored = [one for one in read_shard(lora / "adapter_model.safetensors").tensors if ".lora_" not in one.name]
    assert bool(stored) == (case == "saved modules")
    assert here.sent_of("org/base") == header_bytes(sft) + sum(one.nbytes for one in stored)
    assert not [*(tmp_path / "home").rglob("*.safetensors")]


@pytest.mark.parametrize("first", [True, False], ids=["streamed first", "downloaded first"])
def test_begun_one_way_and_finished_the_other(
    first: bool, here: FakeHub, large: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also the manifest; of SFT only what the shards that are missing need is read."""
    here.add("org/sft", large[0])
    pair = ("org/sft", large[1])
    with stopped_in_shard(1):
        write(pair, tmp_path / "mixed", stream_sft=first)  # type: ignore[arg-type]
    if not first:  # so that the weights are not in the cache
        helpers.shutil.rmtree(tmp_path / "home")
    here.forget_requests()
    write(pair, tmp_path / "mixed", stream_sft=not first)  # type: ignore[arg-type]
    if not first:
        shards = read_checkpoint(large[0]).shards
        read = sum(tensor.nbytes for shard in shards[1:] for tensor in shard.tensors)
        assert here.sent_of("org/sft") == read + header_bytes(large[0]), "the first shard was there"
    write(pair, tmp_path / "whole")  # type: ignore[arg-type]
    assert without_clock(tree(tmp_path / "mixed")) == without_clock(tree(tmp_path / "whole"))
    again = write(pair, tmp_path / "mixed", stream_sft=first)  # type: ignore[arg-type]
    assert [one.status for one in again] == ["already complete"]


def test_killed_and_run_again(
    hub: FakeHub, expo_on_hub: Callable[..., Result], large: tuple[Path, Path], tmp_path: Path
) -> None:
    """Only what is missing is fetched."""
    hub.add("org/sft", large[0])
    args = ("extrapolate", "--sft", "org/sft", "--dpo", large[1], "--alpha", 0.5, "--output", tmp_path / "out")
    shards = read_checkpoint(large[0]).shards
    begins = f"bytes={len(shards[1].header)}-"
    digest = hashlib.sha256(shards[1].file.read_bytes()).hexdigest()
    fault = hub.fail(f"GET /store/{digest} {begins}", stall=threading.Event())
    command = [sys.executable, "-c", helpers.UNHURRIED, *map(str, args), "--stream-sft"]
    env = helpers.environment(**hub.environment(tmp_path / "home", WRITER))
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert fault.seen.wait(60)
    _wait_for(lambda: '"shard"' in (tmp_path / "out" / ".expo-partial" / "journal.jsonl").read_text())
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    fault.stall.set()
    hub.forget_requests()
    assert expo_on_hub(*args, "--stream-sft").code == 0
    rest = sum(tensor.nbytes for shard in shards[1:] for tensor in shard.tensors)
    assert hub.sent_of("org/sft") == rest + header_bytes(large[0])
    assert expo_on_hub(*args[:-1], tmp_path / "whole").code == 0
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "whole"))


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_dry_run_says_how_much_would_be_fetched(
    hub: FakeHub, expo_on_hub: Callable[..., Result], large: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.add("org/sft", large[0])
    args = ("extrapolate", "--sft", "org/sft", "--dpo", large[1], "--alpha", 0.5, "--output", tmp_path / "out")
    done = expo_on_hub(*args, "--stream-sft", "--dry-run")
    assert (done.code, done.stderr) == (0, "")
    assert f"\nsft bytes fetched {tensor_bytes(large[0])}\n" in done.stdout
    assert hub.sent_of("org/sft") == header_bytes(large[0])
    assert "fetched" not in expo_on_hub(*args, "--dry-run").stdout


def test_what_is_in_the_cache_is_not_fetched_again(
    hub: FakeHub, expo_on_hub: Callable[..., Result], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a hub or without one; a cache with only the small files is not taken for a whole one."""
    hub.add("org/sft", pair[0])
    args = ("extrapolate", "--sft", "org/sft", "--dpo", pair[1], "--alpha", 0.5, "--dry-run")
    assert expo_on_hub(*args, "--stream-sft").code == 0
    for more in ((), ("--stream-sft",)):
        offline = expo_on_hub(*args, *more, HF_HUB_OFFLINE="1")
        message = "org/sft is neither a local directory nor complete in the hub cache, and HF_HUB_OFFLINE is set"
        assert (offline.code, offline.stderr) == (2, f"expo: error: {message}\n")
    assert expo_on_hub(*args).code == 0
    hub.forget_requests()
    for offline in ("0", "1"):
        done = expo_on_hub(*args, "--stream-sft", HF_HUB_OFFLINE=offline)
        assert (done.code, done.stderr) == (0, "expo: org/sft is in the cache and read from there\n")
        assert "fetched" not in done.stdout
    assert hub.fetched() == set()


def test_a_hub_that_answers_late_does_not_make_it_a_download(
    here: FakeHub, large: tuple[Path, Path], tmp_path: Path
) -> None:
    """A whole copy is what there is no room for."""
    here.add("org/sft", large[0])
    here.fail("GET /api/models/org/sft", status=503)
    with pytest.raises(EnvironmentFailure, match=r"fetching org/sft from the hub failed: .*503") as caught:
        streamed(large[1], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert here.fetched() == set()


def test_refused(here: FakeHub, pair: tuple[Path, Path], tmp_path: Path, adapter_only: Path) -> None:
    here.add("org/sft", pair[0])
    here.add("org/bin", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    cases: dict[str, tuple[str, Path, dict[str, object]]] = {
        "is a folder: leave out --stream-sft": (str(pair[0]), pair[1], {}),
        "leave out one of the two": ("org/sft", pair[1], {"verify": True}),
        "cannot merge an adapter, which adapter is: leave out --stream-sft": ("org/sft", adapter_only, {}),
        "no safetensors weights on the hub; --allow-pickle": ("org/bin", pair[1], {}),
        "org/bin has only .bin weights on the hub, which --stream-sft": ("org/bin", pair[1], {"allow_pickle": True}),
        "no such directory: ./nowhere": ("./nowhere", pair[1], {}),
        "org/none is neither a local directory nor": ("org/none", pair[1], {}),
    }
    for message, (sft, dpo, settings) in cases.items():
        with pytest.raises(InputError) as caught:
            streamed(dpo, tmp_path / "out", sft, **settings)
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter_only(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "adapter", {"x": torch.ones(1)}, files={"adapter_config.json": "{}"})


def test_one_repository_for_both_sides(here: FakeHub, pair: tuple[Path, Path], tmp_path: Path) -> None:
    here.add("org/sft", pair[0])
    with pytest.raises(InputError, match="are the same files"):
        streamed("org/sft", tmp_path / "out")  # type: ignore[arg-type]


DAMAGED = {
    "empty": b"",
    "three bytes": b"\1\2\3",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "a page": b"<!doctype html><html><body>sign in</body></html>" + b" " * 99,
    "no header": bytes([9] * 200),
    "a header that is cut": (500).to_bytes(8, "little") + b"{" * 100,
    "no JSON": (90).to_bytes(8, "little") + b"{" * 90,
    "a tail": b"",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_refused_as_those_of_a_folder(
    content: bytes, here: FakeHub, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    content = content if content is not DAMAGED["a tail"] else (pair[0] / "model.safetensors").read_bytes() + b"more"
    commit = here.add("org/sft", {**read_folder(pair[0]), "model.safetensors": content}).refs["main"]
    (pair[0] / "model.safetensors").write_bytes(content)
    messages = []
    for sft in (str(pair[0]), "org/sft"):
        with pytest.raises(InputError) as caught:
            write((sft, pair[1]), tmp_path / "out", stream_sft=sft == "org/sft")  # type: ignore[arg-type]
        messages.append(str(caught.value))
    in_cache = tmp_path / "home" / "hub" / "models--org--sft" / "snapshots" / commit
    assert messages[0] == messages[1].replace(str(in_cache), str(pair[0]))


def test_weights_that_the_index_does_not_name(here: FakeHub, large: tuple[Path, Path], tmp_path: Path) -> None:
    files = read_folder(large[0])
    here.add("org/stale", {**files, "model.safetensors": b"x"})
    with pytest.raises(InputError, match=r"has both model\.safetensors and model.safetensors.index.json"):
        streamed(large[1], tmp_path / "out", "org/stale")
    del files["model-00002-of-00003.safetensors"]
    here.add("org/less", files)
    with pytest.raises(InputError, match=r"names model-00002-of-00003.safetensors, which is missing"):
        streamed(large[1], tmp_path / "out", "org/less")


def test_faults_on_the_way_change_nothing(here: FakeHub, large: tuple[Path, Path], tmp_path: Path) -> None:
    """Dropped, busy, expired: the run goes on, and what is fetched twice is only what was lost."""
    here.add("org/sft", large[0])
    here.fail(r"GET /store/\w+ bytes=\d{4}", 3)
    here.fail(r"GET /store/\w+ bytes=\d{7}", 2, status=503)
    here.fail(r"GET /store/\w+ bytes=\d{7}", 1, status=403)
    streamed(large[1], tmp_path / "streamed")
    assert all(fault.times == 0 for fault in here.faults)
    write(large, tmp_path / "local")
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes()
    assert here.sent_of("org/sft") <= 1.01 * tensor_bytes(large[0])


def test_a_hub_that_goes_away_ends_the_run_and_the_next_one_continues(
    hub: FakeHub, expo_on_hub: Callable[..., Result], large: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.add("org/sft", large[0])
    args = ("extrapolate", "--sft", "org/sft", "--dpo", large[1], "--alpha", 0.5, "--output", tmp_path / "out")
    second = read_checkpoint(large[0]).shards[1]
    digest = hashlib.sha256(second.file.read_bytes()).hexdigest()
    fault = hub.fail(f"GET /store/{digest} bytes={len(second.header)}-", 1000, status=503, headers={"Retry-After": "0"})
    broken = expo_on_hub(*args, "--stream-sft")
    assert (broken.code, broken.stdout) == (1, "")
    assert broken.stderr == (
        f"expo: error: reading {second.file.name} of org/sft from the hub failed 6 times in a row: the server answered "
        "503 Service Unavailable; rerun the same command to continue\n"
    )
    fault.times = 0
    hub.forget_requests()
    assert expo_on_hub(*args, "--stream-sft").code == 0
    first = read_checkpoint(large[0]).shards[0]
    assert hub.sent_of("org/sft", first.file.name) == len(first.header), "its shard was whole"


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_elsewhere_ends_the_run_while_others_wait(
    workers: int, here: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker waits for a block that would never be fetched."""
    monkeypatch.setattr(remote, "ReadAhead", partial(ReadAhead, blocks=2, block_bytes=1 << 16))
    sft, dpo = helpers.random_pair({f"t{number:02}": (512, 1024) for number in range(12)})
    dpo["t03"][5] = torch.nan
    here.add("org/sft", write_checkpoint(tmp_path / "sft", sft))
    with pytest.raises(InputError, match="t03 contains NaN"):
        streamed(write_checkpoint(tmp_path / "dpo", dpo), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()


# --- one file's ranges --------------------------------------------------------------------------------------------

CONTENT = random.Random(0).randbytes(400_000)


@pytest.fixture
def file(here: FakeHub, monkeypatch: pytest.MonkeyPatch) -> HubFile:
    """A file on the hub."""
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 1.0)
    commit = here.add("org/model", {"model.safetensors": CONTENT}).refs["main"]
    return HubFile("org/model", commit, "model.safetensors", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def get(file: HubFile, start: int = 0, end: int = len(CONTENT)) -> tuple[bytes, list[float]]:
    """A range, and how long was waited before each try."""
    buffer, waits = bytearray(end - start), []
    file.fetch(start, memoryview(buffer), pause=waits.append)
    return bytes(buffer), waits


def asked(hub: FakeHub) -> list[str | None]:
    return [request.range for request in hub.requests if request.path.startswith("/store/")]


def test_a_range_is_asked_for_where_the_hub_sent_it_before(here: FakeHub, file: HubFile) -> None:
    assert get(file, 5, 99) == (CONTENT[5:99], [])
    assert get(file, 1000, 400_000) == (CONTENT[1000:], [])
    assert [request.path.split("/")[1] for request in here.requests] == ["org", "store", "store"]


def test_dropped_answers_are_continued_at_the_byte_reached(here: FakeHub, file: HubFile) -> None:
    here.fail("GET /store/", 2)
    assert get(file) == (CONTENT, [])
    assert asked(here) == ["bytes=0-399999", "bytes=200000-399999", "bytes=300000-399999"]


def test_answers_that_bring_nothing_are_counted(here: FakeHub, file: HubFile) -> None:
    here.fail("GET /org/", 1000, status=500)
    waits: list[float] = []
    with pytest.raises(EnvironmentFailure, match="failed 6 times in a row: the server answered 500 Internal"):
        file.fetch(0, memoryview(bytearray(9)), pause=waits.append)
    assert waits == [1, 2, 4, 8, 16]


def test_a_little_is_no_progress_and_much_is(here: FakeHub, file: HubFile) -> None:
    """A server that always sends half: 64 KiB, in one answer or in some, begin the count anew."""
    here.fail("GET /store/", 1000)
    with pytest.raises(EnvironmentFailure, match="failed 6 times in a row"):
        get(file)
    assert asked(here)[3] == "bytes=350000-399999", "the last that counts"
    assert len(asked(here)) == 4 + 6


def test_a_server_that_is_silent_is_asked_again(here: FakeHub, file: HubFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    fault = here.fail("GET /store/", stall=threading.Event())
    assert get(file) == (CONTENT, [])
    fault.stall.set()
    assert asked(here) == ["bytes=0-399999", "bytes=200000-399999"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_a_pause_gets_it(status: int, here: FakeHub, file: HubFile) -> None:
    for value in ("7", "100000", "nonsense", formatdate(time.time() + 100, usegmt=True)):
        here.fail("GET /store/", status=status, headers={"Retry-After": value})
    content, waits = get(file)
    assert content == CONTENT
    assert waits[:3] == [7, 300, 4]
    assert 90 < waits[3] <= 100


def test_where_the_hub_sent_it_is_forgotten_when_it_ends(here: FakeHub, file: HubFile) -> None:
    get(file, 0, 9)
    for _ in range(2):
        assert get(file, 9, 99) == (CONTENT[9:99], [])
        here.fail("GET /store/", status=403)
        here.forget_requests()
        assert get(file, 99, 999) == (CONTENT[99:999], [])
        assert [request.path.split("/")[1] for request in here.requests] == ["store", "org", "store"]


def test_where_only_the_hub_leads_to_each_range(here: FakeHub, file: HubFile) -> None:
    """It is tried once."""
    get(file, 0, 9)
    here.fail("GET /store/", status=403)
    for start in (9, 99, 999):
        assert get(file, start, 2 * start) == (CONTENT[start : 2 * start], [])
    assert [request.path.split("/")[1] for request in here.requests] == ["org", "store", "store", *("org", "store") * 3]


def without(name: str, answer: Answer, content: bytes) -> Answer:
    return Answer(answer.status, content, {key: value for key, value in answer.headers.items() if key != name})


LIES: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "the whole file": (
        lambda answer: answer.but(status=200, content=CONTENT, Content_Length=str(len(CONTENT))),
        "sent the whole file where a part was asked for; leave out --stream-sft to download the model instead",
    ),
    "another range": (
        lambda answer: answer.but(Content_Range="bytes 0-89/400000"),
        "sent 'bytes 0-89/400000' where bytes 10-99/400000 were asked for",
    ),
    "another size": (lambda answer: answer.but(Content_Range="bytes 10-99/400001"), "sent 'bytes 10-99/400001' where"),
    "no range": (lambda answer: without("Content-Range", answer, answer.content), "sent 'no range' where"),
    "fewer bytes": (
        lambda answer: answer.but(content=answer.content[:50], Content_Length="50"),
        "sent 50 bytes where 90 were asked for",
    ),
    "more bytes": (
        lambda answer: answer.but(content=answer.content + b"x", Content_Length="91"),
        "sent 91 bytes where 90 were asked for",
    ),
    "more bytes than it says": (
        lambda answer: without("Content-Length", answer, answer.content + b"x" * 9),
        "sent more bytes than were asked for",
    ),
    "a page": (lambda answer: answer.but(Content_Type="text/html; charset=utf-8"), "sent a web page"),
    "compressed": (lambda answer: answer.but(Content_Encoding="gzip"), "sent compressed bytes"),
    "another file": (lambda answer: answer.but(ETag='"other"'), "sent a part of another file than before"),
    "another commit": (lambda answer: answer.but(X_Repo_Commit="0" * 40), "sent another file than the one it named"),
    "no such range": (lambda answer: answer.but(status=416), "answered 416 "),
    "no access any more": (lambda answer: answer.but(status=403), "the server answered 403 Forbidden"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_wrong_answers_are_refused(
    lie: Callable[[Answer], Answer], message: str, here: FakeHub, file: HubFile, capsys: pytest.CaptureFixture[str]
) -> None:
    get(file, 0, 5)
    here.fail("GET /store/", 1000, lie=lie)
    with pytest.raises(EnvironmentFailure) as caught:
        get(file, 10, 100)
    assert message in str(caught.value)
    assert str(caught.value).startswith("reading model.safetensors of org/model from the hub failed: the server ")
    assert "\n" not in str(caught.value)
    assert "/store/" not in str(caught.value), "it may be signed"


def test_the_hub_names_another_file(here: FakeHub, file: HubFile) -> None:
    here.fail("GET /org/", lie=lambda answer: answer.but(X_Linked_Etag='"other"'))
    with pytest.raises(EnvironmentFailure, match="sent another file than the one it named at first"):
        get(file)


def test_fewer_bytes_than_a_length_that_is_not_said_are_continued(here: FakeHub, file: HubFile) -> None:
    here.fail("GET /store/", lie=lambda answer: without("Content-Length", answer, answer.content[:100_000]))
    assert get(file) == (CONTENT, [])
    assert asked(here) == ["bytes=0-399999", "bytes=100000-399999"]


def test_what_the_hub_denies(here: FakeHub, file: HubFile, monkeypatch: pytest.MonkeyPatch) -> None:
    here.fail("GET /org/", status=404, headers={"X-Error-Code": "EntryNotFound"})
    with pytest.raises(EnvironmentFailure, match=r"fetching org/model@.* from the hub failed: 404"):
        get(file)
    here.model("org/model").gated = True
    with pytest.raises(InputError, match="is gated: accept its terms on the hub"):
        get(file)
    monkeypatch.setenv("HF_TOKEN", "hf_anotherHubsToken")
    here.fail("GET /org/", status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
    with pytest.raises(InputError, match="the hub rejected the token for org/model") as caught:
        get(file)
    assert "hf_another" not in str(caught.value)


def test_no_server_at_all(here: FakeHub, file: HubFile, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(EnvironmentFailure, match=r"failed 6 times in a row: .*[Cc]onnect"):
        get(file)


# --- reading ahead ------------------------------------------------------------------------------------------------

FILES = {Path(f"file{number}"): random.Random(number).randbytes(50_000) for number in range(2)}


class Source:
    """Fetches parts of FILES, and notes which."""

    def __init__(self, fault: Callable[[int], None] = lambda _: None) -> None:
        self.parts: list[tuple[Path, int, int]] = []
        self._fault = fault
        self._lock = threading.Lock()

    def __call__(
        self, file: Path, start: int, buffer: memoryview, on_bytes: Callable[[int], None], pause: object
    ) -> None:
        with self._lock:
            self.parts.append((file, start, len(buffer)))
            number = len(self.parts)
        self._fault(number)
        half = len(buffer) // 2
        buffer[:half] = FILES[file][start : start + half]
        on_bytes(half)
        buffer[half:] = FILES[file][start + half : start + len(buffer)]
        on_bytes(len(buffer))


def part(file: Path, start: int, nbytes: int) -> TensorInfo:
    return TensorInfo("t", "U8", (nbytes,), file, start, nbytes)


def ended(reader: ReadAhead) -> None:
    reader.close()
    for thread in reader._threads:
        thread.join(60)
        assert not thread.is_alive()


def read_by_several(reader: ReadAhead, pieces: list[tuple[Path, int, int]], number: int) -> None:
    """Threads take pieces in order and read them, as a combiner's workers do."""
    todo, lock, wrong = iter(pieces), threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                piece = next(todo, None)
            if piece is None:
                return
            file, at, length = piece
            buffer = bytearray(length)
            reader.read(file, at, memoryview(buffer))
            if buffer != FILES[file][at : at + length]:
                wrong.append(piece)

    readers = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


@pytest.mark.parametrize("seed", range(20))
def test_any_parts_in_any_order_by_any_number_of_readers(seed: int) -> None:
    """Each byte as often as it was expected, even where parts overlap; several runs with one reader."""
    draw = random.Random(seed)
    source, expected = Source(), 0
    sizes = {
        "connections": draw.choice([1, 3, 8]),
        "blocks": draw.choice([1, 2, 5]),
        "block_bytes": draw.choice([100, 4096]),
    }
    reader = ReadAhead(source, **sizes)
    for _ in range(3):
        parts, pieces = [], []
        for _ in range(draw.randrange(1, 30)):
            start, nbytes = draw.randrange(40_000), draw.choice([0, 1, 60, 3000, 9000])
            parts.append(part(draw.choice(list(FILES)), start, nbytes))
            end, step = start + nbytes, draw.choice([50, 700, 2000])
            pieces += [(parts[-1].file, at, min(step, end - at)) for at in range(start, end, step)]
        expected += sum(one.nbytes for one in parts)
        reader.expect(parts)
        read_by_several(reader, pieces, draw.choice([1, 4]))
    assert sum(length for _, _, length in source.parts) == expected
    ended(reader)


def test_neighbours_are_one_range() -> None:
    source = Source()
    reader = ReadAhead(source, connections=1, block_bytes=10_000)
    one, other = FILES
    reader.expect(
        [part(one, 0, 10), part(one, 10, 4000), part(one, 4010, 9000), part(one, 20_000, 5), part(other, 20_005, 5)]
    )
    for file, start, nbytes in ((one, 0, 13_010), (one, 20_000, 5), (other, 20_005, 5)):
        reader.read(file, start, memoryview(bytearray(nbytes)))
    assert source.parts == [(one, 0, 10_000), (one, 10_000, 3010), (one, 20_000, 5), (other, 20_005, 5)]
    ended(reader)


def test_no_more_is_fetched_than_there_are_buffers_for() -> None:
    all_there = threading.Event()
    source = Source(lambda number: all_there.set() if number == 4 else None)
    reader = ReadAhead(source, connections=7, blocks=4, block_bytes=1000)
    [file, _] = FILES
    reader.expect([part(file, 0, 50_000)])
    assert all_there.wait(60)
    reader.read(file, 0, memoryview(bytearray(999)))
    reader.read(file, 1000, memoryview(bytearray(999)))
    ended(reader)
    assert len(source.parts) == 4, "none of the four was read to its end"


def test_what_goes_wrong_is_told_to_every_reader() -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise EnvironmentFailure("the third")

    reader = ReadAhead(Source(fail), connections=1, blocks=9, block_bytes=1000)
    [file, _] = FILES
    reader.expect([part(file, 0, 50_000)])
    told: list[str] = []

    def read(start: int) -> None:
        try:
            reader.read(file, start, memoryview(bytearray(1000)))
        except ExpoError as error:
            told.append(str(error))

    threads = [threading.Thread(target=read, args=(start,), daemon=True) for start in (2000, 9000, 40_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert told == ["the third"] * 3
    ended(reader)


def test_stopping_wakes_readers_and_what_pauses() -> None:
    pausing = threading.Event()

    def fetch(file: Path, start: int, buffer: memoryview, on_bytes: object, pause: Callable[[float], None]) -> None:
        pausing.set()
        pause(1e6)

    reader = ReadAhead(fetch, connections=2)
    [file, _] = FILES
    reader.expect([part(file, 0, 10)])
    told: list[BaseException] = []

    def read() -> None:
        try:
            reader.read(file, 0, memoryview(bytearray(10)))
        except ExpoError as error:
            told.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert pausing.wait(60)
    ended(reader)
    thread.join(60)
    assert [str(error) for error in told] == ["reading was stopped"]


def test_what_was_not_expected_is_a_bug() -> None:
    reader = ReadAhead(Source())
    [file, _] = FILES
    reader.expect([part(file, 0, 10)])
    reader.read(file, 0, memoryview(bytearray(10)))
    with pytest.raises(RuntimeError, match="was not expected"):
        reader.read(file, 0, memoryview(bytearray(10)))
    ended(reader)


def test_the_default_is_bounded() -> None:
    assert read_ahead.BLOCKS * read_ahead.BLOCK_BYTES <= 256 * MIB
