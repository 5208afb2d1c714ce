"""LoRA adapters are read as PEFT reads them; what is not plain LoRA, or does not fit, is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import CASES, TOUCHING_ONE, Maker, llama, tied_llama, values, write_adapter
from helpers import write_checkpoint
from peft import IA3Config, LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expo.checkpoint.folder import Checkpoint, is_adapter, read_checkpoint
from expo.errors import InputError
from expo.theta.adapter import settings as adapter_settings
from expo.theta.adapter.settings import Settings
from expo.theta.adapter.tensors import Adapter, read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of every unusual choice, and these are


@pytest.mark.parametrize("case", CASES)
def test_what_an_adapter_changes_is_what_peft_changes(made: Maker, case: str) -> None:
    sft, dpo = made(CASES[case], torch.float32)
    assert is_adapter(dpo)
    assert not is_adapter(sft)
    base = read_checkpoint(sft)
    adapter, right = read_adapter(dpo, base), made.merged((sft, dpo))
    changed = {name for name in base.tensors if not torch.equal(values(base.tensors[name]).double(), right[name])}
    assert changed == {*adapter.low_rank, *adapter.saved}


def test_an_adapter_saved_with_its_own_name_in_the_tensors_reads_the_same(made: Maker, tmp_path: Path) -> None:
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


def test_embeddings_saved_along_with_trained_ones_do_not_hide_them(made: Maker, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("options", [TOUCHING_ONE[case] for case in ("embedding", "head")], ids=["embedding", "head"])
def test_a_change_of_one_of_two_tied_tensors_is_refused(made: Maker, options: dict[str, object]) -> None:
    sft, dpo = made((tied_llama, options), torch.float32)
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight.*ensure_weight_tying"):
        read_adapter(dpo, read_checkpoint(sft))


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize(
    ("config", "stored", "changed", "as_one", "fits"),
    [
        ({"tie_word_embeddings": True}, [EMBEDDING], [EMBEDDING], False, True),
        ({"tie_word_embeddings": True}, [EMBEDDING], [EMBEDDING, HEAD], True, True),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [EMBEDDING, HEAD], True, True),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [EMBEDDING], True, False),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [HEAD], True, False),
        ({"tie_word_embeddings": True}, [EMBEDDING, HEAD], [EMBEDDING, HEAD], False, True),
        ({"tie_word_embeddings": False}, [EMBEDDING], [EMBEDDING], False, True),
        ({"tie_word_embeddings": False}, [EMBEDDING, HEAD], [HEAD], False, True),
        ({"text_config": {"tie_word_embeddings": True}}, [EMBEDDING], [EMBEDDING], False, True),
        ({}, [EMBEDDING], [EMBEDDING], False, True),
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
        with pytest.raises(InputError, match="which may have changed the base's weights"):
            adapter_settings.read_settings(tmp_path / "adapter_config.json")


def test_an_unknown_setting_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_adapter(tmp_path, {}, use_something_new=True, unused_new=False, **LORA)
    adapter_settings.read_settings(folder / "adapter_config.json")
    assert "use_something_new" in caplog.text
    assert "unused_new" not in caplog.text


# --- what is refused ----------------------------------------------------------------------------------------------

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
A, B = "base_model.model.model.q_proj.lora_A.weight", "base_model.model.model.q_proj.lora_B.weight"


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
    "pattern that is no expression": ({"rank_pattern": {"q_(proj": 4}}, "not a regular expression"),
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
    "not a matrix": ({A: torch.ones(2), B: torch.ones(8, 2)}, "not a matrix"),
    "a convolution": (convolution(), "convolution"),
    "DoRA's magnitudes": (
        {**pair_of(), A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)},
        "lora_magnitude_vector is not a tensor of a plain LoRA",
    ),
    "a factor's bias": ({**pair_of(), B.replace("weight", "bias"): torch.ones(8)}, "lora_B.bias is not a tensor of"),
    "single tokens": (
        {"base_model.model.model.q_proj.token_adapter.trainable_tokens_delta": torch.ones(2, 6)},
        "trainable_tokens_delta is not a tensor of a plain LoRA",
    ),
    "two adapters": ({**pair_of(), A.replace(".weight", ".second.weight"): torch.ones(2, 6)}, "more than one adapter"),
    "no prefix": (
        renamed("base_model.model.", ""),
        "is not a tensor of a plain LoRA as PEFT saves it, whose name begins",
    ),
    "another prefix": (
        renamed("model.q_proj", "q_proj"),
        "the base lacks: q_proj.weight; give the model it was trained on",
    ),
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
        (missing, "contains adapter_config.json but no adapter_model.safetensors"),
        (pickled, "only adapter_model.bin; load it with peft and save it again as safetensors"),
        (whole_model, "contains both model.safetensors and adapter_config.json"),
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
def test_other_kinds_as_peft_saves_them_are_refused(made: Maker, tmp_path: Path, kind: str) -> None:
    sft, _ = made(CASES["biases beside it"], torch.float32)
    get_peft_model(AutoModelForCausalLM.from_pretrained(sft), VARIANTS[kind]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="merge_and_unload"):
        read_adapter(tmp_path, read_checkpoint(sft))
