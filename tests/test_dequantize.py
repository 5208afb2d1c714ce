"""FP8 and MXFP4 checkpoints: what transformers dequantizes them to, bit for bit, on either side, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import CASES, Maker
from helpers import (
    Pair,
    as_bytes,
    random_pair,
    read_checkpoint_tensors,
    share_off,
    stopped_in_shard,
    tree,
    without_clock,
    write,
    write_checkpoint,
)
from quantized import Block, Tensors, fp8, in_fp8, in_mxfp4, right_fp8, write_fp8
from sizes import in_full
from torch import Tensor

from expo.checkpoint.folder import read_checkpoint
from expo.checkpoint.quantized import dequantized
from expo.config import ExtrapolateConfig, GenerateConfig, InspectConfig, ThetaConfig
from expo.errors import InputError
from expo.theta import stream, unpacked
from expo.theta.decide import plan_pair
from expo.theta.dequantize import Grid, Scratch, dequantize_fp8, dequantize_mxfp4, fp8_scales, rectangles
from expo.theta.moves import moved_kinds
from expo.theta.pair import plan_theta
from expo.theta.plan import PairSettings
from expo.theta.tensors import Theta
from expo.verbs import extrapolate, inspect
from expo.verbs.generate.model import find_source

BLOCK = (128, 128)
STORED = "FP8 in blocks of 128×128"


def same(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and as_bytes(found[name]) == as_bytes(wanted[name])
        for name in wanted
    )


# --- the arithmetic -----------------------------------------------------------------------------------------------


def dequantizer() -> Any:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_every_byte_of_fp8_is_what_transformers_makes_of_it(scale_type: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    scales = torch.logspace(-30, 30, 64).view(64, 1)
    if scale_type == torch.uint8:
        scales = torch.arange(96, 160, dtype=torch.uint8).view(64, 1)
    scales = scales.to(scale_type)
    wanted = dequantizer()._dequantize_one(stored.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    out = torch.empty(stored.numel(), dtype=torch.bfloat16)
    grid = Grid(64, 256, (1, 256))
    dequantize_fp8(stored.view(-1), 0, grid, fp8_scales(scales), out, Scratch(len(out)))
    numbers = ~wanted.isnan()
    assert numbers.logical_not().sum() == 2 * 64
    assert torch.equal(out.view(64, 256).isnan(), wanted.isnan())
    assert as_bytes(out.view(64, 256)[numbers]) == as_bytes(wanted[numbers])


@pytest.mark.parametrize("shape", [(200, 136), (128, 128), (7, 300), (3, 256, 130)])
def test_any_part_of_a_tensor_is_the_same_part_of_the_whole(shape: tuple[int, ...]) -> None:
    """Ragged blocks: those of transformers for a matrix that is filled up with zeros to whole blocks."""
    outer, (rows, columns) = shape[:-2], shape[-2:]
    down, across = -(-rows // 128), -(-columns // 128)
    filled = torch.zeros(*outer, 128 * down, 128 * across)
    filled[..., :rows, :columns] = torch.randn(shape)
    scales = torch.rand(*outer, down, across) + 0.01
    stored = filled.to(torch.float8_e4m3fn)
    wanted = dequantizer()._dequantize_one(stored, scales, torch.bfloat16)[..., :rows, :columns].reshape(-1)
    flat, own = stored[..., :rows, :columns].reshape(-1).view(torch.uint8), fp8_scales(scales).view(-1, across)
    generator = np.random.default_rng(0)
    for _ in range(40):
        first, end = sorted(generator.integers(0, len(flat) + 1, 2).tolist())
        out = torch.empty(end - first, dtype=torch.bfloat16)
        if end > first:
            dequantize_fp8(flat[first:end], first, Grid(rows, columns, BLOCK), own, out, Scratch(len(out)))
        assert as_bytes(out) == as_bytes(wanted[first:end])


def test_rectangles_cover_every_element_once_in_order() -> None:
    for columns in (1, 5):
        for first in range(12):
            for count in range(12):
                covered = [
                    row * columns + column
                    for top, bottom, left, right in rectangles(first, count, columns)
                    for row in range(top, bottom)
                    for column in range(left, right)
                ]
                assert covered == [*range(first, first + count)]


def test_every_byte_of_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    wanted = convert_moe_packed_tensors(blocks, scales)[0]
    found = dequantize_mxfp4(blocks[0], scales[0])
    assert as_bytes(found[:, :255]) == as_bytes(wanted[:, :255])
    assert found[:, 255].isnan().all()
    some = dequantize_mxfp4(blocks[0, :255, 3:5], scales[0, :255, 3:5])
    assert as_bytes(some) == as_bytes(wanted[96:160, :255])


# --- whole models, as transformers dequantizes them ---------------------------------------------------------------

LLAMA = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "vocab_size": 64}
GPT_OSS = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def random_model(kind: str) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors of a tiny model, as it is saved."""
    from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "mxfp4":
        model: Any = GptOssForCausalLM(
            GptOssConfig(**GPT_OSS, **HEADS, vocab_size=64, intermediate_size=96, head_dim=16)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **HEADS))
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    return config, {name: values.bfloat16() for name, values in model.state_dict().items()}


