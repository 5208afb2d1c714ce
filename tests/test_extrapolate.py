"""`expo extrapolate` from end to end: laws of the output, faults on the way, inputs that are refused."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from adapters import CASES, Maker
from helpers import (
    DTYPES,
    Killed,
    Pair,
    Result,
    as_bytes,
    environment,
    expo_command,
    mounted,
    random_pair,
    read_checkpoint_tensors,
    share_off,
    stopped_in_shard,
    tree,
    without_clock,
    write,
    write_checkpoint,
)
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings, strategies as st
from made_inputs import on_real_inputs_too
from safetensors import safe_open

from expo.cli import program as cli
from expo.config import ExtrapolateConfig
from expo.errors import EnvironmentFailure, InputError
from expo.theta import stream
from expo.verbs import extrapolate

# --- laws of the output -------------------------------------------------------------------------------------------


def test_alpha_zero_is_dpo_byte_for_byte(pair: Pair, tmp_path: Path) -> None:
    dpo = read_checkpoint_tensors(pair[1])
    special = [0x8000, 0x0001, 0x807F, 0x0080, 0xFF7F, 0x0000]
    dpo["b.weight"].view(torch.uint16).reshape(-1)[:6] = torch.tensor(special, dtype=torch.uint16)
    shutil.rmtree(pair[1])
    write_checkpoint(pair[1], dpo, shards=2)
    write(pair, tmp_path / "out", 0.0)
    new, old = tree(tmp_path / "out"), tree(pair[1])
    for name in (name for name in old if name.endswith(".safetensors")):
        assert new[name] == old[name]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_alpha_minus_one_is_sft(tmp_path: Path, dtype: torch.dtype) -> None:
    sft, dpo = random_pair({"w": (100, 30), "v": (7,)}, dtype)
    pair = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo)
    write(pair, tmp_path / "out", -1.0)
    for name, tensor in read_checkpoint_tensors(tmp_path / "out").items():
        assert as_bytes(tensor) == as_bytes(sft[name])


LETTERS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="./\\")


@given(
    names=st.sets(st.text(LETTERS, min_size=1, max_size=9), min_size=1, max_size=5).map(sorted),
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=5, max_size=5),
    dtype=st.sampled_from(list(DTYPES.values())),
    shards=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    alpha=st.floats(-3, 30),
)
@settings(max_examples=30, deadline=None)
def test_any_pair_obeys_the_law(
    names: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype, shards: tuple[int, int], alpha: float
) -> None:
    sides = random_pair({"always": (3, 3), **dict(zip(names, shapes, strict=False))}, dtype)
    with tempfile.TemporaryDirectory() as folder:
        pair = tuple(
            write_checkpoint(Path(folder) / name, side, shards=min(number, len(side)))
            for name, side, number in zip(("sft", "dpo"), sides, shards, strict=True)
        )
        write(pair, Path(folder) / "out", alpha)  # type: ignore[arg-type]
        new = read_checkpoint_tensors(Path(folder) / "out")
    assert {name: (t.shape, t.dtype) for name, t in new.items()} == {n: (t.shape, t.dtype) for n, t in sides[1].items()}
    for name, tensor in new.items():
        share_off(sides[0][name], sides[1][name], alpha, tensor)


def test_excluded_tensors_are_dpos(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "out", 2.0, exclude=("^a", "norm"))
    new, sft, dpo = map(read_checkpoint_tensors, (tmp_path / "out", *pair))
    assert as_bytes(new["a.weight"]) == as_bytes(dpo["a.weight"])
    assert as_bytes(new["norm"]) == as_bytes(dpo["norm"])
    assert not torch.equal(new["b.weight"], dpo["b.weight"])
    share_off(sft["b.weight"], dpo["b.weight"], 2.0, new["b.weight"])


def test_every_weight_of_a_sharded_model_obeys_the_law(tmp_path: Path) -> None:
    shapes = {"scalar": (), "empty": (0, 4), "one": (1,), "odd": (3, 5, 7), "big": (2, 700_001)}
    sft, dpo = random_pair(shapes)
    sft["odd"] = sft["odd"].to(torch.float32)
    dpo["one"] = dpo["one"].to(torch.float16)
    ids = torch.arange(4)
    pair = (
        write_checkpoint(tmp_path / "sft", {**sft, "ids": ids}),
        write_checkpoint(tmp_path / "dpo", {**dpo, "ids": ids}, shards=4),
    )
    alphas = (0.1, 0.3, 0.5, -1.0, -0.7, -2.0, 8.0, 25.0)
    for written in write(pair, tmp_path / "out", *alphas):
        tensors = read_checkpoint_tensors(written.path)
        assert {n: (t.shape, t.dtype) for n, t in tensors.items() if n != "ids"} == {
            n: (t.shape, t.dtype) for n, t in dpo.items()
        }
        assert torch.equal(tensors["ids"], ids)
        assert sorted(os.listdir(written.path)) == sorted({*os.listdir(pair[1]), "expo.json", "README.md"})
        for name in shapes:
            share_off(sft[name], dpo[name], written.alpha, tensors[name])


def test_several_alphas_in_one_pass_equal_separate_passes(pair: Pair, tmp_path: Path) -> None:
    alphas = (0.3, 0.0, -1.0, 8.0)
    together = write(pair, tmp_path / "together-{alpha}", *alphas)
    for written, alpha in zip(together, alphas, strict=True):
        assert written.path == tmp_path / f"together-{alpha}"
        write(pair, tmp_path / "alone", alpha, overwrite=True)
        alone, both = tree(tmp_path / "alone"), tree(written.path)
        assert without_clock(alone) == without_clock(both)


def test_layouts_change_nothing_but_the_files(tmp_path: Path) -> None:
    sft, dpo = random_pair({f"t{number}": (number, 3) for number in range(9)})
    results = []
    for sft_shards, dpo_shards in ((1, 1), (3, 2), (2, 9)):
        folder = tmp_path / f"{sft_shards}-{dpo_shards}"
        pair = (
            write_checkpoint(folder / "sft", sft, shards=sft_shards),
            write_checkpoint(folder / "dpo", dpo, shards=dpo_shards),
        )
        write(pair, folder / "out")
        results.append({name: as_bytes(tensor) for name, tensor in read_checkpoint_tensors(folder / "out").items()})
        index = folder / "out" / "model.safetensors.index.json"
        assert index.exists() == (dpo_shards > 1)
        if dpo_shards > 1:
            old, new = (json.loads((one / index.name).read_text()) for one in (pair[1], folder / "out"))
            assert new == old
    assert results[0] == results[1] == results[2]


def test_a_head_that_is_not_its_embedding_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sft, dpo = random_pair({"model.embed_tokens.weight": (30, 70)})
    dpo["lm_head.weight"] = dpo["model.embed_tokens.weight"] + 1
    pair = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo)
    (pair[1] / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(InputError, match=r"the head lm_head\.weight is stored on one side only"):
        write(pair, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_many_files_and_back(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "one", 0.5)
    write(pair, tmp_path / "many", 0.5, max_shard_size="100B")
    weights = read_checkpoint_tensors(tmp_path / "one")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert {n: as_bytes(t) for n, t in read_checkpoint_tensors(tmp_path / "many").items()} == {
        n: as_bytes(t) for n, t in weights.items()
    }
    write((tmp_path / "one", tmp_path / "many"), tmp_path / "back", 0.0, max_shard_size="1GB")
    assert sorted(file.name for file in (tmp_path / "back").glob("*.safetensors*")) == ["model.safetensors"]
    assert {n: as_bytes(t) for n, t in read_checkpoint_tensors(tmp_path / "back").items()} == {
        n: as_bytes(t) for n, t in weights.items()
    }


def test_a_dry_run_shows_what_each_pattern_takes(pair: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    names = sorted(read_checkpoint_tensors(pair[1]))
    patterns = ("--alpha-for", f"^{names[0]}$=2", "--exclude", f"^{names[1]}$")
    told = expo(pair, "--alpha", "1", *patterns, "--output", tmp_path / "out", "--dry-run", "--json")
    assert told.code == 0, told.stderr
    assert json.loads(told.stdout)["patterns"] == [
        {"flag": "--exclude", "pattern": f"^{names[1]}$", "alpha": 0.0, "tensors": 1, "names": [names[1]]},
        {"flag": "--alpha-for", "pattern": f"^{names[0]}$", "alpha": 2.0, "tensors": 1, "names": [names[0]]},
    ]
    told = expo(pair, "--alpha", "1", *patterns, "--output", tmp_path / "out", "--dry-run")
    assert f"flag --exclude, pattern ^{names[1]}$, alpha 0.0, tensors 1, names {names[1]}" in told.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES.keys())
def test_dtype_changes_the_weights_and_the_configs_dtype_only(tmp_path: Path, dtype: str) -> None:
    config = {"model_type": "x", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}, "é": "é"}
    sft, dpo = random_pair({"w": (50, 7), "v": (3,)})
    ids = {"ids": torch.arange(3)}
    pair = (
        write_checkpoint(tmp_path / "sft", {**sft, **ids}),
        write_checkpoint(tmp_path / "dpo", {**dpo, **ids}, shards=2, files={"config.json": json.dumps(config)}),
    )
    write(pair, tmp_path / "out", 0.3, dtype=dtype)
    new = read_checkpoint_tensors(tmp_path / "out")
    assert new["ids"].dtype == torch.int64
    for name in sft:
        assert new[name].dtype == DTYPES[dtype]
        share_off(sft[name], dpo[name], 0.3, new[name])
    expected = {**config, "torch_dtype": dtype, "text_config": {"dtype": dtype, "n": 1}}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in new.values())


def test_side_files_go_along_byte_for_byte(pair: Pair, tmp_path: Path) -> None:
    (pair[1] / "tokenizer.model").write_bytes(bytes(range(256)))
    (pair[1] / "train_data.jsonl").write_text("not a loader's")
    (pair[0] / "chat_template.jinja").write_text("SFT's own, not to be taken")
    write(pair, tmp_path / "out")
    new, old = tree(tmp_path / "out"), tree(pair[1])
    for name in ("config.json", "tokenizer.json", "custom/model.py", "tokenizer.model"):
        assert new[name] == old[name]
    assert new["README.md"] != old["README.md"]
    assert new.keys() == {*old, "expo.json"} - {"train_data.jsonl"}


def test_inputs_are_not_touched(pair: Pair, tmp_path: Path) -> None:
    def state() -> list[tuple[str, bytes, int]]:
        return [(str(f), f.read_bytes(), f.stat().st_mtime_ns) for side in pair for f in side.rglob("*") if f.is_file()]

    before = state()
    write(pair, tmp_path / "out")
    assert state() == before


def test_expo_json_tells_the_truth(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "out", 0.3, exclude=("norm",))
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    sft, dpo = (
        {name: tensor.double().numpy() for name, tensor in read_checkpoint_tensors(side).items() if name != "norm"}
        for side in pair
    )
    delta = np.sqrt(sum(((dpo[name] - sft[name]) ** 2).sum() for name in sft))
    size = np.sqrt(sum((sft[name] ** 2).sum() for name in sft))
    assert manifest["delta"] == pytest.approx({"norm": delta, "sft_norm": size, "relative": delta / size}, rel=1e-5)
    files = tree(tmp_path / "out")
    assert manifest["files"] == sorted(files.keys() - {"expo.json"})
    assert manifest["shards"] == {
        name: {"bytes": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    assert manifest["bytes"] == sum(shard["bytes"] for shard in manifest["shards"].values())
    assert manifest["tensors"] == {"extrapolated": 2, "copied": 1, "equal": 0}
    assert (manifest["alpha"], manifest["config"]["exclude"]) == (0.3, ["norm"])


def test_the_card_names_the_pair_and_keeps_the_licence(pair: Pair, tmp_path: Path) -> None:
    (pair[1] / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# DPO's own words\n")
    write(pair, tmp_path / "out", 0.3)
    card = (tmp_path / "out" / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license: mit" in front
    assert "own words" not in body
    assert "α = 0.3" in body
    assert "expo extrapolate --sft sft --dpo dpo --alpha 0.3" in body
    assert str(tmp_path) not in card


def test_the_hub_takes_the_card(pair: Pair, tmp_path: Path) -> None:
    """Its metadata survives huggingface_hub's reader, and says what the hub shows as a merge."""
    write(pair, tmp_path / "out", 0.3)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "transformers"
    assert data.tags[:2] == ["merge", "expo"]
    assert (data.base_model, data.get("base_model_relation")) == (
        None,
        None,
    )  # folders: nothing that the hub could link


