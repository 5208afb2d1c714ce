"""`expo extrapolate --as-adapter`: an adapter that makes θ(α) of SFT, by expo's own merge, PEFT's and vLLM's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import CASES, PLAIN, Maker, llama, qwen, save_adapter, tied_llama, wide_llama, write_adapter
from helpers import (
    Result,
    Run,
    as_bytes,
    read_checkpoint_tensors,
    run_python,
    tree,
    write,
    write_checkpoint,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from sizes import sized
from test_extrapolate_adapter import law
from torch import Tensor
from transformers import AutoModelForCausalLM

from expo.checkpoint.folder import Location
from expo.cli import program as cli
from expo.config import ExtrapolateConfig
from expo.errors import InputError
from expo.theta.adapter.scaled import scaled_config
from expo.theta.adapter.settings import read_settings
from expo.verbs import extrapolate
from expo.verbs.extrapolate.adapter import adapter_config
from expo.verbs.extrapolate.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of every unusual choice, and these are

Pair = tuple[Path, Path]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALPHAS = (0.3, -1.0, 8.0)


def scaled(pair: Pair, output: Path, *alphas: float, **settings: object) -> Path:
    """Write the adapter; its folder, or that of several with their α in the name."""
    write(pair, output, *alphas, as_adapter=True, **settings)
    return output


def config_of(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / CONFIG).read_text())
    return content


# --- the laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_merged_into_sft_it_is_theta(made: Maker, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every value is the rounding of a number within float32's error, as that of the checkpoint is."""
    pair = made(CASES[case], dtype)
    scaled(pair, tmp_path / "lora-{alpha}", *ALPHAS)
    for alpha in ALPHAS:
        write((pair[0], tmp_path / f"lora-{alpha}"), tmp_path / f"{alpha}", 0.0)
        law(pair, made.merged(pair), alpha, tmp_path / f"{alpha}")


@pytest.mark.parametrize("case", CASES)
def test_at_zero_it_is_the_adapter_byte_for_byte(made: Maker, case: str, tmp_path: Path) -> None:
    pair = made(CASES[case], torch.bfloat16)
    out, given = tree(scaled(pair, tmp_path / "out", 0.0)), tree(pair[1])
    assert {name: out[name] for name in (WEIGHTS, CONFIG)} == {name: given[name] for name in (WEIGHTS, CONFIG)}
    assert out.keys() == {*given, "README.md", "expo.json"}


def is_factor(name: str) -> bool:
    return ".lora_" in name


@pytest.mark.parametrize("case", ["patterns, rank-stabilised", "saved modules", "trained biases"])
def test_factors_are_copied_and_whole_tensors_are_those_of_the_checkpoint(
    made: Maker, case: str, tmp_path: Path
) -> None:
    pair = made(CASES[case], torch.bfloat16)
    out, given = (load_file(folder / WEIGHTS) for folder in (scaled(pair, tmp_path / "lora", 0.3), pair[1]))
    write(pair, tmp_path / "whole", 0.3)
    whole = read_checkpoint_tensors(tmp_path / "whole")
    assert out.keys() == given.keys()
    for name, tensor in out.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert as_bytes(tensor) == as_bytes(given[name] if is_factor(name) else whole[own]), name
    sizes = [(folder / WEIGHTS).stat().st_size for folder in (tmp_path / "lora", pair[1])]
    assert sizes[0] == sizes[1]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 30)[None]).logits


PROMPTS = torch.arange(3, 63).reshape(6, 10)


def greedy(model: torch.nn.Module, prompts: Tensor = PROMPTS) -> list[list[int]]:
    """The answers' tokens."""
    usual = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    return model.eval().generate(prompts, **usual)[:, prompts.shape[1] :].tolist()


