"""generate on θ(α) without a checkpoint of it, with transformers: the rows of the written checkpoint, and refusals."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from expo import recipes
from expo.cli import program as cli
from expo.config import GenerateConfig
from expo.engines.transformers import _load
from expo.errors import InputError
from expo.verbs import generate as verb

PROMPTS = [" ".join(f"w{(3 * row + word) % 50}" for word in range(1 + row % 7)) for row in range(12)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


def settings(task: Path, **others: Any) -> GenerateConfig:
    defaults = {"engine": "transformers", "device": "cpu", "max_tokens": 9, "batch_tokens": 60}
    return GenerateConfig(task=str(task), output_dir=str(task.parent), **{**defaults, **others})


def of_pair(pair: helpers.Pair, alpha: float = 0.5, **rules: Any) -> dict[str, Any]:
    return {"sft": str(pair[0]), "dpo": str(pair[1]), "alpha": alpha, **rules}


# --- the same rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_are_those_of_the_written_checkpoint(llama_pair, task, tmp_path, dtype, temperature):
    helpers.write(llama_pair, tmp_path / "written", 1.5, exclude=("norm",))
    decoding = {"dtype": dtype, "temperature": temperature}
    theta = verb.run(settings(task, **of_pair(llama_pair, 1.5, exclude=("norm",)), **decoding))
    written = verb.run(settings(task, model=str(tmp_path / "written"), **decoding))
    dpo = verb.run(settings(task, model=str(llama_pair[1]), **decoding))
    assert theta.output.name == "dpo-ExPO-a1.5.jsonl"
    assert theta.output.read_bytes() == written.output.read_bytes() != dpo.output.read_bytes()


def test_a_rerun_is_complete_and_another_alpha_or_rule_is_refused(llama_pair, task):
    def run(alpha: float = 0.5, **rules: Any):
        return verb.run(settings(task, name="mine", **of_pair(llama_pair, alpha, **rules)))

    assert run().status == "written"
    assert run(allow_pickle=True).status == "already complete"
    for change, named in (
        ({"alpha": 0.6}, "alpha"),
        ({"exclude": ("norm",)}, "exclude"),
        ({"vocab": "common"}, "vocab"),
    ):
        with pytest.raises(InputError, match=f"made with a different {named} "):
            run(**change)
    with pytest.raises(InputError, match="made with a different"):
        verb.run(settings(task, name="mine", model=str(llama_pair[1])))


def test_the_meta_file_says_what_answered(llama_pair, task):
    meta = json.loads(verb.run(settings(task, **of_pair(llama_pair))).meta.read_text())
    assert meta["sft"] == {"name": "sft", "revision": None}
    assert meta["dpo"] == {"name": "dpo", "revision": None}
    assert (meta["alpha"], meta["config"]["alpha"], meta["config"]["model"]) == (0.5, 0.5, None)


def test_the_plan_names_the_pair_and_writes_nothing(llama_pair, task):
    plan = verb.plan(settings(task, **of_pair(llama_pair, -0.0))).describe()
    assert (plan["sft"], plan["dpo"], plan["alpha"]) == (str(llama_pair[0]), str(llama_pair[1]), 0.0)
    assert plan["tensors"]["extrapolated"] == 21
    assert list(task.parent.iterdir()) == [task]


# --- what the model is made of ------------------------------------------------------------------------------------


def loaded(task: Path, **given: Any) -> dict[str, torch.Tensor]:
    work = verb.plan(settings(task, **given))
    return _load(work.setup, "cpu")[0].state_dict()


def test_fused_experts_are_those_of_the_written_checkpoint(llama_pair, task, tmp_path):
    """transformers stacks the experts of a file; so it must those of θ(α)."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=3, **shape)
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    for side in ("sft", "dpo"):
        model.save_pretrained(tmp_path / side)
        AutoTokenizer.from_pretrained(llama_pair[0]).save_pretrained(tmp_path / side)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    pair = tmp_path / "sft", tmp_path / "dpo"
    assert any(".experts.2." in name for name in load_file(pair[1] / "model.safetensors"))
    helpers.write(pair, tmp_path / "written")
    theta, written = loaded(task, **of_pair(pair)), loaded(task, model=str(tmp_path / "written"))
    assert theta.keys() == written.keys()
    assert all(torch.equal(theta[name], written[name]) for name in written)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", ["nothing", "template", "tokenizer"])
