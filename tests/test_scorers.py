"""The contract of `expo.engines.Scorer`, the same for every engine, on the architectures that vLLM is taken for.

Rewards are compared with a plain loop over transformers' own class, one row at a time: each engine's, in any batch,
order and padding, within 1e-5 × max(1, |reward|) in float32.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import transformers
from hypothesis import example, given, strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from expo.config import ScoreConfig
from expo.engines import (
    SCORERS,
    ScorerSetup,
    find_engine,
    transformers_reward as backend,
    vllm_reward,
    vllm_tools,
)
from expo.engines.batches import tight_batches
from expo.engines.reward_classes import READ_LAST, VLLM_ARCHITECTURES, class_of_last, unread_id
from expo.errors import EnvironmentFailure, InputError
from expo.verbs.score.rows import cut

HERE = Path(__file__).parent
CONTEXT, VOCABULARY, END = 96, 64, 2
BROKEN = VOCABULARY - 1
"""A token whose vector is not a number: rows that hold it have no reward, and those beside them do."""
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": END,
}
WINDOW = {"sliding_window": 32}
MORE = {"Mistral": WINDOW}
"""Family → what its config has besides."""

KINDS = [name.removesuffix("ForSequenceClassification") for name in VLLM_ARCHITECTURES]


def make(kind: str, folder: Path, tokenizer: Path | None = None, **settings: Any) -> Path:
    """A random reward model of one output, in float32."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(num_labels=1, **settings)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = math.nan
    model.save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def drawn_rows() -> list[list[int]]:
    """Rows of all lengths, single tokens and the whole context among them, that end with any id."""
    generator = torch.Generator().manual_seed(9)
    lengths = [1, 1, 2, 3, CONTEXT, CONTEXT - 1, 60, *(1 + 5 * number for number in range(12)), 7, 7, 7]
    rows = [torch.randint(3, BROKEN, (length,), generator=generator).tolist() for length in lengths]
    ended = [[1, 5, 6, *[END] * number] for number in (1, 2, 5)]  # as templates that end with EOS, which is PAD, give
    return [*rows, *ended, [END], [END] * 4, [1, END, 8, END, 9, END], [5, BROKEN, 7], [BROKEN] * 40]


def alone(model: Path, rows: list[list[int]]) -> list[float]:
    """Each row by itself, as it is, through transformers' class; none of our code."""
    reference = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [reference(torch.tensor([row])).logits[0, 0].item() for row in rows]


def same(expected: list[float]) -> Any:
    return [pytest.approx(value, rel=0, abs=1e-5 * max(1.0, abs(value)), nan_ok=True) for value in expected]


def in_order(batches: list[list[list[float]]], count: int) -> list[float]:
    """The rewards in the rows' order; each comes once."""
    found = sorted((int(place), reward) for batch in batches for place, reward in batch)
    assert [place for place, _ in found] == list(range(count))
    return [reward for _, reward in found]


# --- the contract -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def asked(request, llama_pair, tmp_path_factory, run_warm) -> tuple[dict[str, Any], list[float], int]:
    """What every engine gave for one architecture, what the rows are worth, and how many there are."""
    folder = tmp_path_factory.mktemp(request.param) / "rm"
    model = make(request.param, folder, llama_pair[1], **SHAPE, **MORE.get(request.param, {}))
    rows = drawn_rows()
    unread = unread_id(model, trust_remote_code=False)
    assert unread == END
    expected = alone(model, rows)
    assert len({round(value, 3) for value in expected}) > len(rows) - 8, "the rewards differ"
    ask = {
        "engines": list(SCORERS),
        "model": str(model),
        "rows": [cut(row, unread) for row in rows],
    }
    done = run_warm(HERE / "observe_scorers.py", json.dumps(ask))
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), expected, len(rows)