@pytest.mark.parametrize("alpha", [0.5, -0.5])
@pytest.mark.parametrize(
    "case", ["all linear", "patterns, rank-stabilised", "saved modules", "embedding", "all biases"]
)
def test_peft_answers_with_it_as_with_the_checkpoint(made: Maker, tmp_path: Path, case: str, alpha: float) -> None:
    pair = made(CASES[case], torch.float32)
    write(pair, tmp_path / "whole", alpha)
    base, whole = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (pair[0], tmp_path / "whole")
    )
    plain = greedy(base)
    adapted = PeftModel.from_pretrained(base, scaled(pair, tmp_path / "lora", alpha))
    assert greedy(adapted) == greedy(whole) != plain
    torch.testing.assert_close(logits(adapted), logits(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_module_stored_beside_its_factors_is_extrapolated_too(made: Maker, tmp_path: Path, target: str) -> None:
    """It is not the base's, which it may be after more training."""
    sft, dpo = made((llama, {"target_modules": [target, "q_proj"]}), torch.float32)
    shutil.copytree(dpo, tmp_path / "lora")
    (stored,) = (tensor for name, tensor in load_file(sft / "model.safetensors").items() if target in name)
    name = f"base_model.model.{'model.' if target == 'embed_tokens' else ''}{target}.base_layer.weight"
    edit(tmp_path / "lora", lambda tensors: {**tensors, name: stored + torch.randn_like(stored)})
    pair = sft, tmp_path / "lora"
    scaled(pair, tmp_path / "lora-{alpha}", *ALPHAS)
    for alpha in ALPHAS:
        write((sft, tmp_path / f"lora-{alpha}"), tmp_path / f"{alpha}", 0.0)
        law(pair, made.merged(pair), alpha, tmp_path / f"{alpha}")


def test_every_copy_of_a_module_is_extrapolated(made: Maker, tmp_path: Path) -> None:
    """With `save_embedding_layers` PEFT stores the trained module by two names, and the base's own by a third."""
    base, options = made(CASES["plain"], torch.float32)[0], {"target_modules": ["q_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["lm_head", "embed_tokens"], **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    pair = base, tmp_path / "lora"
    given, out = (load_file(folder / WEIGHTS) for folder in (pair[1], scaled(pair, tmp_path / "out", 0.5)))
    copies = {name for name in given if "embed_tokens" in name}
    assert len(copies) > 1, copies
    write(pair, tmp_path / "whole", 0.5)
    whole = read_checkpoint_tensors(tmp_path / "whole")["model.embed_tokens.weight"]
    for name in copies:
        assert torch.equal(out[name], given[name] if ".original_module." in name else whole), name
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(adapted), logits(expected), rtol=0, atol=1e-4)


# --- an α of its own ----------------------------------------------------------------------------------------------

OWN = {"alpha_for": ("q_proj=2", r"layers\.1\.=-0.25"), "exclude": (r"layers\.0\.self_attn\.v_proj",)}


@pytest.mark.parametrize("case", ["plain", "patterns, rank-stabilised", "saved module of modules", "fan-in fan-out"])
def test_patterns_give_modules_their_own_alpha(made: Maker, tmp_path: Path, case: str) -> None:
    pair = made(CASES[case], torch.float32)
    settings = OWN if "fan-in" not in case else {"alpha_for": ("c_attn=2",), "exclude": (r"h\.1\.attn\.c_proj",)}
    if case == "saved module of modules":
        settings = {"alpha_for": (r"layers\.1\.mlp\.up_proj=2",), "exclude": (r"layers\.0\.mlp", r"layers\.1.*q_proj")}
    write(pair, tmp_path / "whole", 0.5, **settings)
    write((pair[0], scaled(pair, tmp_path / "lora", 0.5, **settings)), tmp_path / "merged", 0.0)
    whole, merged = (read_checkpoint_tensors(tmp_path / name) for name in ("whole", "merged"))
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=2e-6, msg=name)


def test_modules_with_their_own_alpha_are_scaled_so_by_peft(made: Maker, tmp_path: Path) -> None:
    pair = made(CASES["patterns, rank-stabilised"], torch.float32)
    scaled(pair, tmp_path / "lora", 0.5, **OWN)
    given, made_of = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), folder)
        for folder in (pair[1], tmp_path / "lora")
    )
    factors = {}
    layers = dict(made_of.named_modules())
    for name, layer in given.named_modules():
        if isinstance(layer, LoraLayer):
            found = layers[name].scaling["default"] / layer.scaling["default"]
            factors[name.removeprefix("base_model.model.model.layers.")] = round(found, 9)
    assert factors == {
        "0.self_attn.q_proj": 3.0, "0.self_attn.v_proj": 1.0, "0.mlp.down_proj": 1.5,
        "1.self_attn.q_proj": 3.0, "1.self_attn.v_proj": 0.75, "1.mlp.down_proj": 0.75,
    }  # fmt: skip