def quantized_model(folder: Path, kind: str) -> tuple[Path, Tensors]:
    """A quantized checkpoint, and what transformers dequantizes it to."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    config, tensors = random_model(kind)
    said: Any = Mxfp4Config(dequantize=True)
    if kind == "mxfp4":
        tensors, own = in_mxfp4(tensors), {**config, "quantization_config": {"quant_method": "mxfp4"}}
        write_checkpoint(folder, tensors, shards=2, files={"config.json": json.dumps(own)})
    else:
        block = BLOCK if kind == "fp8" else None
        activations = {"model.layers.0.mlp.up_proj.activation_scale": torch.tensor(0.5)}
        write_fp8(folder, in_fp8(tensors, block) | activations, block, shards=2, **config)
        said = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype=torch.bfloat16)
    return folder, {name: values.clone() for name, values in model.state_dict().items()}


def near(tensors: Tensors, seed: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t * (1 + 0.03 * torch.randn(t.shape, generator=generator))).bfloat16() for name, t in tensors.items()
    }


@pytest.mark.parametrize("kind", ["fp8", "fp8 per tensor", "mxfp4"])
def test_what_transformers_dequantizes_is_what_is_extrapolated(tmp_path: Path, kind: str) -> None:
    folder, dequantized_by_them = quantized_model(tmp_path / "quantized", kind)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    other = near(dequantized_by_them)
    plain = write_checkpoint(tmp_path / "plain", other, files={"config.json": json.dumps(config)})

    write((plain, folder), tmp_path / "of-dpo-{alpha}", 0.0, 0.5)
    assert same(read_checkpoint_tensors(tmp_path / "of-dpo-0.0"), dequantized_by_them)
    for name, values in read_checkpoint_tensors(tmp_path / "of-dpo-0.5").items():
        share_off(other[name], dequantized_by_them[name], 0.5, values)
    said = json.loads((tmp_path / "of-dpo-0.5" / "config.json").read_text())
    assert "quantization_config" not in said
    assert said.get("dtype", said.get("torch_dtype")) == "bfloat16"

    write((folder, plain), tmp_path / "of-sft", 0.5)
    for name, values in read_checkpoint_tensors(tmp_path / "of-sft").items():
        share_off(dequantized_by_them[name], other[name], 0.5, values)


# --- layouts ------------------------------------------------------------------------------------------------------

SHAPES = {"model.a_proj.weight": (200, 136), "model.b_proj.weight": (64, 300), "model.norm.weight": (136,)}


def fp8_side(folder: Path, tensors: Tensors, block: Block = BLOCK, shards: int = 1) -> tuple[Path, Tensors]:
    """A checkpoint in FP8 and the bfloat16 values that it stands for."""
    stored = in_fp8(tensors, block)
    right = {
        name: right_fp8(values, stored[f"{name}_scale_inv"], block) if f"{name}_scale_inv" in stored else values
        for name, values in stored.items()
        if not name.endswith("_scale_inv")
    }
    return write_fp8(folder, stored, block, shards), right


@pytest.mark.parametrize("shards", [(1, 1), (4, 3)])
def test_both_sides_may_be_quantized_and_scales_lie_in_other_files(tmp_path: Path, shards: tuple[int, int]) -> None:
    sft, dpo = random_pair(SHAPES)
    ours, s = fp8_side(tmp_path / "sft", sft, shards=shards[0])
    theirs, d = fp8_side(tmp_path / "dpo", dpo, (100, 32), shards=shards[1])
    write((ours, theirs), tmp_path / "out-{alpha}", 0.0, 1.5)
    assert same(read_checkpoint_tensors(tmp_path / "out-0.0"), d)
    for name, values in read_checkpoint_tensors(tmp_path / "out-1.5").items():
        share_off(s[name], d[name], 1.5, values)
    files = {file.name for file in theirs.glob("*.safetensors")}
    assert {file.name for file in (tmp_path / "out-0.0").glob("*.safetensors")} <= files


def test_a_fused_weight_is_cut_where_no_block_ends(tmp_path: Path) -> None:
    """q, k and v of 200, 72 and 72 rows, each in blocks of its own, against rows of one matrix in other blocks."""
    rows = {"q_proj": 200, "k_proj": 72, "v_proj": 72}
    sft, dpo = random_pair({f"model.layers.0.self_attn.{name}.weight": (size, 136) for name, size in rows.items()})
    whole = {"model.layers.0.self_attn.qkv_proj.weight": torch.cat(list(dpo.values()))}
    ours, s = fp8_side(tmp_path / "sft", sft)
    theirs, d = fp8_side(tmp_path / "dpo", whole)
    write((ours, theirs), tmp_path / "fused", 0.5)
    (fused,) = read_checkpoint_tensors(tmp_path / "fused").values()
    share_off(torch.cat(list(s.values())), next(iter(d.values())), 0.5, fused)
    write((theirs, ours), tmp_path / "split", 0.5)
    split = read_checkpoint_tensors(tmp_path / "split")
    share_off(next(iter(d.values())), torch.cat(list(s.values())), 0.5, torch.cat([split[name] for name in s]))


def test_small_pieces_and_chunks_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, rows and blocks are cut anywhere, by several threads that share what is kept."""
    sft, dpo = random_pair({"experts.gate_up_proj": (3, 96, 40), "model.a_proj.weight": (200, 136)})
    said, stored = {"quantization_config": {"quant_method": "mxfp4"}}, in_mxfp4(dpo)
    plain = write_checkpoint(tmp_path / "sft", sft)
    sides = [
        write_checkpoint(tmp_path / "mxfp4", stored, files={"config.json": json.dumps(said)}),
        fp8_side(tmp_path / "fp8", {name: values for name, values in dpo.items() if name.startswith("model")})[0],
    ]
    for side in sides:
        write((plain, side), tmp_path / f"{side.name}-whole", 0.5, missing="copy-dpo", workers=1)
    monkeypatch.setattr(unpacked, "CHUNK", 1000)
    monkeypatch.setattr(stream, "CPU_PIECE_BYTES", 4096)
    for side in sides:
        write((plain, side), tmp_path / f"{side.name}-cut", 0.5, missing="copy-dpo", workers=3)
        whole, cut = (read_checkpoint_tensors(tmp_path / f"{side.name}-{way}") for way in ("whole", "cut"))
        assert same(cut, whole)


