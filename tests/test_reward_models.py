"""Reward models of every kind: their rewards against a plain loop as their cards write it, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_score import ROWS, numbers, settings, write_outputs
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from expo.engines import SCORERS, EngineSpec, reward_adapters, reward_loading as loading, transformers_reward as backend
from expo.engines.reward_models import ADAPTER, BROUGHT, CLASSIFIER, HEADED, PAIRS, find_reward_model, kind_of
from expo.engines.reward_tokens import PairTokenizer, pair_of, token_types
from expo.errors import EnvironmentFailure, InputError, MissingExtra
from expo.verbs import score as verb

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
BATCHES = (1, 10_000)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return write_outputs(tmp_path)


def same(rewards: list[float | None], expected: list[float]) -> None:
    """The law: in float32, to 1e-5 of the larger of 1 and the reward; and they are rewards, not one number."""
    assert len(rewards) == len(expected)
    for number, (one, other) in enumerate(zip(rewards, expected, strict=True)):
        assert one is not None
        assert abs(one - other) <= 1e-5 * max(1, abs(other)), number
    assert len({round(value, 4) for value in expected}) > len(expected) // 2


def score(model: Path, folder: Path, **others: Any) -> list[float | None]:
    return numbers(verb.run(settings(model, folder, **others)).rewards)


def spread(model: nn.Module) -> nn.Module:
    """Weights so large that every token, position and type moves the output."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# --- encoders of text pairs ----------------------------------------------------------------------------------------

FRAMES = {
    "bert": ("[CLS]", "[SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"),
    "roberta": ("<s>", "</s>", "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0"),
}