@pytest.mark.vllm
@pytest.mark.slow
class TestContract:
    """Of every engine, on every architecture."""

    @pytest.fixture(params=SCORERS)
    def seen(self, request, asked) -> dict[str, Any]:
        return {**asked[0][request.param], "engine": request.param}

    def test_a_reward_is_the_raw_logit_of_the_row_alone(self, seen, asked):
        _, expected, count = asked
        assert in_order(seen["all"], count) == same(expected)

    def test_no_reward_moves_with_the_batch_or_the_order(self, seen, asked):
        _, expected, count = asked
        assert [reward for batch in seen["alone"] for _, reward in batch] == same(expected)
        assert in_order(seen["backwards"], count)[::-1] == same(expected)

    def test_rows_come_as_they_finish_and_no_batch_is_empty(self, seen):
        assert len(seen["all"]) > 1
        assert all(seen["all"])
        assert seen["none"] == []

    def test_closing_gives_up_the_rest_and_harms_nothing(self, seen, asked):
        _, expected, count = asked
        assert 0 < sum(map(len, seen["closed"])) < count
        assert in_order(seen["after closing"], count) == same(expected)

    def test_what_the_engine_cannot_take_is_one_line(self, seen):
        if seen["engine"] == "vllm":
            assert seen["refused"].startswith("vLLM refuses the rows for rm: ")
            assert "\n" not in seen["refused"]


# --- the transformers engine --------------------------------------------------------------------------------------


def scorer_of(model: Path, **settings: Any) -> backend.TransformersScorer:
    defaults = {"task": "alpaca", "name": "m", "reward_model": str(model), "dtype": "float32", "device": "cpu"}
    return backend.TransformersScorer(ScorerSetup(ScoreConfig(**{**defaults, **settings}), model, CONTEXT))


OLD = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": END}
GPT = {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.3}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3, **OLD}
OWN_FORWARDS: dict[str, dict[str, Any]] = {
    "BioGpt": {**SIZES, "intermediate_size": 48, "max_position_embeddings": CONTEXT},
    "Bloom": {**OLD, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "CTRL": {**GPT, "dff": 48},
    "Falcon": {**SIZES, "alibi": True},
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPTNeo": {
        **OLD,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTNeoX": {**SIZES, "intermediate_size": 48, "max_position_embeddings": CONTEXT},
    "ModernBertDecoder": {**SIZES, "intermediate_size": 48, "max_position_embeddings": CONTEXT},
    "Mpt": {**OLD, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "OPT": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": CONTEXT},
    "OpenAIGPT": GPT,
}
"""Classes of `READ_LAST` and a tiny config of each; the two of Zamba's need minutes."""


@pytest.mark.parametrize("padding", ["a token", "none"])
@pytest.mark.parametrize("kind", OWN_FORWARDS)
def test_classes_that_read_the_last_token_in_their_own_way(tmp_path, kind, padding):
    if (kind, padding) == ("ModernBertDecoder", "none"):
        pytest.skip("its config must have a padding id")
    settings = OWN_FORWARDS[kind] | ({"pad_token_id": None} if padding == "none" else {})
    model = make(kind, tmp_path / "rm", **settings)
    rows = [row for row in drawn_rows() if BROKEN not in row]
    unread = unread_id(model, trust_remote_code=False)
    assert unread == settings["pad_token_id"]
    given = helpers.rewards(scorer_of(model, batch_tokens=150), [cut(row, unread) for row in rows])
    assert given == same(alone(model, rows))
    assert len({round(value, 3) for value in given}) > len(rows) - 8


def test_the_table_of_classes_that_read_the_last_token_is_whole():
    """As their source says; encoders, and those with an encoder, read a token of their own."""
    import inspect

    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    encoders = {"T5GemmaForSequenceClassification", "T5Gemma2ForSequenceClassification"}
    others = {"CohereCompassTextForSequenceClassification"}  # its config says which token it reads
    for name in sorted(set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()) - encoders - others):
        source = inspect.getsource(getattr(transformers, name).forward)
        assert class_of_last(name) == ("last_non_pad_token" in source or "super().forward(" in source), name
    assert {f"{kind}ForSequenceClassification" for kind in OWN_FORWARDS} >= READ_LAST - {
        "ZambaForSequenceClassification",
        "Zamba2ForSequenceClassification",
        "Gemma3ForSequenceClassification",  # in tests/test_score.py
        "Qwen3_5ForSequenceClassification",
    }


ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": CONTEXT, "type_vocab_size": 1}
BESIDE = {
    "Bert": {**ENCODER, "pad_token_id": 0},
    "DebertaV2": {**ENCODER, "pad_token_id": 0, "relative_attention": True, "position_buckets": 8},
    "ModernBert": {**ENCODER, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "FNet": {**ENCODER, "pad_token_id": 0},
    "XLNet": {
        **OLD,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 48,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    },
    "Phi3": {
        **SHAPE,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 16,
            "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 16,
        },
    },
}
"""Models whose rows what is beside them might move: encoders, and positions that depend on the longest row."""


@pytest.mark.parametrize("kind", BESIDE)
def test_short_rows_beside_long_ones_are_worth_what_they_are_alone(tmp_path, kind):
    model = make(kind, tmp_path / "rm", **BESIDE[kind])
    rows = [[1, *row, 5] for row in drawn_rows() if BROKEN not in row and len(row) < CONTEXT - 2]
    wide = scorer_of(model, batch_tokens=10_000)
    wide._batches = lambda lengths, numbers: [[one] for one in numbers] if wide._alone else [list(numbers)]
    given = helpers.rewards(wide, rows)
    assert given == same(alone(model, rows))
    assert len({round(value, 4) for value in given}) > len(rows) - 8


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "DebertaV2", "ModernBert", "ModernBertDecoder"])
def test_the_head_runs_in_float32_whatever_the_body_runs_in(tmp_path, kind):
    """The reward is the float32 head's of the body's bfloat16 states, to float32's own precision."""
    settings = {**OWN_FORWARDS, **BESIDE, "Llama": SHAPE}[kind]
    model = make(kind, tmp_path / "rm", **settings)
    scorer = scorer_of(model, dtype="bfloat16")
    body = next(name for name, part in scorer._model.named_children() if part is scorer._model.base_model)
    assert {p.dtype for p in getattr(scorer._model, body).parameters()} == {torch.bfloat16}
    heads = [p for name, p in scorer._model.named_parameters() if not name.startswith(f"{body}.")]
    assert heads
    assert {p.dtype for p in heads} == {torch.float32}
    (given,) = helpers.rewards(scorer, [[1, 5, 6, 7]])
    assert given != torch.tensor(given).bfloat16().item(), "it is not a rounded one"
    (whole,) = alone(model, [[1, 5, 6, 7]])
    assert given == pytest.approx(whole, abs=0.15 * max(1, abs(whole)))


