"""Side files: what loaders read goes along, whatever else a training has left in the folder."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import write, write_checkpoint

from expo.checkpoint.side_files import side_files
from expo.errors import InputError

GOES_ALONG = (
    *("config.json", "generation_config.json", "configuration.json", "params.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("tokenizer.model.v3", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "ice_text.model"),
    *("sentencepiece.bpe.model", "source.spm", "target_vocab.json", "vocab-src.json", "bpe.codes", "dict.txt"),
    *("qwen.tiktoken", "tiktoken.model", "rwkv_vocab_v20230424.txt", "prophetnet.tokenizer", "normalizer.json"),
    *("qformer_tokenizer/tokenizer.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "modeling_internlm2.py", "configuration_phi3.py", "custom/model.py"),
    *(
        "tokenization_qwen.py",
        "SimSun.ttf",
        "cache_autogptq_cuda_256.cpp",
        "cuda/wkv5_cuda.cu",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    ),
    *("LICENSE", "LICENSE.txt", "license.md", "MODEL_LICENSE", "NOTICE", "Notice.txt", "USE_POLICY.md", "COPYING"),
)
LEFT = (
    *("train_data.jsonl", "data/train.parquet", "data/config.json", "all_results.json", "train_results.json"),
    *("license_texts.jsonl", "notices.parquet", "system_prompt.json", "policy.pdf"),
    *("training_config.json", "ds_config.json", "dataset_info.json", "random_states_0.pkl", "replay.pickle"),
    *("model.safetensors.bak", "pytorch_model.bin.old", "model.safetensors.tmp", "weights.tar.gz", "nohup.out"),
    *("train.log", "latest", "logs/train.log", "wandb/run-1/files/config.yaml", "wandb/run-1/files/code/train.py"),
    *("mlruns/0/meta.yaml", "lightning_logs/version_0/hparams.yaml", "pytorch_model_fsdp_0/__0_0.distcp"),
    *("optimizer_0/__0_0.distcp", "dist_optimizer/shard", "epoch_1/config.json", "eval/config.json", "loss.png"),
    *("vision-lora/tokenizer.json", "id_rsa", "credentials.json", "hf_quant_config.json.orig"),
)
WITHOUT_A_WORD = (
    *("README.md", "expo.json", ".gitattributes", ".cache/x.json", "original/params.json", "checkpoint-5/config.json"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model.fp16.safetensors", "consolidated.safetensors", "consolidated.00.pth", "__0_0.distcp", "rng_state.pth"),
    *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
    *("training_args.bin", "runs/1/events.out.tfevents.1", "model.gguf", "tf_model.h5", "flax_model.msgpack"),
    *("__pycache__/x.pyc", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"),
)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize(
    ("name", "goes", "said"),
    [
        *((name, True, False) for name in GOES_ALONG),
        *((name, False, True) for name in LEFT),
        *((name, False, False) for name in WITHOUT_A_WORD),
    ],
)
def test_which_files_go_along(
    name: str, goes: bool, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make(tmp_path, name)
    if name.startswith(("epoch_1", "vision-lora")):
        make(tmp_path, f"{name.split('/')[0]}/model.safetensors")
    assert [str(file) for file in side_files(tmp_path)] == [name] * goes
    assert len(caplog.messages) == said


def test_one_line_says_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make(tmp_path, *GOES_ALONG, *WITHOUT_A_WORD, "train.jsonl", "wandb/run/x", "assets/a.png", "assets/b.png")
    assert {str(file) for file in side_files(tmp_path)} == set(GOES_ALONG)
    assert caplog.messages == [
        f"{tmp_path}: 4 files or folders that loaders do not read are not copied: "
        "assets/a.png, assets/b.png, train.jsonl …"
    ]


@pytest.mark.parametrize(
    ("name", "link", "message"),
    [
        ("wandb/latest", "gone", None),
        ("debug.log", "gone", None),
        ("tokenizer.json", "gone", "tokenizer.json cannot be read: No such file"),
    ],
)
def test_a_dangling_link_matters_where_it_is_read(tmp_path: Path, name: str, link: str, message: str | None) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(link)
    if message is None:
        assert side_files(tmp_path) == []
        return
    with pytest.raises(InputError, match=message):
        side_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("tokenizer.model", "is a git-lfs pointer: run `git lfs pull`"), ("train.parquet", None)]
)
def test_a_pointer_matters_where_it_is_read(tmp_path: Path, name: str, message: str | None) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    if message is None:
        assert side_files(tmp_path) == []
        return
    with pytest.raises(InputError, match=message):
        side_files(tmp_path)


def test_pipes_and_links_to_folders_are_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "vocab.json")
    (tmp_path / "code").symlink_to("/etc")
    assert side_files(tmp_path) == []
    assert caplog.messages == [
        f"{tmp_path}/code is a link to a folder; not copied",
        f"{tmp_path}/vocab.json is a pipe; not copied",
    ]


@pytest.mark.parametrize("head", [b"PK\3\4", b"\x80\2"])
def test_weights_that_look_like_a_tokenizer_by_name(
    head: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "best.model").write_bytes(head + bytes(100))
    assert side_files(tmp_path) == []
    assert caplog.messages == [f"{tmp_path}/best.model is a pickle, not a tokenizer; not copied"]


# --- what DPO lacks -----------------------------------------------------------------------------------------------

TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x"}
NO_TOKENIZER = "dpo has no tokenizer (tokenizer.json or tokenizer.model): the output will have none; to use SFT's: "
NO_CONFIG = "dpo has no config.json: the output will have none; to use SFT's, if it fits: "

LACKING: dict[str, tuple[dict[str, str], dict[str, str], list[str], list[str]]] = {
    "nothing": (TOKENIZER, TOKENIZER, [], []),
    "a tokenizer": (TOKENIZER, {}, [NO_TOKENIZER], ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]),
    "all but its settings": (
        {"tokenizer.model": "x"},
        {"tokenizer_config.json": "{}"},
        [NO_TOKENIZER],
        ["tokenizer.model"],
    ),
    "a tokenizer of another kind": (TOKENIZER, {"vocab.txt": "x"}, [], []),
    "a tokenizer that SFT lacks too": ({"tokenizer_config.json": "{}"}, {}, [], []),
}


@pytest.mark.parametrize(("sft", "dpo", "said", "copied"), LACKING.values(), ids=LACKING)
def test_a_tokenizer_that_dpo_lacks(
    sft: dict[str, str],
    dpo: dict[str, str],
    said: list[str],
    copied: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The command that the warning names gives the output a tokenizer."""
    pair = (
        write_checkpoint(tmp_path / "sft", {"a": torch.ones(2)}, files=sft),
        write_checkpoint(tmp_path / "dpo", {"a": torch.full((2,), 1.03)}, files=dpo),
    )
    write(pair, tmp_path / "out")
    assert [message.startswith(one) for message, one in zip(caplog.messages, said, strict=True)] == [True] * len(said)
    if said:
        command = shlex.split(caplog.messages[0].removeprefix(NO_TOKENIZER))
        assert command == ["cp", *(f"{pair[0]}/{name}" for name in copied), f"{pair[1]}/"]
        subprocess.run(command, check=True)
        caplog.clear()
        write(pair, tmp_path / "again")
        assert caplog.messages == []
        assert {file.name for file in (tmp_path / "again").iterdir()} >= set(copied)


@pytest.mark.parametrize(("lacking", "said"), [(("dpo",), [NO_CONFIG]), (("sft", "dpo"), []), (("sft",), [])])
def test_a_config_that_dpo_lacks(
    lacking: tuple[str, ...], said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = (
        write_checkpoint(tmp_path / "sft", {"a": torch.ones(2)}),
        write_checkpoint(tmp_path / "dpo", {"a": torch.full((2,), 1.03)}),
    )
    for side in lacking:
        (tmp_path / side / "config.json").unlink()
    write(pair, tmp_path / "out")
    assert caplog.messages == [f"{one}cp {pair[0]}/config.json {pair[1]}/" for one in said]
    assert (tmp_path / "out/config.json").exists() == ("dpo" not in lacking)
    caplog.clear()
    write(pair, tmp_path / "out")
    assert caplog.messages == [], "nothing is left to do"