def pair_tokenizer(frame: str, *, types: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    start, end, pair = FRAMES[frame]
    special = ["[PAD]", start, end, "[UNK]", "[MASK]"]
    words = [*special, *"[]<>/", "SEP", "CLS", "s", *(f"w{number}" for number in range(50))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:0 {end}:0", pair=pair, special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token=start,
        sep_token=end,
        mask_token="[MASK]",
        model_input_names=names,
    )


SMALL = {"num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
ENCODERS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "bert": ("Bert", "bert", True, {}),
    "electra": ("Electra", "bert", True, {"embedding_size": 16}),
    "deberta v3": ("DebertaV2", "bert", True, {**DEBERTA, "type_vocab_size": 0}),
    "deberta with types": ("DebertaV2", "bert", True, {**DEBERTA, "type_vocab_size": 2}),
    "modernbert": ("ModernBert", "bert", False, {"global_attn_every_n_layers": 1}),
    "roberta": ("Roberta", "roberta", False, {}),
    "distilbert": ("DistilBert", "bert", False, {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}),
    "bart": ("Bart", "roberta", False, {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "eos_token_id": 2}),
}


def encoder(case: str, folder: Path, **others: Any) -> Path:
    name, frame, types, more = ENCODERS[case]
    config = getattr(transformers, f"{name}Config")(
        **{**SIZES, "max_position_embeddings": 66, **SMALL, **more, **others}
    )
    torch.manual_seed(0)
    spread(AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    pair_tokenizer(frame, types=types).save_pretrained(folder)
    return folder


def as_its_card_says(model: Path, pairs, **options: Any) -> list[float]:
    """A plain loop: `model(**tokenizer(question, answer)).logits`, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            reference(**tokenizer(question, answer, return_tensors="pt", **options)).logits[0, 0].item()
            for question, answer in pairs
        ]


unread = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers cannot read such a config that it wrote"
)


@pytest.mark.parametrize("case", [pytest.param(one, marks=unread if one == "modernbert" else ()) for one in ENCODERS])
def test_encoders_are_given_question_and_answer_as_a_pair(outputs, tmp_path, case):
    model = encoder(case, tmp_path / "rm")
    expected = as_its_card_says(model, ROWS)
    for batch_tokens in BATCHES:
        same(score(model, tmp_path, batch_tokens=batch_tokens, name="m", overwrite=True), expected)
    assert kind_of(model) is PAIRS


def test_the_token_types_of_an_encoder_matter_and_are_those_of_the_tokenizer(tmp_path):
    model = encoder("bert", tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForSequenceClassification.from_pretrained(model).eval()
    inputs = tokenizer(*ROWS[3], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert inputs["token_type_ids"][0].tolist() == token_types(ids, tokenizer.sep_token_id)
    with torch.inference_mode():
        right, wrong = (
            reference(inputs["input_ids"], token_type_ids=one).logits.item()
            for one in (inputs["token_type_ids"], torch.zeros_like(inputs["input_ids"]))
        )
    assert abs(right - wrong) > 1e-3


SPELLED = ("w1 [SEP] w2 [CLS]", "w3 [SEP] w4 [PAD] w5 [MASK] [UNK] w6")


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    model = encoder("bert", tmp_path / "rm")
    write_outputs(tmp_path, [SPELLED, *ROWS])
    tokenizer = AutoTokenizer.from_pretrained(model)
    row = verb.plan(settings(model, tmp_path)).rows[0]
    frame = [one for one in row.token_ids if one in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    assert frame == [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.sep_token_id]
    assert not {tokenizer.pad_token_id, tokenizer.mask_token_id} & set(row.token_ids)
    words = tokenizer.convert_ids_to_tokens(row.token_ids)
    assert words[1:9] == ["w1", "[", "SEP", "]", "w2", "[", "CLS", "]"]
    same(score(model, tmp_path), as_its_card_says(model, [SPELLED, *ROWS], split_special_tokens=True))


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    spoken = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *spoken]


CONVERSATIONS = {
    "one turn": (turns("w1", "w2"), ("w1", "w2")),
    "an empty answer": (turns("w1", ""), ("w1", "")),
    "several turns": (turns("w1", "w2", "w3", "w4"), ("w1\nw2\nw3", "w4")),
    "a system message": (turns("w1", "w2", system="w9"), ("w9\nw1", "w2")),
    "no answer": (turns("w1"), ("w1", "")),
}


@pytest.mark.parametrize(("messages", "pair"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_what_stands_before_the_answer_is_the_question(messages, pair):
    assert pair_of(messages) == pair


def test_conversations_of_several_turns_are_scored_as_pairs(tmp_path):
    model = encoder("deberta v3", tmp_path / "rm")
    path = write_outputs(tmp_path)
    asked = [turns(question, "w7", "w8 w9", system="w5") for question, _ in ROWS]
    rows = [{"messages": one, "output": answer} for one, (_, answer) in zip(asked, ROWS, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [("\n".join(turn["content"] for turn in one), answer) for one, (_, answer) in zip(asked, ROWS, strict=True)]
    same(score(model, tmp_path), as_its_card_says(model, pairs))


@pytest.mark.parametrize("longest", [4, 7, 9, 12])
def test_a_pair_that_is_too_long_loses_the_answers_end_and_is_marked(outputs, tmp_path, longest):
    model = encoder("bert", tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = verb.plan(settings(model, tmp_path, max_length=longest)).rows
    for row, (question, answer) in zip(rows, ROWS, strict=True):
        asked, said = (tokenizer.convert_tokens_to_ids(text.split()) for text in (question, answer))
        frames = 3 if said else 2  # an empty text is none to the tokenizer
        asked_kept = asked[: longest - frames]
        said_kept = said[: longest - frames - len(asked_kept)]
        ending = [*said_kept, 2] if said else []
        assert list(row.token_ids) == [1, *asked_kept, 2, *ending]
        assert row.truncated == (len(tokenizer(question, answer)["input_ids"]) > longest)
    assert {row.truncated for row in rows} == {True, False} or longest == 4
    result = verb.run(settings(model, tmp_path, max_length=longest))
    assert json.loads(result.meta.read_text())["truncated"] == sum(row.truncated for row in rows)


def test_an_encoder_takes_at_most_its_positions(tmp_path):
    model = encoder("roberta", tmp_path / "rm")
    write_outputs(tmp_path, [*ROWS, ("w1", "w2 " * 100)])
    verb.run(settings(model, tmp_path))
    last = (tmp_path / "rewards_q" / "m.rows.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) | {"reward": 0} == {"id": "14", "sample": 0, "reward": 0, "tokens": 65, "truncated": True}


def test_an_encoder_with_a_chat_template_is_given_that(llama_pair, outputs, tmp_path):
    from test_score import rewards_alone

    model = encoder("deberta v3", tmp_path / "rm")
    AutoTokenizer.from_pretrained(llama_pair[1]).save_pretrained(model)
    assert kind_of(model) is CLASSIFIER
    same(score(model, tmp_path), rewards_alone(model, ROWS))


def test_a_chat_template_given_is_used_instead_of_pairs(outputs, tmp_path):
    model = encoder("bert", tmp_path / "rm")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    rows = verb.plan(settings(model, tmp_path, chat_template=str(tmp_path / "t.jinja"))).rows
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert list(rows[3].token_ids) == tokenizer(" ".join(ROWS[3]), add_special_tokens=False)["input_ids"]


def test_pairs_with_unknown_token_types_are_refused(tmp_path):
    from tokenizers import processors

    model = encoder("bert", tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0", pair="[CLS]:1 $A:0 [SEP]:1 $B:0 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=r"marks text pairs with token types \[.*\], which expo does not support"):
        PairTokenizer(model, trust_remote_code=False)


def test_a_causal_model_without_a_chat_template_is_no_encoder(llama_pair, outputs, tmp_path):
    from test_score import make_reward_model

    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="rm has no chat template; pass one with --chat-template"):
        score(model, tmp_path)


# --- adapters ------------------------------------------------------------------------------------------------------


def causal(kind: str, folder: Path, like: Path) -> Path:
    """A tiny causal model with tokenizer and chat template; its padding token is its EOS."""
    names = {"llama": "Llama", "gpt2": "GPT2", "mistral": "Mistral"}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {**SIZES, "num_key_value_heads": 2}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = getattr(transformers, f"{names[kind]}Config")(**{**sizes, **tokens})
    torch.manual_seed(0)
    spread(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, *, labels: int = 1, **others: Any) -> Path:
    """A reward adapter of random factors and a random head, as peft saves one."""
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn"] if "GPT2" in (base / "config.json").read_text() else ["q_proj", "v_proj"]
    config = LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": targets, **others})
    auto = AutoModelForCausalLM if config.task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    labelled = {} if auto is AutoModelForCausalLM else {"num_labels": labels}
    torch.manual_seed(1)
    model = get_peft_model(auto.from_pretrained(base, **labelled), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def chat_ids(folder: Path, rows=ROWS) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.apply_chat_template(turns(*row), tokenize=True, return_dict=False) for row in rows]


def read_ids(folder: Path, rows=ROWS) -> list[list[int]]:
    """Up to the last id that is read: these models' padding id is the 2 that their template ends with."""
    return [ids[: max(place for place, one in enumerate(ids) if one != 2) + 1] for ids in chat_ids(folder, rows)]


def as_peft_gives_it(base: Path, folder: Path) -> list[float]:
    """A plain loop over the base with the adapter beside it, not merged."""
    from peft import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in chat_ids(base)]


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "a larger scale": ("llama", {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 8}}),
    "dora": ("mistral", {"use_dora": True}),
    "biases and norms": ("gpt2", {"fan_in_fan_out": True, "bias": "lora_only", "modules_to_save": ["ln_f"]}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_score_as_peft_does(llama_pair, outputs, tmp_path, case):
    kind, others = ADAPTERS[case]
    base = causal(kind, tmp_path / "base", llama_pair[1])
    model = adapter(base, tmp_path / "rm", **others)
    expected = as_peft_gives_it(base, model)
    for batch_tokens in BATCHES:
        same(score(model, tmp_path, batch_tokens=batch_tokens, overwrite=True), expected)
    assert kind_of(model) is ADAPTER


def test_an_adapter_on_an_encoder_is_given_pairs(outputs, tmp_path):
    base = encoder("bert", tmp_path / "base", num_labels=1)
    model = adapter(base, tmp_path / "rm", target_modules=["query", "value"])
    from peft import PeftModel

    reference = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), model).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        expected = [reference(**tokenizer(*row, return_tensors="pt")).logits[0, 0].item() for row in ROWS]
    same(score(model, tmp_path), expected)


