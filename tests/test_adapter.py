"""LoRA adapters: what is read of them merges as PEFT merges it; what is not plain LoRA, or does not fit, is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import round_to, write_checkpoint
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from expo import rules
from expo.adapter import settings as adapter_settings
from expo.adapter.settings import Settings
from expo.adapter.tensors import Adapter, is_adapter, read_adapter
from expo.checkpoint import Checkpoint, TensorInfo, read_checkpoint
from expo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of every unusual choice, and these are

# --- models and adapters as the libraries make them ---------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


def llama(*, tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2, tie_word_embeddings=tied))


def tied_llama() -> nn.Module:
    return llama(tied=True)


def qwen() -> nn.Module:
    """Its attention has biases."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **TOKENS, num_key_value_heads=2, tie_word_embeddings=False))


def gpt2() -> nn.Module:
    """Its Conv1D layers store weights as [in, out], some of them square; its head is tied."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **TOKENS))


def save_base(make: Callable[[], nn.Module], dtype: torch.dtype, folder: Path) -> Path:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases too
    model.to(dtype).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Give a base an adapter of random values, as if it were trained."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """θ_dpo in float64."""
    model = AutoModelForCausalLM.from_pretrained(base).double()
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload().state_dict()


PLAIN = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 3},
    "alpha_pattern": {r"model.layers.\d.mlp.down_proj": 5, "q_proj": 7, "layers.1.self_attn.q_proj": 11},
}
CASES = {
    "plain": (llama, PLAIN),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "biases beside it": (qwen, {"target_modules": "all-linear"}),
    "rank-stabilised": (llama, {**PLAIN, "use_rslora": True}),
    "patterns": (llama, {**PLAIN, **PATTERNS}),
    "patterns, rank-stabilised": (llama, {**PLAIN, **PATTERNS, "use_rslora": True}),
    "layers": (llama, {**PLAIN, "layers_to_transform": [1]}),
    "saved modules": (llama, {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved module of modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "trained biases": (qwen, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": (qwen, {"target_modules": ["q_proj"], "bias": "all"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "v_proj"]}),
    "fan-in fan-out": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "fan-in fan-out, all linear": (gpt2, {"target_modules": "all-linear", "use_rslora": True}),
    "tied base": (tied_llama, {"target_modules": "all-linear"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Base and adapter of a case; bases are made once."""
    bases: dict[tuple[object, torch.dtype], Path] = {}

    def make(case: tuple[Callable[[], nn.Module], dict[str, object]], dtype: torch.dtype) -> tuple[Path, Path]:
        build, options = case
        if (build, dtype) not in bases:
            bases[build, dtype] = save_base(build, dtype, tmp_path_factory.mktemp("base"))
        base = bases[build, dtype]
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
        return base, save_adapter(base, tmp_path_factory.mktemp("adapter"), config, dtype)

    return make


# --- θ(α), executed piece by piece --------------------------------------------------------------------------------


def values(info: TensorInfo) -> Tensor:
    with safe_open(info.file, "pt") as file:
        return file.get_tensor(info.name)


