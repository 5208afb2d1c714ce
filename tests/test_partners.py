"""One model under two kinds of names: what is the same tensor is extrapolated, and the rest is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    Result,
    plan,
    random_pair,
    read_checkpoint_tensors,
    run_expo,
    share_off,
    stream,
    tensors_of,
    tree,
    write_checkpoint,
)
from torch import Tensor

from expo.errors import InputError
from expo.theta.partners import core

Rename = Callable[[str], str]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (60, 8),
    "lm_head.weight": (60, 8),
    "model.norm.weight": (8,),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj.weight": (8, 8),
            "self_attn.k_proj.weight": (4, 8),
            "self_attn.v_proj.weight": (4, 8),
            "self_attn.q_proj.bias": (8,),
            "self_attn.k_proj.bias": (4,),
            "self_attn.v_proj.bias": (4,),
            "self_attn.o_proj.weight": (8, 8),
            "mlp.gate_proj.weight": (12, 8),
            "mlp.up_proj.weight": (12, 8),
            "mlp.down_proj.weight": (8, 12),
        }.items()
    },
}


def same(name: str) -> str:
    return name


def before(prefix: str) -> Rename:
    return lambda name: prefix + name


def within(old: str, new: str) -> Rename:
    return lambda name: re.sub(old, new, name)


def vision_language(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def before_version_5(name: str) -> str:
    return f"language_model.{name}"


def renamed(tensors: dict[str, Tensor], rename: Rename) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in tensors.items()}


CASES: dict[str, tuple[Rename, Rename, Rename]] = {
    # title: SFT's names, DPO's names, the output's names
    "a compiled SFT": (before("_orig_mod."), same, same),
    "a compiled DPO": (same, before("_orig_mod."), same),
    "both compiled": (before("_orig_mod."), before("_orig_mod."), same),
    "data parallel DPO": (same, before("module."), same),
    "data parallel SFT": (before("module."), same, same),
    "both data parallel": (before("module."), before("module."), same),
    "compiled data parallel": (same, before("module._orig_mod."), same),
    "peft's model saved whole": (same, before("base_model.model."), same),
    "data parallel around peft": (same, before("module.base_model.model."), same),
    "peft's on both sides": (before("base_model.model."), before("base_model.model."), same),
    "FSDP around each layer": (same, within(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module."), same),
    "checkpointing in both": (
        within(r"(mlp)\.", r"\1._checkpoint_wrapped_module."),
        within(r"(mlp)\.", r"\1._checkpoint_wrapped_module."),
        same,
    ),
    "compiled layers": (within(r"(layers\.\d+)\.", r"\1._orig_mod."), same, same),
    "module in the middle": (same, within(r"(layers\.\d+)\.", r"\1.module."), same),
    "peft in the middle": (same, before("language_model.base_model.model."), same),
    "a multimodal prefix": (same, before("language_model."), same),
    "a policy's prefix": (same, before("policy."), same),
    "a prefix of two parts": (same, before("actor.net."), same),
    "SFT with a foreign prefix": (before("actor."), same, same),
    "old and new names of a vision-language model": (before_version_5, vision_language, vision_language),
    "new and old": (vision_language, before_version_5, before_version_5),
    "text and vision-language": (same, vision_language, vision_language),
    "SFT without its head's class": (within(r"^model\.", ""), same, same),
    "a part that both have": (within(r"^model\.", "model.module."),) * 3,
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tensors_under_other_names(tmp_path: Path, case: str) -> None:
    sft, dpo = random_pair(SHAPES)
    of_sft, of_dpo, of_output = CASES[case]
    pair = plan(tmp_path, renamed(sft, of_sft), renamed(dpo, of_dpo))
    made = tensors_of(pair, stream(pair)[0])
    assert made.keys() == {of_output(name) for name in SHAPES}
    for name in SHAPES:
        share_off(sft[name], dpo[name], 0.5, made[of_output(name)])
    assert (pair.dropped, pair.missing) == ((), ())
    assert pair.count("extrapolate") == len(SHAPES)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "policy."])
def test_the_output_of_a_wrapped_model_has_its_own_names_and_layout(
    tmp_path: Path, expo: Callable[..., Result], caplog: pytest.LogCaptureFixture, prefix: str, shards: int
) -> None:
    sft, dpo = random_pair(SHAPES)
    wrapped = write_checkpoint(tmp_path / "wrapped", renamed(dpo, before(prefix)), shards=shards)
    sides = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo, shards=shards)
    assert expo((sides[0], wrapped), "--alpha", 0.5, "--output", tmp_path / "out").code == 0
    assert f"23 of 23 tensor names in wrapped contain a training wrapper's prefix: {prefix}" in caplog.text
    assert expo(sides, "--alpha", 0.5, "--output", tmp_path / "plain").code == 0
    made, plain = (tree(tmp_path / name) for name in ("out", "plain"))
    files = [name for name in plain if "safetensors" in name]
    assert [name for name in made if "safetensors" in name] == files
    made, plain = (read_checkpoint_tensors(tmp_path / name) for name in ("out", "plain"))
    assert made.keys() == plain.keys()
    assert all(torch.equal(made[name], plain[name]) for name in plain)


def test_wrapped_pickles(tmp_path: Path, expo: Callable[..., Result]) -> None:
    sft, dpo = random_pair(SHAPES)
    sides = []
    for name, tensors in (("sft", sft), ("dpo", dpo)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        torch.save(renamed(tensors, before("_orig_mod.")), tmp_path / name / "pytorch_model.bin")
        sides.append(tmp_path / name)
    assert expo(tuple(sides), "--alpha", 0.5, "--output", tmp_path / "out", "--allow-pickle").code == 0
    made = read_checkpoint_tensors(tmp_path / "out")
    assert made.keys() == SHAPES.keys()
    for name, tensor in made.items():
        share_off(sft[name], dpo[name], 0.5, tensor)


def test_a_module_that_is_the_models_own_keeps_its_name(tmp_path: Path) -> None:
    pair = plan(tmp_path, *random_pair({"module.a.weight": (4, 4), "b.weight": (4,)}))
    assert tensors_of(pair, stream(pair)[0]).keys() == {"module.a.weight", "b.weight"}


# --- fused and split ----------------------------------------------------------------------------------------------


def fuse(tensors: dict[str, Tensor], *, qkv: str = "qkv_proj") -> dict[str, Tensor]:
    """The same weights with q, k and v in one tensor, and gate and up."""
    fused = {}
    for name, tensor in tensors.items():
        if (path := re.fullmatch(r"(.*)\.q_proj\.(\w+)", name)) is not None:
            parts = [tensors[f"{path[1]}.{part}.{path[2]}"] for part in ("q_proj", "k_proj", "v_proj")]
            fused[f"{path[1]}.{qkv}.{path[2]}"] = torch.cat(parts)
        elif ".gate_proj." in name:
            fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [tensor, tensors[name.replace("gate_proj", "up_proj")]]
            )
        elif not re.search(r"\.(k|v|up)_proj\.", name):
            fused[name] = tensor
    return fused


EXPERTS = {
    "model.layers.0.mlp.gate.weight": (3, 8),
    **{
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": (8, 4) if part == "down" else (4, 8)
        for expert in range(3)
        for part in ("gate", "up", "down")
    },
}
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral(name: str) -> str:
    return re.sub(r"(gate|up|down)_proj", lambda part: MIXTRAL[part[0]], name).replace(".mlp.", ".block_sparse_moe.")


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with one tensor for all experts, gate and up in one."""
    at = "model.layers.0.mlp.experts."
    parts = {
        part: torch.stack([tensors[f"{at}{expert}.{part}_proj.weight"] for expert in range(3)])
        for part in ("gate", "up", "down")
    }
    stacked = {f"{at}gate_up_proj": torch.cat([parts["gate"], parts["up"]], dim=1), f"{at}down_proj": parts["down"]}
    return {**{name: tensor for name, tensor in tensors.items() if ".experts." not in name}, **stacked}


