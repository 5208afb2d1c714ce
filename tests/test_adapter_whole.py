"""θ(α) of an adapter and its base as whole models: names, shapes, values as PEFT merges and transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SIZES, llama, tied_llama, untied_gpt2
from helpers import VISION
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from expo.checkpoint.folder import read_checkpoint
from expo.checkpoint.names import spelling, without_wrappers
from expo.config import ExtrapolateConfig, InspectConfig, ThetaConfig
from expo.errors import InputError
from expo.theta.adapter.tensors import read_adapter
from expo.theta.pair import plan_theta
from expo.theta.tensors import Theta
from expo.verbs import extrapolate, inspect

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of every unusual choice, and these are

ALPHA = 0.5
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PEFT = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def adapted(model: nn.Module, folder: Path, *, copies: object = "auto", **options: object) -> Path:
    """An adapter of random values, saved; `copies` is PEFT's save_embedding_layers."""
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder, save_embedding_layers=copies)
    return folder


def edit(adapter: Path, change: Edit) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


def merged(base: nn.Module, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """θ_dpo in float64, in the names on disk; its config lies beside it."""
    model = PeftModel.from_pretrained(base.double(), adapter).double().merge_and_unload()
    return load_file(save(model, folder) / "model.safetensors")


def run(sft: Path, dpo: Path, output: Path, **settings: Any) -> dict[str, Tensor]:
    given = {"alpha": (ALPHA,), "output": str(output), "fsync": False, **settings}
    extrapolate.run(ExtrapolateConfig(sft=str(sft), dpo=str(dpo), **given))
    return load_file(output / "model.safetensors")


def law(sft: dict[str, Tensor], right: dict[str, Tensor], found: dict[str, Tensor], common: int | None = None) -> None:
    """Every tensor is d + α(d − s); rows from `common` on, which the base lacks, are d's.

    A head that the base ties to its embedding starts as the embedding.
    """
    assert found.keys() == right.keys()
    for name, d in right.items():
        s = sft.get(name, sft.get(EMBEDDING, next(iter(sft.values())))).double()
        assert name in sft or name.endswith("lm_head.weight")
        if common is not None and s.shape != d.shape:
            s = torch.cat([s[:common], d[common:]])
        torch.testing.assert_close(found[name].double(), d + ALPHA * (d - s), rtol=2**-22, atol=2**-22)


def noise(*names: str) -> Edit:
    """A change of whole tensors, as if they had been trained further."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(2)
        return {
            name: tensor + 0.1 * torch.randn_like(tensor) if name.removeprefix(PEFT) in names else tensor
            for name, tensor in tensors.items()
        }

    return change


def without(name: str) -> Edit:
    return lambda tensors: {
        key: tensor for key, tensor in noise(EMBEDDING, HEAD)(tensors).items() if key != PEFT + name
    }


# --- copies of a tied embedding -----------------------------------------------------------------------------------

TIED = {
    "copies as they were": (True, {}, lambda tensors: tensors),
    "copies that changed": (True, {}, noise(EMBEDDING, HEAD)),
    "a copy of the embedding": (True, {}, without(HEAD)),
    "a copy of the head": (True, {}, without(EMBEDDING)),
    "a trained embedding": ("auto", {"modules_to_save": ["embed_tokens"]}, lambda tensors: tensors),
    "a trained head": ("auto", {"modules_to_save": ["lm_head"]}, lambda tensors: tensors),
    "both trained": ("auto", {"modules_to_save": ["embed_tokens", "lm_head"]}, lambda tensors: tensors),
    "both trained as one": (
        "auto",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        lambda tensors: tensors,
    ),
    "a trained embedding and a copy of the head": (True, {"modules_to_save": ["embed_tokens"]}, noise(HEAD)),
}


@pytest.mark.parametrize(("copies", "options", "change"), TIED.values(), ids=TIED)
def test_copies_of_a_tied_embedding_are_merged_as_peft_merges_them(
    tmp_path: Path, copies: object, options: dict[str, Any], change: Edit
) -> None:
    """Also whether embedding and head are still one afterwards, as the config says, and a loader and an engine see."""
    sft = save(tied_llama(), tmp_path / "sft")
    dpo = adapted(AutoModelForCausalLM.from_pretrained(sft), tmp_path / "lora", copies=copies, **options)
    edit(dpo, change)
    right = merged(AutoModelForCausalLM.from_pretrained(sft), dpo, tmp_path / "merged")
    found = run(sft, dpo, tmp_path / "out")
    law(load_file(sft / "model.safetensors"), right, found)
    ties = [AutoConfig.from_pretrained(tmp_path / name).tie_word_embeddings for name in ("out", "merged")]
    assert ties[0] == ties[1] == (HEAD not in right)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_output_embeddings().weight, found.get(HEAD, found[EMBEDDING]))
    assert torch.equal(loaded.get_input_embeddings().weight, found[EMBEDDING])
    with Theta(plan_theta(ThetaConfig(sft=str(sft), dpo=str(dpo), alpha=ALPHA)).pair) as theta:
        assert all(torch.equal(values, found[name]) for name, values in theta)


def test_an_own_head_lies_in_the_shard_of_its_embedding(tmp_path: Path) -> None:
    model = tied_llama()
    model.save_pretrained(tmp_path / "sft", max_shard_size="20KB")
    dpo = adapted(model, tmp_path / "lora", modules_to_save=["embed_tokens"])
    config = ExtrapolateConfig(
        sft=str(tmp_path / "sft"), dpo=str(dpo), alpha=(0.0,), output=str(tmp_path / "out"), fsync=False
    )
    extrapolate.run(config)
    shards = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    before = json.loads((tmp_path / "sft/model.safetensors.index.json").read_text())["weight_map"]
    assert shards == {**before, HEAD: before[EMBEDDING]}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(whole.lm_head.weight, AutoModelForCausalLM.from_pretrained(tmp_path / "sft").lm_head.weight)


def test_patterns_and_dtype_reach_an_own_head(tmp_path: Path) -> None:
    sft = save(tied_llama(), tmp_path / "sft")
    dpo = adapted(AutoModelForCausalLM.from_pretrained(sft), tmp_path / "lora", modules_to_save=["lm_head"])
    found = run(sft, dpo, tmp_path / "out", exclude=("lm_head",), dtype="bfloat16")
    trained = load_file(dpo / WEIGHTS)[PEFT + HEAD]
    assert torch.equal(found[HEAD], trained.bfloat16())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["tie_word_embeddings"], config["dtype"]) == (False, "bfloat16")


def test_a_head_that_was_trained_but_is_not_stored_is_refused(tmp_path: Path) -> None:
    sft = save(tied_llama(), tmp_path / "sft")
    options = {"modules_to_save": ["embed_tokens", "lm_head"]}
    dpo = adapted(AutoModelForCausalLM.from_pretrained(sft), tmp_path / "lora", **options)
    edit(dpo, without(HEAD))
    with pytest.raises(InputError, match="names lm_head among its modules_to_save, but does not store it"):
        run(sft, dpo, tmp_path / "out")


# --- a vocabulary of another size ---------------------------------------------------------------------------------


def resized(sft: Path, rows: int) -> nn.Module:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(sft)
    model.resize_token_embeddings(rows)
    return model


RESIZED: dict[str, tuple[Callable[[], nn.Module], int, object, dict[str, Any]]] = {
    "copies": (llama, 72, True, {}),
    "copies, fewer": (llama, 56, True, {}),
    "trained": (llama, 72, "auto", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "factors too": (llama, 72, True, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "factors too, fewer": (llama, 56, True, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tied, copies": (tied_llama, 72, True, {}),
    "tied, trained": (tied_llama, 72, "auto", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, trained as one": (
        tied_llama,
        72,
        "auto",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize(("build", "rows", "copies", "options"), RESIZED.values(), ids=RESIZED)
def test_rows_of_both_are_extrapolated_and_further_ones_the_adapters(
    tmp_path: Path, build: Callable[[], nn.Module], rows: int, copies: object, options: dict[str, Any]
) -> None:
    sft = save(build(), tmp_path / "sft")
    dpo = adapted(resized(sft, rows), tmp_path / "lora", copies=copies, **options)
    right = merged(resized(sft, rows), dpo, tmp_path / "merged")
    message = rf"lora differs in size from its base's \(.* has {rows} rows, not 64.*\): pass --vocab common"
    with pytest.raises(InputError, match=message) as caught:
        run(sft, dpo, tmp_path / "out")
    assert "fan_in_fan_out" not in str(caught.value)
    assert "ensure_weight_tying" not in str(caught.value)
    found = run(sft, dpo, tmp_path / "out", vocab="common")
    law(load_file(sft / "model.safetensors"), right, found, common=min(rows, 64))
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == rows
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape[0] == rows
    manifest = json.loads((tmp_path / "out/expo.json").read_text())["vocabulary"]
    assert (manifest["sft"], manifest["dpo"], manifest["rows_extrapolated"]) == (64, rows, min(rows, 64))
    inspect.run(InspectConfig(sft=str(sft), dpo=str(dpo)))


def test_factors_of_a_tied_and_resized_embedding_count_once(tmp_path: Path) -> None:
    """As in the model that was trained; PEFT's merge adds them for embedding and head to what is one tensor."""
    sft = save(tied_llama(), tmp_path / "sft")
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "copies": True}
    dpo = adapted(resized(sft, 72), tmp_path / "lora", **options)
    run(sft, dpo, tmp_path / "out", alpha=(0.0,), vocab="common")
    ids = torch.arange(72)[None]
    with torch.no_grad():
        trained = PeftModel.from_pretrained(resized(sft, 72).double(), dpo).double()(ids).logits
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()(ids).logits
    torch.testing.assert_close(written, trained, rtol=0, atol=1e-4)