def test_the_head_of_an_adapter_keeps_its_float32_on_a_narrower_base(llama_pair, outputs, tmp_path):
    base = causal("llama", tmp_path / "base", llama_pair[1])
    model = adapter(base, tmp_path / "rm")
    setup = verb.plan(settings(model, tmp_path, dtype="bfloat16")).setup
    loaded = loading.load_reward_model(setup, torch.device("cpu")).model
    head = load_file(model / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, head)
    assert loaded(torch.tensor([[1, 7, 8]])).logits.dtype == torch.float32


@pytest.mark.parametrize("place", ["beside", "inside", "from the working folder", "of the hub's cache elsewhere"])
def test_the_base_is_found_where_the_adapter_says(llama_pair, outputs, tmp_path, monkeypatch, place):
    base = causal("llama", tmp_path / "base", llama_pair[1])
    model = adapter(base, tmp_path / "rm")
    recorded = {"beside": "base", "inside": "within", "from the working folder": "cwd/base"}.get(
        place, "/home/me/.cache/huggingface/hub/models--me--base/snapshots/0123/"
    )
    if place == "inside":
        base.rename(model / "within")
    elif place.startswith("from"):
        (tmp_path / "cwd").mkdir()
        base.rename(tmp_path / "cwd" / "base")
        monkeypatch.chdir(tmp_path)
    elif place.startswith("of"):
        asked = []
        local = reward_adapters.find_folder(str(base))
        monkeypatch.setattr(reward_adapters, "locate", lambda name: asked.append(name) or local)
    change(model / "adapter_config.json", base_model_name_or_path=recorded, revision="abc")
    assert len(score(model, tmp_path)) == len(ROWS)
    if place.startswith("of"):
        assert set(asked) == {"me/base@abc"}