Layout = Callable[[dict[str, Tensor]], dict[str, Tensor]]
LAYOUTS: dict[str, tuple[dict[str, tuple[int, ...]], Layout, Layout]] = {
    "DPO fused": (SHAPES, dict, fuse),
    "SFT fused": (SHAPES, fuse, dict),
    "Baichuan's": (SHAPES, dict, lambda tensors: fuse(tensors, qkv="W_pack")),
    "both fused": (SHAPES, fuse, fuse),
    "fused under another prefix": (SHAPES, dict, lambda tensors: renamed(fuse(tensors), vision_language)),
    "stacked experts": (EXPERTS, dict, stack),
    "split experts": (EXPERTS, stack, dict),
    "Mixtral's experts, stacked": (EXPERTS, lambda tensors: renamed(tensors, mixtral), stack),
    "Mixtral's experts, split": (EXPERTS, stack, lambda tensors: renamed(tensors, mixtral)),
    "Mixtral's names": (EXPERTS, dict, lambda tensors: renamed(tensors, mixtral)),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_fused_and_split_weights(tmp_path: Path, case: str) -> None:
    shapes, of_sft, of_dpo = LAYOUTS[case]
    sft, dpo = random_pair(shapes)
    pair = plan(tmp_path, of_sft(sft), of_dpo(dpo))
    made = tensors_of(pair, stream(pair)[0])
    assert made.keys() == of_dpo(dpo).keys()
    for name, ours in of_dpo(sft).items():
        share_off(ours, of_dpo(dpo)[name], 0.5, made[name])
    assert (pair.dropped, pair.missing) == ((), ())


def test_a_fused_pair_loads_as_the_split_one(
    tmp_path: Path, expo: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    sft, dpo = random_pair(SHAPES)
    sides = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", fuse(dpo))
    done = expo(sides, "--alpha", 0.5, "--output", tmp_path / "out")
    assert done.code == 0
    assert "6 tensors have other names in sft, or are fused on one side only" in caplog.text
    found = run_expo("inspect", "--sft", sides[0], "--dpo", sides[1]).stdout
    assert "6 tensors have other names in SFT, or are fused on one side only" in found
    split = write_checkpoint(tmp_path / "split", dpo)
    expo((sides[0], split), "--alpha", 0.5, "--output", tmp_path / "whole")
    made, whole = (read_checkpoint_tensors(tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(made[name], tensor) for name, tensor in fuse(whole).items())


# --- no partner ---------------------------------------------------------------------------------------------------


def cut_one(name: str, new: str) -> Layout:
    return lambda tensors: {new if one == name else one: tensor for one, tensor in tensors.items()}


UP = "model.layers.0.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Layout, Layout, str]] = {
    "one tensor renamed": (dict, cut_one(UP, UP.replace("up_proj", "w3")), rf"1 of SFT \(such as {UP}\) and 1 of DPO"),
    "half of a fused tensor": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "0.mlp.up_proj" not in name},
        fuse,
        r"1 of SFT \(such as model.layers.0.mlp.gate_proj.weight\) and 1 of DPO \(such as .*0.mlp.gate_up_proj",
    ),
    "an unknown fused layout": (dict, lambda tensors: fuse(tensors, qkv="query_key_value"), r"12 of SFT .* 4 of DPO"),
    "another model": (dict, lambda tensors: renamed(tensors, within("layers", "h")), "of SFT .* of DPO"),
    "a wrapped and a plain copy": (
        dict,
        lambda tensors: {**tensors, f"_orig_mod.{UP}": tensors[UP].clone()},
        "dpo has a tensor both with and without a wrapper's prefix, such as _orig_mod",
    ),
    "an adapter beside the weights": (
        dict,
        lambda tensors: {
            name.replace("up_proj", "up_proj.base_layer"): tensor for name, tensor in tensors.items()
        },
        "dpo contains an unmerged adapter .*base_layer.*merge_and_unload",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_partner_is_named_without_a_hint_that_copies_it(tmp_path: Path, case: str) -> None:
    of_sft, of_dpo, message = REFUSED[case]
    sft, dpo = random_pair(SHAPES)
    with pytest.raises(InputError, match=message) as caught:
        plan(tmp_path, of_sft(sft), of_dpo(dpo))
    assert "copy-dpo" not in str(caught.value)


def test_an_adapter_that_is_part_of_both_models_is_extrapolated(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.base_layer.weight": (4, 4), "model.layers.0.mlp.lora_A.speech.weight": (2, 4)}
    assert plan(tmp_path, *random_pair(shapes)).count("extrapolate") == 2


def test_a_transposed_layout_is_not_taken_for_another(tmp_path: Path) -> None:
    sft, dpo = random_pair(EXPERTS)
    with pytest.raises(InputError, match="under names that the other side does not have"):
        plan(tmp_path, sft, stack(dpo), files={"config.json": json.dumps({"model_type": "llama4"})})


def test_two_modules_with_one_core_are_not_guessed(tmp_path: Path) -> None:
    sft, dpo = random_pair({"model.norm.weight": (4,), "language_model.norm.weight": (4,), "a.weight": (3,)})
    with pytest.raises(InputError, match=r"2 of SFT .* 1 of DPO"):
        plan(tmp_path, sft, {"transformer.norm.weight": dpo["model.norm.weight"], "a.weight": dpo["a.weight"]})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "text.layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "text.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "text.layers.0.mlp.up_proj.weight"),
        ("model.vision_tower.layers.0.mlp.up_proj.weight", "vision_tower.layers.0.mlp.up_proj.weight"),
        ("vision_tower.layers.0.mlp.up_proj.weight", "vision_tower.layers.0.mlp.up_proj.weight"),
        ("visual.blocks.0.norm.weight", "visual.blocks.0.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.1.block_sparse_moe.experts.3.w2.weight", "text.layers.1.mlp.experts.3.down_proj.weight"),
        ("model.layers.1.feed_forward.w2.weight", "text.layers.1.feed_forward.w2.weight"),
    ],
)
def test_the_core_of_a_name(name: str, expected: str) -> None:
    assert core(name) == expected


