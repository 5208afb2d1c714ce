"""`expo extrapolate` with a LoRA adapter as DPO: against PEFT's merge in float64, and what only an adapter can do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from adapters import (
    CASES,
    TOUCHING_ONE,
    Maker,
    llama,
    tied_llama,
    values,
    write_adapter,
)
from helpers import (
    DTYPES,
    Result,
    as_bytes,
    environment,
    read_checkpoint_tensors,
    round_to,
    tree,
    without_clock,
    write_checkpoint,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from sizes import in_full
from torch import Tensor
from transformers import AutoModelForCausalLM

from expo.checkpoint import hub
from expo.checkpoint.folder import Location, read_checkpoint, read_shard
from expo.cli import program as cli
from expo.config import ExtrapolateConfig
from expo.errors import InputError
from expo.output.shard import StagedShard
from expo.theta import stream
from expo.theta.adapter.folders import output_side_files, require_base
from expo.theta.adapter.tensors import read_adapter
from expo.theta.sources import SourceFiles
from expo.verbs import extrapolate

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of every unusual choice, and these are

Pair = tuple[Path, Path]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is cut into many pieces, and an adapter's product into many tiles."""
    monkeypatch.setattr(stream, "CPU_PIECE_BYTES", 160)
    monkeypatch.setattr(stream, "CPU_TILE", 100)


def write(pair: Pair, output: Path, *alphas: float, **settings: object) -> tuple[extrapolate.Written, ...]:
    """Run the verb in this process."""
    defaults = {"alpha": alphas or (0.5,), "output": str(output), "fsync": False}
    return extrapolate.run(ExtrapolateConfig(sft=str(pair[0]), dpo=str(pair[1]), **{**defaults, **settings}))


# --- the law ------------------------------------------------------------------------------------------------------


