"""`.bin` checkpoints: what they give is what safetensors would; nothing in them runs; what is odd is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    Result,
    as_bytes,
    environment,
    random_pair,
    read_checkpoint_tensors,
    tree,
    without_clock,
    write_checkpoint,
)
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor

from expo.checkpoint import folder as checkpoint
from expo.checkpoint.dtypes import FROM_TORCH
from expo.checkpoint.pickled import read_pickled_checkpoint, read_pickled_shard
from expo.checkpoint.tied import TIED_BY_DEFAULT
from expo.cli import program as cli
from expo.config import ExtrapolateConfig
from expo.errors import EnvironmentFailure, InputError
from expo.verbs import extrapolate

CONFIG = '{"model_type": "tiny", "torch_dtype": "bfloat16"}'


def write_bin(folder: Path, state: object, *, shards: int = 1, config: str = CONFIG) -> Path:
    """Write a state dict as transformers did: pytorch_model.bin, or shards of it and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    assert isinstance(state, dict)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name] for name in list(state)[number::shards]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write(pair: tuple[Path, Path], output: Path, alpha: float = 0.5, **settings: object) -> Path:
    options = {"allow_pickle": True, "fsync": False, **settings}
    extrapolate.run(
        ExtrapolateConfig(sft=str(pair[0]), dpo=str(pair[1]), alpha=(alpha,), output=str(output), **options)
    )
    return output


def contents(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (t.dtype, t.shape, as_bytes(t)) for name, t in read_checkpoint_tensors(folder).items()}


# --- laws ---------------------------------------------------------------------------------------------------------


def many_tensors() -> dict[str, Tensor]:
    """One of everything that is a run of bytes in a .bin file."""
    big = torch.randn(100, 7)
    whole = torch.nn.Parameter(torch.randn(3, 3).bfloat16())
    whole.is_contiguous = "hidden"  # an attribute that goes along with a parameter
    return {
        "f64": torch.randn(3, dtype=torch.float64),
        "f32": torch.randn(5, 3),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 3, 4).bfloat16(),
        "i64": torch.arange(-3, 3),
        "i32": torch.arange(3, dtype=torch.int32),
        "i16": torch.arange(5, dtype=torch.int16),
        "i8": torch.arange(5, dtype=torch.int8),
        "u8": torch.arange(5, dtype=torch.uint8),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False, True]),
        "c64": torch.randn(2, dtype=torch.complex64),
        "f8": torch.randn(6).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "an empty slice": big[50:50],
        "one axis is 1": torch.randn(4, 1).t(),
        "rows of a larger one": big[10:20],
        "other rows of it": big[15:],
        "parameter": whole,
        "shared": big,
        "é \n name": torch.zeros(1),
    }


def test_every_tensor_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    tensors = many_tensors()
    folder = write_bin(tmp_path / "model", OrderedDict(tensors), shards=3)
    read = read_pickled_checkpoint(folder)
    assert read.sharded
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = read.tensors[name]
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            assert stream.read(info.nbytes) == as_bytes(tensor.detach()), name
        assert (info.shape, FROM_TORCH[str(tensor.dtype)[6:]]) == (tuple(tensor.shape), info.dtype)
    for shard in read.shards:
        starts = [tensor.start for tensor in shard.tensors]
        assert starts == sorted(starts)


LAYOUTS = {"bin": 1, "bin in shards": 3, "safetensors": 1, "safetensors in shards": 2}


def in_layout(folder: Path, layout: str, tensors: dict[str, Tensor]) -> Path:
    writer = write_bin if layout.startswith("bin") else write_checkpoint
    return writer(folder, tensors, shards=LAYOUTS[layout])