# --- what is copied is said ---------------------------------------------------------------------------------------


def test_copies_are_counted(tmp_path: Path, expo: Callable[..., Result], caplog: pytest.LogCaptureFixture) -> None:
    sft, dpo = random_pair({"a.weight": (3, 4), "b.weight": (4, 4)})
    del sft["b.weight"]
    sides = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo)
    command = (sides, "--alpha", 0.5, "--output", tmp_path / "out")
    refused = expo(*command)
    assert refused.code == 2
    assert "pass --missing copy-dpo to copy them from DPO" in refused.stderr
    done = expo(*command, "--missing", "copy-dpo")
    assert done.code == 0
    assert "1 of 2 tensors (57 % of the weights) are copied from DPO" in caplog.text


def test_copied_weights_are_said_of_names_without_partners_too(
    tmp_path: Path, expo: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    sft, dpo = random_pair({"a.weight": (3, 4), "b.weight": (4, 4)})
    sft["other.weight"] = sft.pop("b.weight")
    sides = write_checkpoint(tmp_path / "sft", sft), write_checkpoint(tmp_path / "dpo", dpo)
    command = (sides, "--alpha", 0.5, "--output", tmp_path / "out")
    done = expo(*command, "--missing", "copy-dpo")
    assert done.code == 0
    assert "1 of 2 tensors (57 % of the weights) are copied from DPO" in caplog.text
    assert "1 tensors are only in sft and dropped (other.weight" in caplog.text


@pytest.mark.parametrize("options", [("--missing", "copy-dpo"), ("--exclude", ".")])
def test_an_output_in_which_nothing_is_extrapolated_is_refused(
    tmp_path: Path, expo: Callable[..., Result], options: tuple[str, ...]
) -> None:
    sft, dpo = random_pair({"a.weight": (3, 4)})
    ours = {"b.weight": sft["a.weight"]} if "--missing" in options else sft
    sides = write_checkpoint(tmp_path / "sft", ours), write_checkpoint(tmp_path / "dpo", dpo)
    command = (sides, "--alpha", 0.5, "--output", tmp_path / "out")
    done = expo(*command, *options)
    assert done.code == 2
    assert "no tensor would be extrapolated: every θ(α) would be a copy of dpo" in done.stderr
    assert not (tmp_path / "out").exists()


# --- equal values, constants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, 7, 600_000])
@pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.0, 0.3, 0.5, 2.0])
def test_equal_infinities_stay(tmp_path: Path, dtype: torch.dtype, elements: int, alpha: float) -> None:
    sft, dpo = (torch.full((elements,), value, dtype=dtype) for value in (1.0, 1.5))
    for side in (sft, dpo):
        side[0], side[-1] = float("inf"), float("-inf")
    pair = plan(tmp_path, {"mask": sft}, {"mask": dpo}, alphas=(alpha,))
    made = tensors_of(pair, stream(pair)[0])["mask"]
    assert made[-1] == float("-inf")
    assert torch.equal(made[1:-1], torch.full_like(made[1:-1], 1.5 + alpha * 0.5))