def test_an_adapter_answers_with_its_bases_config_and_its_own_tokenizer(llama_pair, task, tmp_path, own):
    from adapters import save_adapter
    from peft import LoraConfig
    from transformers import AutoTokenizer

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    adapter = save_adapter(llama_pair[0], tmp_path / "adapter", lora)
    if own == "template":
        (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }} w7")
    if own == "tokenizer":
        AutoTokenizer.from_pretrained(llama_pair[0]).save_pretrained(adapter)
    pair = llama_pair[0], adapter
    helpers.write(pair, tmp_path / "written")
    theta = verb.run(settings(task, **of_pair(pair)))
    written = verb.run(settings(task, model=str(tmp_path / "written")))
    assert theta.output.name == "adapter-ExPO-a0.5.jsonl"
    assert theta.output.read_bytes() == written.output.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [64, 72])
def test_an_adapter_that_changes_its_bases_config_is_loaded_as_written(llama_pair, task, tmp_path, rows):
    """The base ties its head, the merged model does not; and there may be more tokens."""
    from adapters import llama, save_adapter
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, size in (("sft", 64), ("resized", rows)):
        torch.manual_seed(0)
        model = llama(tied=True)
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(llama_pair[0]).save_pretrained(tmp_path / name)
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    pair = tmp_path / "sft", save_adapter(tmp_path / "resized", tmp_path / "adapter", lora)
    helpers.write(pair, tmp_path / "written", vocab="common")
    theta, written = (
        loaded(task, **of_pair(pair), vocab="common"),
        loaded(task, model=str(tmp_path / "written")),
    )
    assert all(torch.equal(theta[name], written[name]) for name in written)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert model.lm_head.weight.shape[0] == rows
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_adapter_as_the_model_says_how_to_give_it(llama_pair, task, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="--model adapter is an adapter: give it as --dpo, the model"):
        verb.plan(GenerateConfig(task=str(task), model=str(tmp_path / "adapter"), engine="transformers"))