def test_a_name_in_alpha_pattern_is_that_module_alone(tmp_path: Path) -> None:
    """PEFT's patterns match ends of names: `head` would be `other.head` too."""
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "alpha_pattern": {"q": 8}}
    settings = read_settings(write_adapter(tmp_path / "lora", {}, **given) / CONFIG)
    modules = {"head": 1.0, "other.head": 0.5, "a.q": 0.5, "a_q": 0.5}
    made = scaled_config(given, settings, modules, 0.5)
    assert made == {**given, "lora_alpha": 9, "alpha_pattern": {"^head": 12, r"^a\.q": 12}}
    assert list(made) == list(given)
    written = read_settings(write_adapter(tmp_path / "made", {}, **made) / CONFIG)
    assert {name: written.alpha_of(name) for name in modules} == {"head": 12, "other.head": 9, "a.q": 12, "a_q": 9}


def test_patterns_stay_where_one_alpha_holds_for_all(made: Maker, tmp_path: Path) -> None:
    pair = made(CASES["patterns"], torch.float32)
    given, out = config_of(pair[1]), config_of(scaled(pair, tmp_path / "out", 0.3))
    assert out == {
        **given,
        "lora_alpha": 6 * 1.3,
        "alpha_pattern": {key: value * 1.3 for key, value in given["alpha_pattern"].items()},
    }
    assert list(out["alpha_pattern"]) == list(given["alpha_pattern"])


# --- embeddings and heads -----------------------------------------------------------------------------------------


def test_a_tied_head_goes_with_its_embedding(made: Maker, tmp_path: Path) -> None:
    case = tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    pair = made(case, torch.float32)
    write(pair, tmp_path / "whole", 0.5)
    base, whole = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (pair[0], tmp_path / "whole")
    )
    adapted = PeftModel.from_pretrained(base, scaled(pair, tmp_path / "lora", 0.5))
    torch.testing.assert_close(logits(adapted), logits(whole), rtol=0, atol=1e-4)


def test_of_a_grown_vocabulary_the_common_rows_are_extrapolated(made: Maker, tmp_path: Path) -> None:
    sft, _ = made((llama, PLAIN), torch.float32)
    grown = AutoModelForCausalLM.from_pretrained(sft)
    grown.resize_token_embeddings(70)
    grown.save_pretrained(tmp_path / "grown")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    )
    pair = sft, save_adapter(tmp_path / "grown", tmp_path / "lora", config)
    write(pair, tmp_path / "whole", 0.5, vocab="common")
    out = load_file(scaled(pair, tmp_path / "out", 0.5, vocab="common") / WEIGHTS)
    whole = read_checkpoint_tensors(tmp_path / "whole")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(out[f"base_model.model.{name}"], whole[name])
    embedding = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "lm_head"])
    pair = sft, save_adapter(tmp_path / "grown", tmp_path / "factors", embedding)
    with pytest.raises(InputError, match=r"--as-adapter cannot scale lm_head\.weight, of which the adapter"):
        scaled(pair, tmp_path / "none", 0.5, vocab="common")


# --- vLLM ---------------------------------------------------------------------------------------------------------

ANSWERS = """
import gc, json, sys
from expo.engines.vllm_tools import prepare_environment

prepare_environment()
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

given = json.loads(sys.argv[1])
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)

def start(model, **settings):
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "seed": 0, "skip_tokenizer_init": True}
    return LLM(model, kv_cache_memory_bytes=1 << 26, **usual, **settings)

def ask(engine, **settings):
    prompts = [{"prompt_token_ids": list(range(first, first + 10))} for first in range(3, 53, 5)]
    return [list(one.outputs[0].token_ids) for one in engine.generate(prompts, greedy, use_tqdm=False, **settings)]

def main():
    engine = start(given["base"], enable_lora=True, max_lora_rank=64)
    found = {"base": ask(engine)}
    for number, (name, folder) in enumerate(given["adapters"].items(), start=1):
        found[name] = ask(engine, lora_request=LoRARequest(name, number, folder))
    try:
        engine.generate([{"prompt_token_ids": [3]}], greedy, lora_request=LoRARequest("whole", 99, given["refused"]))
    except Exception as error:
        found["refused"] = str(error)
    for name, folder in given["checkpoints"].items():
        del engine
        gc.collect()
        engine = start(folder)
        found[f"checkpoint {name}"] = ask(engine)
    print(json.dumps(found))

if __name__ == "__main__":
    main()
"""