@pytest.mark.parametrize(
    ("sft", "dpo"),
    [(float("inf"), 1.0), (1.0, float("inf")), (float("inf"), float("-inf")), (float("nan"), float("nan"))],
)
def test_other_values_that_are_not_finite_are_refused(tmp_path: Path, sft: float, dpo: float) -> None:
    pair = plan(tmp_path, {"w": torch.tensor([1.0, sft])}, {"w": torch.tensor([2.0, dpo])})
    with pytest.raises(InputError, match="tensor w contains NaN or infinity"):
        stream(pair)


def test_an_overflow_beside_equal_infinities_is_refused(tmp_path: Path) -> None:
    sides = [{"w": torch.tensor([float("inf"), value])} for value in (1.0, 60000.0)]
    pair = plan(tmp_path, *sides, dtype="float16")
    with pytest.raises(InputError, match="too large for F16"):
        stream(pair)
    pair = plan(tmp_path / "equal", *[{"w": torch.tensor([1.0, 1e30])}] * 2, dtype="float16")
    with pytest.raises(InputError, match="too large for F16"):
        stream(pair)


def test_equal_infinities_leave_the_norms_finite(tmp_path: Path) -> None:
    sides = [
        write_checkpoint(tmp_path / name, {"mask": torch.tensor([float("-inf"), 3.0, value])})
        for name, value in (("sft", 4.0), ("dpo", 4.5))
    ]
    done = run_expo("inspect", "--sft", sides[0], "--dpo", sides[1], "--json")
    total = json.loads(done.stdout)["total"]
    assert (total["delta_norm"], total["sft_norm"]) == (0.5, 5.0)


