"""The implicit reward: against a loop in float64, its laws, which tokens are the answer's, and how it goes on."""

from __future__ import annotations

import functools
import json
import math
import shutil
import weakref
from collections import Counter
from pathlib import Path

import helpers
import pytest
import torch
import transformers
from helpers import tree
from made_inputs import on_real_inputs_too
from test_score import ROWS, make_reward_model, numbers, write_outputs
from torch.nn.functional import cross_entropy

from expo.cli import program as cli
from expo.config import ScoreConfig
from expo.engines import transformers_log_probs as backend
from expo.engines.log_probs import Answered, LogProbSetup
from expo.engines.transformers_log_probs import TransformersLogProbs
from expo.errors import EnvironmentFailure, InputError
from expo.verbs import score as verb
from expo.verbs.score.implicit import answer_span

AWKWARD = [("w1 w2", ""), ("</s> <s> w3", "w4 </s> <s> w5 </s>"), ("<|user|> w1", "<|assistant|> w2 <|system|>")]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return write_outputs(tmp_path, [*ROWS, *AWKWARD])


def settings(pair: helpers.Pair, folder: Path, **others) -> ScoreConfig:
    defaults = {"task": "q.jsonl", "name": "m", "dtype": "float32", "device": "cpu", "batch_tokens": 60}
    given = {**defaults, "sft": str(pair[0]), "dpo": str(pair[1]), **others}
    return ScoreConfig(implicit_reward=True, output_dir=str(folder), **given)


def details(folder: Path, stem: str = "m") -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{stem}.rows.jsonl").read_text().splitlines()]


def meta_of(folder: Path, stem: str = "m") -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / f"{stem}.meta.json").read_text())
    return content


def close(value: float) -> object:
    return pytest.approx(value, abs=1e-5 * max(1, abs(value)))