def test_excluded_the_resized_tensors_are_the_adapters(tmp_path: Path) -> None:
    sft = save(llama(), tmp_path / "sft")
    dpo = adapted(resized(sft, 72), tmp_path / "lora", copies=True)
    edit(dpo, noise(EMBEDDING, HEAD))
    found = run(sft, dpo, tmp_path / "out", exclude=("embed_tokens|lm_head",))
    stored = load_file(dpo / WEIGHTS)
    assert all(torch.equal(found[name], stored[PEFT + name]) for name in (EMBEDDING, HEAD))


def test_a_larger_vocabulary_that_is_stored_in_part_is_refused(tmp_path: Path) -> None:
    sft = save(llama(), tmp_path / "sft")
    for name, options, change in (
        ("lora", {"copies": True}, without(HEAD)),
        ("factors", {"copies": False, "target_modules": ["embed_tokens", "lm_head"]}, lambda tensors: tensors),
    ):
        dpo = adapted(resized(sft, 72), tmp_path / name, **options)
        edit(dpo, change)
        with pytest.raises(
            InputError, match=r"does not store the whole of .*lm_head\.weight.*save_embedding_layers=True"
        ):
            run(sft, dpo, tmp_path / "out", vocab="common")


def test_a_vocabulary_of_one_size_is_as_without_the_setting(tmp_path: Path) -> None:
    sft = save(llama(), tmp_path / "sft")
    dpo = adapted(AutoModelForCausalLM.from_pretrained(sft), tmp_path / "lora", copies=True)
    plain, common = run(sft, dpo, tmp_path / "a"), run(sft, dpo, tmp_path / "b", vocab="common")
    assert all(torch.equal(plain[name], common[name]) for name in plain)


