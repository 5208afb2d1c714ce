"""Checkpoints that do not cover their model: what is right passes, whatever its kind; what lacks something is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import VISION
from safetensors.torch import load_file, save_file

from expo.engines.coverage import require_reward_weights, require_whole
from expo.errors import InputError

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GEMMA3 = {"text_config": {**TEXT, "sliding_window": 16}, "vision_config": VISION, "mm_tokens_per_image": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", TEXT),
    "llama-tied": ("Llama", {**TEXT, "tie_word_embeddings": True}),
    "mistral": ("Mistral", TEXT),
    "qwen2": ("Qwen2", TEXT),
    "qwen3": ("Qwen3", TEXT),
    "qwen3_moe": ("Qwen3Moe", {**TEXT, **EXPERTS}),
    "mixtral": ("Mixtral", {**TEXT, **EXPERTS}),
    "gemma2": ("Gemma2", {**TEXT, "sliding_window": 16}),
    "gemma3_text": ("Gemma3Text", {**TEXT, "sliding_window": 16}),
    "gemma3": ("Gemma3", GEMMA3),
    "phi3": ("Phi3", TEXT),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("Falcon", ENCODER),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", ENCODER),
    "olmo2": ("Olmo2", TEXT),
    "deepseek_v3": ("DeepseekV3", {**TEXT, **DEEPSEEK}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta-v2": ("DebertaV2", ENCODER),
    "roberta": ("Roberta", {**ENCODER, "pad_token_id": 1}),
    "modernbert": ("ModernBert", ENCODER),
    "bert": ("Bert", ENCODER),
    "distilbert": ("DistilBert", {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
}


def config_of(kind: str) -> Any:
    name, settings = {**KINDS, **ENCODERS}[kind]
    return getattr(transformers, f"{name}Config")(**settings)


def save(auto: Any, kind: str, folder: Path, *, shard: str = "5GB", **settings: Any) -> Path:
    torch.manual_seed(0)
    config = config_of(kind)
    for name, value in settings.items():
        setattr(config, name, value)
    auto.from_config(config).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def generators(tmp_path_factory) -> Callable[[str], Path]:
    """A kind's tiny generator."""
    folder = tmp_path_factory.mktemp("generators")

    def make(kind: str) -> Path:
        made = folder / kind
        return made if made.exists() else save(transformers.AutoModelForCausalLM, kind, made)

    return make


def changed(model: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A copy of a model with changed tensors and config."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    if config:
        content = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**content, **config}))
    return copy


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def whole(model: Path) -> None:
    require_whole(model, model.name, None, trust_remote_code=False)


def reward(model: Path) -> bool:
    return require_reward_weights(model, trust_remote_code=False)


# --- what is right ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_that_transformers_saved_is_whole(generators, kind):
    whole(generators(kind))


@pytest.mark.parametrize("kind", [*KINDS, *ENCODERS])
def test_a_reward_model_that_transformers_saved_is_whole(tmp_path, kind):
    assert reward(save(transformers.AutoModelForSequenceClassification, kind, tmp_path / "rm", num_labels=1))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3"])
def test_shards_and_other_formats_are_read(generators, tmp_path, kind):
    whole(save(transformers.AutoModelForCausalLM, kind, tmp_path / "shards", shard="20KB"))
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    pickled = tmp_path / "bin"
    shutil.copytree(generators(kind), pickled)
    state = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")
    whole(pickled)
    state.popitem()
    torch.save(state, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="bin lacks"):
        whole(pickled)