@functools.lru_cache(maxsize=2)
def loaded(folder: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the other one has no float64
    return model


def in_float64(folder: Path, ids: list[int], start: int) -> float:
    """Σ log softmax, as a training with DPO computes it: all logits at once, the prompt's labels ignored."""
    model = loaded(folder)
    labels = torch.tensor([[-100] * max(start, 1) + ids[max(start, 1) :]])
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits.double()
    return -cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()


def by_hand(pair: helpers.Pair, messages: list[dict[str, str]], beta: float, longest: int | None = None) -> float:
    """One row, with none of our code: the answer's tokens are those after the prompt, up to the last EOS."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair[1])
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[: len(prompt)] == prompt
    end = max(number for number, one in enumerate(ids) if one == tokenizer.eos_token_id) + 1
    ids = ids[: min(end, longest or end)]
    return beta * (in_float64(pair[1], ids, len(prompt)) - in_float64(pair[0], ids, len(prompt)))


def conversations(rows: list[tuple[str, str]]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 1 << 25])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_rewards_are_those_of_a_loop_in_float64(llama_pair, outputs, tmp_path, monkeypatch, batch_tokens, at_once):
    """Whatever the batches and the positions at once; `</s>` in a text is what the tokenizer makes of it, as always."""
    monkeypatch.setattr(backend, "LOGITS_AT_ONCE", at_once)
    result = verb.run(settings(llama_pair, tmp_path, batch_tokens=batch_tokens, beta=0.5))
    expected = [by_hand(llama_pair, messages, 0.5) for messages in conversations([*ROWS, *AWKWARD])]
    assert numbers(result.rewards) == [close(value) for value in expected]
    assert len({round(value, 4) for value in expected}) > 10
    for row in details(result.rewards.parent):
        assert row["reward"] == 0.5 * (row["log_prob_dpo"] - row["log_prob_sft"])


def test_laws_of_the_pair(llama_pair, outputs, tmp_path):
    """Of a model over itself 0; of the pair the other way round its negative; β is a factor."""
    sft, dpo = llama_pair
    cases = [((dpo, dpo), 0.1), ((sft, dpo), 0.1), ((dpo, sft), 0.1), ((sft, dpo), 0.4)]
    itself, there, back, scaled = (
        numbers(verb.run(settings(pair, tmp_path / str(number), outputs=str(outputs), beta=beta)).rewards)
        for number, (pair, beta) in enumerate(cases)
    )
    assert set(itself) == {0.0}
    assert back == [-value for value in there]
    assert scaled == pytest.approx([4 * value for value in there], rel=1e-12)
    assert len(set(there)) > 10


@on_real_inputs_too
def test_published_answers_with_a_trained_pair(trained, alpaca_data, tmp_path):
    file = alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"
    pair = trained / "tiny-sft", trained / "tiny-dpo"
    given = {"task": "alpaca", "outputs": str(file), "limit": 3, "batch_tokens": 4096}
    result = verb.run(settings(pair, tmp_path, **given))
    rows = [(row["instruction"], row["output"]) for row in json.loads(file.read_text())[:3]]
    longest = json.loads((pair[1] / "config.json").read_text())["max_position_embeddings"]
    expected = [by_hand(pair, messages, 0.1, longest) for messages in conversations(rows)]
    assert numbers(result.rewards) == [close(value) for value in expected]


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS = {
    "a tied head": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "soft caps": ("Gemma2", {**SIZES, "head_dim": 8, "final_logit_softcapping": 2.0, "initializer_range": 0.5}),
    "a scale": ("Cohere", {**SIZES, "logit_scale": 0.25, "initializer_range": 0.5}),
    "a divisor": ("Granite", {**SIZES, "logits_scaling": 8.0, "initializer_range": 0.5}),
    "experts": ("Mixtral", {**SIZES, "num_local_experts": 4}),
    "a head with a bias": ("Phi", {**SIZES}),
    "a body of another name": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "states between": ("Mamba", {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}),
}
BATCH = [Answered((1, 5, 9, 2, 7, 8, 9), 3), Answered((1, 4), 1), Answered((3, 6, 6, 2, 0, 0, 1, 2, 9, 9, 9), 0)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", HEADS)
def test_whatever_a_model_does_to_its_logits_is_done(tmp_path, monkeypatch, case, dtype):
    """In float32 to the digit; in bfloat16 no probability is far from the truth, though the head alone is wider."""
    kind, others = HEADS[case]
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**others)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(backend, "LOGITS_AT_ONCE", 3 * 64)
    config = settings((tmp_path, tmp_path), tmp_path, dtype=dtype)
    engine = TransformersLogProbs(LogProbSetup(config, dpo=tmp_path / "model", sft=tmp_path / "model"))
    expected = [in_float64(tmp_path / "model", list(row.token_ids), row.start) for row in BATCH]
    if dtype == "float32":
        assert engine.log_probs("dpo", BATCH) == [close(value) for value in expected]
        assert [engine.log_probs("sft", [row])[0] for row in BATCH] == [close(value) for value in expected]
    else:
        assert engine.log_probs("dpo", BATCH) == pytest.approx(expected, rel=0.05)
    assert len(set(expected)) == 3


# --- which tokens are the answer's --------------------------------------------------------------------------------

END = 2
SPANS = {
    "after the prompt, to its end": ([1, 5], [1, 5, 7, 8, END], (2, 5)),
    "without the line break after it": ([1, 5], [1, 5, 7, 8, END, 13], (2, 5)),
    "an empty one is its end": ([1, 5], [1, 5, END, 13], (2, 3)),
    "letters of both in one token": ([1, 5, 6], [1, 5, 67, 8, END], (2, 5)),
    "a generation prompt that the template leaves out later": ([1, 5, 90, 91], [1, 5, 7, END], (2, 4)),
    "its own end within it": ([1, 5], [1, 5, 7, END, 8, END, 13], (2, 6)),
    "one that is not closed": ([1, 5], [1, 5, 7, 8], (2, 4)),
    "the end of an earlier turn": ([1, 5, END, 6], [1, 5, END, 6, 7, 8], (4, 6)),
    "nothing": ([1, 5], [1, 5], (2, 2)),
}


@pytest.mark.parametrize(("prompt", "conversation", "span"), SPANS.values(), ids=SPANS)
def test_which_tokens_are_the_answers(prompt, conversation, span):
    assert answer_span(prompt, conversation, END) == span


def test_without_a_token_after_an_answer_all_the_rest_counts():
    assert answer_span([1, 5], [1, 5, 7, 8, 13], None) == (2, 5)


def test_an_empty_answer_has_its_end_alone_and_turns_before_it_are_the_prompts(llama_pair, tmp_path):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    asked = {"role": "user", "content": "w4"}
    rows = [{"messages": [*turns, asked], "output": "w5 w6"}, {"messages": [asked], "output": ""}]
    write_outputs(tmp_path).write_text("".join(json.dumps({**row, "finish_reason": "stop"}) + "\n" for row in rows))
    result = verb.run(settings(llama_pair, tmp_path))
    answers = [[*row["messages"], {"role": "assistant", "content": row["output"]}] for row in rows]
    assert numbers(result.rewards) == [close(by_hand(llama_pair, one, 0.1)) for one in answers]
    assert [row["answer_tokens"] for row in details(result.rewards.parent)] == [3, 1]


def test_both_turns_of_mt_bench_are_scored(trained, alpaca_data, tmp_path):
    folder = alpaca_data / "mt_bench"
    answers = folder / "model_answer" / "zephyr-7b-beta.jsonl"
    pair = trained / "tiny-sft", trained / "tiny-dpo"
    given = {"task": "mtbench", "outputs": str(answers), "dataset": str(folder / "question.jsonl"), "limit": 2}
    result = verb.run(settings(pair, tmp_path, **given))
    questions = [json.loads(line)["turns"] for line in (folder / "question.jsonl").read_text().splitlines()][:2]
    said = [json.loads(line)["choices"][0]["turns"] for line in answers.read_text().splitlines()][:2]
    expected = []
    for asked, answered in zip(questions, said, strict=True):
        turns: list[dict[str, str]] = []
        for question, answer in zip(asked, answered, strict=True):
            turns += conversations([(question, answer)])[0]
            expected.append(by_hand(pair, list(turns), 0.1))
    assert numbers(result.rewards) == [close(value) for value in expected]
    assert [row["turn"] for row in details(result.rewards.parent)] == [0, 1, 0, 1]


def test_what_is_cut_is_marked_and_an_answer_that_is_gone_has_no_reward(llama_pair, outputs, tmp_path, capsys):
    """The longest of these prompts fill 8 tokens: beginning, user, five words, end … and the answer is after that."""
    words = ["score", "q.jsonl", "--name", "m", "--output-dir", tmp_path, "--max-length", 8, "--device", "cpu"]
    words += ["--implicit-reward", "--sft", llama_pair[0], "--dpo", llama_pair[1], "--dtype", "float32"]
    for _ in range(2):
        assert cli.run(list(map(str, words))) == 3
    folder = tmp_path / "rewards_q"
    rows, meta = details(folder), meta_of(folder)
    lost = [number for number, row in enumerate(rows) if row["reward"] is None]
    assert lost == [n for n, (q, _) in enumerate([*ROWS, *AWKWARD]) if 4 + len(q.split()) >= 8]
    assert all(rows[number]["truncated"] and rows[number]["answer_tokens"] == 0 for number in lost)
    assert [error["row"] for error in meta["errors"]] == lost
    assert meta["errors"][0]["reason"] == "its prompt alone fills the maximum length of 8 tokens"
    assert meta["truncated"] == sum(row["truncated"] for row in rows) > len(lost)
    assert meta["failed"] == len(lost)
    kept = [n for n, row in enumerate(rows) if row["truncated"] and row["reward"] is not None]
    for number in kept:
        expected = by_hand(llama_pair, conversations([*ROWS, *AWKWARD])[number], 0.1, 8)
        assert rows[number]["reward"] == close(expected)


# --- rows, files, going on ----------------------------------------------------------------------------------------


def test_files_and_figures(llama_pair, outputs, tmp_path):
    result = verb.run(settings(llama_pair, tmp_path, beta=0.2))
    folder = tmp_path / "rewards_q"
    assert sorted(file.name for file in folder.iterdir()) == ["m.jsonl", "m.meta.json", "m.rows.jsonl"]
    columns = ["id", "sample", "reward", "tokens", "truncated", "answer_tokens", "log_prob_dpo", "log_prob_sft"]
    assert [list(row) for row in details(folder)] == [columns] * 17
    meta = meta_of(folder)
    assert meta["reward_model"] == "implicit reward of dpo over sft (beta 0.2)"
    assert (meta["dpo"], meta["sft"]) == ({"name": "dpo", "revision": None}, {"name": "sft", "revision": None})
    assert (meta["beta"], meta["revision"], meta["n"], meta["rows_this_run"]) == (0.2, None, 17, 17)
    assert meta["mean"] == pytest.approx(sum(numbers(result.rewards)) / 17)
    with pytest.raises(InputError, match=r"a different beta \(0.2 then, 0.1 now\)"):
        verb.run(settings(llama_pair, tmp_path))
    assert verb.run(settings(llama_pair, tmp_path, beta=0.2)).status == "already complete"


def test_beside_a_reward_model_it_has_files_of_its_own(llama_pair, outputs, tmp_path):
    model = make_reward_model(tmp_path / "implicit", llama_pair[1], labels=1, pad_id=2)
    other = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2)
    result = verb.run(settings(llama_pair, tmp_path, reward_model=(str(other), str(model))))
    names = [one.rewards.stem for one in (result, *result.further)]
    assert names == ["m", f"m@{tmp_path.name}--implicit", "m@implicit"]
    alone = verb.run(settings(llama_pair, tmp_path / "alone", outputs=str(outputs)))
    assert alone.rewards.read_bytes() == result.further[-1].rewards.read_bytes()
    assert "beta" not in meta_of(tmp_path / "rewards_q")["config"]


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> Counter[tuple[str, tuple[Answered, ...]]]:
    """How often each batch has been given to each model; the `fails_at`th time the engine dies."""
    original, seen = TransformersLogProbs.log_probs, Counter()

    def noted(self, side, rows):
        if seen.total() == fails_at:
            raise EnvironmentFailure("the engine died")
        seen[side, tuple(rows)] += 1
        return original(self, side, rows)

    monkeypatch.setattr(TransformersLogProbs, "log_probs", noted)
    return seen


def test_a_run_that_dies_anywhere_ends_as_one_that_does_not_and_no_batch_is_done_twice(llama_pair, outputs, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        batches = counted(patched)
        whole = tree(verb.run(settings(llama_pair, tmp_path)).rewards.parent)
    assert set(batches.values()) == {1}
    for moment in range(len(batches)):
        shutil.rmtree(tmp_path / "rewards_q")
        with pytest.MonkeyPatch.context() as patched:
            before = counted(patched, fails_at=moment)
            with pytest.raises(EnvironmentFailure, match="the engine died"):
                verb.run(settings(llama_pair, tmp_path))
        assert {name for name in tree(tmp_path / "rewards_q") if not name.startswith(".")} == set()
        with pytest.MonkeyPatch.context() as patched:
            assert before + counted_in(patched, settings(llama_pair, tmp_path)) == batches
        left = tree(tmp_path / "rewards_q")
        assert left.keys() == whole.keys()
        assert all(left[name] == whole[name] for name in left if not name.endswith(".meta.json"))


def counted_in(patched: pytest.MonkeyPatch, config: ScoreConfig) -> Counter[tuple[str, tuple[Answered, ...]]]:
    seen = counted(patched)
    verb.run(config)
    return seen


def test_a_journal_torn_at_any_byte_is_gone_on_with(llama_pair, outputs, tmp_path):
    """As a kill or a full disk leaves it: the last line is not whole."""
    whole = verb.run(settings(llama_pair, tmp_path)).rewards
    expected, journal = whole.read_bytes(), whole.with_name(".m.journal.jsonl")
    with pytest.MonkeyPatch.context() as patched:
        counted(patched, fails_at=6)
        shutil.rmtree(whole.parent)
        with pytest.raises(EnvironmentFailure):
            verb.run(settings(llama_pair, tmp_path))
    content = journal.read_bytes()
    for end in range(len(content), 0, -len(content) // 4):
        shutil.rmtree(whole.parent)
        whole.parent.mkdir()
        journal.write_bytes(content[:end])
        assert verb.run(settings(llama_pair, tmp_path)).status == "written"
        assert whole.read_bytes() == expected


def test_answers_that_are_others_now_are_scored_with_both(llama_pair, outputs, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        counted(patched, fails_at=5)
        with pytest.raises(EnvironmentFailure):
            verb.run(settings(llama_pair, tmp_path))
    others = [(prompt, f"w9 {answer}") for prompt, answer in ROWS]
    write_outputs(tmp_path, others)
    rewards = numbers(verb.run(settings(llama_pair, tmp_path)).rewards)
    assert rewards == [close(by_hand(llama_pair, messages, 0.1)) for messages in conversations(others)]


def test_a_larger_limit_extends(llama_pair, outputs, tmp_path):
    verb.run(settings(llama_pair, tmp_path, limit=5))
    extended = verb.run(settings(llama_pair, tmp_path))
    assert meta_of(tmp_path / "rewards_q")["rows"] == 17
    expected = [by_hand(llama_pair, messages, 0.1) for messages in conversations([*ROWS, *AWKWARD])]
    assert numbers(extended.rewards) == [close(value) for value in expected]


@pytest.mark.parametrize("count", [2, 5])
def test_joined_parts_are_the_run_in_one_piece(llama_pair, outputs, tmp_path, count):
    whole = verb.run(settings(llama_pair, tmp_path / "whole", outputs=str(outputs), batch_tokens=1)).rewards.parent
    for index in range(count):
        verb.run(settings(llama_pair, tmp_path, part=f"{index}/{count}", batch_tokens=1))
    joined = verb.run(settings(llama_pair, tmp_path, join=count, batch_tokens=1)).rewards.parent
    assert sorted(tree(joined)) == sorted(tree(whole))
    for name in ("m.jsonl", "m.rows.jsonl"):
        assert (joined / name).read_bytes() == (whole / name).read_bytes()


NOT_FINITE = {"π_dpo": ("dpo", math.nan), "π_sft": ("sft", -math.inf)}


@pytest.mark.parametrize(("side", "value"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_row_without_a_finite_number_is_marked(llama_pair, outputs, tmp_path, monkeypatch, side, value):
    original = TransformersLogProbs.log_probs

    def odd(self, of, rows):
        values = original(self, of, rows)
        return [value if of == side and len(row.token_ids) == 7 else one for row, one in zip(rows, values, strict=True)]

    monkeypatch.setattr(TransformersLogProbs, "log_probs", odd)
    for _ in range(2):
        result = verb.run(settings(llama_pair, tmp_path))
        rows = details(tmp_path / "rewards_q")
        lost = [number for number, row in enumerate(rows) if row["tokens"] == 7]
        assert result.failed == len(lost) > 0
        assert result.reason == f"row {lost[0]}: {side} gives its answer no finite log-probability"
        assert [number for number, row in enumerate(rows) if row["reward"] is None] == lost
        assert all(rows[number][f"log_prob_{side}"] is None for number in lost)
    monkeypatch.setattr(TransformersLogProbs, "log_probs", original)
    assert verb.run(settings(llama_pair, tmp_path)).failed == 0


# --- refused ------------------------------------------------------------------------------------------------------


def edit_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def other_architecture(sft: Path) -> None:
    edit_json(sft / "config.json", lambda c: c.update(architectures=["LlamaForSequenceClassification"]))


def other_ids(sft: Path) -> None:
    edit_json(sft / "tokenizer.json", swap_tokens)


def swap_tokens(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]


def resized(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(70)
    model.save_pretrained(folder)


def adapted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


FAULTS = {
    "other ids": (other_ids, "the token 'w2' has id 7 in sft and 8 in dpo"),
    "more tokens": (resized, "sft has vectors for 70 tokens and dpo for 64: their probabilities are of different"),
    "an adapter": (adapted, "--sft sft is an adapter: merge it with `expo extrapolate --sft BASE"),
    "a reward model": (other_architecture, "sft is a reward model (LlamaForSequenceClassification), which cannot"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_pair_that_is_none_is_refused(llama_pair, outputs, tmp_path, fault, message):
    sft = shutil.copytree(llama_pair[0], tmp_path / "sft")
    fault(sft)
    with pytest.raises(InputError) as caught:
        verb.run(settings((sft, llama_pair[1]), tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rewards_q").exists()


USAGE = {
    "no SFT": ("--implicit-reward --dpo d", "--implicit-reward needs --sft and --dpo; missing: --sft"),
    "neither": ("--implicit-reward", "missing: --sft, --dpo"),
    "not asked for": ("--sft s --dpo d", "--sft and --dpo need --implicit-reward"),
    "β without it": ("--beta 0.3", "--beta needs --implicit-reward"),
    "no β": ("--implicit-reward --sft s --dpo d --beta 0", "--beta must be a positive number, not 0.0"),
    "β that is none": ("--implicit-reward --sft s --dpo d --beta nan", "--beta must be a positive number, not nan"),
}


def test_an_engine_that_gives_no_log_probabilities_is_refused(llama_pair, outputs, tmp_path):
    with pytest.raises(InputError, match="--implicit-reward runs with transformers, not with --engine vllm"):
        verb.plan(settings(llama_pair, tmp_path, engine="vllm"))
    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2)
    beside = settings(llama_pair, tmp_path, reward_model=(str(model),), engine="transformers")
    assert verb.plan(beside).further[0].engine == "transformers"


REWRITING = "{% if add_generation_prompt %}w1 w2 w3 w4 w5 w6 w7 w8 w9 w1{% endif %}" + helpers.CHAT_TEMPLATE


def test_a_template_that_writes_answered_prompts_otherwise_is_said(llama_pair, outputs, tmp_path, caplog):
    (tmp_path / "t.jinja").write_text(REWRITING)
    plan = verb.plan(settings(llama_pair, tmp_path, chat_template=str(tmp_path / "t.jinja")))
    assert {row.start for row in plan.rows} == {0}
    assert "in 17 of 17 rows the chat template renders the prompt differently once it has an answer" in caplog.text
    caplog.clear()
    verb.plan(settings(llama_pair, tmp_path))
    assert "differently once it has an answer" not in caplog.text


@pytest.mark.parametrize(("words", "message"), USAGE.values(), ids=USAGE)
def test_usage(tmp_path, capsys, words, message):
    assert cli.run(["score", "q.jsonl", "--name", "m", "--output-dir", str(tmp_path), *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_pair_that_common_names_is_for_the_implicit_reward_alone(llama_pair, outputs, tmp_path, capsys):
    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2)
    names = f'sft = "{llama_pair[0]}"\ndpo = "{llama_pair[1]}"\n'
    (tmp_path / "c.toml").write_text(f"[common]\n{names}")
    words = ["score", "q.jsonl", "--name", "m", "--output-dir", tmp_path, "--config", tmp_path / "c.toml", "--dry-run"]
    assert cli.run(list(map(str, [*words, "--reward-model", model]))) == 0
    assert cli.run(list(map(str, [*words, "--implicit-reward", "--json"]))) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["over"] == str(llama_pair[0])
    (tmp_path / "c.toml").write_text(f"[score]\n{names}")
    assert cli.run(list(map(str, [*words, "--reward-model", model]))) == 2
    assert "--sft and --dpo need --implicit-reward" in capsys.readouterr().err


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_lack_of_memory_halves_the_batch_and_moves_no_reward(llama_pair, outputs, tmp_path, monkeypatch, caplog):
    expected = numbers(verb.run(settings(llama_pair, tmp_path)).rewards)
    shutil.rmtree(tmp_path / "rewards_q")
    original = backend._Reader._sums

    def narrow(self, rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, rows)

    monkeypatch.setattr(backend._Reader, "_sums", narrow)
    assert numbers(verb.run(settings(llama_pair, tmp_path)).rewards) == [close(value) for value in expected]
    assert "out of memory: continuing with batches of half the size" in caplog.text


def test_memory_that_does_not_suffice_for_one_row_is_said(llama_pair, outputs, tmp_path, monkeypatch):
    def nothing(self, rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend._Reader, "_sums", nothing)
    with pytest.raises(EnvironmentFailure, match="--dtype bfloat16, or a smaller --max-length"):
        verb.run(settings(llama_pair, tmp_path))


def test_one_model_is_in_memory_at_a_time_and_the_head_gives_a_few_positions_at_once(llama_pair, tmp_path, monkeypatch):
    """Of the numbers that the head gives there are never more than it may, whatever the rows' lengths."""
    from transformers import LlamaForCausalLM

    alive: list[weakref.ref] = []
    sizes: list[int] = []
    loading, forward = LlamaForCausalLM.from_pretrained.__func__, LlamaForCausalLM.forward

    def noted(cls, *args, **named):
        assert [one for one in alive if one() is not None] == []
        loaded = loading(cls, *args, **named)
        alive.append(weakref.ref(loaded[0]))
        return loaded

    def measured(self, *args, **named):
        output = forward(self, *args, **named)
        sizes.append(output.logits.numel())
        return output

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(noted))
    monkeypatch.setattr(LlamaForCausalLM, "forward", measured)
    monkeypatch.setattr(backend, "LOGITS_AT_ONCE", 3 * 64)
    write_outputs(tmp_path, [("w1", "w2 " * 50), ("w3", "w4 " * 7)])
    verb.run(settings(llama_pair, tmp_path))
    assert len(alive) >= 2
    assert max(sizes) == 3 * 64
    assert sum(sizes) == 2 * 64 * (51 + 8)