def test_the_linked_folder_of_an_adapter_goes_with_its_plan(llama_pair, task, tmp_path, monkeypatch):
    folder = tmp_path / "links"
    monkeypatch.setattr("expo.verbs.generate.model.tempfile.mkdtemp", lambda **_: folder.mkdir() or str(folder))
    (tmp_path / "adapter").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    factors = {f"{name}_A.weight": torch.ones(2, 32), f"{name}_B.weight": torch.ones(32, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    work = verb.plan(settings(task, **of_pair((llama_pair[0], tmp_path / "adapter"))))
    assert (folder / "config.json").is_symlink()
    del work
    gc.collect()
    assert not folder.exists()


# --- refusals -----------------------------------------------------------------------------------------------------


def test_what_turns_up_while_loading_is_one_error(llama_pair, task, tmp_path):
    for side in (0, 1):
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copytree(llama_pair[side], tmp_path / "bad" / str(side))
    shard = next((tmp_path / "bad" / "1").glob("*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    pair = of_pair((tmp_path / "bad" / "0", tmp_path / "bad" / "1"))
    with pytest.raises(InputError, match="contains NaN or infinity"):
        verb.run(settings(task, **pair))
    assert verb.run(settings(task, **pair, allow_nonfinite=True)).status == "written"


def test_a_tensor_that_both_sides_lack_is_refused_in_the_plan(llama_pair, task, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    for side, model in zip(("sft", "dpo"), llama_pair, strict=True):
        shutil.copytree(model, tmp_path / side, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors = helpers.read_checkpoint_tensors(model)
        del tensors[name]
        save_file(tensors, tmp_path / side / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"dpo lacks {name}, which LlamaForCausalLM reads"):
        verb.plan(settings(task, **of_pair((tmp_path / "sft", tmp_path / "dpo"))))


def test_the_same_weights_twice_are_refused(llama_pair, task, tmp_path):
    shutil.copytree(llama_pair[1], tmp_path / "copy")
    with pytest.raises(InputError, match="SFT and DPO have the same weights"):
        verb.run(settings(task, **of_pair((tmp_path / "copy", llama_pair[1]))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no model given: pass --model, or --sft, --dpo and --alpha"),
        ({"sft": "s"}, "θ(α) needs --sft, --dpo and --alpha; missing: --dpo, --alpha"),
        ({"sft": "s", "dpo": "d"}, "missing: --alpha"),
        (
            {"model": "m", "alpha": 0.3},
            "--model and --alpha cannot be combined: give either --model, or --sft, --dpo and --alpha",
        ),
        (
            {"model": "m", "exclude": ("a",)},
            "--exclude cannot be combined with --model, only with --sft, --dpo and --alpha",
        ),
        ({"model": "m", "allow_pickle": True}, "--allow-pickle cannot be combined with --model"),
        ({"sft": "s", "dpo": "d", "alpha": float("inf")}, "--alpha must be a finite number, not inf"),
        ({"sft": "s", "dpo": "d", "alpha": 1e39}, "--alpha 1e+39 exceeds the range of float32"),
        ({"sft": "s", "dpo": "d", "alpha": 1.0, "alpha_for": ("a",)}, "--alpha-for must be REGEX=A"),
    ],
)
def test_settings_that_do_not_say_what_answers(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        GenerateConfig(task="alpaca", **given)
    assert message in str(caught.value)


# --- which of a recipe's two is meant -----------------------------------------------------------------------------

RECIPE = """
[recipe]
source = "x"
[extrapolate]
sft = "recipe/sft"
dpo = "recipe/dpo"
alpha = [0.25]
[generate]
model = "recipe/dpo"
max_tokens = 7
"""


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GenerateConfig]:
    """The config that `expo generate` makes of flags and a file, with a recipe named `known` at hand."""
    (tmp_path / "Known.toml").write_text(RECIPE)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    made: list[GenerateConfig] = []

    def stop(config: GenerateConfig) -> None:
        made.append(config)
        raise InputError("enough")

    monkeypatch.setattr(verb, "run", stop)

    def run(flags: str, toml: str = "") -> GenerateConfig:
        (tmp_path / "expo.toml").write_text(toml)
        assert cli.run(["generate", "alpaca", "--config", str(tmp_path / "expo.toml"), *flags.split()]) == 2
        return made.pop()

    return run


@pytest.mark.parametrize(
    ("flags", "toml", "expected"),
    [
        ("--recipe known", "", ("recipe/dpo", None, None, None)),
        ("--recipe known --alpha 0.5", "", (None, "recipe/sft", "recipe/dpo", 0.5)),
        ("--recipe known --sft mine", "", (None, "mine", "recipe/dpo", 0.25)),
        ("--recipe known --model mine", "", ("mine", None, None, None)),
        ("--recipe known", "[generate]\nalpha = 0.5", (None, "recipe/sft", "recipe/dpo", 0.5)),
        ("--recipe known --model mine", "[generate]\nalpha = 0.5", ("mine", None, None, None)),
        ("--alpha 0.5", '[common]\nsft = "s"\ndpo = "d"\nalpha = [1, 2]\n', (None, "s", "d", 0.5)),
        ("", '[common]\nsft = "s"\ndpo = "d"\nalpha = [1]\n', (None, "s", "d", 1.0)),
        ("", '[common]\nsft = "s"\nalpha = [1]\nexclude = ["x"]\n[generate]\nmodel = "m"\n', ("m", None, None, None)),
        ("--model mine", '[common]\nsft = "s"\ndpo = "d"\n', ("mine", None, None, None)),
    ],
)
def test_what_counts_most_decides_what_answers(resolve, flags: str, toml: str, expected: tuple[object, ...]) -> None:
    made = resolve(flags, toml)
    assert (made.model, made.sft, made.dpo, made.alpha) == expected
    assert made.max_tokens == (7 if "--recipe" in flags else 2048)


def test_a_flag_for_each_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "alpaca", "--model", "m", "--alpha", "0.5", "--recipe", "zephyr-7b-beta"]) == 2
    assert "--model and --alpha cannot be combined" in capsys.readouterr().err