HARMLESS = {
    "old rotary buffers": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
    "layers for several tokens": ("deepseek_v3", {"model.layers.2.eh_proj.weight": (32, 64)}),
    "masked bias": ("gpt2", {"transformer.h.0.attn.masked_bias": ()}),
    "a vision tower": ("llama", {"vision_tower.layers.0.weight": (4, 4)}),
    "a value head": ("llama", {"v_head.summary.weight": (1, 32)}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_tensors_without_a_place_are_no_fault(generators, tmp_path, case):
    kind, more = HARMLESS[case]
    extra = {name: torch.zeros(shape) for name, shape in more.items()}
    whole(changed(generators(kind), tmp_path / "m", lambda tensors: {**tensors, **extra}))


@pytest.mark.parametrize("head", ["lm_head", "embedding"])
def test_either_of_two_tied_tensors_is_enough(generators, tmp_path, head):
    def keep_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    whole(changed(generators("llama-tied"), tmp_path / "m", keep_head if head == "lm_head" else dict))


def test_names_without_the_models_prefix_are_understood(generators, tmp_path):
    whole(
        changed(
            generators("gpt2"),
            tmp_path / "m",
            lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        )
    )


def test_a_router_without_a_trained_bias_may_be_without_it(generators, tmp_path):
    names = [name for name in load_file(generators("deepseek_v3") / "model.safetensors") if "correction" in name]
    assert names
    whole(changed(generators("deepseek_v3"), tmp_path / "m", without(*names), topk_method="greedy"))


UNKNOWN = {
    "a model that transformers does not know": {"model_type": "nothing_of_this_name"},
    "a quantized one": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "code beside it, and its own names": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_judged_is_left_to_the_engine(generators, tmp_path, case):
    whole(
        changed(
            generators("llama"),
            tmp_path / "m",
            lambda tensors: {f"blocks.{number}": tensor for number, tensor in enumerate(tensors.values())},
            **UNKNOWN[case],
        )
    )


def test_a_folder_without_the_usual_weights_is_left_to_the_engine(generators, tmp_path):
    shutil.copytree(generators("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "consolidated.safetensors")
    whole(tmp_path / "m")


# --- what is not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_missed_by_its_name(generators, tmp_path, kind):
    model = generators(kind)
    names = sorted(load_file(model / "model.safetensors"))
    step = max(1, len(names) // 6)
    for number, name in enumerate(names[::step]):
        lacking = changed(model, tmp_path / f"m{number}", without(name))
        with pytest.raises(InputError) as raised:
            whole(lacking)
        assert f"lacks {name}" in str(raised.value)
        assert "would answer with random weights" in str(raised.value)


FUSED = {
    "half of a fused pair": ("llama", "model.layers.1.mlp.up_proj.weight"),
    "a query": ("llama", "model.layers.0.self_attn.q_proj.weight"),
    "the head": ("llama", "lm_head.weight"),
    "one of the experts": ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
    "a router's trained bias": ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    "a router": ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
    "a norm": ("qwen3", "model.norm.weight"),
}


@pytest.mark.parametrize("case", FUSED)
def test_what_is_missing_is_named(generators, tmp_path, case):
    kind, name = FUSED[case]
    model = changed(generators(kind), tmp_path / "m", without(name))
    with pytest.raises(InputError, match=f"^m lacks {name}, which .* reads: it would answer with random weights"):
        whole(model)


def test_the_same_projection_of_every_expert(generators, tmp_path):
    def drop(tensors):
        return {name: tensor for name, tensor in tensors.items() if "layers.0" not in name or "w3" not in name}

    model = changed(generators("mixtral"), tmp_path / "m", drop)
    with pytest.raises(InputError, match=r"lacks model.layers.0.block_sparse_moe.experts.0.w3.weight \(and 3 more\)"):
        whole(model)


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "peft": (lambda name: f"base_model.model.{name}", "base_model.model."),
    "peft, unmerged": (
        lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."),
        "base_model.model.",
    ),
    "compiled": (lambda name: f"_orig_mod.{name}", "_orig_mod."),
    "data parallel": (lambda name: f"module.{name}", "module."),
    "of a trainer's own": (lambda name: f"policy.{name}", "policy."),
    "layers compiled": (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "_orig_mod."),
}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_wrappers_prefix_is_named(generators, tmp_path, case, kind):
    rename, prefix = WRAPPED[case]
    model = changed(
        generators(kind), tmp_path / "m", lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}
    )
    with pytest.raises(InputError, match=f"m names its tensors with '{prefix}'"):
        whole(model)


def test_a_wrappers_prefix_is_named_where_the_model_is_not_known(generators, tmp_path):
    model = changed(
        generators("llama"),
        tmp_path / "m",
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        model_type="nothing_of_this_name",
    )
    with pytest.raises(InputError, match=r"m names its tensors with 'module\.'"):
        whole(model)


def test_another_shape_is_named(generators, tmp_path):
    model = changed(generators("llama"), tmp_path / "m", dict, intermediate_size=40)
    with pytest.raises(
        InputError, match=r"mlp\.\w+_proj.weight is \[\d+, \d+\], and LlamaForCausalLM has \[\d+, \d+\]"
    ):
        whole(model)


def test_a_bias_of_the_head_has_no_place(generators, tmp_path):
    model = changed(generators("llama"), tmp_path / "m", lambda t: {**t, "lm_head.bias": torch.zeros(96)})
    with pytest.raises(InputError, match=r"m has lm_head.bias, which LlamaForCausalLM would ignore"):
        whole(model)


@pytest.mark.parametrize("file", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_that_are_cut_short_are_refused_in_the_plan(tmp_path, file):
    model = save(transformers.AutoModelForCausalLM, "llama", tmp_path / "m", shard="60KB" if "-" in file else "1GB")
    shards = sorted(model.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated"):
        whole(model)


# --- reward models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rm(tmp_path_factory) -> Path:
    """A tiny Llama with a score head of one row."""
    auto = transformers.AutoModelForSequenceClassification
    return save(auto, "llama", tmp_path_factory.mktemp("rm") / "rm", num_labels=1)


LABELS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "one, and the config says so": ({}, 1, None),
    "one, and the config does not say": ({"id2label": None, "label2id": None}, 1, None),
    "one, and the config says two": ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, 1, None),
    "two, and the config says so": ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, 2, "2 labels"),
    "two, and the config says one": ({}, 2, "2 labels"),
    "five, and the config says nothing": ({"id2label": None, "label2id": None}, 5, "5 labels"),
}


@pytest.mark.parametrize("case", LABELS)
def test_the_heads_own_rows_are_its_labels(rm, tmp_path, case):
    config, rows, message = LABELS[case]
    head = torch.zeros(rows, 32)
    model = changed(rm, tmp_path / "m", lambda tensors: {**tensors, "score.weight": head})
    content = {**json.loads((model / "config.json").read_text()), **config}
    (model / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    if message is None:
        assert reward(model)
    else:
        with pytest.raises(
            InputError, match=rf"m has {message}; a reward model has one \(score.weight is \[{rows}, 32"
        ):
            reward(model)


HEADS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no head": (
        without("score.weight"),
        r"no trained score head \(score.weight is not in its weights\)",
    ),
    "a head that is not read": (
        lambda t: t.update({"v_head.summary.weight": t.pop("score.weight")}),
        r"score.weight is not in its weights; v_head.summary.weight is not a head that LlamaForSequenceClassification",
    ),
    "a bias that is not read": (
        lambda t: t.update({"score.bias": torch.ones(1)}),
        "m has score.bias, which LlamaForSequenceClassification would ignore",
    ),
    "a second head": (
        lambda t: t.update({"v_head.weight": torch.ones(1, 32)}),
        "m has v_head.weight, which LlamaForSequenceClassification would ignore",
    ),
    "another tensor": (
        without("model.layers.1.mlp.up_proj.weight"),
        "^m lacks model.layers.1.mlp.up_proj.weight, .*: it would score with random weights",
    ),
    "a prefix": (lambda t: {f"module.{name}": tensor for name, tensor in t.items()}, "with 'module.'"),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_does_not_fit_is_named(rm, tmp_path, case):
    change, message = HEADS[case]
    model = changed(rm, tmp_path / "m", change)
    with pytest.raises(InputError, match=message):
        reward(model)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt"])
def test_a_bias_that_a_class_has_no_place_for_is_refused(tmp_path, kind):
    """vLLM would add it, and transformers drop it; encoders' heads have places for theirs, as above."""
    model = save(transformers.AutoModelForSequenceClassification, kind, tmp_path / "rm", num_labels=1)
    biased = changed(model, tmp_path / "m", lambda tensors: {**tensors, "score.bias": torch.ones(1)})
    with pytest.raises(InputError, match=r"m has score.bias, which \w+ForSequenceClassification would ignore"):
        reward(biased)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_head_of_several_layers_is_judged_whole(tmp_path, kind):
    auto = transformers.AutoModelForSequenceClassification
    model = save(auto, kind, tmp_path / "rm", num_labels=1)
    for name in [name for name in load_file(model / "model.safetensors") if "classifier" in name]:
        lacking = changed(model, tmp_path / name, without(name))
        with pytest.raises(InputError, match=rf"no trained score head \({name} is not in its weights\)"):
            reward(lacking)
    with pytest.raises(InputError, match=r"has 3 labels; a reward model has one"):
        reward(save(auto, kind, tmp_path / "three", num_labels=3))