def factors(adapter: Adapter, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pair = adapter.low_rank[name]
    left, right = (values(info).to(dtype) for info in (pair.left, pair.right))
    return (left.T, right.T) if pair.transposed else (left, right)


def theta(base: Checkpoint, adapter: Adapter, name: str, alpha: float, piece: int) -> Tensor:
    sft = values(base.tensors[name])
    whole = values(adapter.saved[name]).float() - sft.float() if name in adapter.saved else torch.zeros(sft.shape)
    s, delta, out = sft.view(-1), whole.view(-1), torch.empty_like(sft).view(-1)
    starts = range(0, len(s), piece)
    if name in adapter.low_rank:
        scale, (left, right) = adapter.low_rank[name].scale, factors(adapter, name, torch.float32)
        for first in starts:
            part = delta[first : first + piece]
            part += rules.low_rank_delta(left, right, scale, first, len(part))
    for first in starts:
        part = slice(first, first + piece)
        rules.add_delta(s[part], delta[part], alpha, out[part])
    return out.view(sft.shape)


def check(base: Checkpoint, adapter: Adapter, right: dict[str, Tensor], alpha: float, piece: int) -> None:
    """The law: a rounding of a number that is within float32's error of s + (1 + α)(d − s), for every tensor."""
    for name, info in base.tensors.items():
        out = theta(base, adapter, name, alpha, piece).double().numpy()
        s, d = values(info).double().numpy(), right[name].numpy()
        size = np.abs(s) + np.abs(d)
        if name in adapter.low_rank:
            left, other = (factor.abs().numpy() for factor in factors(adapter, name, torch.float64))
            size = size + abs(adapter.low_rank[name].scale) * (left @ other)
        want, bound = s + (1 + alpha) * (d - s), 2.0**-21 * (1 + abs(alpha)) * size
        dtype = values(info).dtype
        wrong = (out < round_to(want - bound, dtype)) | (out > round_to(want + bound, dtype))
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.size} are off, {out[wrong][0]} {want[wrong][0]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_merges_as_peft_merges_it(made, case: str, dtype: torch.dtype) -> None:
    sft, dpo = made(CASES[case], dtype)
    assert is_adapter(dpo)
    assert not is_adapter(sft)
    base = read_checkpoint(sft)
    adapter, right = read_adapter(dpo, base), merged_by_peft(sft, dpo)
    changed = {name for name in base.tensors if not torch.equal(values(base.tensors[name]).double(), right[name])}
    assert changed == {*adapter.low_rank, *adapter.saved}
    for alpha, piece in ((0.0, 1 << 20), (0.3, 100), (-1.0, 7), (8.0, 33)):
        check(base, adapter, right, alpha, piece)


def test_an_adapter_saved_with_its_own_name_in_the_tensors_reads_the_same(made, tmp_path: Path) -> None:
    sft, dpo = made(CASES["embedding"], torch.float32)
    tensors = {
        name.replace(".weight", ".default.weight") if ".lora_" in name else name: tensor
        for name, tensor in load_file(dpo / "adapter_model.safetensors").items()
    }
    tensors = {name + ".default" if "_embedding_" in name else name: tensor for name, tensor in tensors.items()}
    renamed = write_adapter(tmp_path / "renamed", tensors, **json.loads((dpo / "adapter_config.json").read_text()))
    base = read_checkpoint(sft)
    one, other = read_adapter(dpo, base), read_adapter(renamed, base)
    assert outline(one) == outline(other)


def outline(adapter: Adapter) -> object:
    """An adapter without the places of its bytes."""
    low_rank = {name: (pair.shape, pair.transposed, pair.scale) for name, pair in adapter.low_rank.items()}
    return low_rank, set(adapter.saved), adapter.settings


def test_embeddings_saved_along_with_trained_ones_do_not_hide_them(made, tmp_path: Path) -> None:
    """`save_embedding_layers` stores a module thrice: trained, trained under its wrapper's name, and untrained."""
    sft, dpo = made(CASES["saved modules"], torch.float32)
    tensors = load_file(dpo / "adapter_model.safetensors")
    trained = tensors["base_model.model.lm_head.weight"]
    tensors["base_model.model.lm_head.modules_to_save.weight"] = trained + 1
    tensors["base_model.model.lm_head.original_module.weight"] = trained + 2
    thrice = write_adapter(tmp_path / "thrice", tensors, **json.loads((dpo / "adapter_config.json").read_text()))
    assert torch.equal(values(read_adapter(thrice, read_checkpoint(sft)).saved["lm_head.weight"]), trained)
    del tensors["base_model.model.lm_head.weight"]
    twice = write_adapter(tmp_path / "twice", tensors, **json.loads((dpo / "adapter_config.json").read_text()))
    assert torch.equal(values(read_adapter(twice, read_checkpoint(sft)).saved["lm_head.weight"]), trained + 1)


# --- tied embeddings ----------------------------------------------------------------------------------------------

TOUCHING_ONE = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("options", TOUCHING_ONE.values(), ids=TOUCHING_ONE.keys())
def test_a_change_of_one_of_two_tied_tensors_is_refused(made, options: dict[str, object]) -> None:
    sft, dpo = made((tied_llama, options), torch.float32)
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight.*ensure_weight_tying"):
        read_adapter(dpo, read_checkpoint(sft))


@pytest.mark.parametrize("case", ["embedding", "head", "saved embedding", "both saved"])
def test_embedding_and_head_trained_as_one_are_merged_as_one(made, case: str) -> None:
    sft, dpo = made((tied_llama, {**TOUCHING_ONE[case], "ensure_weight_tying": True}), torch.float32)
    base = read_checkpoint(sft)
    adapter = read_adapter(dpo, base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sft).double(), dpo).double()
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(sft).double()
    with torch.no_grad():
        for name in {*adapter.low_rank, *adapter.saved}:
            merged.get_parameter(name).copy_(theta(base, adapter, name, 0.0, 1 << 20))
    torch.testing.assert_close(merged(tokens).logits, before, rtol=0, atol=1e-5)


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize(
    ("config", "stored", "changed", "as_one", "fits"),
    [
        ({"tie_word_embeddings": True}, [EMBEDDING], [EMBEDDING], False, False),
        ({"tie_word_embeddings": True}, [EMBEDDING], [EMBEDDING, HEAD], True, True),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [EMBEDDING, HEAD], True, True),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [EMBEDDING], True, False),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [HEAD], True, False),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [EMBEDDING, HEAD], False, False),
        ({"tie_word_embeddings": False}, [EMBEDDING], [EMBEDDING], False, True),
        ({"tie_word_embeddings": False}, [EMBEDDING, HEAD], [HEAD], False, True),
        ({"text_config": {"tie_word_embeddings": True}}, [EMBEDDING], [EMBEDDING], False, False),
        ({}, [EMBEDDING], [EMBEDDING], False, False),
        ({}, [EMBEDDING, HEAD], [EMBEDDING], False, True),
    ],
)
def test_whether_the_base_ties_its_head(
    tmp_path: Path, config: dict[str, object], stored: list[str], changed: list[str], as_one: bool, fits: bool
) -> None:
    files = {"config.json": json.dumps(config)}
    sft = write_checkpoint(tmp_path / "base", {f"{name}.weight": torch.ones(8, 6) for name in stored}, files=files)
    saved = {f"base_model.model.{name}.weight": torch.ones(8, 6) for name in changed}
    dpo = write_adapter(tmp_path / "lora", saved, **LORA, ensure_weight_tying=as_one)
    if fits:
        kept = {f"{name}.weight" for name in changed if name in stored}
        assert set(read_adapter(dpo, read_checkpoint(sft)).saved) == kept
    else:
        with pytest.raises(InputError, match="ties lm_head"):
            read_adapter(dpo, read_checkpoint(sft))