@pytest.mark.parametrize("dpo_layout", LAYOUTS)
@pytest.mark.parametrize("sft_layout", LAYOUTS)
def test_a_pair_gives_the_same_tensors_in_any_format(tmp_path: Path, sft_layout: str, dpo_layout: str) -> None:
    shapes = {"scalar": (), "empty": (0, 4), "odd": (3, 5, 7), "long": (3, 200_001), "norm": (16,)}
    sft, dpo = random_pair(shapes)
    sft["odd"], dpo["norm"] = sft["odd"].float(), dpo["norm"].half()
    buffers = {"ids": torch.arange(4), "mask": torch.tensor([True, False])}
    sides = {"sft": {**sft, **buffers}, "dpo": {**dpo, **buffers}}
    expected = write(
        [write_checkpoint(tmp_path / "safe" / side, t) for side, t in sides.items()], tmp_path / "expected"
    )
    pair = in_layout(tmp_path / "sft", sft_layout, sides["sft"]), in_layout(tmp_path / "dpo", dpo_layout, sides["dpo"])
    output = write(pair, tmp_path / "out")
    assert contents(output) == contents(expected)
    shards = LAYOUTS[dpo_layout]
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    weights = ["model.safetensors"] if shards == 1 else [*names, "model.safetensors.index.json"]
    assert sorted(os.listdir(output)) == sorted(["README.md", "config.json", "expo.json", *weights])
    for file in output.glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_alpha_0_is_dpo_and_minus_1_is_sft(tmp_path: Path) -> None:
    sft, dpo = (dict.fromkeys(["a", "b"], side["a"]) for side in random_pair({"a": (33, 3)}))
    pair = write_bin(tmp_path / "sft", sft), write_bin(tmp_path / "dpo", dpo, shards=2)
    for alpha, side in ((0.0, dpo), (-1.0, sft)):
        output = read_checkpoint_tensors(write(pair, tmp_path / str(alpha), alpha))
        assert {name: as_bytes(t) for name, t in output.items()} == {name: as_bytes(t) for name, t in side.items()}


def test_dtype_and_exclude_work_as_ever(tmp_path: Path) -> None:
    sft, dpo = random_pair({"w": (50, 7), "v": (3,)})
    safe = write_checkpoint(tmp_path / "safe/sft", sft), write_checkpoint(tmp_path / "safe/dpo", dpo)
    pair = write_bin(tmp_path / "sft", sft), write_bin(tmp_path / "dpo", dpo)
    settings = {"dtype": "float32", "exclude": ("v",)}
    output, expected = write(pair, tmp_path / "out", **settings), write(safe, tmp_path / "expected", **settings)
    assert contents(output) == contents(expected)


def test_records_are_found_by_name_whatever_their_order_in_the_archive(tmp_path: Path) -> None:
    """A reader that counts on the order in which torch.save writes them would swap the two."""
    tensors = {"a": torch.randn(64), "b": torch.randn(64)}
    file = write_bin(tmp_path, tensors) / "pytorch_model.bin"
    rezip(file, order=lambda names: sorted(names, reverse=True))
    assert {name: as_bytes(t) for name, t in torch.load(file).items()} == {n: as_bytes(t) for n, t in tensors.items()}
    for info in read_pickled_shard(file).tensors:
        assert file.read_bytes()[info.start : info.start + info.nbytes] == as_bytes(tensors[info.name])


class HidesItems:
    """Unpickled, an OrderedDict whose attributes hide its methods."""

    def __init__(self, **items: Tensor) -> None:
        self._items = items

    def __reduce__(self) -> tuple[object, ...]:
        return OrderedDict, (), {"items": "hidden", "keys": "hidden"}, None, iter(self._items.items())


def test_an_ordered_dict_that_hides_its_items(tmp_path: Path) -> None:
    file = write_bin(tmp_path, HidesItems(a=torch.ones(3))) / "pytorch_model.bin"
    assert torch.load(file).items == "hidden"
    assert [info.name for info in read_pickled_shard(file).tensors] == ["a"]