def approximated(base: Path, folder: Path) -> Path:
    """An adapter of rank 48, and in smaller layers less, to a base, of a DPO model that differs in all tensors."""
    torch.manual_seed(4)
    tensors = read_checkpoint_tensors(base)
    shutil.copytree(base, folder / "dpo")
    write_checkpoint(folder / "dpo", {name: one + 0.05 * torch.randn_like(one) for name, one in tensors.items()})
    return scaled((base, folder / "dpo"), folder / "ranked", 0.5, rank=48, alpha_for=("q_proj=2",))


@pytest.mark.full  # in CI vLLM's server answers with adapters, one of them with patterns: `test_lora_server.py`
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_answers_with_it_as_with_the_checkpoint(made: Maker, run_warm: Run, tmp_path: Path) -> None:
    """With one scaling for all modules, with an α of their own over patterns and rsLoRA, and of two checkpoints.

    What vLLM should answer with the last one PEFT does.
    """
    cases = {"uniform": ("all linear", {}), "own": ("patterns, rank-stabilised", OWN)}
    folders = {}
    for name, (case, settings) in cases.items():
        pair = made((wide_llama, CASES[case][1]), torch.float32)
        write(pair, tmp_path / f"whole-{name}", 0.5, **settings)
        folders[name] = str(scaled(pair, tmp_path / name, 0.5, **settings))
    shutil.copytree(folders["own"], tmp_path / "without")
    (tmp_path / "without" / CONFIG).write_text(json.dumps({**config_of(tmp_path / "own"), "alpha_pattern": {}}))
    base, saved = made((wide_llama, CASES["saved modules"][1]), torch.float32)
    ranked = approximated(base, tmp_path)
    given = {
        "base": str(base),
        "adapters": {**folders, "without": str(tmp_path / "without"), "ranked": str(ranked)},
        "checkpoints": {name: str(tmp_path / f"whole-{name}") for name in cases},
        "refused": str(scaled((base, saved), tmp_path / "saved", 0.5)),
    }
    (tmp_path / "answers.py").write_text(ANSWERS)
    done = run_warm(tmp_path / "answers.py", json.dumps(given))
    assert done.code == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in cases:
        assert found[name] == found[f"checkpoint {name}"] != found["base"], name
    assert found["without"] != found["own"], "it reads alpha_pattern"
    assert "modules_to_save" in found["refused"], "what the command warns of"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts = torch.tensor([list(range(first, first + 10)) for first in range(3, 53, 5)])
    assert found["ranked"] == greedy(PeftModel.from_pretrained(model, ranked), prompts) != found["base"]


# --- what is recorded, and what goes along ------------------------------------------------------------------------


@pytest.fixture
def by_hand(tmp_path: Path) -> Pair:
    """A base with two modules and an adapter to one, with a tokenizer."""
    torch.manual_seed(2)
    base = {"model.up.weight": torch.randn(40, 24), "model.norm.weight": torch.randn(24)}
    prefix = "base_model.model.model.up"
    factors = {f"{prefix}.lora_A.weight": torch.randn(3, 24), f"{prefix}.lora_B.weight": torch.randn(40, 3)}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "sft"}
    lora = write_adapter(tmp_path / "lora", factors, **config)
    (lora / "tokenizer.json").write_text("{}")
    (lora / "LICENSE").write_text("mine")
    (lora / "training_args.bin").write_text("left")
    return write_checkpoint(tmp_path / "sft", base, files={"config.json": "{}"}), lora


def test_the_folder_is_an_adapters(by_hand: Pair, tmp_path: Path) -> None:
    out = tree(scaled(by_hand, tmp_path / "out", 0.25))
    assert out.keys() == {WEIGHTS, CONFIG, "tokenizer.json", "LICENSE", "README.md", "expo.json"}
    manifest = json.loads(out["expo.json"])
    assert manifest["fingerprint"]["as_adapter"] is True
    assert manifest["config"]["as_adapter"] is True
    assert manifest["tensors"] == {"merged": 1, "extrapolated": 0, "copied": 1, "equal": 0}
    assert manifest["shards"].keys() == {WEIGHTS}
    assert "delta" not in manifest, "it would be that of the tensors stored whole"
    assert set(manifest["files"]) == out.keys() - {"expo.json"}
    card = out["README.md"].decode()
    assert "# lora-ExPO-a0.25-adapter" in card
    assert "library_name: peft" in card
    assert "--as-adapter" in card
    assert config_of(tmp_path / "out") == {**config_of(by_hand[1]), "lora_alpha": 7.5}