@pytest.mark.parametrize("name", ["model.a_proj.weight_scale_inv", "model.a_proj.scale"])
@pytest.mark.parametrize("kind", ["e8m0", "a byte", "bfloat16", "one in all"])
def test_scales_of_every_type_and_name(tmp_path: Path, kind: str, name: str) -> None:
    sft, dpo = random_pair({"model.a_proj.weight": (256, 384)})
    exponents = torch.arange(116, 122, dtype=torch.uint8).view(2, 3)
    scales = {
        "e8m0": exponents.view(torch.float8_e8m0fnu),
        "a byte": exponents,
        "bfloat16": torch.rand(2, 3).bfloat16(),
        "one in all": torch.tensor(0.01),
    }[kind]
    stored = fp8(dpo["model.a_proj.weight"].float(), BLOCK)[0]
    folder = write_fp8(tmp_path / "dpo", {"model.a_proj.weight": stored, name: scales}, BLOCK)
    write((write_checkpoint(tmp_path / "sft", sft), folder), tmp_path / "out", 0.0)
    wanted = dequantizer()._dequantize_one(stored, scales, torch.bfloat16)
    assert same(read_checkpoint_tensors(tmp_path / "out"), {"model.a_proj.weight": wanted})


def test_stacked_experts_have_blocks_of_their_own(tmp_path: Path) -> None:
    sft, dpo = random_pair({"experts.down_proj": (3, 200, 136)})
    parts = [fp8(expert.float(), BLOCK) for expert in dpo["experts.down_proj"]]
    stored = {
        "experts.down_proj": torch.stack([values.view(torch.uint8) for values, _ in parts]).view(torch.float8_e4m3fn),
        "experts.down_proj_scale_inv": torch.stack([scales for _, scales in parts]),
    }
    wanted = torch.stack([right_fp8(values, scales, BLOCK) for values, scales in parts])
    folder = write_fp8(tmp_path / "dpo", stored, BLOCK)
    write((write_checkpoint(tmp_path / "sft", sft), folder), tmp_path / "out", 0.0)
    assert same(read_checkpoint_tensors(tmp_path / "out"), {"experts.down_proj": wanted})