# --- the config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["proj"],
        ["self_attn.q_proj", "q_proj"],
        ["layers.1.self_attn.q_proj"],
        ["^model.layers.1.*q_proj"],
        ["^layers.1.*q_proj"],
        [r"model\.layers\.\d+\.self_attn\.(q|v)_proj"],
        [".*"],
        ["q_proj|v_proj"],
        ["", "1"],
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(keys: list[str]) -> None:
    table = {key: number for number, key in enumerate(keys, start=10)}
    settings = Settings(rank=1, alpha=1.0, rank_pattern=table)
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.v_proj", "q_proj", "xq_proj", "a.b"):
        assert settings.rank_of(module) == table.get(get_pattern_key(list(table), module), 1), module


def test_every_setting_of_peft_is_decided_on() -> None:
    """A new one may change what an adapter is: does it belong to the refused or to the neutral settings?"""
    known = adapter_settings.NEUTRAL_SETTINGS | set(adapter_settings.REFUSED_SETTINGS)
    assert {item.name for item in dataclasses.fields(LoraConfig)} <= known


@pytest.mark.parametrize("init", [True, False, *adapter_settings.PLAIN_INITS, "pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_those_refused(init: str | bool, tmp_path: Path) -> None:
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    now = tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    tuned.save_pretrained(tmp_path)
    if torch.equal(before, now):
        adapter_settings.read_settings(tmp_path / "adapter_config.json")
    else:
        with pytest.raises(InputError, match="not known to leave the base's weights as they are"):
            adapter_settings.read_settings(tmp_path / "adapter_config.json")


def test_an_unknown_setting_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_adapter(tmp_path, {}, use_something_new=True, unused_new=False, **LORA)
    adapter_settings.read_settings(folder / "adapter_config.json")
    assert "use_something_new" in caplog.text
    assert "unused_new" not in caplog.text


# --- what is refused ----------------------------------------------------------------------------------------------

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
A, B = "base_model.model.model.q_proj.lora_A.weight", "base_model.model.model.q_proj.lora_B.weight"


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    tensors = {
        "model.q_proj.weight": torch.randn(8, 6),
        "model.conv.weight": torch.randn(8, 6, 3),
        "model.norm.weight": torch.randn(6),
        "model.steps": torch.arange(3),
    }
    return read_checkpoint(write_checkpoint(tmp_path / "base", tensors))


def pair_of(rank: int = 2, rows: int = 8, columns: int = 6) -> dict[str, Tensor]:
    return {A: torch.randn(rank, columns), B: torch.randn(rows, rank)}


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "another method": ({"peft_type": "IA3"}, "of type IA3, not LORA"),
    "no method": ({"peft_type": None}, "of type None"),
    "DoRA": ({"use_dora": True}, "uses DoRA; merge it"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "uses target_parameters"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "uses layer_replication"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "activated LoRA"),
    "two at once": ({"use_dora": True, "use_qalora": True}, "uses DoRA and QA-LoRA"),
    "Megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    **{
        init: ({"init_lora_weights": init}, f"init_lora_weights '{init}'")
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something new")
    },
    "no rank": ({"r": None}, "r is None, not a positive whole number"),
    "rank of zero": ({"r": 0}, "r is 0"),
    "rank true": ({"r": True}, "r is True"),
    "huge rank": ({"r": 10**400}, "not a positive whole number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None, not a number"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "huge alpha": ({"lora_alpha": 10**400}, "not a number"),
    "pattern of another type": ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
    "pattern to text": ({"alpha_pattern": {"q_proj": "8"}}, r"alpha_pattern\['q_proj'\] is '8'"),
    "pattern that is no expression": ({"rank_pattern": {"q_(proj": 4}}, "no regular expression"),
    "another rank": ({"r": 3}, r"ranks that differ .*model.q_proj.weight 2×2 ≠ 3"),
    "another layout": ({"fan_in_fan_out": True}, r"stored as \[in, out\].*model.q_proj.weight \[6, 8\] ≠ \[8, 6\]"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_is_refused_by_name(base: Checkpoint, tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write_adapter(tmp_path / "lora", pair_of(), **{**LORA, **change})
    with pytest.raises(InputError, match=message):
        read_adapter(folder, base)


def convolution() -> dict[str, Tensor]:
    name = "base_model.model.model.conv"
    return {f"{name}.lora_A.weight": torch.ones(2, 6, 3), f"{name}.lora_B.weight": torch.ones(8, 2, 1)}


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in pair_of().items()}


TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "A alone": ({A: torch.ones(2, 6)}, "lora_A.weight without the other factor"),
    "B alone": ({B: torch.ones(8, 2)}, "lora_B.weight without the other factor"),
    "A of an embedding": (
        {"base_model.model.model.q_proj.lora_embedding_A": torch.ones(2, 6), B: torch.ones(8, 2)},
        "without the other factor",
    ),
    "rows": (pair_of(rows=9), r"model.q_proj.weight \[9, 6\] ≠ \[8, 6\]"),
    "columns": (pair_of(columns=7), r"\[8, 7\] ≠ \[8, 6\]"),
    "A's rank": ({A: torch.ones(3, 6), B: torch.ones(8, 2)}, "2×3 ≠ 2"),
    "B's rank": ({A: torch.ones(2, 6), B: torch.ones(8, 3)}, "3×2 ≠ 2"),
    "rank": (pair_of(rank=4), "4×4 ≠ 2"),
    "no matrix": ({A: torch.ones(2), B: torch.ones(8, 2)}, "no matrix"),
    "a convolution": (convolution(), "convolution"),
    "DoRA's magnitudes": (
        {**pair_of(), A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)},
        "lora_magnitude_vector is no tensor of a plain LoRA",
    ),
    "a factor's bias": ({**pair_of(), B.replace("weight", "bias"): torch.ones(8)}, "lora_B.bias is no tensor of"),
    "single tokens": (
        {"base_model.model.model.q_proj.token_adapter.trainable_tokens_delta": torch.ones(2, 6)},
        "trainable_tokens_delta is no tensor of a plain LoRA",
    ),
    "two adapters": ({**pair_of(), A.replace(".weight", ".second.weight"): torch.ones(2, 6)}, "more than one adapter"),
    "no prefix": (renamed("base_model.model.", ""), "is no tensor of a plain LoRA"),
    "another prefix": (renamed("model.q_proj", "q_proj"), "the base lacks: q_proj.weight"),
    "a module too many": ({**pair_of(), **renamed("q_proj", "k_proj")}, "the base lacks: model.k_proj.weight"),
    "a saved one too many": ({**pair_of(), "base_model.model.score.weight": torch.ones(2)}, "lacks: score.weight"),
    "a resized one": (
        {**pair_of(), "base_model.model.model.norm.weight": torch.ones(7)},
        r"model.norm.weight \[7\] ≠ \[6\]",
    ),
    "eight bits": (
        {A: torch.ones(2, 6).to(torch.float8_e4m3fn), B: torch.ones(8, 2)},
        "dtypes that cannot be combined: model.q_proj.weight F32, F32, F8_E4M3",
    ),
    "integers": (
        {**pair_of(), "base_model.model.model.steps": torch.arange(3)},
        "dtypes that cannot be combined: model.steps I64, I64",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_are_refused_by_name(
    base: Checkpoint, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_adapter(write_adapter(tmp_path / "lora", tensors, **LORA), base)


def test_all_mismatches_are_in_one_message(base: Checkpoint, tmp_path: Path) -> None:
    tensors = {**pair_of(rank=3, rows=9), "base_model.model.gone.weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"lacks: gone\.weight; ranks .*; shapes "):
        read_adapter(write_adapter(tmp_path / "lora", tensors, **LORA), base)


def missing(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def whole_model(folder: Path) -> None:
    save_file(pair_of(), folder / "model.safetensors")


def torn(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-4])


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "holds adapter_config.json but no adapter_model.safetensors"),
        (pickled, "adapter_model.bin only; load it with peft and save it again as safetensors"),
        (whole_model, "holds both model.safetensors and adapter_config.json"),
        (torn, "truncated"),
        (no_json, "not valid JSON"),
    ],
)
def test_a_folder_is_refused(base: Checkpoint, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_adapter(tmp_path / "lora", pair_of(), **LORA)
    read_adapter(folder, base)
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_adapter(folder, base)


VARIANTS = {
    "DoRA": LoraConfig(target_modules=["q_proj"], use_dora=True),
    "lora_bias": LoraConfig(target_modules=["q_proj"], lora_bias=True),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "parameters": LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_other_kinds_as_peft_saves_them_are_refused(made, tmp_path: Path, kind: str) -> None:
    sft, _ = made(CASES["biases beside it"], torch.float32)
    get_peft_model(AutoModelForCausalLM.from_pretrained(sft), VARIANTS[kind]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="merge_and_unload"):
        read_adapter(tmp_path, read_checkpoint(sft))
