"""Checkpoint folders: what is read is what the safetensors library reads; what lies is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import entry, raw_safetensors, read_checkpoint_tensors, write, write_checkpoint
from safetensors.torch import load_file, save_file

from expo.checkpoint import folder as checkpoint
from expo.errors import InputError

F32 = entry("F32", [2], 0, 8)
EIGHT = bytes(8)


def test_offsets_are_where_safetensors_has_the_data(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "odd": torch.arange(15, dtype=torch.int16).reshape(3, 5),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(7, dtype=torch.float16),
    }
    folder = write_checkpoint(tmp_path / "model", tensors, shards=2)
    read = checkpoint.read_checkpoint(folder)
    assert read.sharded
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = read.tensors[name]
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            assert stream.read(info.nbytes) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (info.shape, info.numel) == (tuple(tensor.shape), tensor.numel())


# --- folders ------------------------------------------------------------------------------------------------------


def sharded(folder: Path, weight_map: object) -> Path:
    raw_safetensors(folder / "one.safetensors", {"a": F32}, EIGHT)
    raw_safetensors(folder / "two.safetensors", {"b": F32}, EIGHT)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


BAD_INDEXES = {
    "a missing shard": ({"a": "one.safetensors", "b": "gone.safetensors"}, "names gone.safetensors, which is missing"),
    "a path upwards": ({"a": "../one.safetensors"}, "'../one.safetensors', which is not a safetensors file in the"),
    "an absolute path": ({"a": "/etc/one.safetensors"}, "'/etc/one.safetensors', which is not a safetensors file"),
    "a file of another kind": ({"a": "config.json"}, "'config.json', which is not a safetensors file"),
    "a tensor no shard has": (
        {"a": "one.safetensors", "c": "one.safetensors"},
        "says tensor 'c' is in one.safetensors, but it is not in any shard: download the checkpoint again or, if the "
        "model has no such tensor, remove it from the index",
    ),
    "tensors no shard has": (
        {"a": "one.safetensors", "c": "one.safetensors", "d": "two.safetensors"},
        r"says tensor 'c' is in one.safetensors, but it is not in any shard \(and 1 more tensors\): download",
    ),
    "a tensor of a file that the index does not name": (
        {"a": "one.safetensors", "b": "one.safetensors"},
        "says tensor 'b' is in one.safetensors, but it is not in any shard",
    ),
    "a tensor left out": ({"a": "one.safetensors"}, None),
    "no weight_map": (None, "has no weight_map"),
    "an empty weight_map": ({}, "has no weight_map"),
    "numbers for names": ({"a": 1}, "has no weight_map"),
}


@pytest.mark.parametrize(("weight_map", "message"), BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_indexes_that_lie(tmp_path: Path, weight_map: object, message: str | None) -> None:
    folder = sharded(tmp_path / "model", weight_map)
    if message is None:
        assert checkpoint.read_checkpoint(folder).ignored == ("two.safetensors",)
        return
    with pytest.raises(InputError, match=message):
        checkpoint.read_checkpoint(folder)


@dataclass(frozen=True)
class Disagreement:
    """Shards, file → name → value of each tensor, and where the index says they are."""

    shards: dict[str, dict[str, float]]
    index: dict[str, str]
    values: dict[str, float] | str
    """What loaders read; or what the refusal says."""
    warning: str = ""


IN_ORDER = {"a": "1", "b": "2"}
DISAGREEMENTS = {
    "none": Disagreement({"1": {"a": 1}, "2": {"b": 2}}, IN_ORDER, {"a": 1, "b": 2}),
    "a tensor in another shard": Disagreement(
        {"1": {"a": 1}, "2": {"b": 2, "c": 3}},
        {**IN_ORDER, "c": "1"},
        {"a": 1, "b": 2, "c": 3},
        "lists 1 tensors in the wrong shard ('c' …): following the shards",
    ),
    "two tensors in each other's shard": Disagreement(
        {"1": {"a": 1}, "2": {"b": 2}},
        {"a": "2", "b": "1"},
        {"a": 1, "b": 2},
        "lists 2 tensors in the wrong shard ('a' …): following the shards",
    ),
    "a tensor that the index leaves out": Disagreement(
        {"1": {"a": 1, "c": 3}, "2": {"b": 2}},
        IN_ORDER,
        {"a": 1, "b": 2, "c": 3},
        "does not list 1 tensors of its shards ('c' …): reading them",
    ),
    "a superseded copy": Disagreement(
        {"1": {"a": 1, "b": 0}, "2": {"b": 2}},
        IN_ORDER,
        {"a": 1, "b": 2},
        "1 tensors are in more than one shard ('b' …): taking them from where the index places them",
    ),
    "a shard of superseded copies alone": Disagreement(
        {"1": {"a": 0, "b": 0}, "2": {"a": 1}, "3": {"b": 2, "c": 3}},
        {"a": "2", "b": "3", "c": "1"},
        {"a": 1, "b": 2, "c": 3},
        "2 tensors are in more than one shard ('a' …): taking them from where the index places them",
    ),
    "three copies": Disagreement(
        {"1": {"a": 1, "b": 0}, "2": {"b": 7, "c": 3}, "3": {"b": 2}},
        {"a": "1", "b": "3", "c": "2"},
        {"a": 1, "b": 2, "c": 3},
        "1 tensors are in more than one shard",
    ),
    "a copy that loaders prefer to the index's": Disagreement(
        {"1": {"a": 1}, "2": {"a": 0, "b": 2}},
        IN_ORDER,
        "tensor 'a' is in more than one shard (model-1.F, model-2.F); the index says model-1.F, and loaders take it "
        "from model-2.F: remove the stray copies",
    ),
    "copies that the index does not list": Disagreement(
        {"1": {"a": 1, "c": 0}, "2": {"b": 2, "c": 3}}, IN_ORDER, "(model-1.F, model-2.F); the index does not list it"
    ),
    "copies in shards whose order loaders disagree on": Disagreement(
        {"9": {"a": 1, "b": 0}, "10": {"b": 2}},
        {"a": "9", "b": "10"},
        "the index says model-10.F, and loaders take it from model-10.F or model-9.F",
    ),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("case", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_an_index_that_disagrees_with_its_shards(
    case: Disagreement, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is read is what transformers loads; the output's own index and shards agree."""
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    names = {number: f"model-{number}.{suffix}" for number in case.shards}
    for number, values in case.shards.items():
        tensors = {name: torch.full((2,), float(value)) for name, value in values.items()}
        write_checkpoint(dpo, {})
        (save_file if suffix == "safetensors" else torch.save)(tensors, dpo / names[number])
    (dpo / "model.safetensors").unlink()
    weight_map = {name: names[number] for name, number in case.index.items()}
    index = f"{'model' if suffix == 'safetensors' else 'pytorch_model'}.{suffix}.index.json"
    (dpo / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_checkpoint(sft, {name: torch.zeros(2) for name in {name for one in case.shards.values() for name in one}})

    if isinstance(case.values, str):
        with pytest.raises(InputError) as caught:
            write((sft, dpo), tmp_path / "out", 0.0, allow_pickle=True)
        assert case.values.replace("F", suffix) in str(caught.value)
        return
    write((sft, dpo), tmp_path / "out", 0.0, allow_pickle=True)
    warnings = [message for message in caplog.messages if "index.json" in message]
    assert case.warning in "".join(warnings)
    assert bool(warnings) == bool(case.warning)
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(names.values()):
        loaded |= (load_file if suffix == "safetensors" else torch.load)(dpo / file)
    out = read_checkpoint_tensors(tmp_path / "out")
    assert {name: tensor.tolist() for name, tensor in out.items()} == {n: t.tolist() for n, t in loaded.items()}
    assert {name: tensor[0].item() for name, tensor in out.items()} == case.values
    written = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    shards = {file.name: load_file(file).keys() for file in (tmp_path / "out").glob("*.safetensors")}
    assert {name: file for file, inside in shards.items() for name in inside} == written
    assert sum(map(len, shards.values())) == len(written)
    assert all(shards.values())


def test_transformers_reads_the_shards_and_not_the_places(llama_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What the above assumes: a tensor elsewhere, one that the index leaves out, and a copy in an earlier shard."""
    from transformers import AutoModelForCausalLM

    dpo = shutil.copytree(llama_pair[1], tmp_path / "dpo")
    index = json.loads((dpo / "model.safetensors.index.json").read_text())
    weight_map, files = index["weight_map"], sorted(set(index["weight_map"].values()))
    moved, unlisted = (
        next(name for name, file in weight_map.items() if file == files[i] and "mlp" in name) for i in (0, 1)
    )
    copied = next(name for name, file in weight_map.items() if file == files[-1])
    first = load_file(dpo / files[0])
    save_file(
        {**first, copied: torch.zeros(load_file(dpo / files[-1])[copied].shape)}, dpo / files[0], {"format": "pt"}
    )
    del weight_map[unlisted]
    weight_map[moved] = files[-1]
    (dpo / "model.safetensors.index.json").write_text(json.dumps(index))
    write((llama_pair[0], dpo), tmp_path / "out", 0.0)
    wanted, loaded, out = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (llama_pair[1], dpo, tmp_path / "out")
    )
    assert all(torch.equal(loaded[name], tensor) and torch.equal(out[name], tensor) for name, tensor in wanted.items())


def test_a_single_file_beside_an_index_that_does_not_name_it(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", {"a": "one.safetensors", "b": "two.safetensors"})
    raw_safetensors(folder / "model.safetensors", {"a": F32}, EIGHT)
    with pytest.raises(InputError, match=r"both model\.safetensors and .* does not list it"):
        checkpoint.read_checkpoint(folder)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(2)})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert checkpoint.read_checkpoint(folder).sharded


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "contains no safetensors weights"),
        (("pytorch_model.bin",), r"only \.bin weights"),
        (("adapter_model.safetensors",), "adapter_model.safetensors' but neither model.safetensors nor"),
        (("model.safetensors", ".expo-partial"), "unfinished output"),
    ],
)
def test_folders_without_weights(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        checkpoint.read_checkpoint(tmp_path)


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    raw_safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(InputError, match="contains no tensors"):
        checkpoint.read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        checkpoint.read_checkpoint(tmp_path)


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_size_time_header_and_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(4), "b": torch.zeros(4)})
    weights, seen = folder / "model.safetensors", [checkpoint.fingerprint(folder)]
    status = weights.stat()

    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.append(checkpoint.fingerprint(folder))

    content = weights.read_bytes()
    weights.write_bytes(content.replace(b'"b"', b'"c"'))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(checkpoint.fingerprint(folder))

    (folder / "config.json").write_text("{}")
    seen.append(checkpoint.fingerprint(folder))
    assert [seen.count(one) for one in seen] == [1, 1, 1, 1]

    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert checkpoint.fingerprint(folder)["files"] == seen[0]["files"]


def test_a_fingerprint_reads_no_more_than_it_must(tmp_path: Path) -> None:
    """Pipes, folders and what others keep there; a large file counts by size and time."""
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(4)})
    plain = checkpoint.fingerprint(folder)
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.safetensors").mkdir()
    (folder / "notes.txt").symlink_to("gone")
    assert checkpoint.fingerprint(folder) == plain
    (folder / "huge.json").touch()
    os.truncate(folder / "huge.json", 10**13)
    (folder / "lie.safetensors").write_bytes((10**13).to_bytes(8, "little"))
    assert checkpoint.fingerprint(folder)["files"].keys() == {"huge.json", "lie.safetensors", "model.safetensors"}


def test_a_fingerprint_of_a_name_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"a": torch.zeros(4)})
    Path(f"{folder}/caf\udce9.safetensors").touch()
    with pytest.raises(InputError, match="not UTF-8; rename it"):
        checkpoint.fingerprint(folder)