@pytest.mark.parametrize("dtype", ["float32", in_full("float16")])
def test_other_types_shard_sizes_and_exclusions_go_on_from_the_dequantized_values(tmp_path: Path, dtype: str) -> None:
    sft, dpo = random_pair(SHAPES)
    folder, d = fp8_side(tmp_path / "dpo", dpo)
    pair = (write_checkpoint(tmp_path / "sft", sft), folder)
    write(pair, tmp_path / "out", 0.5, dtype=dtype, max_shard_size="60KB", exclude=("a_proj",))
    found = read_checkpoint_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (3 if dtype == "float32" else 2)
    assert {values.dtype for values in found.values()} == {getattr(torch, dtype)}
    assert torch.equal(found["model.a_proj.weight"], d["model.a_proj.weight"].to(found["model.a_proj.weight"].dtype))
    share_off(sft["model.b_proj.weight"], d["model.b_proj.weight"], 0.5, found["model.b_proj.weight"])
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said == {"torch_dtype": dtype}


# --- what is said -------------------------------------------------------------------------------------------------


def test_plan_log_manifest_and_norms_speak_of_the_dequantized_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sft, dpo = random_pair(SHAPES)
    folder, d = fp8_side(tmp_path / "dpo", dpo)
    plain = write_checkpoint(tmp_path / "sft", sft)
    write((plain, folder), tmp_path / "out", 0.5)
    said = "DPO is quantized (FP8 in blocks of 128×128) and dequantized to bfloat16: its rounding errors are part of Δ"
    assert caplog.text.count(said) == 1
    assert json.loads((tmp_path / "out" / "expo.json").read_text())["dequantized"] == {"dpo": STORED}
    settings = ExtrapolateConfig(sft=str(folder), dpo=str(plain), alpha=(0.5,), output=str(tmp_path / "dry"))
    assert extrapolate.plan(settings).describe()["dequantized"] == {"sft": STORED}
    caplog.clear()
    found = inspect.run(InspectConfig(sft=str(plain), dpo=str(folder)))
    assert caplog.text.count(said) == 1
    delta = sum(float((d[name].double() - sft[name].double()).square().sum()) for name in SHAPES)
    assert found.total.delta_squared == pytest.approx(delta, rel=1e-6)


# --- faults -------------------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda stored: {name: values for name, values in stored.items() if name not in names}


