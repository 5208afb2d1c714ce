"""Checkpoint folders: what is read is what the safetensors library reads; what lies is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import entry, raw_safetensors, write_checkpoint

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
    "a tensor in the wrong shard": (
        {"a": "two.safetensors", "b": "one.safetensors"},
        "says tensor 'a' is in two.safetensors, but it is not",
    ),
    "a tensor no shard has": (
        {"a": "one.safetensors", "c": "one.safetensors"},
        "says tensor 'c' is in one.safetensors, but it is not",
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


def test_a_tensor_of_a_named_shard_that_the_index_leaves_out(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", {"a": "one.safetensors"})
    raw_safetensors(folder / "one.safetensors", {"a": F32, "hidden": entry("F32", [2], 8, 16)}, bytes(16))
    with pytest.raises(InputError, match="does not list tensor 'hidden'"):
        checkpoint.read_checkpoint(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", {"a": "one.safetensors", "b": "two.safetensors"})
    raw_safetensors(folder / "two.safetensors", {"a": F32, "b": entry("F32", [2], 8, 16)}, bytes(16))
    with pytest.raises(InputError, match="'a' is in more than one shard"):
        checkpoint.read_checkpoint(folder)


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


def test_side_files_are_the_models_and_nothing_else(tmp_path: Path) -> None:
    wanted = {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"),
        *("modeling_custom.py", "LICENSE", "merges.txt", "custom_generate/generate.py", "added_tokens.json"),
    }
    unwanted = {
        *("README.md", "expo.json", ".gitattributes", ".cache/x.json", "original/params.json", "checkpoint-5/a.json"),
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
        *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        *("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "runs/1/events.out.tfevents.1"),
        *("model.gguf", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "__pycache__/x.pyc", "rng_state.pth"),
    }
    for name in wanted | unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert {str(file) for file in checkpoint.side_files(tmp_path)} == wanted


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