def change(file: Path, **values: Any) -> None:
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit(folder: Path, edits: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    tensors = edits(tensors) or tensors
    save_file(tensors, folder / file, {"format": "pt"})


A_FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
BAD_ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "no head": (
        {"task_type": "CAUSAL_LM"},
        lambda _: None,
        r"rm is an adapter \(CAUSAL_LM\) of .*base without a trained score head: .*SEQ_CLS",
    ),
    "two labels": (
        {"labels": 2},
        lambda _: None,
        r"rm has 2 labels; a reward model has one \(.*score.weight is \[2, 32",
    ),
    "a factor is missing": (
        {},
        lambda rm: edit(rm, lambda t: {n: x for n, x in t.items() if n != A_FACTOR}, "adapter_model.safetensors"),
        rf"the adapter rm does not fit base: {A_FACTOR} is not in its weights",
    ),
    "a factor of another base": (
        {},
        lambda rm: edit(rm, lambda t: {**t, A_FACTOR: torch.zeros(48, 4)}, "adapter_model.safetensors"),
        rf"the adapter rm does not fit base: {A_FACTOR} is \[48, 4\], not \[32, 4\]",
    ),
    "a tensor too many": (
        {},
        lambda rm: edit(
            rm, lambda t: {**t, "base_model.model.extra.weight": torch.zeros(1)}, "adapter_model.safetensors"
        ),
        "base_model.model.extra.weight has no place in it",
    ),
    "another method": (
        {},
        lambda rm: change(rm / "adapter_config.json", peft_type="PROMPT_TUNING"),
        "rm is a PROMPT_TUNING adapter, and expo merges only LORA adapters",
    ),
    "no base": (
        {},
        lambda rm: change(rm / "adapter_config.json", base_model_name_or_path=None),
        r"rm is an adapter whose adapter_config.json names no base model: set base_model_name_or_path there",
    ),
    "a base that is gone": (
        {},
        lambda rm: change(rm / "adapter_config.json", base_model_name_or_path="/gone/base"),
        r"the base of the adapter rm is not found: no such directory: /gone/base; set base_model_name",
    ),
    "no weights": (
        {},
        lambda rm: (rm / "adapter_model.safetensors").unlink(),
        "adapter_config.json but no adapter_model",
    ),
    "a base that lacks a tensor": (
        {},
        lambda rm: edit(rm.parent / "base", lambda t: {n: x for n, x in t.items() if "norm.weight" not in n}),
        r"base lacks model\..*norm.weight .*would score with random weights",
    ),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_adapters_that_cannot_score_are_refused_by_name(llama_pair, outputs, tmp_path, monkeypatch, case):
    others, spoil, message = BAD_ADAPTERS[case]
    base = causal("llama", tmp_path / "base", llama_pair[1])
    spoil(adapter(base, tmp_path / "rm", **others))
    refused(tmp_path / "rm", tmp_path, monkeypatch, message)


def refused(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, message: str, **others: Any) -> None:
    """In the plan, before any engine starts; one line."""

    def never(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(backend, "TransformersScorer", never)
    with pytest.raises(InputError, match=message) as caught:
        verb.run(settings(model, folder, **others))
    assert "\n" not in str(caught.value)
    assert not (folder / "rewards_q").exists()


def test_without_peft_its_install_command_is_named(llama_pair, outputs, tmp_path, monkeypatch):
    model = adapter(causal("llama", tmp_path / "base", llama_pair[1]), tmp_path / "rm")
    monkeypatch.setattr(reward_adapters, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"rm is a PEFT adapter: pip install 'llm-expo\[peft\]' to score with it"):
        verb.plan(settings(model, tmp_path))


@pytest.mark.parametrize("side", ["base", "rm"])
def test_the_fingerprint_covers_the_adapter_and_its_base(llama_pair, outputs, tmp_path, side):
    base = causal("llama", tmp_path / "base", llama_pair[1])
    model = adapter(base, tmp_path / "rm")
    score(model, tmp_path)
    assert verb.run(settings(model, tmp_path)).status == "already complete"
    file = "adapter_model.safetensors" if side == "rm" else "model.safetensors"
    edit(tmp_path / side, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()}, file)
    with pytest.raises(InputError, match="a different reward-model"):
        score(model, tmp_path)


def test_the_tokenizer_is_the_adapters_own_where_it_has_one(llama_pair, outputs, tmp_path):
    base = causal("llama", tmp_path / "base", llama_pair[1])
    model = adapter(base, tmp_path / "rm")
    of_base = [list(row.token_ids) for row in verb.plan(settings(model, tmp_path)).rows]
    assert of_base == read_ids(base)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    only_template = [list(row.token_ids) for row in verb.plan(settings(model, tmp_path)).rows]
    assert only_template != of_base
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    own = [list(row.token_ids) for row in verb.plan(settings(model, tmp_path)).rows]
    assert own == [[1, *row] for row in only_template]


# --- value heads ---------------------------------------------------------------------------------------------------


class ValueHeaded(nn.Module):
    """The reward as TRL's AutoModelForCausalLMWithValueHead computes it, at the last token; the head in float32."""

    def __init__(self, base: Path, bias: bool) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        torch.manual_seed(5)
        self.summary = nn.Linear(32, 1, bias=bias)
        nn.init.normal_(self.summary.weight)

    @torch.inference_mode()
    def reward(self, ids: list[int]) -> float:
        hidden = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]  # (1, tokens, 32)
        return self.summary(hidden.float())[0, -1, 0].item()


def headed(
    base: Path, folder: Path, head: str = "v_head.summary", *, bias: bool = True, prefix: str = "", pickle: bool = False
) -> ValueHeaded:
    """A causal model with a value head, saved with TRL's layout; `prefix` and `pickle` are its other ways."""
    whole = ValueHeaded(base, bias)
    shutil.copytree(base, folder)
    state = {f"{prefix}{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    state |= {f"{head}.{name}": tensor.detach() for name, tensor in whole.summary.state_dict().items()}
    (folder / "model.safetensors").unlink()
    if pickle:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return whole


HEADED_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("llama", {}),
    "trl, gpt2": ("gpt2", {}),
    "trl, mistral": ("mistral", {}),
    "trl, saved by a trainer": ("llama", {"prefix": "pretrained_model."}),
    "trl, pickled": ("llama", {"pickle": True}),
    "trl, pickled by a trainer": ("gpt2", {"pickle": True, "prefix": "pretrained_model."}),
    "ultrarm": ("llama", {"head": "regression_head", "bias": False}),
    "eurus": ("mistral", {"head": "regression_head", "bias": False}),
    "openrlhf": ("mistral", {"head": "value_head", "bias": False}),
}


