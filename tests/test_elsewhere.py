"""Folders that have something in the place of weights: what is there and the next step, whatever the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import write_checkpoint

from expo.checkpoint.folder import read_checkpoint, require_loadable
from expo.cli import program as cli
from expo.errors import InputError

MERGE = "`accelerate merge-weights {at}/pytorch_model_fsdp_0 {at}` puts them together"
SHARDS = "model.safetensors.index.json"

ELSEWHERE: dict[str, tuple[list[str], str]] = {
    # --- below the folder
    "a trainer's output": (
        ["checkpoint-90/model.safetensors", "checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"],
        "its folder checkpoint-500 is a checkpoint; give {model}/checkpoint-500 (the last of 2 such folders)",
    ),
    "one checkpoint": (["checkpoint-500/" + SHARDS, "runs/x"], "give {model}/checkpoint-500"),
    "pickled checkpoints": (["step_10/pytorch_model.bin", "training_args.bin"], "give {model}/step_10"),
    "adapters": (
        ["checkpoint-10/adapter_config.json", "checkpoint-9/adapter_config.json"],
        "give {model}/checkpoint-10",
    ),
    "a folder of runs": (["a/run/checkpoint-7/model.safetensors"], "give {model}/a/run/checkpoint-7"),
    "outputs of several α": (
        ["alpha-0.1/model.safetensors", "alpha-0.1/config.json", "alpha-0.5/model.safetensors"],
        "give {model}/alpha-0.5 (the last of 2 such folders)",
    ),
    "the upper one counts": (["final/model.safetensors", "x/checkpoint-9/model.safetensors"], "give {model}/final"),
    "a hidden copy does not count": ([".trash/model.safetensors", "model.gguf"], "it has GGUF weights (model.gguf)"),
    "the hub's cache": (
        ["models--org--name/snapshots/abc/model.safetensors", "models--org--name/refs/main"],
        "it is part of the hub cache; give org/name, or {model}/models--org--name/snapshots/abc",
    ),
    # --- sharded training states
    "FSDP": (
        ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "config.json"],
        MERGE.format(at="{model}"),
    ),
    "FSDP in a checkpoint": (
        ["checkpoint-5/pytorch_model_fsdp_0/__0_0.distcp", "checkpoint-5/optimizer_0/__0_0.distcp"],
        MERGE.format(at="{model}/checkpoint-5"),
    ),
    "the folder of FSDP's shards": (["__0_0.distcp", ".metadata"], "`accelerate merge-weights {model} {root}` puts"),
    "FSDP's whole state": (
        ["pytorch_model_fsdp.bin"],
        "`mv {model}/pytorch_model_fsdp.bin {model}/pytorch_model.bin`, and --allow-pickle reads it",
    ),
    "ZeRO": (
        ["global_step100/mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest"],
        "`python {model}/zero_to_fp32.py {model} {model} --safe_serialization` puts them together",
    ),
    "ZeRO in a checkpoint": (
        ["checkpoint-5/global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "checkpoint-5/zero_to_fp32.py"],
        "`python {model}/checkpoint-5/zero_to_fp32.py {model}/checkpoint-5 {model}/checkpoint-5",
    ),
    "ZeRO without its script": (
        ["global_step5/mp_rank_00_model_states.pt"],
        "DeepSpeed's `zero_to_fp32.py {model} {model} --safe_serialization`",
    ),
    "verl": (["actor/model_world_size_2_rank_0.pt"], "--local_dir {model}/actor --target_dir {model}/actor`"),
    # --- other formats
    "GGUF": (
        ["model-Q4.gguf", "config.json"],
        "it has GGUF weights (model-Q4.gguf); give the checkpoint they were made",
    ),
    "Meta's": (
        ["consolidated.00.pth", "params.json"],
        "Meta's own format (consolidated.00.pth); transformers' convert_ll",
    ),
    "Meta's, below": (["original/consolidated.00.pth"], "Meta's own format (original/consolidated.00.pth)"),
    "TensorFlow": (
        ["tf_model.h5"],
        "it has TensorFlow weights (tf_model.h5); load them with transformers 4",
    ),
    "Flax": (["flax_model.msgpack"], "it has Flax weights (flax_model.msgpack); load them with transformers 4"),
    "NeMo": (["model.nemo"], "it has a NeMo archive (model.nemo)"),
    "MLX": (["weights.npz"], "it has MLX weights (weights.npz); give the checkpoint they were converted from"),
    "ONNX": (["onnx/model.onnx"], "it has an ONNX model (onnx/model.onnx)"),
    "Lightning": (["epoch=1.ckpt"], "it has a trainer's checkpoint (epoch=1.ckpt); load it into the model and"),
    "nothing": ([], "it is empty; is the path right"),
}

ROOT_WEIGHTS: dict[str, tuple[list[str], str]] = {
    "Mistral's": (["consolidated.safetensors", "params.json"], "it has weights in Mistral's own format"),
    "a variant": (
        ["model.fp16.safetensors"],
        "it has model.fp16.safetensors, a variant; if it is not quantized, rename",
    ),
    "shards without an index": (["model-00001-of-00002.safetensors"], "download model.safetensors.index.json too"),
    "an adapter without its config": (
        ["adapter_model.safetensors"],
        "without its adapter_config.json; download that too",
    ),
    "another name": (
        ["gptq-4bit.safetensors"],
        "if it is the whole model, unquantized, rename it to model.safetensors",
    ),
    "a pickled variant": (["pytorch_model.fp16.bin"], "rename it to pytorch_model.bin, or load it with"),
    "pickled shards without an index": (["pytorch_model-00001-of-00002.bin"], "download pytorch_model.bin.index.json"),
    "a pickled adapter": (["adapter_model.bin"], "load it with peft and save it again as safetensors"),
}
"""What expo does not read, and an engine may."""


def make(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(("names", "said"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_is_there_and_the_next_step(names: list[str], said: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", names)
    for look in (read_checkpoint, require_loadable):
        with pytest.raises(InputError) as caught:
            look(model)
        assert said.format(model=model, root=tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("names", "said"), ROOT_WEIGHTS.values(), ids=ROOT_WEIGHTS)
def test_weights_that_only_an_engine_reads(names: list[str], said: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", names)
    with pytest.raises(InputError, match=re.escape(said)):
        read_checkpoint(model)
    require_loadable(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "notes.txt"])
def test_nothing_known_is_no_advice(name: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", [name])
    with pytest.raises(InputError, match=r"contains no safetensors weights \(model\.safetensors or [a-z.]+\)$"):
        read_checkpoint(model)
    require_loadable(model)


def test_a_snapshot_of_the_hubs_cache_is_a_checkpoint(tmp_path: Path) -> None:
    snapshot = write_checkpoint(tmp_path / "models--org--name/snapshots/abc", {"a": torch.ones(2)})
    assert read_checkpoint(snapshot).tensors.keys() == {"a"}
    with pytest.raises(InputError, match=re.escape(f"give org/name, or {snapshot}")):
        read_checkpoint(tmp_path / "models--org--name")


COMMANDS = {
    "extrapolate": ("extrapolate", "--sft", "{good}", "--dpo", "{bad}", "--alpha", 1, "--output", "{root}/out"),
    "extrapolate, SFT": ("extrapolate", "--sft", "{bad}", "--dpo", "{good}", "--alpha", 1, "--output", "{root}/out"),
    "a dry run": (
        "extrapolate",
        "--sft",
        "{good}",
        "--dpo",
        "{bad}",
        "--alpha",
        1,
        "--output",
        "{root}/out",
        "--dry-run",
    ),
    "inspect": ("inspect", "--sft", "{good}", "--dpo", "{bad}"),
    "generate": ("generate", "{root}/q.jsonl", "--model", "{bad}", "--output-dir", "{root}"),
    "generate, θ(α)": (
        *("generate", "{root}/q.jsonl", "--sft", "{good}", "--dpo", "{bad}", "--alpha", 1, "--output-dir", "{root}"),
    ),
    "score": (
        *("score", "{root}/q.jsonl", "--name", "x", "--outputs", "{root}/o.jsonl", "--reward-model", "{bad}"),
        *("--output-dir", "{root}"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_says_it(command: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_checkpoint(tmp_path / "good", {"a": torch.ones(2)})
    bad = make(tmp_path / "bad", ["checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors", "config.json"])
    (bad / "config.json").write_text("{}")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "o.jsonl").write_text('{"prompt": "a", "output": "b", "length": 1, "finish_reason": "stop"}\n')
    words = {"good": good, "bad": bad, "root": tmp_path}
    assert cli.run([str(word).format(**words) for word in command]) == 2
    assert f"give {bad}/checkpoint-10 (the last of 2 such folders)" in capsys.readouterr().err
