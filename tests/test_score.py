"""score: the numbers against transformers itself, the formats, resume and refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import statistics
from pathlib import Path

import helpers
import pytest
import torch
from crashes import killed_when
from helpers import VISION
from made_inputs import on_real_inputs_too

from expo.cli.score import show
from expo.config import ScoreConfig
from expo.engines import ScorerSetup, coverage, transformers_reward as backend
from expo.engines.reward_classes import unread_id
from expo.errors import EnvironmentFailure, InputError
from expo.verbs import score as verb
from expo.verbs.score.rows import cut

ROWS = [(" ".join(f"w{(5 * row + word) % 50}" for word in range(2 + row % 4)), "w3 " * (row % 9)) for row in range(14)]


@pytest.fixture(scope="session")
def reward_model(llama_pair, tmp_path_factory) -> Path:
    """A random tiny Llama with one label; its padding token is its EOS, as in many reward models."""
    return make_reward_model(tmp_path_factory.mktemp("rm") / "rm", llama_pair[1], labels=1, pad_id=2)


def make_reward_model(folder: Path, like: Path, *, labels: int, pad_id: int | None) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(like, num_labels=labels, pad_token_id=pad_id)
    LlamaForSequenceClassification(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return write_outputs(tmp_path)


def write_outputs(folder: Path, rows=ROWS) -> Path:
    path = folder / "outputs_q" / "m.jsonl"
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = [{"prompt": p, "output": o, "length": 3, "finish_reason": "stop"} for p, o in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(model: Path, folder: Path, **others) -> ScoreConfig:
    defaults = {"task": "q.jsonl", "name": "m", "dtype": "float32", "device": "cpu", "batch_tokens": 60}
    return ScoreConfig(reward_model=str(model), output_dir=str(folder), **{**defaults, **others})


def numbers(path: Path) -> list[float | None]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewards_alone(model: Path, rows, longest: int | None = None) -> list[float]:
    """Each row by itself through transformers: no padding, no batching, none of our code."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    values = []
    for prompt, output in rows:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.inference_mode():
            values.append(reference(torch.tensor([ids[:longest]])).logits[0, 0].item())
    return values


@pytest.mark.parametrize("pad_id", [2, None, 5])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_rewards_are_the_raw_logits_of_each_row_alone(llama_pair, outputs, tmp_path, pad_id, batch_tokens):
    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=pad_id)
    result = verb.run(settings(model, tmp_path, batch_tokens=batch_tokens))
    expected = rewards_alone(model, ROWS)
    assert numbers(result.rewards) == pytest.approx(expected, abs=2e-6)
    assert len({round(value, 4) for value in expected}) > 10