@pytest.mark.parametrize("case", HEADED_CASES)
def test_value_heads_are_read_at_the_last_token(llama_pair, outputs, tmp_path, case):
    kind, options = HEADED_CASES[case]
    whole = headed(causal(kind, tmp_path / "base", llama_pair[1]), tmp_path / "rm", **options)
    ids = chat_ids(tmp_path / "rm")
    assert all(row[-1] == 2 for row in ids), "the template ends with the padding token, which is read here"
    expected = [whole.reward(row) for row in ids]
    for batch_tokens in BATCHES:
        same(score(tmp_path / "rm", tmp_path, batch_tokens=batch_tokens, overwrite=True), expected)
    assert kind_of(tmp_path / "rm") is HEADED


def test_a_value_head_stays_in_float32_on_a_bfloat16_body(llama_pair, outputs, tmp_path):
    whole = headed(causal("llama", tmp_path / "base", llama_pair[1]), tmp_path / "rm")
    setup = verb.plan(settings(tmp_path / "rm", tmp_path, dtype="bfloat16")).setup
    loaded = loading.load_reward_model(setup, torch.device("cpu")).model
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, whole.summary.weight)
    assert torch.equal(loaded.score.bias, whole.summary.bias)
    assert loaded(torch.tensor([[1, 7, 8]])).logits.dtype == torch.float32


BAD_HEADS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "several outputs": (
        lambda t: {**t, "v_head.summary.weight": torch.zeros(3, 32)},
        r"rm has 3 labels; a reward model has one \(v_head.summary.weight is \[3, 32\]\)",
    ),
    "no bias": (
        lambda t: {name: tensor for name, tensor in t.items() if name != "v_head.summary.bias"},
        r"rm lacks v_head.summary.bias, which TRL's value heads have",
    ),
    "a head of another width": (
        lambda t: {**t, "v_head.summary.weight": torch.zeros(1, 16)},
        r"rm does not fit its config.json: score.weight is \[1, 16\]",
    ),
    "a body that lacks a tensor": (
        lambda t: {name: tensor for name, tensor in t.items() if "layers.1.mlp.up_proj" not in name},
        r"rm lacks model.layers.1.mlp.up_proj.weight, .*would score with random weights",
    ),
    "no head": (
        lambda t: {name: tensor for name, tensor in t.items() if "v_head" not in name},
        r"rm is a LlamaForCausalLM, not a reward model: it has no trained score head",
    ),
    "a head of two layers": (
        lambda t: {("v_head.0" + n[14:] if n.startswith("v_head.summary") else n): x for n, x in t.items()},
        r"rm is a LlamaForCausalLM, not a reward model: it has no trained score head",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_value_heads_that_do_not_fit_are_refused_by_name(llama_pair, outputs, tmp_path, monkeypatch, case):
    edits, message = BAD_HEADS[case]
    headed(causal("llama", tmp_path / "base", llama_pair[1]), tmp_path / "rm")
    edit(tmp_path / "rm", edits)
    refused(tmp_path / "rm", tmp_path, monkeypatch, message)


# --- code that models bring along ----------------------------------------------------------------------------------

BROUGHT_CODE = """
import torch
from torch import nn
from types import SimpleNamespace
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel


class {name}(LlamaPreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        {head}
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **_):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        {body}
"""
GATED = (
    "self.regression_layer = nn.Linear(config.hidden_size, 5, bias=False); "
    "self.gating = nn.Linear(config.hidden_size, 5)",
    "rewards = self.regression_layer(hidden[:, -1]); gates = self.gating(hidden[:, 0]).softmax(-1); "
    "score = (gates * rewards).sum(-1); return SimpleNamespace(rewards=rewards, logits=rewards, score=score)",
)
ENDED = (
    "self.v_head = nn.Linear(config.hidden_size, 1, bias=False)",
    "assert input_ids[:, -1].eq(self.config.reward_token_id).all(); "
    "return SimpleNamespace(logits=self.v_head(hidden)[:, -1].view(-1, 1))",
)
PLAIN = ("self.score = nn.Linear(config.hidden_size, 1)", "return SimpleNamespace(logits=self.score(hidden[:, -1]))")
SHY = ("self.score = nn.Linear(config.hidden_size, 1)", "return SimpleNamespace(reward=self.score(hidden[:, -1]))")
MANY = ("self.score = nn.Linear(config.hidden_size, 3)", "return SimpleNamespace(logits=self.score(hidden[:, -1]))")
CLASSIFIES, ANY = "AutoModelForSequenceClassification", "AutoModel"


def bringing(folder: Path, like: Path, name: str, code: tuple[str, str], auto: str = CLASSIFIES, **config: Any) -> Path:
    """A tiny model with code of its own, saved by transformers."""
    folder.mkdir()
    (folder / "modeling_own.py").write_text(BROUGHT_CODE.format(name=name, head=code[0], body=code[1]))
    configured = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=2, **config)
    configured.auto_map = {auto: f"modeling_own.{name}"}
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = get_class_from_dynamic_module(f"modeling_own.{name}", str(folder))
    torch.manual_seed(2)
    spread(own(configured)).save_pretrained(folder)
    change(folder / "config.json", auto_map={auto: f"modeling_own.{name}"}, architectures=[name])
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