def law(pair: Pair, right: dict[str, Tensor], alpha: float, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Every value is a rounding of a number that is within float32's error of s + (1 + α)(d − s).

    Args:
        pair: Base and adapter.
        right: θ_dpo in float64.
        alpha: α.
        folder: The checkpoint of θ(α).
        dtype: The type it should have; the base's where it is None.
    """
    base = read_checkpoint(pair[0])
    adapter, found = read_adapter(pair[1], base), read_checkpoint_tensors(folder)
    assert found.keys() == base.tensors.keys()
    for name, info in base.tensors.items():
        sft, out = values(info), found[name]
        assert (out.dtype, out.shape) == (dtype or sft.dtype, sft.shape)
        if dtype is None and (alpha == -1 or name not in {*adapter.low_rank, *adapter.saved}):
            assert as_bytes(out) == as_bytes(sft), name
            continue
        s, d = sft.double().numpy(), right[name].numpy()
        size = np.abs(s) + np.abs(d)
        if (factors := adapter.low_rank.get(name)) is not None:
            left, other = (values(side).double().abs().numpy() for side in (factors.left, factors.right))
            size = size + abs(factors.scale) * (left.T @ other.T if factors.transposed else left @ other)
        want, bound = s + (1 + alpha) * (d - s), 2.0**-21 * (1 + abs(alpha)) * size
        got = out.double().numpy()
        wrong = (got < round_to(want - bound, out.dtype)) | (got > round_to(want + bound, out.dtype))
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.size} are off, {got[wrong][0]} {want[wrong][0]}"


ALPHAS = (0.0, 0.3, -1.0, 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_merges_as_peft_merges_it(made: Maker, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also: at α = −1, and where the adapter changes nothing, every byte is the base's."""
    pair = made(CASES[case], dtype)
    right = made.merged(pair)
    for written in write(pair, tmp_path / "{alpha}", *ALPHAS):
        law(pair, right, written.alpha, written.path)


@pytest.mark.parametrize("case", ["plain", "saved modules", "embedding", "fan-in fan-out", "trained biases"])
def test_pieces_and_tiles_of_any_size(made: Maker, case: str, tmp_path: Path, small_pieces: None) -> None:
    pair = made(CASES[case], torch.float32)
    right = made.merged(pair)
    for written in write(pair, tmp_path / "{alpha}", *ALPHAS):
        law(pair, right, written.alpha, written.path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_module_stored_beside_its_factors_takes_the_bases_place(
    made: Maker, tmp_path: Path, target: str, dtype: torch.dtype, small_pieces: None
) -> None:
    """`save_embedding_layers` stores it; here it is not the base's, which it may be after more training."""
    sft, dpo = made((llama, {"target_modules": [target, "q_proj"]}), dtype)
    shutil.copytree(dpo, tmp_path / "lora")
    tensors = load_file(dpo / "adapter_model.safetensors")
    (stored,) = (tensor for name, tensor in load_file(sft / "model.safetensors").items() if target in name)
    parent = "model." if target == "embed_tokens" else ""
    tensors[f"base_model.model.{parent}{target}.base_layer.weight"] = stored + torch.randn_like(stored)
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    pair = sft, tmp_path / "lora"
    right = made.merged(pair)
    assert not torch.allclose(right[f"{parent}{target}.weight"], made.merged((sft, dpo))[f"{parent}{target}.weight"])
    for written in write(pair, tmp_path / "{alpha}", *ALPHAS):
        law(pair, right, written.alpha, written.path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_changes_every_floating_point_tensor(made: Maker, tmp_path: Path, dtype: str) -> None:
    pair = made(CASES["saved modules"], torch.float32)
    write(pair, tmp_path / "out", 0.3, dtype=dtype)
    law(pair, made.merged(pair), 0.3, tmp_path / "out", DTYPES[dtype])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["all linear", "saved modules", "embedding", "fan-in fan-out"])
def test_cuda_obeys_the_same_law(made: Maker, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = made(CASES[case], dtype)
    right = made.merged(pair)
    for written in write(pair, tmp_path / "{alpha}", *ALPHAS, device="cuda"):
        law(pair, right, written.alpha, written.path)


@pytest.mark.parametrize("case", ["all linear", "embedding", "fan-in fan-out"])
def test_a_factor_is_read_once_however_many_pieces_its_tensor_has(
    made: Maker, case: str, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = made(CASES[case], torch.float32)
    file = pair[1] / "adapter_model.safetensors"
    times, read = np.zeros(file.stat().st_size, dtype=int), SourceFiles.read

    def counting(sources: SourceFiles, source: Path, position: int, buffer: memoryview) -> None:
        if source == file:
            times[position : position + len(buffer)] += 1
        read(sources, source, position, buffer)

    monkeypatch.setattr(SourceFiles, "read", counting)
    write(pair, tmp_path / "out", 0.3, 8.0, workers=1)
    first = min(tensor.start for tensor in read_shard(file).tensors)
    assert set(times[first:]) == {1}


# --- models that load ---------------------------------------------------------------------------------------------


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 30)[None]).logits


def adapted(sft: Path, dpo: Path, alpha: float = 0.0) -> torch.nn.Module:
    """PEFT's model of the pair in float64, its ΔW stretched by 1 + α."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sft).double(), dpo).double()
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.scaling["default"] *= 1 + alpha
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("case", ["all linear", "embedding", "fan-in fan-out", "tied base"])
def test_the_model_loads_with_the_logits_of_pefts(made: Maker, tmp_path: Path, case: str, alpha: float) -> None:
    pair = made(CASES[case], torch.float32)
    write(pair, tmp_path / "out", alpha)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).double()
    expected = logits(adapted(*pair, alpha))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(pair[0]).double()), atol=1e-2)


@pytest.mark.parametrize("case", ["embedding", "head", "saved embedding", "both saved"])
def test_embedding_and_head_trained_as_one_are_merged_as_one(made: Maker, tmp_path: Path, case: str) -> None:
    pair = made((tied_llama, {**TOUCHING_ONE[case], "ensure_weight_tying": True}), torch.float32)
    write(pair, tmp_path / "out", 0.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).double()
    torch.testing.assert_close(logits(model), logits(adapted(*pair)), rtol=0, atol=1e-4)


# --- layouts and settings -----------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(tmp_path: Path) -> Pair:
    """Two merged tensors, a replaced one, an untouched one and a buffer, in two files."""
    torch.manual_seed(2)
    tensors = {
        "model.up.weight": torch.randn(40, 24),
        "model.down.weight": torch.randn(24, 40),
        "model.norm.weight": torch.randn(24),
        "model.untouched.weight": torch.randn(7, 3),
        "model.steps": torch.arange(5),
    }
    tensors = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    files = {"config.json": '{"model_type": "tiny", "torch_dtype": "bfloat16"}', "custom/model.py": "x = 1\n"}
    prefix = "base_model.model.model"
    stored = {
        f"{prefix}.up.lora_A.weight": torch.randn(3, 24),
        f"{prefix}.up.lora_B.weight": torch.randn(40, 3),
        f"{prefix}.down.lora_A.weight": torch.randn(2, 40).bfloat16(),
        f"{prefix}.down.lora_B.weight": torch.randn(24, 2).half(),
        f"{prefix}.norm.weight": torch.randn(24),
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"down": 2}}
    return (
        write_checkpoint(tmp_path / "sft", tensors, shards=2, files=files),
        write_adapter(tmp_path / "lora", stored, **config),
    )


def whole(pair: Pair) -> dict[str, Tensor]:
    """θ_dpo of `by_hand` in float64."""
    base = {name: tensor.double() for name, tensor in read_checkpoint_tensors(pair[0]).items()}
    lora = {name: tensor.double() for name, tensor in load_file(pair[1] / "adapter_model.safetensors").items()}
    lora = {name.removeprefix("base_model.model.model."): tensor for name, tensor in lora.items()}
    base["model.up.weight"] += 2 * lora["up.lora_B.weight"] @ lora["up.lora_A.weight"]
    base["model.down.weight"] += 3 * lora["down.lora_B.weight"] @ lora["down.lora_A.weight"]
    return {**base, "model.norm.weight": lora["norm.weight"]}


def test_a_sharded_base_gives_its_files_and_headers(by_hand: Pair, tmp_path: Path) -> None:
    write(by_hand, tmp_path / "{alpha}", *ALPHAS)
    for alpha in ALPHAS:
        law(by_hand, whole(by_hand), alpha, tmp_path / repr(alpha))
    old, same = tree(by_hand[0]), tree(tmp_path / "-1.0")
    assert same.keys() == {*old, "README.md", "expo.json"}
    weights = [name for name in old if name.endswith(".safetensors")]
    assert [same[name] for name in weights] == [old[name] for name in weights]
    index = "model.safetensors.index.json"
    assert json.loads(same[index]) == json.loads(old[index])


def test_several_alphas_in_one_pass_equal_separate_passes(by_hand: Pair, tmp_path: Path, small_pieces: None) -> None:
    write(by_hand, tmp_path / "together-{alpha}", *ALPHAS, workers=1)
    for alpha in ALPHAS:
        write(by_hand, tmp_path / f"alone-{alpha}", alpha, workers=3)
        together, alone = (without_clock(tree(tmp_path / f"{how}-{alpha}")) for how in ("together", "alone"))
        assert together == alone


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40_000, 7, 16), (30, 20_000, 8)])
def test_neither_workers_nor_the_number_of_alphas_change_a_bit(
    tmp_path: Path, rows: int, columns: int, rank: int
) -> None:
    """At 40 α and 4 workers a tile is six pieces; of products of other shapes some last bits are others."""
    torch.manual_seed(3)
    prefix, config = "base_model.model.w", {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    factors = {"lora_A.weight": torch.randn(rank, columns), "lora_B.weight": torch.randn(rows, rank)}
    pair = (
        write_checkpoint(tmp_path / "sft", {"w.weight": torch.randn(rows, columns)}),
        write_adapter(tmp_path / "lora", {f"{prefix}.{name}": tensor for name, tensor in factors.items()}, **config),
    )
    write(pair, tmp_path / "alone", 0.5, workers=1)
    write(pair, tmp_path / "many-{alpha}", *(number / 8 for number in range(1, 41)), workers=4)
    alone, many = (load_file(tmp_path / name / "model.safetensors")["w.weight"] for name in ("alone", "many-0.5"))
    assert as_bytes(alone) == as_bytes(many)


def test_a_stopped_run_goes_on_to_the_same_bytes(by_hand: Pair, tmp_path: Path) -> None:
    write(by_hand, tmp_path / "whole", 0.3, 8.0)
    finish, calls = StagedShard.finish, iter(range(1))

    def stop_later(shard: StagedShard) -> str:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return finish(shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagedShard, "finish", stop_later)
        with pytest.raises(KeyboardInterrupt):
            write(by_hand, tmp_path / "out", 0.3, 8.0)
    assert not list((tmp_path / "out").glob("*/config.json"))
    write(by_hand, tmp_path / "out", 0.3, 8.0)
    for alpha in ("alpha-0.3", "alpha-8.0"):
        assert without_clock(tree(tmp_path / "out" / alpha)) == without_clock(tree(tmp_path / "whole" / alpha))


def test_patterns_act_by_the_bases_names(by_hand: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An excluded tensor is what DPO is: the merged one, or the one that takes the base's place."""
    settings = {"exclude": ("up|norm",), "alpha_for": ("down=-1", "untouched=3")}
    write(by_hand, tmp_path / "out", 8.0, **settings)
    write(by_hand, tmp_path / "merged", 0.0)
    out, merged, base = map(read_checkpoint_tensors, (tmp_path / "out", tmp_path / "merged", by_hand[0]))
    for name in ("model.up.weight", "model.norm.weight"):
        assert torch.equal(out[name], merged[name])
        assert not torch.equal(out[name], base[name])
    assert torch.equal(out["model.down.weight"], base["model.down.weight"])
    assert "--alpha-for 'untouched' matches only tensors that lora does not change" in caplog.text
    assert caplog.text.count("does not change") == 1
    found = json.loads((tmp_path / "out" / "expo.json").read_text())["delta"]
    right = whole(by_hand)["model.down.weight"] - base["model.down.weight"].double()
    assert found["norm"] == pytest.approx(float(right.norm()), rel=1e-5), "of excluded tensors no change is counted"
    with pytest.raises(InputError, match="--exclude 'lm_head' matches no tensor"):
        write(by_hand, tmp_path / "none", exclude=("lm_head",))


def test_what_is_excluded_is_merged(by_hand: Pair, tmp_path: Path) -> None:
    write(by_hand, tmp_path / "merged", 0.0)
    base, merged = read_checkpoint_tensors(by_hand[0]), read_checkpoint_tensors(tmp_path / "merged")
    one = next(name for name in merged if not torch.equal(merged[name], base[name]))
    write(by_hand, tmp_path / "out", 8.0, exclude=(rf"^(?!{re.escape(one)}$)",))
    out = read_checkpoint_tensors(tmp_path / "out")
    assert [name for name in out if not torch.equal(out[name], merged[name])] == [one]
    with pytest.raises(InputError, match="no tensor would be extrapolated: every θ"):
        write(by_hand, tmp_path / "all", 8.0, exclude=("model",))


def test_an_untrained_adapter_is_refused(by_hand: Pair, tmp_path: Path) -> None:
    tensors = load_file(by_hand[1] / "adapter_model.safetensors")
    tensors = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    tensors["base_model.model.model.norm.weight"] = read_checkpoint_tensors(by_hand[0])["model.norm.weight"]
    save_file(tensors, by_hand[1] / "adapter_model.safetensors")
    with pytest.raises(InputError, match="SFT and DPO have the same weights"):
        write(by_hand, tmp_path / "out", 0.3)


def test_files_may_be_of_another_size(by_hand: Pair, tmp_path: Path) -> None:
    write(by_hand, tmp_path / "out", 0.3, max_shard_size="1kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    law(by_hand, whole(by_hand), 0.3, tmp_path / "out")


def test_a_base_of_bin_files(made: Maker, tmp_path: Path) -> None:
    sft, dpo = made(CASES["plain"], torch.bfloat16)
    shutil.copytree(sft, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(load_file(sft / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        write((tmp_path / "bin", dpo), tmp_path / "out", 0.3)
    write((tmp_path / "bin", dpo), tmp_path / "out", 0.3, allow_pickle=True)
    law((sft, dpo), made.merged((sft, dpo)), 0.3, tmp_path / "out")


@pytest.mark.parametrize("allowed", [False, True])
def test_what_is_not_finite_is_refused_or_written(by_hand: Pair, tmp_path: Path, allowed: bool) -> None:
    tensors = load_file(by_hand[1] / "adapter_model.safetensors")
    tensors["base_model.model.model.up.lora_B.weight"][1, 2] = float("inf")
    save_file(tensors, by_hand[1] / "adapter_model.safetensors")
    expected = (
        nullcontext() if allowed else pytest.raises(InputError, match=r"tensor model\.up\.weight contains NaN or")
    )
    with expected:
        write(by_hand, tmp_path / "out", 0.3, allow_nonfinite=allowed)
    assert (tmp_path / "out").exists() == allowed
    write(by_hand, tmp_path / "base", -1.0)
    assert torch.equal(
        *(read_checkpoint_tensors(folder)["model.up.weight"] for folder in (tmp_path / "base", by_hand[0]))
    )


# --- what is recorded ---------------------------------------------------------------------------------------------


@pytest.fixture
def expo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`expo extrapolate` in this process, on the inputs it is given."""

    def run(pair: Pair, *args: object) -> Result:
        code = cli.run(["extrapolate", "--sft", str(pair[0]), "--dpo", str(pair[1]), *map(str, args)])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


def test_expo_json_and_the_card_tell_the_truth(by_hand: Pair, tmp_path: Path) -> None:
    (by_hand[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    write(by_hand, tmp_path / "out", 0.3)
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    assert manifest["tensors"] == {"merged": 2, "extrapolated": 1, "copied": 2, "equal": 0}
    assert manifest["lora"] == {"merged": 2, "replaced": 1, "ranks": [2, 3], "scalings": [2.0, 3.0]}
    base, right = read_checkpoint_tensors(by_hand[0]), whole(by_hand)
    changed = ("model.up.weight", "model.down.weight", "model.norm.weight")
    delta = sum(float((right[name] - base[name].double()).square().sum()) for name in changed) ** 0.5
    size = sum(float(base[name].double().square().sum()) for name in changed) ** 0.5
    assert manifest["delta"] == pytest.approx({"norm": delta, "sft_norm": size, "relative": delta / size}, rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| θ_dpo | lora, a LoRA adapter merged into θ_sft | local |" in card
    assert "The config is that of sft;" in card
    assert "license: mit" in card
    assert "| tensors extrapolated | 3 |" in card


def test_a_dry_run_counts_merged_tensors(by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    result = expo(by_hand, "--alpha", 0.3, "--output", tmp_path / "out", "--dry-run", "--json")
    assert result.code == 0
    assert json.loads(result.stdout)["tensors"] == {"merged": 2, "extrapolated": 1, "copied": 2, "equal": 0}
    assert not (tmp_path / "out").exists()


def test_the_default_output_is_named_after_the_adapter(
    by_hand: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (written,) = extrapolate.run(ExtrapolateConfig(sft="sft", dpo="lora", alpha=(0.3,), fsync=False))
    assert str(written.path) == "checkpoints/lora-ExPO-a0.3"


def test_a_changed_adapter_is_another_input(by_hand: Pair, tmp_path: Path) -> None:
    write(by_hand, tmp_path / "out")
    assert [one.status for one in write(by_hand, tmp_path / "out")] == ["already complete"]
    config = json.loads((by_hand[1] / "adapter_config.json").read_text())
    (by_hand[1] / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    with pytest.raises(InputError, match="a different dpo; --overwrite"):
        write(by_hand, tmp_path / "out")


# --- side files ---------------------------------------------------------------------------------------------------

WEIGHTS = {"config.json": "base", "generation_config.json": "base", "remote.py": "base"}
WHOLE = {"tokenizer.json": "x", "tokenizer_config.json": "x", "special_tokens_map.json": "x"}
TEMPLATE = {"chat_template.jinja": "x"}

SIDE_FILES = {
    "none of its own": (["tokenizer.json", "chat_template.jinja"], [], ["tokenizer.json", "chat_template.jinja"], []),
    "a tokenizer, and none in the base": ([], [*WHOLE], [], [*WHOLE]),
    "a tokenizer takes the place of all of the base's": (
        [*WHOLE, "tokenizer.model", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja"],
        ["tokenizer.json", "tokenizer_config.json"],
        [],
        ["tokenizer.json", "tokenizer_config.json"],
    ),
    "a chat template of its own": (
        [*WHOLE, "chat_template.json", "additional_chat_templates/tool.jinja"],
        ["chat_template.jinja"],
        [*WHOLE],
        ["chat_template.jinja"],
    ),
    "settings without a vocabulary": (
        ["tokenizer.json", "tokenizer_config.json"],
        ["tokenizer_config.json"],
        ["tokenizer.json"],
        ["tokenizer_config.json"],
    ),
    "what is no tokenizer stays behind": (
        ["tokenizer.json"],
        ["adapter_model.safetensors", "README.md", "training_args.bin", "trainer_state.json", "eval_results.json"],
        ["tokenizer.json"],
        [],
    ),
}


@pytest.mark.parametrize(("base", "adapter", "from_base", "from_adapter"), SIDE_FILES.values(), ids=SIDE_FILES.keys())
def test_whose_side_files(
    tmp_path: Path, base: list[str], adapter: list[str], from_base: list[str], from_adapter: list[str]
) -> None:
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    for folder, names in ((sft, [*WEIGHTS, "README.md", *base]), (dpo, ["adapter_config.json", *adapter])):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    found = output_side_files(sft, dpo)
    assert {name: file.parents[len(Path(name).parents) - 1].name for name, file in found.items()} == {
        **dict.fromkeys([*WEIGHTS, *from_base], "sft"),
        **dict.fromkeys(from_adapter, "dpo"),
    }


def test_side_files_go_along_byte_for_byte(by_hand: Pair, tmp_path: Path) -> None:
    (by_hand[0] / "tokenizer.json").write_text("{}")
    (by_hand[1] / "chat_template.jinja").write_bytes(b"\xff the adapter's")
    write(by_hand, tmp_path / "out")
    sft, dpo, out = map(tree, (*by_hand, tmp_path / "out"))
    assert {name: out[name] for name in sft if not name.startswith("model")} == {
        name: content for name, content in sft.items() if not name.startswith("model")
    }
    assert out["chat_template.jinja"] == dpo["chat_template.jinja"]
    assert not [name for name in out if name.startswith("adapter_")]


# --- the hub ------------------------------------------------------------------------------------------------------


def test_of_an_adapters_base_everything_is_fetched(
    by_hand: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the card names both, the adapter first."""
    fetched = []

    def snapshot_download(repository: str, **options: object) -> str:
        fetched.append((repository, options["allow_patterns"]))
        return str(by_hand[repository == "org/lora"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "_has_safetensors", lambda *_: True)
    write(("org/base", "org/lora"), tmp_path / "out", 0.3)
    assert fetched[-1] == ("org/base", None)
    assert ("org/lora", None) in fetched
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/lora\n- org/base\n" in card
    assert "base_model_relation: merge" in card


@pytest.mark.parametrize(
    ("trained_on", "sft", "warns"),
    [
        ("org/base", "org/base", False),
        ("Org/Base", "org/base", False),
        ("org/other", "org/base", True),
        ("/home/me/base", "org/base", False),
        ("/home/me/other", "org/base", True),
        ("/cache/models--org--base/snapshots/0a1b", "org/base", False),
        ("/cache/models--org--other/snapshots/0a1b", "org/base", True),
        ("/gone/sft", None, False),
        ("/gone/other", None, True),
        ("{here}/sft", None, False),
        ("{here}/link", None, False),
        ("{here}/lora", None, True),
        ("{here}/copies/sft", None, True),
        ("", None, False),
        (None, "org/base", False),
        ("org/other", None, False),
    ],
)
def test_an_adapter_to_another_model_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained_on: str | None, sft: str | None, warns: bool
) -> None:
    folder = tmp_path / "sft"
    for made in (folder, tmp_path / "copies/sft"):
        made.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    recorded = trained_on and trained_on.format(here=tmp_path)
    dpo = write_adapter(tmp_path / "lora", {}, base_model_name_or_path=recorded)
    require_base(Location(folder, sft.split("/")[1] if sft else "sft", sft), Location(dpo, "lora", "org/lora"))
    said = f"org/lora was trained on {recorded}, and --sft is {sft or folder}: are they the same model?"
    assert (said in caplog.text, bool(caplog.text)) == (warns, warns)


# --- what is refused: always exit code 2, one line, nothing written ------------------------------------------------


def reconfigure(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def swap(root: Path) -> None:
    for old, new in (("sft", "x"), ("lora", "sft"), ("x", "lora")):
        (root / old).rename(root / new)


def empty(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter as SFT": (swap, "--sft sft is an adapter, not a checkpoint: give the model it was trained on"),
    "two adapters": (
        lambda root: [shutil.rmtree(root / "sft"), shutil.copytree(root / "lora", root / "sft")],
        "merge it into that model with peft's merge_and_unload",
    ),
    "DoRA": (lambda root: reconfigure(root / "lora", use_dora=True), "not a plain LoRA: it uses DoRA"),
    "IA3": (lambda root: reconfigure(root / "lora", peft_type="IA3"), "is of type IA3, not LORA"),
    "PiSSA": (lambda root: reconfigure(root / "lora", init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "another base": (
        lambda root: (
            write_checkpoint(root / "sft", {"model.up.weight": torch.ones(3, 3)}, shards=1)
            and [file.unlink() for file in (root / "sft").glob("model*-of-*")]
            and (root / "sft" / "model.safetensors.index.json").unlink()
        ),
        "the adapter lora does not fit sft: tensors that the base lacks: model.down.weight, model.norm.weight",
    ),
    "a quantized base": (
        lambda root: (root / "sft/config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}'),
        "sft is quantized (bitsandbytes)",
    ),
    "no weights": (
        lambda root: (root / "lora/adapter_model.safetensors").unlink(),
        "contains adapter_config.json but no adapter_model.safetensors",
    ),
    "weights of another format": (
        lambda root: (root / "lora/adapter_model.safetensors").rename(root / "lora/adapter_model.bin"),
        "only adapter_model.bin; load it with peft and save it again as safetensors",
    ),
    "no tensors": (lambda root: empty(root / "lora"), "adapter_model.safetensors contains no tensors"),
    "a whole model beside it": (
        lambda root: write_checkpoint(root / "lora", {"w": torch.ones(2)}),
        "contains both model.safetensors and adapter_config.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    prepare, message = REFUSED[case]
    prepare(tmp_path)
    before = tree(tmp_path)
    result = expo(by_hand, "--alpha", 0.3, "--output", tmp_path / "out")
    assert result.code == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert tree(tmp_path) == before


def test_an_output_inside_the_adapter_is_refused(by_hand: Pair) -> None:
    with pytest.raises(InputError, match=r"the output .* is the input .* or lies inside it"):
        write(by_hand, by_hand[1] / "out")


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from expo.config import ExtrapolateConfig
from expo.verbs.extrapolate import run
from expo.theta import stream

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

before = peak_mb()
sft, dpo, out = sys.argv[1:]
run(ExtrapolateConfig(sft=sft, dpo=dpo, alpha=(0.3,), output=out, workers=2))
print(peak_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["linear", in_full("embedding")])
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, kind: str) -> None:
    """A product of 268 MB, of factors of which the long one has 34 MB: neither is ever whole in memory."""
    rows, columns, rank = 65_536, 1024, 128
    names = {"linear": ("lora_B.weight", "lora_A.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}[kind]
    left, right = torch.randn(rows, rank), torch.randn(rank, columns)
    if kind == "embedding":
        left, right = left.T.contiguous(), right.T.contiguous()
    prefix, config = "base_model.model.w", {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    factors = {f"{prefix}.{name}": tensor for name, tensor in zip(names, (left, right), strict=True)}
    sft = write_checkpoint(tmp_path / "sft", {"w.weight": torch.ones(rows, columns, dtype=torch.bfloat16)})
    dpo = write_adapter(tmp_path / "lora", factors, **config)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(sft), str(dpo), str(tmp_path / "out")],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 60  # it takes 34 to 41 where nothing is whole