def test_the_cards_command_runs_again_where_it_ran(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From paths below the working folder, with a name that a shell would split."""
    monkeypatch.chdir(tmp_path)
    Path("my models").mkdir()
    inputs = [Path("my models") / folder.name for folder in pair]
    for folder, link in zip(pair, inputs, strict=True):
        folder.rename(link)
    write((f"./{inputs[0]}", inputs[1]), tmp_path / "out", 0.3, alpha_for=("norm=0.0",))
    command = (tmp_path / "out" / "README.md").read_text().split("```sh\n")[1].split("\n```")[0]
    assert "--sft 'my models/sft'" in command
    assert cli.run(shlex.split(command)[1:]) == 0
    again = tmp_path / "checkpoints" / "dpo-ExPO-a0.3"
    assert without_clock(tree(again)) == without_clock(tree(tmp_path / "out"))


def test_nonfinite_outputs_still_give_valid_json(pair: Pair, tmp_path: Path) -> None:
    tensors = read_checkpoint_tensors(pair[0])
    tensors["norm"][3] = float("nan")
    write_checkpoint(pair[0], tensors)
    write(pair, tmp_path / "out", allow_nonfinite=True)
    assert read_checkpoint_tensors(tmp_path / "out")["norm"].isnan().tolist() == [False] * 3 + [True] + [False] * 4

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    manifest = json.loads((tmp_path / "out" / "expo.json").read_text(), parse_constant=refuse)
    assert manifest["delta"]["norm"] is None


def test_default_output_names(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = extrapolate.run(ExtrapolateConfig(sft="sft", dpo="dpo", alpha=(0.5, 1e-7), fsync=False))
    assert [str(one.path) for one in written] == ["checkpoints/dpo-ExPO-a0.5", "checkpoints/dpo-ExPO-a1e-07"]
    written = extrapolate.run(ExtrapolateConfig(sft="sft", dpo="dpo", alpha=(2, 3.0), output="many", fsync=False))
    assert [one.path.name for one in written] == ["alpha-2.0", "alpha-3.0"]
    assert all((one.path / "config.json").is_file() for one in written)


MEASURE = """
import re, sys
from pathlib import Path
from expo.config import ExtrapolateConfig
from expo.verbs.extrapolate import run

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

peaks = []
for name in ("small", "large"):
    root = Path(sys.argv[1]) / name
    run(ExtrapolateConfig(sft=str(root / "sft"), dpo=str(root / "dpo"), alpha=(0.3,), output=str(root / "out")))
    peaks.append(peak_mb())
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model_nor_its_largest_tensor(tmp_path: Path) -> None:
    """One tensor of 120 MB on each side; a process that has made a 30 MB model before needs hardly more for it."""
    for name, numel in (("small", 15_000_000), ("large", 60_000_000)):
        for side, value in (("sft", 1.0), ("dpo", 1.03125)):
            write_checkpoint(tmp_path / name / side, {"w": torch.full((numel,), value, dtype=torch.bfloat16)})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 16


# --- models that load -----------------------------------------------------------------------------------------------


def logits(folder: Path, dtype: torch.dtype, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    if state is not None:
        model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def in_memory(pair: Pair, alpha: float) -> dict[str, torch.Tensor]:
    """θ(α) as a state dict, in float32 arithmetic: the paper's formula without expo."""
    from transformers import AutoModelForCausalLM

    sft, dpo = (AutoModelForCausalLM.from_pretrained(side, dtype=torch.bfloat16).state_dict() for side in pair)
    return {name: (d.float() + alpha * (d.float() - sft[name].float())).to(d.dtype) for name, d in dpo.items()}


def test_a_random_llama_loads_with_the_logits_of_one_made_in_memory(llama_pair: Pair, tmp_path: Path) -> None:
    write(llama_pair, tmp_path / "out", 0.5)
    assert torch.equal(
        logits(tmp_path / "out", torch.bfloat16), logits(llama_pair[1], torch.bfloat16, in_memory(llama_pair, 0.5))
    )
    assert not torch.equal(logits(tmp_path / "out", torch.bfloat16), logits(llama_pair[1], torch.bfloat16))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<s><|user|>w1</s><|assistant|>"


@on_real_inputs_too
def test_the_trained_pair(trained: Path, tmp_path: Path) -> None:
    pair = trained / "tiny-sft", trained / "tiny-dpo"
    write(pair, tmp_path / "{alpha}", 0.5, 0.0, -1.0)
    sft, dpo, half = map(read_checkpoint_tensors, (*pair, tmp_path / "0.5"))
    off = [share_off(sft[name], dpo[name], 0.5, tensor) * tensor.numel() for name, tensor in half.items()]
    assert sum(off) / sum(tensor.numel() for tensor in half.values()) < 1e-4
    assert (tmp_path / "0.0" / "model.safetensors").read_bytes() == (pair[1] / "model.safetensors").read_bytes()
    assert (tmp_path / "-1.0" / "model.safetensors").read_bytes() == (pair[0] / "model.safetensors").read_bytes()
    assert torch.equal(logits(tmp_path / "0.5", torch.bfloat16), logits(pair[1], torch.bfloat16, in_memory(pair, 0.5)))
    card = json.loads((tmp_path / "0.5" / "expo.json").read_text())["delta"]
    assert 0.001 < card["relative"] < 0.1


def test_outputs_open_with_safe_open(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "out", dtype="float32")
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened, safe_open(pair[1] / file.name, "pt") as old:
            assert opened.metadata() == old.metadata()
            assert list(opened.keys()) == list(old.keys())


# --- rerunning ------------------------------------------------------------------------------------------------------


def test_a_complete_output_is_left_alone(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(pair, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr(stream, "SourceFiles", no_weights)
    assert [one.status for one in write(pair, tmp_path / "out")] == ["already complete"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_only_new_alphas_are_made(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "{alpha}", 0.1)
    assert [one.status for one in write(pair, tmp_path / "{alpha}", 0.1, 0.2)] == ["already complete", "written"]
    write(pair, tmp_path / "alone", 0.2)
    assert without_clock(tree(tmp_path / "0.2")) == without_clock(tree(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": (0.7,)}, r"a different alpha \(0.5 then, 0.7 now\)"),
        ({"dtype": "float32"}, r"a different dtype \('auto' then, 'float32' now\)"),
        ({"exclude": ("norm",)}, r"a different exclude \(\[\] then, \['norm'\] now\)"),
        ({"missing": "copy-dpo"}, r"a different missing \('error' then, 'copy-dpo' now\)"),
        ({"allow_nonfinite": True}, r"a different allow-nonfinite \(False then, True now\)"),
        ({"alpha_for": ("norm=2",)}, r"a different alpha-for \(\[\] then, \['norm=2'\] now\)"),
        ({"max_shard_size": "1KB"}, r"a different max-shard-size \('keep' then, '1KB' now\)"),
        ({"vocab": "common"}, r"a different vocab \('error' then, 'common' now\)"),
    ],
)
def test_other_settings_are_refused_by_name(pair: Pair, tmp_path: Path, settings: dict, named: str) -> None:
    write(pair, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match=named):
        write(pair, tmp_path / "out", **settings)
    assert tree(tmp_path / "out") == before
    write(pair, tmp_path / "out", **settings, overwrite=True)
    write(pair, tmp_path / "fresh", **settings)
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "fresh"))


@pytest.mark.parametrize("side", ["sft", "dpo"])
def test_changed_inputs_are_refused_by_name(pair: Pair, tmp_path: Path, side: str) -> None:
    write(pair, tmp_path / "out")
    os.utime(next((tmp_path / side).glob("*.safetensors")), ns=(0, 0))
    with pytest.raises(InputError, match=f"a different {side}; --overwrite"):
        write(pair, tmp_path / "out")


def flip(file: Path) -> None:
    """Change a file's last byte, and neither its size nor its time."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("side", ["sft", "dpo", "out"])
def test_verify_finds_weights_that_changed_unseen(pair: Pair, tmp_path: Path, side: str) -> None:
    write(pair, tmp_path / "out", verify=True)
    said = json.loads((tmp_path / "out/expo.json").read_text())["sources"]
    for folder in pair:
        hashes = {file.name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in folder.glob("*.safetensors")}
        assert said[folder.name]["xxh3"] == hashes
    assert [one.status for one in write(pair, tmp_path / "out", verify=True)] == ["already complete"]
    flip(max((tmp_path / side).glob("*.safetensors")))
    assert [one.status for one in write(pair, tmp_path / "out")] == ["already complete"]
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match="; --overwrite rebuilds the output"):
        write(pair, tmp_path / "out", verify=True)
    assert tree(tmp_path / "out") == before
    assert [one.status for one in write(pair, tmp_path / "out", verify=True, overwrite=True)] == ["written"]
    write(pair, tmp_path / "fresh", verify=True)
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "fresh"))


def test_verify_reads_weights_only_when_nothing_else_is_left_to_refuse(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("expo.verbs.extrapolate.plan")
    monkeypatch.setattr(module, "weights_xxh3", lambda _: pytest.fail("the weights are read"))
    with pytest.raises(InputError, match="matches no tensor"):
        write(pair, tmp_path / "out", verify=True, exclude=("no_such",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(InputError, match="contains files expo did not write"):
        write(pair, tmp_path / "out", verify=True)


def test_verify_reads_adapters_and_bin_files_too(made: Maker, tmp_path: Path) -> None:
    base, adapter = made(CASES["plain"], torch.float32)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(read_checkpoint_tensors(base), pickled / "pytorch_model.bin")
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    write((pickled, adapter), tmp_path / "out", verify=True, allow_pickle=True)
    said = json.loads((tmp_path / "out/expo.json").read_text())["sources"]
    assert [list(said[side]["xxh3"]) for side in ("sft", "dpo")] == [
        ["pytorch_model.bin"],
        ["adapter_model.safetensors"],
    ]


def test_a_common_number_with_two_tokens_is_refused(tmp_path: Path) -> None:
    sides = []
    for side, rows, last in (("sft", 2, "old"), ("dpo", 3, "new")):
        vocabulary = {"a": 0, last: 1, **({"newer": 2} if rows > 2 else {})}
        files = {
            "config.json": json.dumps({"vocab_size": rows}),
            "tokenizer.json": json.dumps({"model": {"vocab": vocabulary}}),
        }
        tensors = {"model.embed_tokens.weight": torch.randn(rows, 4), "norm": torch.randn(4)}
        sides.append(write_checkpoint(tmp_path / side, tensors, files=files))
    with pytest.raises(InputError, match="id 1 is the token 'old' in sft and 'new' in dpo"):
        write((sides[0], sides[1]), tmp_path / "out", vocab="common")
    write((sides[0], sides[1]), tmp_path / "out", vocab="common", exclude=("embed_tokens",))


def test_settings_that_change_no_byte_are_not_compared(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "out", workers=1)
    (again,) = write(pair, tmp_path / "out", workers=3, fsync=True, device="cpu")
    assert again.status == "already complete"


def test_overwriting_with_a_bad_input_keeps_the_old_output(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match="too large for F16"):
        write(pair, tmp_path / "out", 1e30, dtype="float16", overwrite=True)
    assert tree(tmp_path / "out") == before


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    """A pair of 120 MB in 40 shards, and the output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("long")
    sft, dpo = random_pair({f"layer.{number}": (1_500_001,) for number in range(40)})
    files = {"tokenizer.json": "{}", "custom/model.py": "x = 1\n"}
    pair = (
        write_checkpoint(folder / "sft", sft, shards=3),
        write_checkpoint(folder / "dpo", dpo, shards=40, files=files),
    )
    write(pair, folder / "whole", 0.3)
    return pair, folder / "whole"


def start(pair: Pair, output: Path, *args: str) -> subprocess.Popen[str]:
    command = expo_command("extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", 0.3, "--output", output, *args)
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_at(process: subprocess.Popen[str], output: Path, shards: int, signal_number: int) -> tuple[int, str]:
    """Send a signal as soon as that many staged shards can be seen; returns the exit code and stderr."""
    deadline = time.monotonic() + 60
    while len(list(output.glob(".expo-partial/*.partial"))) < shards and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal_number)
    return process.wait(60), process.communicate()[1]


def looks_unfinished(output: Path) -> bool:
    names = [file.name for file in output.glob("*") if file.is_file()]
    return not any(name == "config.json" or name.endswith((".safetensors", ".index.json")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_resumably(long_job: tuple[Pair, Path], tmp_path: Path, signal_number: int, code: int) -> None:
    pair, whole = long_job
    process = start(pair, tmp_path / "out")
    seen, stderr = stop_at(process, tmp_path / "out", 10, signal_number)
    assert seen == code
    assert stderr.splitlines() == ["expo: stopped; rerun the same command to continue"]
    assert looks_unfinished(tmp_path / "out")
    made = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / ".expo-partial").glob("*.partial")}
    assert len(made) >= 10
    write(pair, tmp_path / "out", 0.3)
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(whole))
    reused = [name for name, mtime in made.items() if _mtime(tmp_path / "out", name) == mtime]
    assert len(reused) >= 9, "finished shards are not made again"


def _mtime(folder: Path, staged: str) -> int:
    return (folder / staged.removesuffix(".partial")).stat().st_mtime_ns


@pytest.mark.parametrize("damage", ["flip", "cut", "lengthen", "remove"])
def test_a_damaged_staged_shard_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    sft, dpo = random_pair({f"t{number}": (1000 + number,) for number in range(6)})
    pair = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo, shards=6)
    write(pair, tmp_path / "whole", 0.3)
    with stopped_in_shard(4):
        write(pair, tmp_path / "out", 0.3)
    victim = sorted((tmp_path / "out" / ".expo-partial").glob("*.partial"))[1]
    content = bytearray(victim.read_bytes())
    content[1000] ^= 1
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes({"flip": content, "cut": content[:500], "lengthen": content + b"\0"}[damage])
    write(pair, tmp_path / "out", 0.3)
    assert [record.getMessage() for record in caplog.records if "damaged" in record.message] == [
        f"the staged {victim.name.removesuffix('.partial')} is damaged; rebuilding it"
    ]
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "whole"))