def changed(**values: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Tensors replaced by what becomes of them; `a` and `a_scale` are those of a_proj."""
    names = {"a": "model.a_proj.weight", "a_scale": "model.a_proj.weight_scale_inv"}
    return lambda stored: stored | {names[key]: change(stored[names[key]]) for key, change in values.items()}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scale": (
        without("model.a_proj.weight_scale_inv"),
        "FP8 tensors without weight_scale_inv: model.a_proj.weight;",
    ),
    "no weight": (without("model.a_proj.weight"), "scales without an FP8 tensor: model.a_proj.weight_scale_inv;"),
    "a scale of a bfloat16 weight": (
        changed(a=lambda values: values.bfloat16()),
        "scales without an FP8 tensor: model.a_proj.weight_scale_inv;",
    ),
    "scales in another shape": (
        changed(a_scale=lambda values: values[:1].contiguous()),
        r"scales that do not fit their tensors: model.a_proj.weight_scale_inv \[1, 2\] for \[200, 136\];",
    ),
    "scales that are integers": (
        changed(a_scale=lambda values: values.to(torch.int32)),
        "types that are not known there: model.a_proj.weight_scale_inv I32;",
    ),
    "another FP8": (
        changed(a=lambda values: values.to(torch.float8_e5m2)),
        "types that are not known there: model.a_proj.weight F8_E5M2;",
    ),
    "two faults": (
        without("model.a_proj.weight_scale_inv", "model.b_proj.weight"),
        "without weight_scale_inv: model.a_proj.weight; scales without an FP8 tensor: model.b_proj.weight_scale_inv;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_headers_that_do_not_fit_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    folder = write_fp8(tmp_path / "dpo", change(in_fp8(random_pair(SHAPES)[1], BLOCK)), BLOCK)
    with pytest.raises(InputError, match=rf"^dpo cannot be dequantized \(FP8 in blocks of 128×128\): .*{message} give"):
        dequantized(read_checkpoint(folder))


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_mxfp4_without_its_other_half_is_refused(tmp_path: Path, part: str) -> None:
    stored = in_mxfp4({"experts.down_proj": torch.zeros(2, 32, 8)})
    files = {"config.json": '{"quantization_config": {"quant_method": "mxfp4"}}'}
    short = {name: values[:1].contiguous() if name.endswith(part) else values for name, values in stored.items()}
    with pytest.raises(InputError, match=r"do not fit each other: experts.down_proj_blocks U8 \[\d, 8, 1, 16\] and"):
        dequantized(read_checkpoint(write_checkpoint(tmp_path / "short", short, files=files)))
    del stored[f"experts.down_proj_{part}"]
    with pytest.raises(InputError, match=r"blocks without scales, or scales without blocks: experts\.down_proj_"):
        dequantized(read_checkpoint(write_checkpoint(tmp_path / "lacking", stored, files=files)))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_nan_is_refused_and_a_cut_file_too(tmp_path: Path, alpha: float) -> None:
    sft, dpo = random_pair(SHAPES)
    stored = in_fp8(dpo, BLOCK)
    stored["model.b_proj.weight"].view(torch.uint8)[5, 5] = 0xFF
    pair = write_checkpoint(tmp_path / "sft", sft), write_fp8(tmp_path / "dpo", stored, BLOCK)
    with pytest.raises(InputError, match=r"the result for tensor model.b_proj.weight contains NaN or infinity"):
        write(pair, tmp_path / "out", alpha)
    file = tmp_path / "dpo" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="is truncated"):
        write(pair, tmp_path / "out", alpha)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_what_is_not_dequantized_is_refused_as_before(tmp_path: Path, method: str) -> None:
    """Also FP8 by the config alone, where no tensor is."""
    files = {"config.json": json.dumps({"quantization_config": {"quant_method": method}})}
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "dpo", random_pair(SHAPES)[1], files=files))
    with pytest.raises(InputError) as caught:
        dequantized(checkpoint)
    assert str(caught.value) == (
        f"dpo is quantized ({method}); extrapolate the unquantized checkpoints and quantize the result (for "
        "dequantized weights, remove the quantization from config.json)"
    )


# --- whatever else goes through the stream ------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_parts_make_the_same_bytes(tmp_path: Path) -> None:
    sft, dpo = random_pair(SHAPES)
    pair = write_checkpoint(tmp_path / "sft", sft), fp8_side(tmp_path / "dpo", dpo, shards=3)[0]
    write(pair, tmp_path / "whole", 0.5)
    with stopped_in_shard(2):
        write(pair, tmp_path / "again", 0.5)
    write(pair, tmp_path / "again", 0.5)
    for part in ("0/2", "1/2"):
        write(pair, tmp_path / "joined", 0.5, part=part)
    write(pair, tmp_path / "joined", 0.5, join=2)
    whole = without_clock(tree(tmp_path / "whole"))
    assert whole == without_clock(tree(tmp_path / "again")) == without_clock(tree(tmp_path / "joined"))


def twins(folder: Path, name: str, tensors: Tensors, config: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """A checkpoint in small FP8 blocks, and one of the bfloat16 values that it stands for."""
    stored, block = in_fp8(tensors, (16, 24)), (16, 24)
    right = {
        one: right_fp8(stored[one], stored[f"{one}_scale_inv"], block) if f"{one}_scale_inv" in stored else stored[one]
        for one in tensors
    }
    plain = write_checkpoint(folder / "plain" / name, right, files={"config.json": json.dumps(config or {})})
    return write_fp8(folder / "quantized" / name, stored, block, **(config or {})), plain


def test_an_adapter_is_added_to_a_dequantized_base(tmp_path: Path, made: Maker) -> None:
    base, adapter = made(CASES["plain"], torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    found = [tmp_path / "of-quantized", tmp_path / "of-plain"]
    for side, output in zip(twins(tmp_path, "base", read_checkpoint_tensors(base), config), found, strict=True):
        write((side, adapter), output, 0.5)
        write((side, adapter), Path(f"{output}-adapter"), 0.5, as_adapter=True)
    assert same(*map(read_checkpoint_tensors, found))
    assert same(*(read_checkpoint_tensors(Path(f"{output}-adapter")) for output in found))
    assert "quantization_config" not in json.loads((found[0] / "config.json").read_text())


def test_a_training_run_and_an_adapter_of_a_rank_know_no_difference(tmp_path: Path) -> None:
    steps = {number: random_pair(SHAPES, seed=number)[1] for number in range(3)}
    start, first, last = (twins(tmp_path, f"step{number}", tensors) for number, tensors in steps.items())
    for own, theta_0, theta_1, theta_2 in zip(("quantized", "plain"), start, first, last, strict=True):
        course = (f"1={theta_1}", f"2={theta_2}")
        config = {
            "sft": str(theta_0),
            "checkpoint": course,
            "target_step": (5.0,),
            "output": str(tmp_path / own / "out"),
        }
        extrapolate.run(ExtrapolateConfig(**config))
        write((theta_0, theta_2), tmp_path / own / "ranked", 0.5, as_adapter=True, rank=4)
    for output in ("out", "ranked"):
        assert same(*(read_checkpoint_tensors(tmp_path / own / output) for own in ("quantized", "plain")))


def test_engines_are_given_the_same_values_and_a_config_without_quantization(tmp_path: Path, llama_pair: Pair) -> None:
    sft, dpo = llama_pair
    config = json.loads((dpo / "config.json").read_text())
    quantized, plain = twins(tmp_path, "dpo", read_checkpoint_tensors(dpo), config)
    for file in dpo.glob("*token*"):
        shutil.copy(file, quantized / file.name)
    values = []
    for side in (quantized, plain):
        pair = plan_theta(ThetaConfig(sft=str(sft), dpo=str(side), alpha=0.5)).pair
        with Theta(pair) as theta:
            values.append(dict(theta))
        assert moved_kinds(pair)
    assert same(*values)
    source = find_source(GenerateConfig(task="alpaca", sft=str(sft), dpo=str(quantized), alpha=0.5))
    assert json.loads((source.folder / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    assert (source.folder / "tokenizer.json").is_file()


@pytest.mark.full
@pytest.mark.vllm
def test_vllm_is_told_to_make_no_layers_for_quantized_weights(tmp_path: Path) -> None:
    from expo.engines.vllm_loader import _require_plain_layers

    sft, dpo = random_pair(SHAPES)
    sides = write_checkpoint(tmp_path / "sft", sft), fp8_side(tmp_path / "dpo", dpo)[0]
    pair = plan_pair(*map(read_checkpoint, sides), PairSettings(alphas=(0.5,)))
    asked = SimpleNamespace(hf_config=SimpleNamespace(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(InputError, match=r"--hf-overrides '\{\"quantization_config\": null\}'"):
        _require_plain_layers(asked, pair)
    _require_plain_layers(SimpleNamespace(hf_config=SimpleNamespace(quantization_config=None)), pair)


def test_weights_that_stay_on_the_hub_are_not_dequantized(tmp_path: Path) -> None:
    folder, _ = fp8_side(tmp_path / "sft", random_pair(SHAPES)[0])
    remote = replace(read_checkpoint(folder), open_remote=lambda: pytest.fail("nothing is fetched"))
    with pytest.raises(InputError, match=r"sft is quantized \(fp8\) and cannot be .* leave out --stream-sft"):
        dequantized(remote)