def test_the_card_of_an_adapter_to_a_model_on_the_hub(by_hand: Pair, tmp_path: Path) -> None:
    from expo.output.adapter_card import adapter_card

    sft, dpo = Location(by_hand[0], "base", "org/base", "0a1b"), Location(by_hand[1], "lora", "org/lora", "2c3d")
    card = adapter_card(title="t", alpha=0.3, formula="f", sft=sft, dpo=dpo, command="expo", figures={})
    assert "base_model:\n- org/base\nbase_model_relation: adapter\n" in card
    assert "| θ_dpo | org/lora, a LoRA adapter on θ_sft | 2c3d |" in card


@pytest.mark.parametrize(
    ("trained_on", "hub_id", "recorded"),
    [
        ("org/base", "org/base", "org/base"),
        ("org/other", "org/base", "org/base"),
        (None, "org/base", "org/base"),
        ("org/base", None, "org/base"),
        ("sft", None, "sft"),
        ("/gone/elsewhere", None, "{sft}"),
        ("", None, "{sft}"),
    ],
)
def test_the_base_in_the_config(by_hand: Pair, trained_on: str | None, hub_id: str | None, recorded: str) -> None:
    file = by_hand[1] / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": trained_on}))
    sft, dpo = map(str, by_hand)
    job = plan(ExtrapolateConfig(sft=sft, dpo=dpo, alpha=(0.5,), as_adapter=True, output="none"))
    object.__setattr__(job, "sft", Location(by_hand[0], hub_id.split("/")[1] if hub_id else "sft", hub_id))
    made = json.loads(adapter_config(job, job.pair, 0.5))  # type: ignore[arg-type]
    assert made["base_model_name_or_path"] == recorded.format(sft=by_hand[0])