@pytest.mark.parametrize("name", ["inv_freq", "original_inv_freq", "cos_cached", "sin_cached"])
@pytest.mark.parametrize("side", ["both", "sft", "dpo"])
def test_tables_of_rotary_embeddings_are_dpos(tmp_path: Path, name: str, side: str) -> None:
    table = torch.tensor([1.0, 0.3333, 0.1])
    sft, dpo = random_pair({"w": (4,)})
    at = f"model.layers.0.self_attn.rotary_emb.{name}"
    if side != "dpo":
        sft[at] = table.bfloat16()
    if side != "sft":
        dpo[at] = table
    pair = plan(tmp_path, sft, dpo)
    made = tensors_of(pair, stream(pair)[0])
    assert made.keys() == dpo.keys()
    assert side == "sft" or torch.equal(made[at], table)
    assert (pair.dropped, pair.missing) == ((), ())


# --- heads and vocabularies ---------------------------------------------------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(value: object) -> dict[str, str]:
    return {"config.json": json.dumps({} if value is None else {"tie_word_embeddings": value})}


@pytest.mark.parametrize("of_dpo", [False, None])
@pytest.mark.parametrize("of_sft", [True, None])
@pytest.mark.parametrize("rename", [same, vision_language])
def test_a_head_of_its_own_is_combined_with_the_embedding_that_was_its_head(
    tmp_path: Path, of_sft: object, of_dpo: object, rename: Rename
) -> None:
    sft, dpo = random_pair({EMBEDDING: (60, 8), HEAD: (60, 8)})
    del sft[HEAD]
    pair = plan(tmp_path, sft, renamed(dpo, rename), files=[tied(of_sft), tied(of_dpo)])
    made = tensors_of(pair, stream(pair)[0])
    share_off(sft[EMBEDDING], dpo[HEAD], 0.5, made[HEAD])
    share_off(sft[EMBEDDING], dpo[EMBEDDING], 0.5, made[rename(EMBEDDING)])
    assert (pair.untied, pair.equal) == ((HEAD,), ())


@pytest.mark.parametrize(
    "files",
    [
        [{"vocab_size": 60}, {"vocab_size": 60}],
        [{"vocab_size": 60}, {"vocab_size": 66}],
        [{}, {}],
        [{"a": {"text_config": {"vocab_size": 60}}}, {"a": {"text_config": {"vocab_size": 72}}}],
        [{"vocab_size": 1, "text_config": {"vocab_size": 60}}, {"vocab_size": 1, "text_config": {"vocab_size": 72}}],
    ],
)
def test_the_rows_decide_about_the_vocabulary_not_the_config(tmp_path: Path, files: list[dict[str, object]]) -> None:
    sft, _ = random_pair({EMBEDDING: (60, 8), HEAD: (60, 8), "lm_head.bias": (60,), "w": (4,)})
    _, dpo = random_pair({EMBEDDING: (72, 8), HEAD: (72, 8), "lm_head.bias": (72,), "w": (4,)})
    configs = [{"config.json": json.dumps(content)} for content in files]
    with pytest.raises(InputError, match=r"the vocabularies differ in size: pass --vocab common"):
        plan(tmp_path / "no", sft, dpo, files=configs)
    pair = plan(tmp_path / "yes", sft, dpo, files=configs, common_vocabulary=True)
    made = tensors_of(pair, stream(pair)[0])
    for name in (EMBEDDING, HEAD, "lm_head.bias"):
        share_off(sft[name], dpo[name][:60], 0.5, made[name][:60])
        assert torch.equal(made[name][60:], dpo[name][60:])
    assert pair.vocabulary is not None
    assert (pair.vocabulary.sft, pair.vocabulary.dpo) == (60, 72)