# --- names in memory and on disk ----------------------------------------------------------------------------------

TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 64}


def gemma() -> nn.Module:
    layers = {"head_dim": 8, "sliding_window": 16, "layer_types": ["full_attention"] * 2}
    config = Gemma3Config(text_config={**TEXT, **layers}, vision_config=VISION, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config)


def qwen_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 14, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}
    config = LlavaConfig(text_config={"model_type": "llama", **TEXT}, vision_config=vision, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


ALIKE = {
    "language model": (
        "model.language_model.layers.0.q",
        "language_model.model.layers.0.q",
        "model.layers.0.q",
        "layers.0.q",
    ),
    "text model": ("model.text_model.layers.0.q", "text_model.model.layers.0.q"),
    "embedding": ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight", "embed_tokens.weight"),
    "head": (
        "lm_head.weight",
        "language_model.lm_head.weight",
        "model.language_model.lm_head.weight",
        "embed_out.weight",
    ),
    "vision": ("model.visual.blocks.0.q", "visual.blocks.0.q"),
    "vision tower": ("model.vision_tower.encoder.q", "vision_tower.vision_model.encoder.q", "vision_tower.encoder.q"),
    "projector": ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear.weight"),
    "a vector": ("model.image_newline", "image_newline"),
    "thinker": ("thinker.model.layers.0.q", "model.layers.0.q"),
    "gpt2": ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
    "wrapped": ("_orig_mod.model.layers.0._fsdp_wrapped_module.q", "module.model.layers.0.q", "model.layers.0.q"),
    "plain": ("q_proj.weight",),
    "plain under a model": ("model.q_proj.weight",),
    "talker": ("talker.model.layers.0.q",),
    "encoder": ("encoder.layers.0.q",),
    "decoder": ("model.decoder.layers.0.q",),
    "a module of that name": ("model.module.q",),
    "vision model": ("vision_model.layers.0.q", "model.vision_model.layers.0.q"),
}


def test_names_have_one_spelling_only_where_they_mean_one_tensor() -> None:
    spelt = [{spelling(name) for name in names} for names in ALIKE.values()]
    assert [len(names) for names in spelt] == [1] * len(ALIKE)
    meanings = {
        name for kind, names in zip(ALIKE, spelt, strict=True) for name in names if kind not in ("thinker", "wrapped")
    }
    assert len(meanings) == len(ALIKE) - 3, "text model, thinker and wrapped repeat the language model"


MULTIMODAL = {
    "gemma3": (gemma, {"target_modules": "all-linear"}),
    "gemma3, a trained embedding": (gemma, {"modules_to_save": ["embed_tokens"]}),
    "gemma3, copies": (gemma, {"copies": True}),
    "gemma3, ranks of its own": (gemma, {"rank_pattern": {r"^model\.language_model\.layers\.1\..*q_proj": 2}}),
    "qwen2_5_vl": (qwen_vl, {"target_modules": "all-linear"}),
    "qwen2_5_vl, both trained": (qwen_vl, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "llava": (llava, {"target_modules": "all-linear"}),
    "llava, a trained projector and head": (llava, {"modules_to_save": ["multi_modal_projector", "lm_head"]}),
}


@pytest.mark.parametrize(("build", "options"), MULTIMODAL.values(), ids=MULTIMODAL)
def test_an_adapter_of_a_vision_language_model_is_merged_as_peft_merges_it(
    tmp_path: Path, build: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build()
    sft = save(model, tmp_path / "sft")
    load = type(model).from_pretrained
    dpo = adapted(load(sft), tmp_path / "lora", **options)
    right = merged(load(sft), dpo, tmp_path / "merged")
    before = load_file(sft / "model.safetensors")
    if EMBEDDING not in before:
        before[EMBEDDING] = before["language_model.model.embed_tokens.weight"]
    law(before, right, run(sft, dpo, tmp_path / "out"))
    merged_model, written = load(tmp_path / "merged"), load(tmp_path / "out")
    assert written.config.tie_word_embeddings == merged_model.config.tie_word_embeddings
    ties = [
        one.get_input_embeddings().weight.data_ptr() == one.get_output_embeddings().weight.data_ptr()
        for one in (merged_model, written)
    ]
    assert ties[0] == ties[1]


def on_disk(*renamed: tuple[str, str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for old, new in renamed:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return rename


OTHER_NAMES: dict[str, tuple[Callable[[], nn.Module], Callable[[str], str]]] = {
    "as in memory": (gemma, on_disk(("language_model.model.", "model.language_model."), ("vision_", "model.vision_"))),
    "with the tower's model": (llava, on_disk(("vision_tower.", "vision_tower.vision_model."))),
    "in memory since": (qwen_vl, on_disk(("model.", "model.language_model."), ("visual.", "model.visual."))),
    "without the model's prefix": (untied_gpt2, on_disk(("transformer.", ""))),
    "wrapped": (llama, lambda name: f"_orig_mod.{name}"),
}


@pytest.mark.parametrize(("build", "rename"), OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_a_base_with_other_names_on_disk(
    tmp_path: Path, build: Callable[[], nn.Module], rename: Callable[[str], str]
) -> None:
    """The same values under names that other versions of transformers write, or the hub's."""
    torch.manual_seed(0)
    sft = save(build(), tmp_path / "sft")
    targets = {"target_modules": ["c_attn", "lm_head"]} if build is untied_gpt2 else {"target_modules": "all-linear"}
    dpo = adapted(type(build()).from_pretrained(sft), tmp_path / "lora", **targets)
    found = run(sft, dpo, tmp_path / "out")
    shutil.copytree(sft, tmp_path / "other")
    tensors = load_file(sft / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / "other/model.safetensors")
    other = run(tmp_path / "other", dpo, tmp_path / "other-out")
    written = {name: without_wrappers(rename(name)) for name in found}
    assert other.keys() == set(written.values())
    assert all(torch.equal(other[written[name]], tensor) for name, tensor in found.items())


PLACES = {
    "compiled": lambda name: "_orig_mod." + name,
    "its model compiled": lambda name: name.replace(PEFT, PEFT + "_orig_mod."),
    "its layers compiled": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "in parallel": lambda name: "module." + name,
    "in parallel inside": lambda name: name.replace(PEFT, PEFT + "module."),
    "in parallel and compiled": lambda name: "module._orig_mod." + name,
    "sharded": lambda name: name.replace(".mlp", "._fsdp_wrapped_module.mlp").replace(
        "_attn.", "_attn._checkpoint_wrapped_module."
    ),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_names_that_a_wrapper_changed_are_read_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: Callable[[str], str]
) -> None:
    sft = save(llama(), tmp_path / "sft")
    options = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    dpo = adapted(AutoModelForCausalLM.from_pretrained(sft), tmp_path / "lora", **options)
    right = merged(AutoModelForCausalLM.from_pretrained(sft), dpo, tmp_path / "merged")
    edit(dpo, lambda tensors: {place(name): tensor for name, tensor in tensors.items()})
    law(load_file(sft / "model.safetensors"), right, run(sft, dpo, tmp_path / "out"))
    assert "contain a training wrapper's prefix, which is dropped" in caplog.text


def test_names_that_mean_several_tensors_or_one_tensor_twice_are_refused(tmp_path: Path) -> None:
    layer = "layers.0.self_attn.q_proj"
    tensors = {f"model.{layer}.weight": torch.ones(8, 6), f"language_model.model.{layer}.weight": torch.ones(8, 6)}
    (tmp_path / "sft").mkdir()
    save_file(tensors, tmp_path / "sft/model.safetensors")
    (tmp_path / "sft/config.json").write_text("{}")
    base = read_checkpoint(tmp_path / "sft")

    def adapter(*modules: str) -> Path:
        folder = tmp_path / "lora"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        pairs = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(8, 2)}
        save_file(
            {f"{PEFT}{module}.{side}.weight": value.clone() for module in modules for side, value in pairs.items()},
            folder / WEIGHTS,
        )
        return folder

    exact = read_adapter(adapter(f"model.{layer}", f"language_model.model.{layer}"), base)
    assert exact.low_rank.keys() == tensors.keys()
    with pytest.raises(
        InputError, match=r"model\.language_model\..*may mean language_model\.model\..* or model\..* of sft"
    ):
        read_adapter(adapter(f"model.language_model.{layer}"), base)
    del base.tensors[f"language_model.model.{layer}.weight"]
    assert read_adapter(adapter(f"model.language_model.{layer}"), base).low_rank.keys() == base.tensors.keys()
    with pytest.raises(InputError, match=r"both mean model\.layers\.0.*of sft"):
        read_adapter(adapter(f"model.language_model.{layer}", f"model.{layer}"), base)
    with pytest.raises(InputError, match=r"contains more than one adapter"):
        read_adapter(adapter(f"_orig_mod.model.{layer}", f"model.{layer}"), base)