# --- batches and memory -------------------------------------------------------------------------------------------

SPREADS = {
    "uniform": [1 + number for number in range(2048)],
    "geometric": [int(2048 * 0.97**number) + 1 for number in range(300)],
    "two kinds": [10] * 500 + [2000] * 5,
    "one each": [1 << number for number in range(12)],
    "alike": [700] * 100,
}


@pytest.mark.parametrize("budget", [512, 4096, 16384, 1 << 20])
@pytest.mark.parametrize("spread", SPREADS)
def test_little_is_computed_that_is_padding(spread, budget):
    lengths = SPREADS[spread]
    batches = tight_batches(lengths, budget)
    padded = sum(max(lengths[number] for number in batch) * len(batch) for batch in batches)
    assert padded <= 1.08 * sum(lengths)
    if spread == "alike":
        assert len(batches) == -(-len(lengths) // max(1, budget // 700)), "batches are full"


@given(st.lists(st.integers(1, 3000), max_size=80), st.integers(1, 5000))
@example([], 1)
def test_tight_batches_hold_every_row_once_and_keep_the_budget(lengths, budget):
    batches = tight_batches(lengths, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[number] for number in batch) * len(batch)
        assert len(batch) == 1 or (padded <= budget and padded <= 1.08 * sum(lengths[number] for number in batch))
    widths = [lengths[batch[0]] for batch in batches]
    assert widths == sorted(widths, reverse=True), "a lack of memory shows at once"


OUT_OF_MEMORY = {
    "CUDA's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CPU's": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"),
    "any": RuntimeError("out of memory"),
    "Python's": MemoryError(),
}


def with_little_memory(scorer: backend.TransformersScorer, fits: int, error: BaseException) -> list[int]:
    """Let batches of more tokens fail; gives the tokens of every batch that was tried."""
    original, tried = scorer._logits, []

    def limited(rows):
        tried.append(len(rows) * max(map(len, rows)))
        if tried[-1] > fits:
            raise error
        return original(rows)

    scorer._logits = limited
    return tried


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batches_and_goes_on(tmp_path, error, caplog):
    model = make("Llama", tmp_path / "rm", **SHAPE)
    rows = [[3 + (place + word) % 50 for word in range(20 + place % 3)] for place in range(60)]
    scorer = scorer_of(model, batch_tokens=1000)
    tried = with_little_memory(scorer, 130, error)
    assert helpers.rewards(scorer, rows) == same(alone(model, rows))
    failed = [tokens for tokens in tried if tokens > 130]
    assert 1 < len(failed) < 5, "each try is half as large"
    assert tried[: len(failed)] == failed, "and none that large is tried again"
    assert f"out of memory: continuing with batches of at most {failed[-1] // 2} tokens" in caplog.text
    tried.clear()
    helpers.rewards(scorer, rows)
    assert max(tried) <= 130, "what was learnt stays"


def test_a_row_that_does_not_fit_by_itself_ends_the_run_with_a_hint_and_what_was_scored_stays(tmp_path):
    model = make("Llama", tmp_path / "rm", **SHAPE)
    scorer = scorer_of(model, batch_tokens=1000)
    with_little_memory(scorer, 30, OUT_OF_MEMORY["CUDA's"])
    with pytest.raises(EnvironmentFailure, match="out of memory; --dtype bfloat16, or a smaller --max-length, red"):
        helpers.rewards(scorer, [[5] * 40, [6] * 20])


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path):
    model = make("Llama", tmp_path / "rm", **SHAPE)
    scorer = scorer_of(model)
    tried = with_little_memory(scorer, 0, RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side"):
        helpers.rewards(scorer, [[5] * 40, [6] * 20])
    assert len(tried) == 1


# --- which engine -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """A machine with a GPU and vLLM for it, as far as the plan sees."""
    monkeypatch.setattr(vllm_tools, "why_not", lambda: None)
    monkeypatch.setattr(vllm_reward, "has_gpu", lambda: True)


def choice(model: Path, engine: str = "auto", **settings: Any) -> str:
    config = ScoreConfig(task="alpaca", name="m", reward_model=str(model), engine=engine, **settings)
    return find_engine(SCORERS, engine, config, model)[0]


def test_auto_takes_vllm_on_a_gpu_for_what_was_compared_there(on_gpu, tmp_path, caplog):
    caplog.set_level("INFO")
    assert choice(make("Llama", tmp_path / "rm", **SHAPE)) == "vllm"
    assert "engine: vllm (it is installed and can run)" in caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        (
            "DebertaV2",
            BESIDE["DebertaV2"],
            "expo has not compared vLLM's rewards of DebertaV2ForSequenceClassification",
        ),
        ("Gemma3Text", {**SHAPE, **WINDOW}, "not compared vLLM's rewards of Gemma3TextForSequenceClassification"),
        (
            "Llama",
            {**SHAPE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rm has rotary positions that depend on a row's length",
        ),
    ],
)
def test_others_are_for_transformers_and_vllm_is_refused_by_name(on_gpu, tmp_path, caplog, kind, settings, why):
    caplog.set_level("INFO")
    model = make(kind, tmp_path / "rm", **settings)
    assert choice(model) == "transformers"
    assert re.search(rf"engine: transformers \(.*{why}", caplog.text)
    with pytest.raises(InputError, match=f"--engine vllm: .*{why[-30:]}"):
        choice(model, "vllm")


def test_on_a_cpu_auto_is_transformers_and_small_heads_are_refused(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(vllm_tools, "why_not", lambda: None)
    monkeypatch.setattr(vllm_reward, "has_gpu", lambda: False)
    model = make("Llama", tmp_path / "rm", **SHAPE)
    assert choice(model) == "transformers"
    assert "engine: transformers (on a CPU transformers is faster and starts sooner)" in caplog.text
    assert choice(model, "vllm") == "vllm"
    small = make("Llama", tmp_path / "small", **{**SHAPE, "head_dim": 16})
    with pytest.raises(InputError, match="small has attention heads of 16 dimensions, and vLLM on a CPU needs 32"):
        choice(small, "vllm")


def test_a_device_is_transformers(on_gpu, tmp_path):
    assert choice(make("Llama", tmp_path / "rm", **SHAPE), device="cpu") == "transformers"