BROUGHT_CASES = {
    "armorm": ("LlamaForRewardModelWithGating", GATED, CLASSIFIES, {}, lambda out: out.score[0]),
    "internlm2": ("InternLM2ForRewardModel", ENDED, ANY, {"reward_token_id": 5}, lambda out: out.logits[0, 0]),
    "one that is not listed": ("LlamaOfOurs", PLAIN, CLASSIFIES, {}, lambda out: out.logits[0, 0]),
}


@pytest.mark.parametrize("case", BROUGHT_CASES)
def test_models_with_code_of_their_own_score_as_their_cards_say(llama_pair, outputs, tmp_path, case):
    name, code, auto, config, number = BROUGHT_CASES[case]
    model = bringing(tmp_path / "rm", llama_pair[1], name, code, auto, **config)
    reference = getattr(transformers, auto).from_pretrained(model, trust_remote_code=True, dtype=torch.float32).eval()
    ending = [config["reward_token_id"]] if config else []
    with torch.inference_mode():
        expected = [number(reference(torch.tensor([[*ids, *ending]]))).item() for ids in chat_ids(model)]
    for batch_tokens in BATCHES:
        same(score(model, tmp_path, batch_tokens=batch_tokens, trust_remote_code=True, overwrite=True), expected)


def test_a_row_that_is_cut_keeps_the_token_it_must_end_with(llama_pair, outputs, tmp_path):
    model = bringing(tmp_path / "rm", llama_pair[1], "InternLM2ForRewardModel", ENDED, ANY, reward_token_id=5)
    rows = verb.plan(settings(model, tmp_path, trust_remote_code=True, max_length=8)).rows
    for row, ids in zip(rows, chat_ids(model), strict=True):
        assert list(row.token_ids) == [*ids[:7], 5]
        assert row.truncated == (len(ids) > 7)


BAD_CODE = {
    "not trusted": (
        ("LlamaForRewardModelWithGating", GATED, CLASSIFIES),
        {},
        "rm is a LlamaForRewardModelWithGating, which comes with its own Python code: .* pass --trust-remote-code",
    ),
    "no end token": (
        ("InternLM2ForRewardModel", ENDED, ANY),
        {"trust_remote_code": True},
        "config.json has reward_token_id None, which is no token id",
    ),
}


@pytest.mark.parametrize("case", BAD_CODE)
def test_code_that_cannot_run_is_refused_in_the_plan(llama_pair, outputs, tmp_path, monkeypatch, case):
    made, flags, message = BAD_CODE[case]
    refused(bringing(tmp_path / "rm", llama_pair[1], *made), tmp_path, monkeypatch, message, **flags)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (SHY, "rm gives SimpleNamespace without logits: expo does not know which output is its reward"),
        (MANY, "3 numbers|3 lab"),
    ],
)
def test_outputs_that_are_not_one_number_are_refused(llama_pair, outputs, tmp_path, code, message):
    model = bringing(tmp_path / "rm", llama_pair[1], "LlamaOfOurs", code)
    with pytest.raises(InputError, match=message):
        score(model, tmp_path, trust_remote_code=True)


def test_a_brought_model_that_lacks_a_tensor_is_refused(llama_pair, outputs, tmp_path, monkeypatch):
    model = bringing(tmp_path / "rm", llama_pair[1], "LlamaForRewardModelWithGating", GATED)
    edit(model, lambda t: {name: tensor for name, tensor in t.items() if name != "gating.weight"})
    refused(model, tmp_path, monkeypatch, "rm lacks gating.weight, .*random weights", trust_remote_code=True)


# --- one reward for all --------------------------------------------------------------------------------------------


def give(monkeypatch: pytest.MonkeyPatch, reward: Callable[[], float]) -> None:
    """Have the engine give every row the next reward, one after another."""

    def score(_: object, rows: Sequence[object]) -> Iterator[list[tuple[int, float]]]:
        for number in range(len(rows)):
            yield [(number, reward())]

    monkeypatch.setattr(backend.TransformersScorer, "score", score)


@pytest.fixture
def stuck(monkeypatch) -> list[int]:
    """An engine that gives every row one reward; how many it was asked for is counted."""
    asked: list[int] = []

    def one_for_all() -> float:
        asked.append(1)
        return 0.25

    give(monkeypatch, one_for_all)
    return asked


@pytest.fixture(scope="module")
def reward_model(llama_pair, tmp_path_factory) -> Path:
    from test_score import make_reward_model

    return make_reward_model(tmp_path_factory.mktemp("rm") / "rm", llama_pair[1], labels=1, pad_id=2)