def test_several_alphas_resume_together(pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where one of them was stopped while renaming and the other before it."""
    write(pair, tmp_path / "whole-{alpha}", 0.1, 0.2)
    real, calls = os.replace, iter(range(3))

    def replace(source: Path, target: Path) -> None:
        if next(calls, None) is None:
            raise Killed
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            write(pair, tmp_path / "{alpha}", 0.1, 0.2)
    write(pair, tmp_path / "{alpha}", 0.1, 0.2)
    assert "damaged" not in caplog.text
    for alpha in ("0.1", "0.2"):
        assert without_clock(tree(tmp_path / alpha)) == without_clock(tree(tmp_path / f"whole-{alpha}"))


def test_inputs_that_change_while_they_are_read_are_noticed(pair: Pair, tmp_path: Path) -> None:
    module = import_module("expo.verbs.extrapolate.write")
    real = module._write_shards

    def touching(*args: object) -> object:
        times = real(*args)
        os.utime(pair[0] / "model.safetensors", ns=(1, 1))
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_write_shards", touching)
        with pytest.raises(InputError, match="changed while it was read"):
            write(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    with mounted(tmp_path / "disk", "size=6m") as folder:
        yield folder


@pytest.mark.parametrize("noticed", ["before", "in the middle"])
def test_a_full_disk_is_one_line_and_resumable(
    small_disk: Path, tmp_path: Path, noticed: str, expo: Callable[..., Result]
) -> None:
    sft, dpo = random_pair({f"t{number}": (200_000,) for number in range(10)})
    pair = write_checkpoint(tmp_path / "sft", sft, shards=2), write_checkpoint(tmp_path / "dpo", dpo, shards=10)
    (small_disk / "filler").write_bytes(bytes(4 << 20))
    args = ("--alpha", "0.3", "--output", small_disk / "out")
    with pytest.MonkeyPatch.context() as patch:
        if noticed == "in the middle":
            patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        result = expo(pair, *args)
    assert result.code == 1
    assert len(result.stderr.splitlines()) == 1
    assert ("are needed" if noticed == "before" else "No space left on device") in result.stderr
    assert result.stdout == ""
    assert looks_unfinished(small_disk / "out")
    (small_disk / "filler").unlink()
    assert expo(pair, *args).code == 0
    write(pair, tmp_path / "whole", 0.3)
    assert without_clock(tree(small_disk / "out")) == without_clock(tree(tmp_path / "whole"))


def test_a_disk_that_is_full_of_the_output_itself_needs_only_the_rest(tmp_path: Path, small_disk: Path) -> None:
    """Space that staged shards take already is not asked for twice."""
    sft, dpo = random_pair({f"t{number}": (200_000,) for number in range(10)})
    pair = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo, shards=10)
    with stopped_in_shard(8):
        write(pair, small_disk / "out", 0.3)
    assert shutil.disk_usage(small_disk).free < 4_000_000
    assert [one.status for one in write(pair, small_disk / "out", 0.3)] == ["written"]


def test_a_second_run_at_the_same_time_is_refused(pair: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    with stopped_in_shard(1):
        write(pair, tmp_path / "out")
    with (tmp_path / "out" / ".expo-partial" / "journal.jsonl").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        before = tree(tmp_path / "out")
        result = expo(pair, "--alpha", "0.5", "--output", tmp_path / "out")
        assert (result.code, result.stdout) == (2, "")
        assert "another run is writing" in result.stderr
        assert tree(tmp_path / "out") == before
    assert expo(pair, "--alpha", "0.5", "--output", tmp_path / "out").code == 0


def test_an_unreadable_source_is_the_environments_fault(pair: Pair, tmp_path: Path) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(EnvironmentFailure, match=r"reading .* failed: Input/output error"):
            write(pair, tmp_path / "out")
    assert [one.status for one in write(pair, tmp_path / "out")] == ["written"]


def test_calls_that_only_linux_has_are_not_needed(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(pair, tmp_path / "here")
    for name in ("sched_getaffinity", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    write(pair, tmp_path / "there")
    assert without_clock(tree(tmp_path / "there")) == without_clock(tree(tmp_path / "here"))


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_tensors_that_only_sft_has_are_named_before_they_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sft, dpo = random_pair({"w": (4, 4)})
    sides = [
        write_checkpoint(tmp_path / "s", {**sft, "extra": sft["w"].clone()}),
        write_checkpoint(tmp_path / "d", dpo),
    ]
    settings = ExtrapolateConfig(
        sft=str(sides[0]), dpo=str(sides[1]), alpha=(0.3,), output=str(tmp_path / "out"), missing="copy-dpo"
    )
    extrapolate.run(settings)
    assert "1 tensors are only in s and dropped (extra …)" in caplog.text
    assert set(read_checkpoint_tensors(tmp_path / "out")) == {"w"}