def test_files_and_figures(reward_model, outputs, tmp_path):
    result = verb.run(settings(reward_model, tmp_path))
    folder = tmp_path / "rewards_q"
    assert sorted(path.name for path in folder.iterdir()) == ["m.jsonl", "m.meta.json", "m.rows.jsonl"]
    rewards = numbers(result.rewards)
    rows = [json.loads(line) for line in (folder / "m.rows.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["id", "sample", "reward", "tokens", "truncated"]] * 14
    assert [row["reward"] for row in rows] == rewards
    meta = json.loads(result.meta.read_text())
    assert meta["n"] == 14
    assert meta["failed"] == meta["truncated"] == 0
    assert meta["mean"] == pytest.approx(statistics.fmean(rewards))
    assert meta["standard_error"] == pytest.approx(statistics.stdev(rewards) / math.sqrt(14))
    assert meta["reward_model"] == "rm"


def test_prompts_hash_is_the_one_generate_wrote(llama_pair, reward_model, tmp_path):
    from expo.config import GenerateConfig
    from expo.verbs import generate

    task = tmp_path / "q.jsonl"
    task.write_text("".join(json.dumps({"prompt": prompt, "id": f"r{n}"}) + "\n" for n, (prompt, _) in enumerate(ROWS)))
    generated = generate.run(
        GenerateConfig(
            task=str(task),
            model=str(llama_pair[1]),
            engine="transformers",
            device="cpu",
            max_tokens=5,
            output_dir=str(tmp_path),
            name="m",
            n=2,
        )
    )
    scored = verb.run(settings(reward_model, tmp_path))
    metas = [json.loads(path.read_text()) for path in (generated.meta, scored.meta)]
    assert metas[0]["prompts_sha256"] == metas[1]["prompts_sha256"]
    rows = [json.loads(line) for line in (tmp_path / "rewards_q/m.rows.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(f"r{n}", s) for n in range(14) for s in range(2)]


def test_long_conversations_lose_their_end_and_are_marked(reward_model, outputs, tmp_path):
    result = verb.run(settings(reward_model, tmp_path, max_length=8))
    rows = [json.loads(line) for line in (tmp_path / "rewards_q/m.rows.jsonl").read_text().splitlines()]
    assert all(row["tokens"] <= 8 for row in rows)
    truncated = sum(row["truncated"] for row in rows)
    assert 0 < truncated < 14
    assert json.loads(result.meta.read_text())["truncated"] == truncated


def test_rows_without_an_answer_have_no_reward(reward_model, tmp_path):
    path = write_outputs(tmp_path)
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"prompt": "w1", "output": "", "length": 0, "finish_reason": "error"})
    path.write_text("\n".join(lines) + "\n")
    result = verb.run(settings(reward_model, tmp_path))
    rewards = numbers(result.rewards)
    assert [number for number, reward in enumerate(rewards) if reward is None] == [3]
    assert (result.n, result.failed) == (13, 1)
    meta = result.meta.read_bytes()
    assert verb.run(settings(reward_model, tmp_path)).status == "already complete"
    assert result.meta.read_bytes() == meta


def test_complete_is_left_alone_more_rows_extend_and_other_outputs_are_refused(
    reward_model, outputs, tmp_path, monkeypatch
):
    first = verb.run(settings(reward_model, tmp_path, limit=5))
    assert len(numbers(first.rewards)) == 5
    assert verb.run(settings(reward_model, tmp_path, limit=5)).status == "already complete"
    assert verb.run(settings(reward_model, tmp_path)).n == 14
    assert numbers(first.rewards) == pytest.approx(rewards_alone(reward_model, ROWS), abs=2e-6)
    write_outputs(tmp_path, [("w1", "w2"), *ROWS[1:]])
    with pytest.raises(InputError, match="made from different rows; --overwrite replaces it"):
        verb.run(settings(reward_model, tmp_path))
    assert verb.run(settings(reward_model, tmp_path, overwrite=True)).status == "written"
    with pytest.raises(InputError, match="a different max-length"):
        verb.run(settings(reward_model, tmp_path, max_length=7))


def test_fewer_or_other_outputs_than_were_scored_are_told_apart(reward_model, outputs, tmp_path):
    verb.run(settings(reward_model, tmp_path))
    assert verb.run(settings(reward_model, tmp_path, limit=3)).status == "already complete"
    write_outputs(tmp_path, ROWS[1:])
    with pytest.raises(InputError, match="made from different rows; --overwrite replaces it"):
        verb.run(settings(reward_model, tmp_path))
    with pytest.raises(InputError, match="made from different rows; --overwrite replaces it"):
        verb.run(settings(reward_model, tmp_path, limit=3))
    again = verb.run(settings(reward_model, tmp_path, overwrite=True))
    assert numbers(again.rewards) == pytest.approx(rewards_alone(reward_model, ROWS[1:]), abs=2e-6)


SOUND = {"id": "0", "sample": 0, "reward": 1.0, "tokens": 3, "truncated": False}


@pytest.mark.parametrize("content", [None, '{"a": 1}\n' * 5, '{"id": "0", "sam', json.dumps(SOUND | {"reward": "1"})])
def test_rows_whose_file_is_damaged_are_scored_again(reward_model, outputs, tmp_path, content, caplog):
    first = verb.run(settings(reward_model, tmp_path, limit=5))
    rows = first.rewards.with_name("m.rows.jsonl")
    rows.unlink() if content is None else rows.write_text(content)
    with caplog.at_level("WARNING", logger="expo"):
        assert verb.run(settings(reward_model, tmp_path)).n == 14
    assert "m.rows.jsonl is missing or damaged: its rows are scored again" in caplog.text
    assert numbers(first.rewards) == pytest.approx(rewards_alone(reward_model, ROWS), abs=2e-6)


FOREIGN = {
    "another program's": ({"errors": ["x"], "per_row": [1]}, None),
    "no object": ([], "m.meta.json does not contain a JSON object; move it away to score m.jsonl without it"),
    "errors of another kind": ({"command": "generate", "errors": ["x"], "per_row": {}}, "m.meta.json is damaged: move"),
    "ids without samples": (
        {"command": "generate", "errors": [], "per_row": {"id": ["a"], "sample": []}},
        "m.meta.json is damaged: move",
    ),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_meta_file_that_generate_did_not_write(reward_model, outputs, tmp_path, content, message):
    outputs.with_name("m.meta.json").write_text(json.dumps(content))
    if message is None:
        assert verb.run(settings(reward_model, tmp_path)).n == 14
        return
    with pytest.raises(InputError, match=message):
        verb.run(settings(reward_model, tmp_path))


SURROGATES = {
    "in an answer": ({"prompt": "w1", "output": "w2 \ud83d"}, True),
    "in a prompt": ({"prompt": "w1 \ude00", "output": "w2"}, True),
    "in a message": ({"messages": [{"role": "user", "content": "\ud83d"}], "output": "w2"}, True),
    "in another column": ({"prompt": "w1", "output": "w2", "note": "\ud83d"}, False),
    "a whole pair": ({"prompt": "w1", "output": "\ud83d\ude00"}, False),
}


@pytest.mark.parametrize(("row", "refused"), SURROGATES.values(), ids=SURROGATES)
def test_half_of_a_surrogate_pair_is_refused_by_row(reward_model, outputs, tmp_path, row, refused):
    outputs.write_text("".join(json.dumps(one) + "\n" for one in ({"prompt": "w1", "output": "w2"}, row)))
    if not refused:
        assert verb.run(settings(reward_model, tmp_path)).n == 2
        return
    with pytest.raises(InputError, match=r"row 1 of .*m\.jsonl holds half of a surrogate pair") as caught:
        verb.run(settings(reward_model, tmp_path))
    assert "\n" not in str(caught.value)


def test_lengths_that_are_not_known_are_scored(reward_model, outputs, tmp_path):
    rows = [{"prompt": p, "output": o, "length": None, "finish_reason": "stop"} for p, o in ROWS]
    outputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verb.run(settings(reward_model, tmp_path)).n == 14


NAN = "row 2: the reward model gives it no finite number"
UNSCORED = {
    "no answer": ("error", [0.5], "row 2: m.jsonl has no answer to score, because generating it failed", {}),
    "not a number": ("stop", [math.nan], NAN, {}),
    "infinite": ("stop", [-math.inf], NAN, {}),
    "not a number in bfloat16": ("stop", [math.nan], f"{NAN}; --dtype float32 may give one", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("finish", "reward", "reason", "more"), UNSCORED.values(), ids=UNSCORED)
def test_why_a_row_has_no_reward(reward_model, outputs, tmp_path, monkeypatch, finish, reward, reason, more):
    rows = [{"prompt": "w1", "output": "w2", "finish_reason": "stop"} for _ in range(4)]
    rows[2] |= {"output": "w3", "finish_reason": finish}
    outputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = settings(reward_model, tmp_path, batch_tokens=1, **more)
    of_row = verb.plan(scored).rows[2].token_ids
    monkeypatch.setattr(
        backend.TransformersScorer,
        "_logits",
        lambda _, batch: torch.tensor([reward if tuple(batch[0]) == of_row else [1.0]]),
    )
    for _ in range(2):
        result = verb.run(scored)
        assert (result.n, result.failed, result.reason, result.can_retry) == (3, 1, reason, False)


def test_an_output_that_is_or_lies_in_an_input_is_refused(reward_model, outputs, tmp_path):
    with pytest.raises(InputError, match=r" or lies inside it; choose another --output-dir"):
        verb.plan(settings(reward_model, reward_model / "out", outputs=str(outputs)))
    mine = tmp_path / "rewards_q" / "m.rows.jsonl"
    mine.parent.mkdir()
    outputs.rename(mine)
    with pytest.raises(InputError, match=r"m\.rows\.jsonl is the input .*; choose another --name or --output-dir"):
        verb.plan(settings(reward_model, tmp_path, outputs=str(mine)))


def test_interrupted_runs_end_as_uninterrupted_ones(reward_model, outputs, tmp_path, monkeypatch):
    whole = verb.run(settings(reward_model, tmp_path)).rewards.read_bytes()
    shutil.rmtree(tmp_path / "rewards_q")
    original, calls = backend.TransformersScorer._logits, []

    def failing(self, rows):
        calls.append(len(rows))
        if len(calls) % 3 == 0:
            raise EnvironmentFailure("the engine died")
        return original(self, rows)

    monkeypatch.setattr(backend.TransformersScorer, "_logits", failing)
    final = tmp_path / "rewards_q" / "m.jsonl"
    for _ in range(12):
        try:
            verb.run(settings(reward_model, tmp_path))
            break
        except EnvironmentFailure:
            assert [path.name for path in final.parent.iterdir()] == [".m.journal.jsonl"]
    assert len(calls) > 3
    assert final.read_bytes() == whole


def test_rewards_of_an_interrupted_run_are_of_the_answers_there_are_now(reward_model, outputs, tmp_path):
    interrupt(settings(reward_model, tmp_path))
    others = [(prompt, answer + " w9") for prompt, answer in ROWS]
    write_outputs(tmp_path, others)
    rewards = numbers(verb.run(settings(reward_model, tmp_path)).rewards)
    assert rewards == pytest.approx(rewards_alone(reward_model, others), abs=2e-6)


def test_a_smaller_limit_does_not_drop_what_an_interrupted_run_has(reward_model, outputs, tmp_path):
    interrupt(settings(reward_model, tmp_path))
    journal = tmp_path / "rewards_q" / ".m.journal.jsonl"
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"the unfinished .*m\.jsonl has \d+ rows that this run does not include"):
        verb.run(settings(reward_model, tmp_path, limit=1))
    assert journal.read_bytes() == before
    assert verb.run(settings(reward_model, tmp_path, limit=1, overwrite=True)).n == 1


def interrupt(config: ScoreConfig) -> None:
    """A run that ends after two batches."""
    with helpers.dying(backend.TransformersScorer, "_logits"):
        verb.run(config)


def test_a_causal_model_is_refused_by_name(llama_pair, outputs, tmp_path):
    with pytest.raises(InputError, match="dpo is a LlamaForCausalLM, not a reward model: it has no trained score head"):
        verb.run(settings(llama_pair[1], tmp_path))
    assert not (tmp_path / "rewards_q").exists()


def test_two_labels_are_refused(llama_pair, outputs, tmp_path):
    model = make_reward_model(tmp_path / "two", llama_pair[1], labels=2, pad_id=2)
    with pytest.raises(InputError, match="two has 2 labels; a reward model has one"):
        verb.run(settings(model, tmp_path))


def edited(model: Path, copy: Path, **changes) -> Path:
    """A copy of a model with another config; None leaves an entry out."""
    shutil.copytree(model, copy)
    config = {**json.loads((copy / "config.json").read_text()), **changes}
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return copy


LABELS = {
    "unsaid": {"id2label": None, "label2id": None},
    "said to be two": {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "said to be five, as a number": {"id2label": None, "label2id": None, "num_labels": 5},
}


@pytest.mark.parametrize("case", LABELS)
def test_a_head_with_one_row_scores_whatever_the_config_says_of_labels(reward_model, outputs, tmp_path, case):
    model = edited(reward_model, tmp_path / "labelled", **LABELS[case])
    result = verb.run(settings(model, tmp_path))
    assert numbers(result.rewards) == pytest.approx(rewards_alone(reward_model, ROWS), abs=2e-6)


def test_a_config_that_does_not_fit_the_weights_is_one_line(reward_model, outputs, tmp_path):
    model = edited(reward_model, tmp_path / "narrow", intermediate_size=40)
    with pytest.raises(InputError, match=r"narrow does not fit its config.json: .* is \[32, 64\]") as raised:
        verb.run(settings(model, tmp_path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "rewards_q").exists()


@pytest.mark.parametrize("pad_id", [-1, 10_000], ids=["-1", "beyond the vocabulary"])
@pytest.mark.parametrize("batch_tokens", [1, 60])
def test_a_padding_id_that_is_no_token_moves_no_reward(reward_model, outputs, tmp_path, pad_id, batch_tokens):
    """Alone, a row is read at its last id that is not this one: its last."""
    model = edited(reward_model, tmp_path / "odd", pad_token_id=pad_id)
    unpadded = edited(reward_model, tmp_path / "none", pad_token_id=None)
    result = verb.run(settings(model, tmp_path, batch_tokens=batch_tokens))
    assert numbers(result.rewards) == pytest.approx(rewards_alone(unpadded, ROWS), abs=2e-6)


TEXT = {
    "initializer_range": 0.3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_VISION = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
COMPOSITE = {
    "Gemma3": ({**TEXT, "sliding_window": 16}, VISION, {"mm_tokens_per_image": 4, "image_token_index": 5}),
    "Gemma3Text": ({**TEXT, "sliding_window": 16}, None, {}),
    "Qwen3_5": ({**TEXT, **LINEAR}, QWEN_VISION, {}),
}


def make_classifier(kind: str, folder: Path, tokenizer: Path, **settings) -> Path:
    import transformers
    from transformers import AutoTokenizer

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(num_labels=1, **settings)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(
        next(value for name, value in model.named_parameters() if name.startswith(("score", "class")))
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad_id", [0, 2, 7, -1, None])
@pytest.mark.parametrize("kind", COMPOSITE)
def test_a_text_model_within_a_model_is_read_where_transformers_reads_it(llama_pair, tmp_path, kind, pad_id):
    """Rows of unequal lengths, with the padding id inside, at the end, and everywhere."""
    from transformers import AutoModelForSequenceClassification

    text, vision, others = COMPOSITE[kind]
    text = {**text, "vocab_size": vocabulary(llama_pair[1]), "pad_token_id": pad_id}
    parts = text if vision is None else {"text_config": text, "vision_config": vision, **others}
    model = make_classifier(kind, tmp_path / "rm", llama_pair[1], **parts)
    rows = [[1, 5, 6, 2], [1, 7, 8, 9, 10, 11, 2], [3], [0, 4, 0, 0], [7, 9, 2, 7], [7, 7], [2, 2, 2], [12, 13, 0]]
    unread = unread_id(model, trust_remote_code=False)
    scorer = backend.TransformersScorer(ScorerSetup(settings(model, tmp_path), model, 7))
    alone = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [alone(torch.tensor([row])).logits.item() for row in rows]
    seen = [cut(row, unread) for row in rows]
    assert helpers.rewards(scorer, seen) == pytest.approx(expected, abs=1e-4)
    assert [helpers.rewards(scorer, [row])[0] for row in seen] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 4) for value in expected}) == len(rows)


def test_an_encoder_with_a_decoder_scores_rows_with_any_number_of_eos(llama_pair, tmp_path):
    from transformers import AutoModelForSequenceClassification

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0, "init_std": 0.3}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "vocab_size": 64}
    model = make_classifier(
        "Bart", tmp_path / "rm", llama_pair[1], max_position_embeddings=64, **sizes, **heads, **tokens
    )
    rows = [[1, 5, 2, 6, 2], [7, 2], [8, 9, 2, 2, 2]]
    scorer = backend.TransformersScorer(ScorerSetup(settings(model, tmp_path), model, 5))
    alone = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [alone(torch.tensor([row])).logits.item() for row in rows]
    assert helpers.rewards(scorer, rows) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 3


def vocabulary(model: Path) -> int:
    size: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return size


ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "type_vocab_size": 1,
}
POSITIONS = {
    "roberta": ("Roberta", {"pad_token_id": 1}, 12),
    "roberta that pads with 0": ("Roberta", {"pad_token_id": 0}, 13),
    "roberta that pads with 4": ("Roberta", {"pad_token_id": 4}, 9),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1}, 12),
    "xlm-roberta-xl": ("XLMRobertaXL", {"pad_token_id": 1}, 12),
    "camembert": ("Camembert", {"pad_token_id": 1}, 12),
    "data2vec": ("Data2VecText", {"pad_token_id": 1}, 12),
    "longformer": ("Longformer", {"pad_token_id": 1, "attention_window": 4}, 12),
    "mpnet": ("MPNet", {"pad_token_id": 0}, 12),
    "bert": ("Bert", {"pad_token_id": 0}, 14),
    "deberta-v2": ("DebertaV2", {"pad_token_id": 0, "relative_attention": False}, 14),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_that_begin_after_the_padding_id_are_not_run_out_of(llama_pair, outputs, tmp_path, case, caplog):
    kind, others, longest = POSITIONS[case]
    sizes = {**ENCODER, "vocab_size": vocabulary(llama_pair[1]), "max_position_embeddings": 14}
    model = make_classifier(kind, tmp_path / "rm", llama_pair[1], **{**sizes, **others})
    result = verb.run(settings(model, tmp_path, max_length=1000))
    assert f"--max-length 1000: rm takes at most {longest} tokens" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "rewards_q/m.rows.jsonl").read_text().splitlines()]
    assert max(row["tokens"] for row in rows) == longest
    assert any(row["truncated"] for row in rows)
    assert numbers(result.rewards) == pytest.approx(rewards_alone(model, ROWS, longest), abs=1e-5)


