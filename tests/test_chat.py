"""chat: token ids as the model's own tokenizer gives them; models, tokenizers and templates that are refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CHAT_TEMPLATE
from safetensors.torch import load_file, save_file

from expo.checkpoint.vocabulary import embedding_rows, rows_in
from expo.config import GenerateConfig, ScoreConfig
from expo.engines.chat import ChatTokenizer
from expo.errors import InputError
from expo.verbs import generate, score

DATED = "{{ bos_token }}<|system|>{{ strftime_now('%d %b %Y %H:%M:%S') }}" + CHAT_TEMPLATE.removeprefix(
    "{{ bos_token }}"
)
WITHOUT_SYSTEM = CHAT_TEMPLATE.replace("%}<|{{", "%}{% if message['role'] in ('user', 'assistant') %}<|{{").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)


@pytest.fixture
def model(llama_pair, tmp_path) -> Path:
    """A model of 64 tokens to change."""
    return Path(shutil.copytree(llama_pair[1], tmp_path / "m"))


def edit(file: Path, **entries: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **entries}))


def tokenizer_of(model: Path, **others) -> ChatTokenizer:
    return ChatTokenizer(model, **{"template": None, "trust_remote_code": False, **others})


def plan(model: Path, folder: Path, *rows: dict, **others) -> generate.GenerateJob:
    task = folder / "q.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows or ({"prompt": "w1"},)))
    defaults = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_tokens": 4}
    return generate.plan(
        GenerateConfig(task=str(task), model=str(model), output_dir=str(folder), **{**defaults, **others})
    )


def change_tensors(file: Path, change: Callable[[dict], dict]) -> None:
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def plan_scores(model: Path, folder: Path, *messages: dict) -> score.ScoreJob:
    """The plan of scoring one answer of a conversation."""
    row = {"prompt": messages[-1]["content"], "messages": list(messages), "output": "w3"}
    (folder / "o.jsonl").write_text(json.dumps(row) + "\n")
    edit(model / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    for file in model.glob("*.safetensors"):
        change_tensors(file, lambda tensors: {**tensors, "score.weight": torch.ones(1, 32)})
    outputs = str(folder / "o.jsonl")
    return score.plan(
        ScoreConfig(task=outputs, outputs=outputs, name="n", output_dir=str(folder / "out"), reward_model=str(model))
    )


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- tokenizers and configs that cannot be used ---------------------------------------------------------------------


def change_tokenizer(model: Path, **entries: object) -> None:
    edit(model / "tokenizer.json", **entries)


def change_model(model: Path, **entries: object) -> None:
    file = model / "tokenizer.json"
    edit(file, model={**json.loads(file.read_text())["model"], **entries})


UNREADABLE = {
    "another kind of model": lambda m: change_model(m, type="NewerKind"),
    "another pre-tokenizer": lambda m: change_tokenizer(m, pre_tokenizer={"type": "NewerKind"}),
    "another decoder": lambda m: change_tokenizer(m, decoder={"type": "NewerKind"}),
    "a negative id": lambda m: change_model(m, vocab={"a": -1}),
    "an added token without an id": lambda m: change_tokenizer(m, added_tokens=[{"id": None}]),
    "a normalizer at which the library panics": lambda m: change_tokenizer(
        m, normalizer={"type": "Precompiled", "precompiled_charsmap": ""}
    ),
    "tokenizer.json is a list": lambda m: (m / "tokenizer.json").write_text("[]"),
    "tokenizer_config.json is a list": lambda m: (m / "tokenizer_config.json").write_text("[]"),
    "a list for a dictionary": lambda m: edit(m / "tokenizer_config.json", model_specific_special_tokens=["<x>"]),
    "a number for a class": lambda m: edit(m / "tokenizer_config.json", tokenizer_class=5),
    "a number for a token": lambda m: edit(m / "tokenizer_config.json", eos_token=5),
    "text for an id in config.json": lambda m: edit(m / "config.json", eos_token_id="</s>"),
    "text for an id": lambda m: edit(m / "tokenizer_config.json", added_tokens_decoder={"x": {"content": "q"}}),
}


@pytest.mark.parametrize("harm", UNREADABLE.values(), ids=UNREADABLE)
def test_a_tokenizer_that_cannot_be_read_is_one_line(model, harm):
    harm(model)
    with pytest.raises(InputError, match=r"^the tokenizer in .*/m cannot be loaded: .*; it may need newer ") as caught:
        tokenizer_of(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", [plan, plan_scores], ids=["generate", "score"])
def test_every_verb_refuses_such_a_tokenizer(model, tmp_path, verb):
    change_model(model, type="NewerKind")
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be loaded"):
        verb(model, tmp_path, *([message("user", "w1")] if verb is plan_scores else []))


def test_a_text_that_the_tokenizer_cannot_encode_fails_alone(model, tmp_path):
    change_model(model, unk_token="<none>")
    work = plan(model, tmp_path, {"prompt": "w1"}, {"prompt": "nowhere"})
    assert [request.id for request in work.requests] == ["0"]
    reason = work.first.unanswerable["1", 0, 0]
    assert reason.startswith(f"the tokenizer in {model} cannot encode it: WordLevel error: Missing [UNK] token")
    with pytest.raises(InputError, match="cannot encode the prompts: WordLevel error"):
        plan(model, tmp_path, {"prompt": "nowhere"})


STOPS = {
    "text": ("generation_config.json", "2", "'2'"),
    "a fraction": ("generation_config.json", 2.0, "2.0"),
    "true": ("generation_config.json", True, "True"),
    "nothing in a list": ("generation_config.json", [2, None], "None"),
    "a list in a list": ("generation_config.json", [[2]], r"\[2\]"),
    "an object": ("generation_config.json", {"id": 2}, r"\{'id': 2\}"),
    "in config.json": ("config.json", "</s>", "'</s>'"),
}


@pytest.mark.parametrize(("file", "value", "shown"), STOPS.values(), ids=STOPS)
def test_a_configured_stop_token_that_is_none_is_refused(model, tmp_path, file, value, shown):
    edit(model / "generation_config.json", eos_token_id=None)
    edit(model / file, eos_token_id=value)
    with pytest.raises(InputError, match=rf"m/{file} has eos_token_id {shown}.*: correct it there$"):
        plan(model, tmp_path)


@pytest.mark.parametrize(
    ("own", "configured", "expected"),
    [
        (5, [2, 7], (2, 5, 7)),
        (None, 6, (2, 6)),
        ([], 6, (2,)),
        (0, None, (0, 2)),
        ([63], None, (2, 63)),
        ([64, -1], 6, (2,)),
    ],
)
def test_stop_tokens_are_those_of_the_generation_config_else_the_config(model, tmp_path, own, configured, expected):
    edit(model / "generation_config.json", eos_token_id=[own, *configured] if configured == [2, 7] else own)
    edit(model / "config.json", eos_token_id=configured)
    assert plan(model, tmp_path).setup.stop_ids == expected


# --- tokens without a vector ----------------------------------------------------------------------------------------


def shrink(model: Path, rows: int) -> None:
    """Take the last rows of the embedding away, as if the tokenizer had been extended after training."""
    cut = ("embed_tokens", "lm_head")
    for file in model.glob("*.safetensors"):
        change_tensors(
            file, lambda tensors: {n: t[:rows] if any(c in n for c in cut) else t for n, t in tensors.items()}
        )
    edit(model / "config.json", vocab_size=rows)


@pytest.mark.parametrize("verb", [plan, plan_scores], ids=["generate", "score"])
def test_a_prompt_with_a_token_beyond_the_embedding_is_refused(model, tmp_path, verb):
    shrink(model, 40)
    rows = [message("user", "w1 w40")] if verb is plan_scores else [{"prompt": "w1"}, {"prompt": "w2 w40"}]
    with pytest.raises(
        InputError, match=r"row \d has token 'w40' with id 46, and the model has vectors for ids up to 39 only"
    ):
        verb(model, tmp_path, *rows)


def test_prompts_without_such_tokens_are_answered(model, tmp_path):
    shrink(model, 40)
    assert len(plan(model, tmp_path, {"prompt": "w1"}, {"prompt": "w33"}).requests) == 2


def test_an_answer_with_such_a_token_has_no_next_turn(model, tmp_path):
    shrink(model, 40)
    rows = [{"question_id": 81, "category": "writing", "turns": ["w1", "w2"]}]
    (tmp_path / "questions.jsonl").write_text(json.dumps(rows[0]) + "\n")
    settings = {"engine": "transformers", "device": "cpu", "dtype": "float32", "output_dir": str(tmp_path)}
    work = generate.plan(
        GenerateConfig(task="mtbench", model=str(model), dataset=str(tmp_path / "questions.jsonl"), **settings)
    )
    answer = {"id": "81", "sample": 0, "turn": 0, "output": "w50", "finish_reason": "stop"}
    turn = work.builder.turn(work.prompts, 1, {("81", 0, 0): answer})
    assert "has token 'w50' with id 56" in turn.unanswerable["81", 0, 1]


def test_padding_is_never_a_token_without_a_vector(model, tmp_path):
    edit(model / "tokenizer_config.json", pad_token="w57")
    assert plan(model, tmp_path).setup.pad_id == 63
    shrink(model, 40)
    assert plan(model, tmp_path).setup.pad_id == 2


EMBEDDINGS = {
    "llama": ({"model.embed_tokens.weight": (64, 8), "lm_head.weight": (70, 8)}, 64),
    "gpt2": ({"wte.weight": (64, 8), "wpe.weight": (99, 8)}, 64),
    "bert": (
        {"bert.embeddings.word_embeddings.weight": (64, 8), "bert.embeddings.position_embeddings.weight": (512, 8)},
        64,
    ),
    "mamba": ({"backbone.embeddings.weight": (64, 8)}, 64),
    "t5": ({"shared.weight": (64, 8)}, 64),
    "neox": ({"gpt_neox.embed_in.weight": (64, 8), "embed_out.weight": (70, 8)}, 64),
    "internlm2": ({"model.tok_embeddings.weight": (64, 8), "output.weight": (70, 8)}, 64),
    "wrapped": ({"base_model.model.model.embed_tokens.weight": (64, 8)}, 64),
    "several": ({"model.embed_tokens.weight": (64, 8), "vision.embeddings.weight": (9, 8)}, 64),
    "packed": ({"model.embed_tokens.qweight": (8, 8), "model.embed_tokens.weight": (8,)}, None),
    "none": ({"a.weight": (3, 3)}, None),
}


@pytest.mark.parametrize(("shapes", "expected"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_the_rows_of_the_embedding(shapes, expected):
    assert rows_in(shapes.items()) == expected


def test_the_rows_are_the_checkpoints_not_the_configs(model):
    edit(model / "config.json", vocab_size=99)
    assert embedding_rows(model) == 64
    for file in model.glob("*.safetensors*"):
        file.unlink()
    assert embedding_rows(model) == 99
    edit(model / "config.json", vocab_size="99", text_config={"vocab_size": 80})
    assert embedding_rows(model) == 80
    (model / "model.safetensors").write_text("damaged")
    assert embedding_rows(model) is None


# --- messages that a template ignores -------------------------------------------------------------------------------

TURNS = [message("human", "w1 w2"), message("gpt", "w3"), message("user", "w4")]
REFUSED = {
    "--system": (
        [{"prompt": "w1"}, {"prompt": "w2"}],
        {"system": "w5"},
        r"ignores messages with role 'system' \(row 0 and 1 more\): drop --system, use roles that it renders "
        r"\(user, assistant\), or pass a --chat-template",
    ),
    "some rows": (
        [{"prompt": "w1"}, {"messages": [message("system", "w5"), message("user", "w1")]}, {"prompt": "w2"}],
        {},
        r"ignores messages with role 'system' \(row 1\): use roles that it renders \(user, assistant\)",
    ),
    "other names of roles": ([{"messages": TURNS}], {}, r"ignores messages with role 'human', 'gpt' \(row 0\)"),
    "developer": (
        [{"messages": [message("developer", "w5"), message("user", "w5")]}],
        {},
        r"ignores messages with role 'developer' \(row 0\)",
    ),
}


@pytest.mark.parametrize(("rows", "settings", "words"), REFUSED.values(), ids=REFUSED)
def test_a_message_that_the_template_ignores_is_refused(model, tmp_path, rows, settings, words):
    (tmp_path / "t.jinja").write_text(WITHOUT_SYSTEM)
    with pytest.raises(InputError, match=words):
        plan(model, tmp_path, *rows, chat_template=str(tmp_path / "t.jinja"), **settings)
    assert len(plan(model, tmp_path, *rows, **settings).requests) == len(rows)


def test_a_template_of_one_turn_is_refused_for_a_task_of_two(model, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[-1]['content'] }}")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question_id": 81, "category": "x", "turns": ["w1", "w2"]}))
    settings = {"dataset": str(tmp_path / "questions.jsonl"), "chat_template": str(tmp_path / "t.jinja")}
    with pytest.raises(InputError, match=r"ignores messages with role 'user', 'assistant' \(row 0\)"):
        generate.plan(GenerateConfig(task="mtbench", model=str(model), engine="transformers", device="cpu", **settings))


def test_a_reward_models_template_too(model, tmp_path):
    (model / "chat_template.jinja").write_text(WITHOUT_SYSTEM)
    assert len(plan_scores(model, tmp_path, message("user", "w1")).rows) == 1
    with pytest.raises(InputError, match=r"ignores messages with role 'system' \(row 0\)"):
        plan_scores(model, tmp_path, message("system", "w5"), message("user", "w1"))


def test_rows_that_the_template_rejects_still_fail_alone(model, tmp_path):
    (tmp_path / "t.jinja").write_text("{% if 'w5' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + CHAT_TEMPLATE)
    work = plan(model, tmp_path, {"prompt": "w1"}, {"prompt": "w5"}, chat_template=str(tmp_path / "t.jinja"))
    assert len(work.requests) == 1
    assert list(work.first.unanswerable) == [("1", 0, 0)]


# --- the token after an answer --------------------------------------------------------------------------------------

CLOSED_BY_USER = CHAT_TEMPLATE.replace("{{ eos_token }}", "<|user|>")
WARNED = {
    "the tokenizer's EOS": (CHAT_TEMPLATE, {}, None),
    "another token": (CLOSED_BY_USER, {}, 3),
    "given as --stop-token-id": (CLOSED_BY_USER, {"stop_token_id": (3,)}, None),
    "in the generation config": (CLOSED_BY_USER, {"own": [2, 3]}, None),
    "after a line": (CHAT_TEMPLATE.replace("{{ eos_token }}", "\n w1 <|system|>"), {}, 5),
    "nothing special": (CHAT_TEMPLATE.replace("{{ eos_token }}", "\n"), {}, None),
    "an unknown word": (CHAT_TEMPLATE.replace("{{ eos_token }}", " unknown "), {}, None),
    "no answers": ("{% for m in messages if m.role != 'assistant' %}{{ m.content }} <|user|>{% endfor %}", {}, None),
}


@pytest.mark.parametrize(("template", "settings", "token"), WARNED.values(), ids=WARNED)
def test_a_template_whose_closing_token_is_no_stop_token(model, tmp_path, caplog, template, settings, token):
    settings = dict(settings)
    (tmp_path / "t.jinja").write_text(template)
    edit(model / "generation_config.json", eos_token_id=settings.pop("own", 2))
    with caplog.at_level(logging.WARNING):
        plan(model, tmp_path, chat_template=str(tmp_path / "t.jinja"), **settings)
    said = [record.getMessage() for record in caplog.records if "stop token" in record.getMessage()]
    assert [text.endswith(f"so answers may run on: pass --stop-token-id {token}") for text in said] == [True] * len(
        said
    )
    assert len(said) == (token is not None)


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_ids_with_a_clock_are_those_of_the_template_at_that_moment(model, tmp_path):
    from datetime import datetime

    from transformers import AutoTokenizer

    (tmp_path / "t.jinja").write_text(DATED)
    one = tokenizer_of(model, template=str(tmp_path / "t.jinja")).at("2024-02-29T23:59:58")
    assert one.asks_for_time
    own = AutoTokenizer.from_pretrained(model)
    turns = [message("user", "w1")]
    expected = own.apply_chat_template(
        turns,
        chat_template=DATED.replace("strftime_now('%d %b %Y %H:%M:%S')", "'29 Feb 2024 23:59:58'"),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert one.encode([turns], generation_prompt=True) == [expected]
    assert one._render(turns, True).startswith("<s><|system|>29 Feb 2024 23:59:58<|user|>")
    assert datetime.now().strftime("%Y") not in one._render(turns, True)
