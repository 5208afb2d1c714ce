"""`--as-adapter --rank`: a whole checkpoint's change as a LoRA adapter, and what is said of what it lacks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import Maker, gpt2, llama, qwen, save_base, tied_llama
from helpers import Result, read_checkpoint_tensors, run_python, tree, write, write_checkpoint
from peft import PeftModel
from safetensors.torch import load_file
from test_as_adapter import CONFIG, WEIGHTS, config_of, greedy, logits, require_same_after_kills
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from expo.cli import program as cli

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of fan_in_fan_out, and this is right

Pair = tuple[Path, Path]
Tensors = dict[str, Tensor]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONV1D = ("c_attn", "c_proj", "c_fc")


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in (*LINEAR, *CONV1D)


def low_rank(rank: int | None) -> Callable[[str, Tensor], Tensor]:
    """A change of this rank to linear layers alone; None: of all ranks, to all tensors."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if rank is None:
            return 0.02 * torch.randn_like(tensor)
        if not is_linear(name):
            return torch.zeros_like(tensor)
        return 0.02 * torch.randn(tensor.shape[0], rank) @ torch.randn(rank, tensor.shape[1])

    return change


def trained(sft: Path, dpo: Path, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype) -> Pair:
    """A pair whose DPO model is SFT and a change."""
    shutil.copytree(sft, dpo)
    torch.manual_seed(3)
    tensors = {
        name: (tensor.float() + change(name, tensor.float())).to(dtype)
        for name, tensor in read_checkpoint_tensors(sft).items()
    }
    write_checkpoint(dpo, tensors)
    return sft, dpo


@pytest.fixture
def made_pair(tmp_path: Path) -> Callable[..., Pair]:
    def make(
        build: Callable[[], nn.Module] = llama, rank: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Pair:
        return trained(save_base(build, dtype, tmp_path / "sft"), tmp_path / "dpo", low_rank(rank), dtype)

    return make


def ranked(pair: Pair, output: Path, rank: int, *alphas: float, **settings: object) -> Path:
    write(pair, output, *alphas, as_adapter=True, rank=rank, **settings)
    return output


def found_in(folder: Path) -> dict[str, dict[str, object]]:
    content: dict[str, dict[str, object]] = json.loads((folder / "expo.json").read_text())["approximation"]
    return content


def merged(sft: Path, adapter: Path) -> Tensors:
    """By PEFT, in float64, as the factors are."""
    model = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float64)
    return dict(PeftModel.from_pretrained(model, adapter).double().merge_and_unload().state_dict())


def deltas(pair: Pair) -> Tensors:
    sft, dpo = map(read_checkpoint_tensors, pair)
    return {name: dpo[name].double() - sft[name].double() for name in sft}


# --- the laws -----------------------------------------------------------------------------------------------------

BUILDS = {"llama": llama, "tied": tied_llama, "biases": qwen, "fan-in fan-out": gpt2}


@pytest.mark.parametrize("alpha", [0.3, -1.0, 8.0])
@pytest.mark.parametrize("build", BUILDS)
def test_at_full_rank_linear_layers_are_those_of_theta(
    made_pair: Callable[..., Pair], build: str, alpha: float, tmp_path: Path
) -> None:
    """And all others those of SFT."""
    pair = made_pair(BUILDS[build])
    out, sft = merged(pair[0], ranked(pair, tmp_path / "out", 10_000, alpha)), read_checkpoint_tensors(pair[0])
    change = deltas(pair)
    assert any(map(is_linear, change))
    for name, delta in change.items():
        expected = sft[name].double() + (1 + alpha) * delta if is_linear(name) else sft[name].double()
        torch.testing.assert_close(out[name], expected, rtol=0, atol=2e-6 * max(1.0, 1 + alpha), msg=name)