@pytest.mark.parametrize(("rows", "words"), [(1, r"reward -?[0-9.]+ over 1 rows"), (2, r"± [0-9.]+ over 2 rows")])
def test_one_row_has_no_standard_error(reward_model, tmp_path, rows, words, caplog):
    write_outputs(tmp_path, ROWS[:rows])
    with caplog.at_level("INFO"):
        show(verb.run(settings(reward_model, tmp_path)))
    assert re.search(words, caplog.text)


def test_missing_weights_that_only_loading_shows_are_refused(llama_pair, reward_model, outputs, tmp_path, monkeypatch):
    model = tmp_path / "headless"
    shutil.copytree(llama_pair[1], model)
    shutil.copy(reward_model / "config.json", model / "config.json")
    monkeypatch.setattr(coverage, "require_reward_weights", lambda *_, **__: True)
    with pytest.raises(InputError, match=r"headless lacks score.weight: it would score with random weights"):
        verb.run(settings(model, tmp_path))


def test_an_untrained_head_is_refused(llama_pair, reward_model, outputs, tmp_path):
    model = tmp_path / "headless"
    shutil.copytree(llama_pair[1], model)
    shutil.copy(reward_model / "config.json", model / "config.json")
    with pytest.raises(InputError, match=r"headless has no trained score head \(score.weight is not in its weights\)"):
        verb.run(settings(model, tmp_path))
    assert not (tmp_path / "rewards_q" / "m.jsonl").exists()