CONSTANT = r"rm gives the same reward, 0.25, to all (8|14) different token sequences: .*kept in .m.*--overwrite"


@pytest.mark.parametrize(("rows", "is_refused"), [(8, True), (7, False)])
def test_one_reward_for_eight_sequences_is_refused_and_its_rows_are_kept(
    reward_model, tmp_path, stuck, rows, is_refused
):
    write_outputs(tmp_path, ROWS[:rows])
    if not is_refused:
        assert score(reward_model, tmp_path) == [0.25] * rows
        return
    for _ in range(2):  # a rerun says it again, and asks no engine
        with pytest.raises(InputError, match=CONSTANT) as caught:
            score(reward_model, tmp_path)
        assert "\n" not in str(caught.value)
        assert "float32 (" not in str(caught.value)
        assert [file.name for file in (tmp_path / "rewards_q").iterdir()] == [".m.journal.jsonl"]
        assert (tmp_path / "rewards_q" / ".m.journal.jsonl").read_text().count('"reward": 0.25') == rows
    assert sum(stuck) == rows


def test_a_narrow_type_may_be_why(reward_model, outputs, tmp_path, stuck):
    with pytest.raises(InputError, match=r"try --dtype float32 \(a narrow type can saturate\), another version"):
        score(reward_model, tmp_path, dtype="bfloat16")


def test_equal_sequences_do_not_count_as_different(reward_model, tmp_path, stuck):
    write_outputs(tmp_path, [ROWS[number % 7] for number in range(30)])
    assert score(reward_model, tmp_path) == [0.25] * 30


def test_rewards_that_differ_in_the_last_bit_are_rewards(reward_model, outputs, tmp_path, monkeypatch):
    values = iter([math.nextafter(0.25, 1), *[0.25] * 20])
    give(monkeypatch, lambda: next(values))
    assert len(set(score(reward_model, tmp_path))) == 2


def test_rewards_of_an_interrupted_run_count(reward_model, outputs, tmp_path, monkeypatch):
    calls: list[int] = []

    def dying() -> float:
        calls.append(1)
        if len(calls) == 3:
            raise EnvironmentFailure("the engine died")
        return 0.25

    give(monkeypatch, dying)
    with pytest.raises(EnvironmentFailure):
        score(reward_model, tmp_path, batch_tokens=1)
    with pytest.raises(InputError, match=CONSTANT):
        score(reward_model, tmp_path, batch_tokens=1)
    assert len(calls) == 1 + len(ROWS)


def test_parts_are_judged_and_what_they_make_together_is(reward_model, outputs, tmp_path, stuck):
    with pytest.raises(InputError, match=r"to all 14 different .*kept in \.0-of-1\.journal"):
        score(reward_model, tmp_path, part="0/1")
    shutil.rmtree(tmp_path / "rewards_q")
    for number in range(2):
        verb.run(settings(reward_model, tmp_path, part=f"{number}/2"))
    before = sorted(file.name for file in (tmp_path / "rewards_q").rglob("*"))
    with pytest.raises(InputError, match=r"to all 14 different .*kept in their parts"):
        score(reward_model, tmp_path, join=2)
    assert sorted(file.name for file in (tmp_path / "rewards_q").rglob("*")) == before


def test_a_model_whose_head_is_zero_is_found_out(reward_model, outputs, tmp_path):
    shutil.copytree(reward_model, tmp_path / "rm")
    edit(tmp_path / "rm", lambda tensors: tensors.update({"score.weight": torch.zeros(1, 32)}))
    with pytest.raises(InputError, match=r"rm gives the same reward, -?0\.0, to all 14 different token sequences"):
        score(tmp_path / "rm", tmp_path)


# --- what is recorded, and which engine ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "recorded"),
    [({"mean": 1.5, "std": 2}, {"mean": 1.5, "std": 2.0}), ({"mean": 1.5}, None), ({"mean": "x", "std": 1.0}, None)],
)
def test_a_mean_and_standard_deviation_in_its_config_are_recorded_and_not_applied(
    reward_model, outputs, tmp_path, config, recorded
):
    shutil.copytree(reward_model, tmp_path / "rm")
    expected = score(reward_model, tmp_path)
    change(tmp_path / "rm" / "config.json", **config)
    result = verb.run(settings(tmp_path / "rm", tmp_path, overwrite=True))
    assert numbers(result.rewards) == expected
    assert json.loads(result.meta.read_text()).get("normalization") == recorded