def test_the_default_output_says_what_it_is(by_hand: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ExtrapolateConfig(sft="sft", dpo="lora", alpha=(0.3,), as_adapter=True, fsync=False)
    (written,) = extrapolate.run(config)
    assert str(written.path) == "checkpoints/lora-ExPO-a0.3-adapter"
    assert [one.status for one in extrapolate.run(config)] == ["already complete"]
    extrapolate.run(ExtrapolateConfig(sft="sft", dpo="lora", alpha=(0.3,), fsync=False))
    assert {path.name for path in Path("checkpoints").iterdir()} == {"lora-ExPO-a0.3", "lora-ExPO-a0.3-adapter"}


def test_a_checkpoint_is_replaced_only_if_asked_for(by_hand: Pair, tmp_path: Path) -> None:
    write(by_hand, tmp_path / "out", 0.3)
    with pytest.raises(InputError, match=r"a different as-adapter \(False then, True now\); --overwrite"):
        scaled(by_hand, tmp_path / "out", 0.3)
    scaled(by_hand, tmp_path / "out", 0.3, overwrite=True)
    assert not (tmp_path / "out" / "config.json").exists()
    write(by_hand, tmp_path / "out", 0.3, overwrite=True)
    assert not (tmp_path / "out" / CONFIG).exists()


def test_verify_finds_what_was_damaged(by_hand: Pair, tmp_path: Path) -> None:
    (first,) = write(by_hand, tmp_path / "out", 0.3, as_adapter=True, verify=True)
    (again,) = write(by_hand, tmp_path / "out", 0.3, as_adapter=True, verify=True)
    assert (first.status, again.status) == ("written", "already complete")
    file = tmp_path / "out" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing or damaged"):
        scaled(by_hand, tmp_path / "out", 0.3, verify=True)


def test_it_can_be_extrapolated_further(by_hand: Pair, tmp_path: Path) -> None:
    """Its change is 1 + α of DPO's, so that two steps make one."""
    once, twice = scaled(by_hand, tmp_path / "once", 0.5), tmp_path / "twice"
    scaled((by_hand[0], once), twice, 1.0)
    assert config_of(twice)["lora_alpha"] == config_of(scaled(by_hand, tmp_path / "both", 2.0))["lora_alpha"] == 18


@pytest.mark.parametrize(("case", "warns"), [("plain", False), ("saved modules", True), ("all biases", True)])
def test_what_vllm_does_not_take_is_warned_of(
    made: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, warns: bool
) -> None:
    scaled(made(CASES[case], torch.float32), tmp_path / "out", 0.3)
    assert ("the output is for PEFT, and vLLM does not take it" in caplog.text) == warns


def test_experts_with_their_own_alpha_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT fuses them, and gives them lora_alpha (`_convert_peft_config_moe`)."""
    names = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(2)]
    sft = write_checkpoint(tmp_path / "sft", {f"{name}.weight": torch.randn(6, 4) for name in names})
    factors = {"lora_A.weight": torch.randn(2, 4), "lora_B.weight": torch.randn(6, 2)}
    stored = {f"base_model.model.{name}.{side}": factors[side].clone() for name in names for side in factors}
    pair = sft, write_adapter(tmp_path / "lora", stored, peft_type="LORA", r=2, lora_alpha=2)
    scaled(pair, tmp_path / "out", 0.5)
    assert "α of their own" not in caplog.text
    scaled(pair, tmp_path / "own", 0.5, exclude=("experts.1",))
    assert "1 experts have an α of their own (model.layers.0.mlp.experts.1.up_proj …)" in caplog.text


# --- killed -------------------------------------------------------------------------------------------------------

KILLED = """
import json, shutil, sys
from pathlib import Path
from crashes import die_at, ended, finished, forked, run, tree, warm_up

sft, dpo, folder = map(Path, sys.argv[1:4])
stride, sys.stdout, results = int(sys.argv[4]), sys.stderr, sys.stdout

def command(output):
    return run(sft, dpo, output, "--alpha", "0.3", "--as-adapter", *sys.argv[5:])

def broken(output, step):
    die_at(step, output)
    return command(output)

warm_up(sft, dpo, folder)
assert ended(forked(lambda: command(folder / "whole"))) == 0
whole, output, wrong, kills = finished(folder / "whole"), folder / "out", [], 0
for step in range(0, 10_000, stride):
    code = ended(forked(lambda: broken(output, step)))
    left = {name for name in tree(output) if not name.startswith(".expo-partial")}
    if "adapter_config.json" in left and left != {*whole}:
        wrong.append(f"at {step} it loads, and is not whole: {sorted(left)}")
    if ended(forked(lambda: command(output))) or finished(output) != whole:
        wrong.append(f"after {step} the rerun ended otherwise")
    shutil.rmtree(output)
    if code == 0:
        break
    kills += 1
print(json.dumps([kills, wrong]), file=results)
"""


def require_same_after_kills(pair: Pair, folder: Path, *words: object) -> None:
    """Killed at changes of the disk, the command leaves nothing that loads and is not whole, and ends the same."""
    stride, env = sized(ci=5, full=1), {"PYTHONPATH": str(Path(__file__).parent)}
    done = run_python(KILLED, *pair, folder, stride, *words, env=env, timeout=300)
    assert done.code == 0, done.stderr
    kills, wrong = json.loads(done.stdout.splitlines()[-1])
    assert wrong == []
    assert kills > 5


@pytest.mark.slow
def test_a_killed_run_is_continued_to_the_same_bytes(made: Maker, tmp_path: Path) -> None:
    require_same_after_kills(made(CASES["saved modules"], torch.float32), tmp_path)


# --- what is refused: exit code 2, one line, nothing written ------------------------------------------------------


@pytest.fixture
def expo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`expo extrapolate --as-adapter` in this process, on the inputs it is given."""

    def run(pair: Pair, *args: object) -> Result:
        code = cli.run(["extrapolate", "--sft", str(pair[0]), "--dpo", str(pair[1]), "--as-adapter", *map(str, args)])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def zero(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def spoiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def whole_model(root: Path) -> None:
    shutil.rmtree(root / "lora")
    write_checkpoint(root / "lora", {"model.up.weight": torch.ones(40, 24), "model.norm.weight": torch.ones(24)})


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "a whole checkpoint": (whole_model, (), "--as-adapter scales the LoRA adapter that --dpo is, and lora is a whole"),
    "an untrained adapter": (lambda root: edit(root / "lora", zero), (), "SFT and DPO have the same weights"),
    "NaN": (lambda root: edit(root / "lora", spoiled), (), "the LoRA factors of lora contain NaN or infinity"),
    "a wrapper's name": (
        lambda root: edit(root / "lora", renamed("model.up", "_orig_mod.model.up")),
        (),
        "PEFT does not read one of the name base_model.model._orig_mod.model.up.lora_A.weight: load it with peft",
    ),
    "an adapter's own name": (
        lambda root: edit(root / "lora", renamed(".weight", ".default.weight")),
        (),
        "PEFT does not read one of the name base_model.model.model.up.lora_A.default.weight: load it with peft",
    ),
    "an output inside": (lambda root: None, ("--output", "{root}/lora/out"), "or lies inside it"),
    "nothing is scaled": (lambda root: None, ("--exclude", "up"), "no tensor would be extrapolated"),
    "a pattern without a tensor": (lambda root: None, ("--alpha-for", "down=1"), "--alpha-for 'down' matches no"),
    "too much": (lambda root: None, ("--alpha-for", "up=1e30"), "lora_alpha 6 times 1 + α, 1e+30, is too large"),
    "a dtype": (lambda root: None, ("--dtype", "float32"), "keeps the types of the adapter's tensors: leave out --dt"),
    "a size": (lambda root: None, ("--max-shard-size", "1GB"), "writes one small file: leave out --max-shard-size"),
    "a part": (lambda root: None, ("--part", "0/2"), "--as-adapter writes one small file: leave out --part"),
    "joining": (lambda root: None, ("--join", "2"), "--as-adapter writes one small file: leave out --join"),
    "processes": (lambda root: None, ("--data-parallel", "2"), "writes one small file: leave out --data-parallel"),
    "a cluster": (lambda root: None, ("--ray", "auto"), "--as-adapter writes one small file: leave out --ray"),
    "streaming": (
        lambda root: None,
        ("--stream-sft",),
        "--as-adapter reads SFT from its files: leave out --stream-sft",
    ),
    "another rule": (lambda root: None, ("--rule", "clipped"), "which is the rule linear alone: leave out --rule"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    prepare, args, message = REFUSED[case]
    prepare(tmp_path)
    before = tree(tmp_path)
    given = [word.format(root=tmp_path) for word in args]
    output = [] if "--output" in given else ["--output", tmp_path / "out"]
    result = expo(by_hand, "--alpha", 0.3, *output, *given)
    assert result.code == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert tree(tmp_path) == before


def test_a_training_runs_checkpoints_are_refused(by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    args = ("--checkpoint", f"100={by_hand[1]}", "--target-step", 200, "--output", tmp_path / "out")
    result = expo(by_hand, *args)
    assert result.code == 2
    assert "--as-adapter takes a pair, not yet a training run's checkpoints: leave out --checkpoint" in result.stderr


def test_nan_is_written_where_it_is_allowed(by_hand: Pair, tmp_path: Path) -> None:
    edit(by_hand[1], spoiled)
    scaled(by_hand, tmp_path / "out", 0.3, allow_nonfinite=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (by_hand[1] / WEIGHTS).read_bytes()


def test_a_dry_run_writes_nothing(by_hand: Pair, tmp_path: Path, expo: Callable[..., Result]) -> None:
    result = expo(by_hand, "--alpha", 0.3, "--output", tmp_path / "out", "--dry-run", "--json")
    assert result.code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["tensors"] == {"merged": 1, "extrapolated": 0, "copied": 1, "equal": 0}
    assert [shard["file"] for shard in said["shards"]] == [WEIGHTS]
    assert said["bytes_per_output"] == (by_hand[1] / WEIGHTS).stat().st_size
    assert not (tmp_path / "out").exists()


def test_biases_of_an_adapter_have_their_own_patterns(made: Maker, tmp_path: Path) -> None:
    pair = made((qwen, {"target_modules": ["q_proj"], "bias": "lora_only"}), torch.float32)
    settings = {"exclude": (r"layers\.0\..*bias",), "alpha_for": (r"bias=2",)}
    out = load_file(scaled(pair, tmp_path / "lora", 0.5, **settings) / WEIGHTS)
    write(pair, tmp_path / "whole", 0.5, **settings)
    whole = read_checkpoint_tensors(tmp_path / "whole")
    biases = {name: tensor for name, tensor in out.items() if name.endswith(".bias")}
    assert len(biases) == 2
    for name, tensor in biases.items():
        assert torch.equal(tensor, whole[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    assert config_of(tmp_path / "lora")["lora_alpha"] == 9