def test_missing_or_strange_outputs_are_refused(reward_model, tmp_path):
    with pytest.raises(InputError, match=r"no outputs to score: .*m.jsonl does not exist"):
        verb.run(settings(reward_model, tmp_path))
    path = write_outputs(tmp_path)
    path.write_text('{"prompt": "w1"}\n')
    with pytest.raises(InputError, match=r"row 0 of .* lacks a prompt"):
        verb.run(settings(reward_model, tmp_path))
    path.write_text('{"prompt": "w1", "out')
    with pytest.raises(InputError, match="is not a valid jsonl file"):
        verb.run(settings(reward_model, tmp_path))


@on_real_inputs_too
def test_published_outputs_with_a_trained_reward_model(trained, alpaca_data, tmp_path):
    """AlpacaEval outputs, read as they are published, without a meta file."""
    outputs = alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"
    model = trained / "tiny-rm"
    result = verb.run(settings(model, tmp_path, task="alpaca", outputs=str(outputs), limit=24, batch_tokens=4096))
    rows = json.loads(outputs.read_text())[:24]
    expected = rewards_alone(model, [(row["instruction"], row["output"]) for row in rows])
    assert numbers(result.rewards) == pytest.approx(expected, abs=1e-4)


def test_a_killed_process_is_continued(trained, alpaca_data, tmp_path):
    shared = {"task": "alpaca", "batch_tokens": 120, "limit": 300}
    shared["outputs"] = str(alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json")
    verb.run(settings(trained / "tiny-rm", tmp_path / "whole", **shared))
    folder = tmp_path / "killed" / "rewards_alpaca"
    journal = folder / ".m.journal.jsonl"

    def killed() -> None:
        verb.run(settings(trained / "tiny-rm", folder.parent, **shared))

    assert killed_when(lambda: journal.exists() and journal.stat().st_size > 1000, killed) == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == {".m.journal.jsonl", ".m.journal.jsonl.lock"}
    verb.run(settings(trained / "tiny-rm", folder.parent, **shared))
    for name in ("m.jsonl", "m.rows.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "rewards_alpaca" / name).read_bytes()