KINDS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "pairs": (lambda folder, _: encoder("bert", folder / "rm"), "an encoder of text pairs"),
    "adapter": (
        lambda folder, like: adapter(causal("llama", folder / "base", like), folder / "rm"),
        "a PEFT adapter",
    ),
    "value head": (
        lambda folder, like: headed(causal("llama", folder / "base", like), folder / "rm"),
        "a causal model with a value head",
    ),
    "own code": (
        lambda folder, like: bringing(folder / "rm", like, "LlamaForRewardModelWithGating", GATED),
        "a model with code of its own",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_an_engine_that_does_not_run_its_kind_is_refused_before_it_starts(
    llama_pair, outputs, tmp_path, monkeypatch, case
):
    make, what = KINDS[case]
    make(tmp_path, llama_pair[1])
    monkeypatch.setitem(SCORERS, "vllm", EngineSpec("nowhere:Nothing", can=frozenset({"local"})))
    message = f"--engine vllm: rm is {what}, which only the transformers engine runs"
    refused(tmp_path / "rm", tmp_path, monkeypatch, message, engine="vllm", trust_remote_code=case == "own code")
    found = find_reward_model(str(tmp_path / "rm"), trust_remote_code=case == "own code")
    assert found.engines == {"transformers"}
    assert found.why_not("transformers") is None
    assert BROUGHT.reads == "own"


def test_a_sequence_classifier_is_left_to_what_the_engines_know(reward_model):
    found = find_reward_model(str(reward_model))
    assert found.kind is CLASSIFIER
    assert found.why_not("vllm") is None


# --- BOS -----------------------------------------------------------------------------------------------------------


def test_without_bos_only_the_templates_own_is_left_out(reward_model, tmp_path):
    rows = [("<s> w1", "w2 <s>"), *ROWS]
    write_outputs(tmp_path, rows)
    with_bos = [list(row.token_ids) for row in verb.plan(settings(reward_model, tmp_path)).rows]
    without = [list(row.token_ids) for row in verb.plan(settings(reward_model, tmp_path, bos="none")).rows]
    assert with_bos == read_ids(reward_model, rows)
    assert without == [row[1:] for row in with_bos]
    assert all(row[0] == 1 for row in with_bos)
    assert without[0].count(1) == 2, "those that the user's text spells stay"
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    own = {"chat_template": str(tmp_path / "t.jinja")}
    plans = [verb.plan(settings(reward_model, tmp_path, bos=bos, **own)) for bos in ("template", "none")]
    assert plans[0].rows[0].token_ids == plans[1].rows[0].token_ids, "a template that writes none has none to leave out"


def test_bos_is_in_the_fingerprint_only_where_it_is_left_out(reward_model, outputs, tmp_path):
    assert "bos" not in verb.plan(settings(reward_model, tmp_path)).fingerprint
    result = verb.run(settings(reward_model, tmp_path))
    assert verb.run(settings(reward_model, tmp_path, bos="template")).status == "already complete"
    with pytest.raises(InputError, match="a different bos"):
        verb.run(settings(reward_model, tmp_path, bos="none"))
    without = verb.run(settings(reward_model, tmp_path, bos="none", overwrite=True))
    meta = json.loads(without.meta.read_text())
    assert meta["fingerprint"]["bos"] == meta["config"]["bos"] == "none"
    assert without.mean != result.mean


def test_pairs_have_no_bos_to_leave_out(outputs, tmp_path, monkeypatch):
    model = encoder("bert", tmp_path / "rm")
    refused(model, tmp_path, monkeypatch, "--bos none is for chat templates, and rm reads text pairs", bos="none")


# --- larger than a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "spare", "dtype", "place"),
    [
        ("auto", 2, "float32", "cuda"),
        ("auto", 0.5, "float32", "auto"),
        ("auto", 0.6, "bfloat16", "cuda"),
        ("auto", 1.05, "auto", "auto"),
        ("cuda", 0.5, "auto", "auto"),
        ("cuda:0", 0.5, "auto", "cuda:0"),
    ],
)
def test_a_model_that_one_gpu_does_not_hold_is_spread(
    reward_model, outputs, tmp_path, monkeypatch, device, spare, dtype, place
):
    plan = verb.plan(settings(reward_model, tmp_path))
    held = sum(tensor.nbytes for tensor in load_file(reward_model / "model.safetensors").values())  # float32
    monkeypatch.setattr(loading, "free_memory", lambda: int(spare * held))
    setup = replace(plan.setup, config=replace(plan.config, device=device, dtype=dtype))
    assert loading.placement(setup, torch.device(device.replace("auto", "cuda"))) == place


@pytest.mark.gpu
def test_a_model_that_one_gpu_does_not_hold_scores_as_one_that_it_holds(llama_pair, outputs, tmp_path):
    """0.8 GB in float32, on a GPU that is filled but for 0.7 GB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 16}
    config = transformers.LlamaConfig(**{**sizes, "vocab_size": 64, "num_labels": 1, "pad_token_id": 2})
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(llama_pair[1]).save_pretrained(tmp_path / "rm")
    expected = score(tmp_path / "rm", tmp_path, device="cuda")
    torch.cuda.empty_cache()
    filler = torch.empty(loading.free_memory() - 700_000_000, dtype=torch.uint8, device="cuda")
    spread_out = score(tmp_path / "rm", tmp_path, device="auto", overwrite=True)
    assert filler.numel()
    same(spread_out, expected)  # type: ignore[arg-type]


def test_on_a_cpu_nothing_is_spread(reward_model, outputs, tmp_path):
    setup = verb.plan(settings(reward_model, tmp_path)).setup
    assert loading.placement(setup, torch.device("cpu")) == "cpu"