@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize("build", ["llama", "fan-in fan-out"])
def test_errors_are_those_of_float64s_singular_values(
    made_pair: Callable[..., Pair], build: str, rank: int, tmp_path: Path
) -> None:
    pair = made_pair(BUILDS[build])
    found = found_in(ranked(pair, tmp_path / "out", rank, 0.3))
    change, lost = deltas(pair), 0.0
    assert found["modules"].keys() == set(filter(is_linear, change))
    for name, row in found["modules"].items():
        values = torch.linalg.svdvals(change[name])
        assert row["rank"] == min(rank, len(values))
        assert row["norm"] == pytest.approx(float(values.norm()), rel=1e-6)
        assert row["error"] == pytest.approx(float(values[rank:].norm()), rel=1e-5, abs=1e-6 * row["norm"])
        assert row["relative_error"] == row["error"] / row["norm"]
        lost += float(values[rank:].square().sum())
    total = sum(float(delta.square().sum()) for delta in change.values())
    left = sum(float(delta.square().sum()) for name, delta in change.items() if not is_linear(name))
    shares = found["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["lost_to_rank"] == pytest.approx(lost / total, rel=1e-5, abs=1e-9)
    assert shares["without_factors"] == pytest.approx(left / total, rel=1e-5)
    assert found["relative_error"] == pytest.approx(math.sqrt((lost + left) / total), rel=1e-5)
    assert math.fsum(norm**2 for norm in found["without_factors"].values()) == pytest.approx(left, rel=1e-5)


def test_the_total_is_what_merging_shows(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """In bfloat16, where the factors' own rounding counts, too."""
    pair = made_pair(dtype=torch.bfloat16)
    out = ranked(pair, tmp_path / "out", 6, 0.0)
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.bfloat16}
    made, dpo, change = merged(pair[0], out), read_checkpoint_tensors(pair[1]), deltas(pair)
    off = math.sqrt(sum(float((made[name] - dpo[name].double()).square().sum()) for name in change))
    whole = math.sqrt(sum(float(delta.square().sum()) for delta in change.values()))
    assert found_in(out)["relative_error"] == pytest.approx(off / whole, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_change_of_that_rank_has_no_error(made_pair: Callable[..., Pair], rank: int, tmp_path: Path) -> None:
    pair = made_pair(rank=rank)
    out = ranked(pair, tmp_path / "out", rank, 0.5)
    assert found_in(out)["relative_error"] < 1e-5
    write(pair, tmp_path / "whole", 0.5)
    made = merged(pair[0], out)
    for name, tensor in read_checkpoint_tensors(tmp_path / "whole").items():
        torch.testing.assert_close(made[name], tensor.double(), rtol=0, atol=2e-6, msg=name)


def test_peft_answers_with_it_as_with_the_approximate_model(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = made_pair()
    out = ranked(pair, tmp_path / "out", 4, 0.5)
    base, whole = (AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32) for _ in range(2))
    plain, (sft, factors) = greedy(base), (read_checkpoint_tensors(pair[0]), load_file(out / WEIGHTS))
    for name in filter(is_linear, sft):
        a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        sft[name] = sft[name] + 1.5 * b @ a
    whole.load_state_dict(sft)
    adapted = PeftModel.from_pretrained(base, out)
    assert greedy(adapted) == greedy(whole) != plain
    torch.testing.assert_close(logits(adapted), logits(whole), rtol=0, atol=1e-4)


def test_every_alpha_has_the_same_factors(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = made_pair()
    ranked(pair, tmp_path / "out-{alpha}", 4, 0.3, -0.5, 0.0)
    ranked(pair, tmp_path / "alone", 4, 2.0)
    folders = [tmp_path / name for name in ("out-0.3", "out--0.5", "out-0.0", "alone")]
    assert len({(folder / WEIGHTS).read_bytes() for folder in folders}) == 1
    configs = [config_of(folder) for folder in folders]
    assert [config["lora_alpha"] for config in configs] == [4 * 1.3, 2, 4, 12]
    assert [config["r"] for config in configs] == [4] * 4
    assert len({json.dumps({**config, "lora_alpha": 0}) for config in configs}) == 1
    assert set(configs[0]["target_modules"]) == set(LINEAR)


def test_patterns_give_modules_their_own_alpha(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """Also where a module has a smaller rank than others."""
    pair = made_pair()
    own = {"alpha_for": ("q_proj=2", r"layers\.1\..*proj=-0.25"), "exclude": (r"layers\.0\.self_attn\.[kv]_proj",)}
    made = merged(pair[0], ranked(pair, tmp_path / "out", 10_000, 0.5, **own))
    write(pair, tmp_path / "whole", 0.5, **own)
    whole = read_checkpoint_tensors(tmp_path / "whole")
    assert len({row["rank"] for row in found_in(tmp_path / "out")["modules"].values()}) > 1
    for name in filter(is_linear, whole):
        torch.testing.assert_close(made[name], whole[name].double(), rtol=0, atol=1e-5, msg=name)


def test_the_dtype_of_the_factors_may_be_chosen(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = made_pair(rank=2, dtype=torch.bfloat16)
    errors = {}
    for dtype in ("auto", "float32", "float16"):
        out = ranked(pair, tmp_path / dtype, 32, 0.3, dtype=dtype)
        (kind,) = {tensor.dtype for tensor in load_file(out / WEIGHTS).values()}
        assert kind == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
        errors[dtype] = found_in(out)["relative_error"]
    assert errors["float32"] < 1e-5 < errors["float16"] < errors["auto"] < 0.01


# --- layouts ------------------------------------------------------------------------------------------------------


def fused(tensors: Tensors) -> Tensors:
    out = dict(tensors)
    for layer in range(2):
        for into, names in {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}.items():
            outer = into.split(".")[0]
            parts = [out.pop(f"model.layers.{layer}.{outer}.{name}_proj.weight") for name in names]
            out[f"model.layers.{layer}.{into}.weight"] = torch.cat(parts)
    return out


def test_a_fused_dpo_is_the_same(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = made_pair()
    shutil.copytree(pair[1], tmp_path / "fused")
    write_checkpoint(tmp_path / "fused", fused(read_checkpoint_tensors(pair[1])))
    one = ranked(pair, tmp_path / "one", 4, 0.3)
    two = ranked((pair[0], tmp_path / "fused"), tmp_path / "two", 4, 0.3)
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()


def test_of_a_fused_sft_its_own_modules_have_factors(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = made_pair()
    shutil.copytree(pair[0], tmp_path / "fused")
    whole = fused(read_checkpoint_tensors(pair[0]))
    write_checkpoint(tmp_path / "fused", whole)
    out = ranked((tmp_path / "fused", pair[1]), tmp_path / "out", 10_000, 0.5)
    factors, change = load_file(out / WEIGHTS), fused(deltas(pair))
    prefix = "base_model.model.model.layers.1.self_attn.qkv_proj"
    product = factors[f"{prefix}.lora_B.weight"].double() @ factors[f"{prefix}.lora_A.weight"].double()
    torch.testing.assert_close(product, change["model.layers.1.self_attn.qkv_proj.weight"], rtol=0, atol=1e-6)
    assert "qkv_proj" in config_of(out)["target_modules"]


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=2, num_experts_per_tok=1)
    )


def test_experts_routers_and_embeddings_are_left_and_counted(made_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = made_pair(mixtral)
    out = ranked(pair, tmp_path / "out", 4, 0.3)
    found = found_in(out)
    assert {name.split(".")[-2] for name in found["modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    left = found["without_factors"]
    assert {"embed_tokens", "lm_head", "norm", "input_layernorm"} < left.keys()
    assert any("experts" in name for name in left)
    base = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    plain = logits(base)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, out)), plain)


# --- what is recorded, said, and refused --------------------------------------------------------------------------


@pytest.fixture
def by_hand(tmp_path: Path) -> Pair:
    torch.manual_seed(2)
    shapes = {"model.up.weight": (40, 24), "model.norm.weight": (24,), "model.embed_tokens.weight": (50, 24)}
    sft = {name: torch.randn(shape) for name, shape in shapes.items()}
    dpo = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in sft.items()}
    files = {"config.json": "{}", "tokenizer.json": "{}", "generation_config.json": "{}", "LICENSE": "mine"}
    return write_checkpoint(tmp_path / "sft", sft, files=files), write_checkpoint(tmp_path / "dpo", dpo, files=files)


@pytest.fixture
def expo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(pair: Pair, *args: object) -> Result:
        code = cli.run(["extrapolate", "--sft", str(pair[0]), "--dpo", str(pair[1]), *map(str, args)])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


def test_what_is_said_and_recorded(
    by_hand: Pair, tmp_path: Path, expo: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    args = ("--as-adapter", "--rank", 3, "--alpha", 0.25, "--output", tmp_path / "out")
    result = expo(by_hand, *args)
    assert result.code == 0, result.stderr
    out = tree(tmp_path / "out")
    assert out.keys() == {WEIGHTS, CONFIG, "tokenizer.json", "LICENSE", "README.md", "expo.json"}
    manifest = json.loads(out["expo.json"])
    assert (manifest["fingerprint"]["rank"], manifest["config"]["rank"]) == (3, 3)
    assert manifest["tensors"] == {"approximated": 1, "left as in SFT": 2}
    assert manifest["delta"]["norm"] == pytest.approx(manifest["approximation"]["norm"])
    shares = {name: f"{100 * share:.3g} %" for name, share in manifest["approximation"]["shares"].items()}
    assert f"the adapter has {shares['in_adapter']} of the change" in caplog.text
    assert f"{shares['lost_to_rank']} is lost to the rank" in caplog.text
    assert (
        f"{shares['without_factors']} is in tensors that get no factors (model.embed_tokens, model.norm)" in caplog.text
    )
    card = out["README.md"].decode()
    assert "best approximation of rank 3" in card
    assert f"| of it lost to the rank | {shares['lost_to_rank']} |" in card
    assert "--as-adapter --rank 3" in card
    assert config_of(tmp_path / "out") == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(by_hand[0]), "revision": None,
        "r": 3, "lora_alpha": 3.75, "lora_dropout": 0.0, "target_modules": ["up"], "rank_pattern": {},
        "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
        "use_rslora": False, "inference_mode": True,
    }  # fmt: skip
    assert expo(by_hand, *args).code == 0
    assert tree(tmp_path / "out") == out, "it is complete"
    other = expo(by_hand, "--as-adapter", "--rank", 4, "--alpha", 0.25, "--output", tmp_path / "out")
    assert other.code == 2
    assert "was made with a different rank (3 then, 4 now)" in other.stderr


def test_it_is_read_as_any_adapter(by_hand: Pair, tmp_path: Path) -> None:
    """It can be extrapolated further, or merged, by the command itself."""
    once, sft = ranked(by_hand, tmp_path / "once", 24, 0.5), read_checkpoint_tensors(by_hand[0])
    write((by_hand[0], once), tmp_path / "merged", 0.0)
    made, delta = read_checkpoint_tensors(tmp_path / "merged"), deltas(by_hand)
    expected = sft["model.up.weight"].double() + 1.5 * delta["model.up.weight"]
    torch.testing.assert_close(made["model.up.weight"].double(), expected, rtol=0, atol=1e-6)


def test_a_dry_run_writes_nothing(by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    args = ("--as-adapter", "--rank", 3, "--alpha", 0.3, "--output", tmp_path / "out")
    result = expo(by_hand, *args, "--dry-run", "--json")
    assert result.code == 0, result.stderr
    assert not (tmp_path / "out").exists()
    assert expo(by_hand, *args).code == 0
    said = json.loads(result.stdout)
    assert said["tensors"] == {"approximated": 1, "left as in SFT": 2}
    assert said["bytes_per_output"] == (tmp_path / "out" / WEIGHTS).stat().st_size


def set_tensor(root: Path, name: str, values: Callable[[Tensor], Tensor]) -> None:
    tensors = read_checkpoint_tensors(root / "dpo")
    write_checkpoint(root / "dpo", {**tensors, name: values(tensors[name])})


def same_model(root: Path) -> None:
    write_checkpoint(root / "dpo", read_checkpoint_tensors(root / "sft"))


def same_layers(root: Path) -> None:
    layer = read_checkpoint_tensors(root / "sft")["model.up.weight"]
    set_tensor(root, "model.up.weight", lambda _: layer)


def spoiled(root: Path) -> None:
    set_tensor(root, "model.up.weight", lambda tensor: torch.full_like(tensor, math.nan))


def unprefixed(root: Path) -> None:
    config = json.dumps({"architectures": ["GPT2LMHeadModel"]})
    for side, value in (("sft", 1.0), ("dpo", 1.5)):
        tensors = {"h.0.attn.c_attn.weight": torch.full((8, 8), value)}
        shutil.rmtree(root / side)
        write_checkpoint(root / side, tensors, files={"config.json": config})


def without_layers(root: Path) -> None:
    for side, value in (("sft", 1.0), ("dpo", 1.5)):
        write_checkpoint(root / side, {"model.norm.weight": torch.full((8,), value)})


def nothing(root: Path) -> None:
    """Leave the pair as it is."""


RANK = ("--as-adapter", "--rank", "3")
REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "no rank": (nothing, ("--as-adapter",), "dpo is a whole checkpoint: give --rank R for the adapter of rank R"),
    "no adapter": (nothing, ("--rank", "3"), "--rank is for an adapter: give --as-adapter, too, or leave out --rank"),
    "rank 0": (nothing, ("--as-adapter", "--rank", "0"), "--rank must be positive, not 0"),
    "a negative rank": (nothing, ("--as-adapter", "--rank", "-2"), "--rank must be positive, not -2"),
    "the same models": (same_model, RANK, "SFT and DPO have the same weights"),
    "the same layers": (same_layers, RANK, "SFT and DPO differ in no layer that gets LoRA factors"),
    "no layers": (without_layers, RANK, "sft has no linear layer that a LoRA adapter could change"),
    "NaN": (spoiled, RANK, "θ_dpo − θ_sft of model.up.weight contains NaN or infinity"),
    "names of a part": (unprefixed, RANK, "lack the prefix that they have in a loaded GPT2LMHeadModel"),
    "a pattern of norms": (nothing, (*RANK, "--alpha-for", "norm=1"), "--alpha-for 'norm' matches only tensors that"),
    "all excluded": (nothing, (*RANK, "--exclude", "."), "no tensor would be extrapolated"),
    "missing": (nothing, (*RANK, "--missing", "copy-dpo"), "no place for what DPO alone has: leave out --missing"),
    "vocabularies": (nothing, (*RANK, "--vocab", "common"), "no place for what DPO alone has: leave out --vocab"),
    "NaN allowed": (nothing, (*RANK, "--allow-nonfinite"), "neither NaN nor infinity: leave out --allow-nonfinite"),
    "a part": (nothing, (*RANK, "--part", "0/2"), "--rank writes one small file: leave out --part"),
    "another rule": (nothing, (*RANK, "--rule", "clipped"), "the rule linear alone scales: leave out --rule"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    prepare, args, message = REFUSED[case]
    prepare(tmp_path)
    before = tree(tmp_path)
    result = expo(by_hand, "--alpha", 0.3, "--output", tmp_path / "out", *args)
    assert result.code == 2, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert tree(tmp_path) == before


def test_an_adapter_keeps_its_own_rank(made: Maker, tmp_path: Path, expo: Callable[..., Result]) -> None:
    pair = made((llama, {"target_modules": ["q_proj"]}), torch.float32)
    result = expo(pair, "--alpha", 0.3, "--output", tmp_path / "out", "--as-adapter", "--rank", 2)
    assert result.code == 2
    assert "is an adapter already, and keeps its own rank: leave out --rank" in result.stderr


def test_different_alphas_within_a_fused_module_are_refused(
    made_pair: Callable[..., Pair], tmp_path: Path, expo: Callable[..., Result]
) -> None:
    pair = made_pair()
    shutil.copytree(pair[0], tmp_path / "fused")
    write_checkpoint(tmp_path / "fused", fused(read_checkpoint_tensors(pair[0])))
    given = (*RANK, "--alpha", 0.3, "--output", tmp_path / "out", "--alpha-for", "q_proj=2")
    result = expo((tmp_path / "fused", pair[1]), *given)
    assert result.code == 2
    assert "one module in fused: model.layers.0.self_attn.qkv_proj.weight" in result.stderr


# --- killed, and in little memory ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_is_run_again_to_the_same_bytes(by_hand: Pair, tmp_path: Path) -> None:
    require_same_after_kills(by_hand, tmp_path, "--rank", 4)


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
    pair = {"sft": str(root / "sft"), "dpo": str(root / "dpo")}
    run(ExtrapolateConfig(**pair, alpha=(0.3, 0.5), output=str(root / "out"), as_adapter=True, rank=2))
    peaks.append(peak_mb())
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of twelve layers of 2 MB and an embedding of 96 MB on each side, beside one of two layers."""
    for name, layers, tokens in (("small", 2, 100), ("large", 12, 24_000)):
        torch.manual_seed(0)
        sft = {f"model.layers.{number}.up.weight": torch.randn(512, 1024) for number in range(layers)}
        sft["model.embed_tokens.weight"] = torch.randn(tokens, 1024)
        write_checkpoint(tmp_path / name / "sft", sft)
        write_checkpoint(tmp_path / name / "dpo", {name: tensor * 1.01 for name, tensor in sft.items()})
    done = run_python(MEASURE, tmp_path, timeout=300)
    assert done.code == 0, done.stderr
    assert float(done.stdout) < 64