MEASURE = """
import re, sys
from pathlib import Path
from expo.checkpoint.pickled import read_pickled_checkpoint

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

peaks = []
for name in ("small", "large"):
    read_pickled_checkpoint(Path(sys.argv[1]) / name)
    peaks.append(peak_mb())
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_planning_reads_no_weights(tmp_path: Path) -> None:
    """A file of 300 MB after one of 300 bytes: hardly more memory."""
    write_bin(tmp_path / "small", {"a": torch.zeros(75)})
    with torch.serialization.skip_data():
        write_bin(tmp_path / "large", {str(number): torch.empty(25_000_000) for number in range(3)})
    assert (tmp_path / "large/pytorch_model.bin").stat().st_size > 300_000_000
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert float(done.stdout) < 10


def test_a_rerun_knows_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file was exchanged for one of the same size and time: the checksums at the archive's end tell."""
    monkeypatch.setattr(checkpoint, "BIN_TAIL_BYTES", 2000)
    sft, dpo = random_pair({"v": (3,), "w": (50, 70)})
    pair = write_bin(tmp_path / "sft", sft), write_bin(tmp_path / "dpo", dpo)
    write(pair, tmp_path / "out")
    before = tree(tmp_path / "out")
    write(pair, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    file = pair[0] / "pytorch_model.bin"
    status = file.stat()
    write_bin(pair[0], {**sft, "v": sft["v"] + 1})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    with pytest.raises(InputError, match="a different sft"):
        write(pair, tmp_path / "out")


# --- tied embeddings ------------------------------------------------------------------------------------------------


def tiny_model(model_type: str, tied: bool | None):
    """A tiny random model; `tied` None leaves the class's default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"vocab_size": 48, "max_position_embeddings": 64}
    opt = {"ffn_dim": 32, "word_embed_proj_dim": 16} if model_type == "opt" else {}
    flag = {} if tied is None else {"tie_word_embeddings": tied}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **opt, **flag)).bfloat16()


def save_pair(folder: Path, model, formats: tuple[str, str], *, keep_flag: bool) -> tuple[Path, Path]:
    """The model and a moved copy of it, as .bin or safetensors."""
    torch.manual_seed(0)
    for side, kind in zip(("sft", "dpo"), formats, strict=True):
        model.save_pretrained(folder / side)
        if kind == "bin":
            (folder / side / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / side / "pytorch_model.bin")
        config = json.loads((folder / side / "config.json").read_text())
        if not keep_flag:
            config.pop("tie_word_embeddings", None)
        (folder / side / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return folder / "sft", folder / "dpo"


def state_of(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"], "weights that are not in the files would be made up"
    return model.state_dict()


FORMATS = [("bin", "bin"), ("bin", "safetensors"), ("safetensors", "bin")]
TIED_CASES = {
    "llama, tied": ("llama", True, True),
    "llama, not tied": ("llama", False, True),
    "gpt2, tied by default": ("gpt2", None, False),
    "opt, tied by default": ("opt", None, False),
}


@pytest.mark.parametrize("formats", FORMATS, ids=" + ".join)
@pytest.mark.parametrize("case", TIED_CASES)
def test_what_transformers_loads_is_the_model_made_in_memory(
    tmp_path: Path, case: str, formats: tuple[str, str]
) -> None:
    model_type, tied, keep_flag = TIED_CASES[case]
    pair = save_pair(tmp_path, tiny_model(model_type, tied), formats, keep_flag=keep_flag)
    sft, dpo = map(state_of, pair)
    new = state_of(write(pair, tmp_path / "out", 0.5))
    assert new.keys() == dpo.keys()
    for name, tensor in new.items():
        right = torch.lerp(dpo[name].float(), sft[name].float(), -0.5).bfloat16()
        assert as_bytes(tensor) == as_bytes(right), name
    stored = read_checkpoint_tensors(tmp_path / "out")
    assert ("lm_head.weight" in stored) == (tied is False), "a tied head is the embedding and written once"


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ('{"tie_word_embeddings": true}', ["embed.weight"]),
        ('{"text_config": {"tie_word_embeddings": true}}', ["embed.weight"]),
        ('{"model_type": "gpt2"}', ["embed.weight"]),
        ('{"tie_word_embeddings": false}', ["embed.weight", "lm_head.weight"]),
        ('{"tie_word_embeddings": true, "text_config": {"tie_word_embeddings": false}}', None),
        ('{"model_type": "gpt2", "tie_word_embeddings": false}', None),
        ('{"model_type": "llama"}', None),
    ],
)
def test_a_shared_head_is_left_out_only_where_the_config_ties_it(
    tmp_path: Path, config: str, kept: list[str] | None
) -> None:
    weight = torch.randn(6, 4)
    state = {"embed.weight": weight, "lm_head.weight": weight, "xlm_head.weight": weight}
    read = read_pickled_checkpoint(write_bin(tmp_path, state, config=config))
    assert sorted(read.tensors) == sorted([*(kept or ["embed.weight", "lm_head.weight"]), "xlm_head.weight"])
    assert [info.name for info in read.shards[0].tensors] == [n for n in state if n in read.tensors]


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    for other in (weight.clone(), weight[:3], weight.view(4, 6)):
        state = {"embed.weight": weight, "lm_head.weight": other}
        read = read_pickled_checkpoint(write_bin(tmp_path, state, config='{"tie_word_embeddings": true}'))
        assert read.tensors.keys() == state.keys()


def test_the_model_types_tied_by_default_are_so_in_transformers() -> None:
    from transformers import AutoConfig

    assert [name for name in TIED_BY_DEFAULT if not AutoConfig.for_model(name).tie_word_embeddings] == []


# --- nothing runs ---------------------------------------------------------------------------------------------------


class Calls:
    """Unpickled by Python, it calls a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


PAYLOADS: dict[str, Callable[[str], Calls]] = {
    "os.system": lambda canary: Calls(os.system, f"touch {canary}"),
    "eval": lambda canary: Calls(eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: Calls(exec, f"open({canary!r}, 'w')"),
    "open": lambda canary: Calls(open, canary, "w"),
    "subprocess": lambda canary: Calls(subprocess.Popen, ["touch", canary]),
    "torch's own loader": lambda canary: Calls(torch.load, canary),
    "a tensor's attribute": lambda canary: Calls(getattr, torch.zeros(1), "tofile"),
}


@pytest.fixture
def expo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(root: Path, *args: str) -> Result:
        sides = ["--sft", str(root / "sft"), "--dpo", str(root / "dpo")]
        code = cli.run(["extrapolate", *sides, "--alpha", "0.5", "--output", str(root / "out"), *args])
        return Result(code, *capsys.readouterr())

    return run


def refused(result: Result, message: str) -> None:
    assert (result.code, result.stdout) == (2, ""), result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1, "one line"
    assert result.stderr.startswith("expo: error: ")


@pytest.mark.parametrize("form", ["archive", "old", "bare"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_malicious_pickles_do_not_run(tmp_path: Path, payload: str, form: str, expo: Callable[..., Result]) -> None:
    canary = tmp_path / "canary"
    state = {"w": torch.zeros(3), "x": PAYLOADS[payload](str(canary))}
    for side in ("sft", "dpo"):
        write_bin(tmp_path / side, {"w": torch.zeros(3)})
    file = tmp_path / "sft/pytorch_model.bin"
    if form == "bare":
        file.write_bytes(
            pickle.dumps({"x": state["x"]} if payload != "a tensor's attribute" else Calls(getattr, 1, "x"))
        )
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "archive")
    refused(expo(tmp_path, "--allow-pickle"), "weights_only loader" if form == "archive" else "is a bare pickle, or in")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_the_refusal_names_what_the_pickle_refers_to(tmp_path: Path, expo: Callable[..., Result]) -> None:
    write_bin(tmp_path / "sft", {"x": Calls(os.system, "true")})
    write_bin(tmp_path / "dpo", {"x": torch.zeros(3)})
    result = expo(tmp_path, "--allow-pickle")
    refused(result, "(it refers to 'posix.system')")
    assert "weights_only=False" not in result.stderr, "torch's advice to run it all the same is not passed on"


def test_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bin(tmp_path, {"a": torch.zeros(3)})
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was loaded"))
    for version in ("2.6.0+cpu", "2.9.1", "2.10.0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(EnvironmentFailure, match=re.escape(f"this is {version}: pip install 'torch>=2.11'")):
            read_pickled_checkpoint(folder)


# --- the flag -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["sft", "dpo"])
@pytest.mark.parametrize("shards", [1, 2])
def test_without_the_flag_nothing_is_unpickled(
    tmp_path: Path, side: str, shards: int, expo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = dict(zip(("sft", "dpo"), random_pair({"a": (4, 4), "b": (2,)}), strict=True))
    for name, tensors in sides.items():
        writer = write_bin if name == side else write_checkpoint
        writer(tmp_path / name, tensors, shards=shards)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was loaded"))
    refused(
        expo(tmp_path), f"{tmp_path / side} has only .bin weights, which are pickles and may contain code: --allow-p"
    )
    monkeypatch.undo()
    assert expo(tmp_path, "--allow-pickle").code == 0


def test_a_folder_with_both_formats_is_read_as_safetensors(tmp_path: Path) -> None:
    sft, dpo = random_pair({"a": (4, 4)})
    pair = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo, shards=2)
    expected = contents(write(pair, tmp_path / "expected", allow_pickle=False))
    for folder in pair:
        (folder / "pytorch_model.bin").write_bytes(b"\x80 not to be looked into")
        assert not checkpoint.holds_only_bin(folder)
    output = write(pair, tmp_path / "out")
    assert contents(output) == expected
    assert not list(output.glob("*.bin"))


def test_the_flag_changes_no_byte_and_is_part_of_the_command(tmp_path: Path) -> None:
    sft, dpo = random_pair({"a": (4, 4)})
    pair = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo)
    (one,) = extrapolate.run(
        ExtrapolateConfig(sft=str(pair[0]), dpo=str(pair[1]), alpha=(1,), output=str(tmp_path / "o"))
    )
    before = tree(one.path)
    write(pair, tmp_path / "o", 1.0, allow_pickle=True)
    assert tree(one.path) == before
    write(pair, tmp_path / "p", 1.0, allow_pickle=True)
    assert "--allow-pickle" in (tmp_path / "p/README.md").read_text()
    after = without_clock(tree(tmp_path / "p"))
    assert {**after, "README.md": b""} == {**without_clock(before), "README.md": b""}


# --- files that are refused -----------------------------------------------------------------------------------------


def rezip(
    file: Path,
    *,
    order: Callable[[list[str]], list[str]] = list,
    compression: int = zipfile.ZIP_STORED,
    **records: bytes | None,
) -> None:
    """Write an archive again, with records exchanged, added or (None) left out; `__` in a name stands for /."""
    with zipfile.ZipFile(file) as old:
        content: dict[str, bytes | None] = {entry.filename: old.read(entry) for entry in old.infolist()}
    folder = next(iter(content)).partition("/")[0]
    content |= {f"{folder}/{name.replace('__', '/').replace('_pkl', '.pkl')}": data for name, data in records.items()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name in order(list(content)):
            if (data := content[name]) is not None:
                new.writestr(name, data)


def twice(file: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(
            "pytorch_model/data/0" if archive.infolist()[0].filename[0] == "p" else "archive/data/0", bytes(12)
        )


def moved(file: Path) -> None:
    """The directory points beside the record."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        at, entry = archive.start_dir, next(e for e in archive.infolist() if e.filename.endswith("data/0"))
    found = content.index(entry.header_offset.to_bytes(4, "little"), at)
    content[found : found + 4] = (entry.header_offset + 1).to_bytes(4, "little")
    file.write_bytes(content)


def of(state: object, **options: object) -> Callable[[Path], None]:
    return lambda file: torch.save(state, file, **options)


def bytes_of(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


W = torch.randn(3, 4)
SPARSE = (
    "'w' is sparse" if Version(torch.__version__) < Version("2.14") else "is refused by torch's weights_only loader"
)
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (bytes_of(b""), "is not a torch archive: download it again"),
    "noise": (bytes_of(b"\x13\x37" * 50), "is not a torch archive: download it again"),
    "a git-lfs pointer": (
        bytes_of(b"version https://git-lfs.github.com/spec/v1\noid x\n"),
        "is not weights but a git-lfs pointer",
    ),
    "a web page": (bytes_of(b"<!DOCTYPE html><html><body>403</body></html>"), "is not weights but a web page"),
    "a bare pickle": (bytes_of(pickle.dumps({"w": 1})), "is a bare pickle, or in torch's format from before 1.6"),
    "torch before 1.6": (of({"w": W}, _use_new_zipfile_serialization=False), "torch's format from before 1.6"),
    "cut at the end": (lambda file: os.truncate(file, file.stat().st_size - 1), "is truncated or damaged"),
    "cut in the middle": (lambda file: os.truncate(file, file.stat().st_size // 2), "is truncated or damaged"),
    "cut to its first bytes": (lambda file: os.truncate(file, 10), "is truncated or damaged"),
    "a hole in the middle": (
        lambda file: file.write_bytes(file.read_bytes()[:300] + file.read_bytes()[400:]),
        "is truncated or damaged",
    ),
    "any zip archive": (lambda file: rezip(file, data_pkl=None), "is a zip archive, but not one of torch's"),
    "no version": (lambda file: rezip(file, version=None), "is a zip archive, but not one of torch's"),
    "a future version": (lambda file: rezip(file, version=b"99"), "is refused by torch's weights_only loader"),
    "a compressed archive": (lambda file: rezip(file, compression=zipfile.ZIP_DEFLATED), "is duplicated, compressed"),
    "a record that is there twice": (twice, "is duplicated, compressed or encrypted"),
    "a record that is elsewhere": (moved, "is not where its directory says"),
    "a record that is missing": (lambda file: rezip(file, data__0=None), "is refused by torch's weights_only loader"),
    "a record that is too short": (lambda file: rezip(file, data__0=bytes(8)), "'w' ends beyond its data"),
    "a big-endian machine's": (lambda file: rezip(file, byteorder=b"big"), "was written on a big-endian machine"),
    "a pickle that ends early": (lambda file: rezip(file, data_pkl=b"\x80\x02}"), "loader (EOFError): it is damaged"),
    "a pickle without stack": (lambda file: rezip(file, data_pkl=b"\x80\x020."), "is refused by torch's weights_only"),
    "a list": (of([W]), "contains a list, not a model's state dict"),
    "a tensor alone": (of(W), "contains a Tensor, not a model's state dict"),
    "nested": (of({"state_dict": {"w": W}}), "'state_dict' is a dict, not a tensor: this is a trainer's checkpoint"),
    "a number among them": (of({"w": W, "epoch": 3}), "'epoch' is a int, not a tensor: this is a trainer's checkpoint"),
    "a name that is no text": (of({7: W}), "has a int as a tensor name"),
    "a name with half a character": (of({"\ud800": W}), r"has '\ud800' as a tensor name"),
    "a reserved name": (of({"__metadata__": W}), "has '__metadata__' as a tensor name"),
    "a transposed view": (of({"w": W.t()}), "'w' of shape [4, 3] is a view with strides [1, 4]; load the model with"),
    "every second column": (of({"w": W[:, ::2]}), "'w' of shape [3, 2] is a view with strides [4, 2]"),
    "an expanded value": (of({"w": torch.zeros(1).expand(4)}), "'w' of shape [4] is a view with strides [0]"),
    "a sparse one": (of({"w": W.to_sparse()}), SPARSE),
    "a compressed sparse one": (lambda file: torch.save({"w": W.to_sparse_csr()}, file), SPARSE),
    "a wide complex one": (of({"w": W.to(torch.complex128)}), "'w' has the type complex128"),
    "a conjugate": (of({"w": W.to(torch.complex64).conj()}), "'w' is the conjugate or negative of what is stored"),
    "one without values": (of({"w": W.to("meta")}), "'w' has no values in the file"),
    "no tensors": (of({}), "contains no tensors"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files(case: str, tmp_path: Path, expo: Callable[..., Result]) -> None:
    make, message = UNREADABLE[case]
    for side in ("sft", "dpo"):
        write_bin(tmp_path / side, {"w": W})
    make(tmp_path / "sft/pytorch_model.bin")
    before = tree(tmp_path)
    result = expo(tmp_path, "--allow-pickle")
    refused(result, message)
    assert str(tmp_path / "sft") in result.stderr
    assert tree(tmp_path) == before, "nothing is written"


def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop such tensors
        torch.save({"w": torch.quantize_per_tensor(W, 1.0, 0, torch.qint8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="is refused by torch's weights_only loader"):
        read_pickled_shard(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(("what", "damaged"), [(b"Kx", b"Ky"), (b"Kd", b"K\xff")], ids=["size", "start"])
def test_a_tensor_that_claims_more_than_its_record(tmp_path: Path, what: bytes, damaged: bytes) -> None:
    file = write_bin(tmp_path, {"w": torch.arange(220.0)[100:], "v": torch.zeros(9)}) / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert data.count(what) == 1, "its size is 120, its start 100"
    rezip(file, data_pkl=data.replace(what, damaged))
    with pytest.raises(InputError, match="is damaged: tensor 'w' ends beyond its data"):
        read_pickled_shard(file)


INDEXES = {
    "a missing shard": ({"a": "pytorch_model-1.bin", "b": "gone.bin"}, "names gone.bin, which is missing"),
    "a path upwards": ({"a": "../pytorch_model.bin"}, "'../pytorch_model.bin', which is not a .bin file in the same"),
    "an absolute path": ({"a": "/etc/x.bin"}, "'/etc/x.bin', which is not a .bin file in the same folder"),
    "another format": ({"a": "model.safetensors"}, "'model.safetensors', which is not a .bin file in the same folder"),
    "a tensor that is not there": (
        {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin", "c": "pytorch_model-2.bin"},
        "says tensor 'c' is in pytorch_model-2.bin, but it is not",
    ),
    "a tensor of a file that is not named": (
        {"a": "pytorch_model-2.bin"},
        "says tensor 'a' is in pytorch_model-2.bin, but it",
    ),
    "no weight_map": (None, "has no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_lie(tmp_path: Path, case: str) -> None:
    weight_map, message = INDEXES[case]
    torch.save({"a": W}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": W}, tmp_path / "pytorch_model-2.bin")
    torch.save({"a": W}, tmp_path / "model.safetensors.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=re.escape(message)):
        read_pickled_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, {"a": W, "b": W}, shards=2)
    torch.save({"a": W, "b": W}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputError, match="'a' is in more than one shard"):
        read_pickled_checkpoint(folder)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "model", {"a": W, "b": W}, shards=2)
    for name in ("training_args.bin", "optimizer.bin", "pytorch_model-stale.bin"):
        (folder / name).write_bytes(b"x")
    assert read_pickled_checkpoint(folder).ignored == ("pytorch_model-stale.bin",)
    shutil.copy(folder / "pytorch_model-00001-of-00002.bin", folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"both pytorch_model\.bin and pytorch_model\.bin\.index\.json"):
        read_pickled_checkpoint(folder)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut or double some bytes."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(damaged)), rng.randrange(1, 20)
        kind = rng.choice(("flip", "flip", "cut", "double"))
        if kind == "flip":
            damaged[at] = rng.randrange(256)
        else:
            damaged[at : at + length] = damaged[at : at + length] * (2 if kind == "double" else 0)
    return bytes(damaged)


@pytest.mark.parametrize("where", ["archive", "pickle"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, where: str) -> None:
    """An `InputError`, or a plan whose tensors lie within the file; never another error."""
    whole, file = tmp_path / "whole.bin", tmp_path / "pytorch_model.bin"
    torch.save({name: tensor for name, tensor in many_tensors().items() if tensor.numel() < 30}, whole)
    with zipfile.ZipFile(whole) as archive:
        data = archive.read("whole/data.pkl")
    rng, refusals = random.Random(0), 0
    for _ in range(300):
        if where == "archive":
            file.write_bytes(damage(whole.read_bytes(), rng))
        else:
            shutil.copy(whole, file)
            rezip(file, data_pkl=damage(data, rng))
        try:
            shard = read_pickled_shard(file)
        except InputError:
            refusals += 1
            continue
        size = file.stat().st_size
        assert all(0 <= info.start <= info.start + info.nbytes <= size for info in shard.tensors)
    assert 50 < refusals < 300
