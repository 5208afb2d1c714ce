"""`expo sweep --likelihood`: log-probabilities against a loop in float64, its laws, and how it goes on."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import Pair, tree
from sizes import in_full

import expo
from expo.config import SweepConfig
from expo.engines.transformers_log_probs import TransformersThetaLogProbs
from expo.errors import EnvironmentFailure, InputError
from expo.tasks import Preference, clusters_of, load_preferences, preferences
from expo.verbs import sweep as verb
from expo.verbs.sweep.likelihood.figures import Likelihoods, explained_by_line, figures

running = importlib.import_module("expo.verbs.sweep.likelihood.run")  # the package has its function under this name

PAIRS = [
    ("w1 w2", "w3 w4 w5", "w6"),
    ("w1 w2", "w7", "w8 w9 w10 w11"),
    ("w12", "w13 w14", "w15 w16"),
    ("w17 w18 w19", "w20", "w21 w22 w23"),
    ("w24", "w25 w26 w27 w28", "w29"),
]
ALPHAS = (-1.0, 0.0, 0.5, 2.0)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(
        tmp_path / "pairs.jsonl", [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS]
    )


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(pair: Pair, pairs: Path, **others) -> SweepConfig:
    defaults = {"dtype": "float32", "device": "cpu", "batch_tokens": 60, "alpha": (0.5, 2.0)}
    given = {**defaults, "output": str(pairs.parent / "swept"), **others}
    return SweepConfig(sft=str(pair[0]), dpo=str(pair[1]), likelihood=str(pairs), **given)


def rows_of(folder: Path, alpha: float) -> list[dict[str, object]]:
    file = next((folder / "likelihood_pairs").glob(f"*-a{alpha!r}.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def in_float64(model: torch.nn.Module, tokenizer, prompt: str, answer: str) -> tuple[float, int]:
    """log π of an answer and its closing token, all logits at once; and how many tokens they are."""
    asked = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], return_dict=False)
    end = max(number for number, one in enumerate(ids) if one == tokenizer.eos_token_id) + 1
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:end]])).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[at]].item() for at in range(len(before), end)), end - len(before)


@pytest.mark.parametrize("tied", [in_full(False), True])
def test_log_probabilities_are_those_of_each_checkpoint_in_float64(llama_pair, tied_pair, pairs, tmp_path, tied):
    """One engine goes from α to α: also its head, in float32, which a tied model shares with the embedding."""
    pair = tied_pair if tied else llama_pair
    found = verb.run(settings(pair, pairs))
    made = expo.extrapolate(sft=str(pair[0]), dpo=str(pair[1]), alpha=ALPHAS, output=str(tmp_path / "theta"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair[1])
    seen = set()
    for one in made:
        alpha = one.alpha
        model = transformers.AutoModelForCausalLM.from_pretrained(one.path, dtype=torch.float64).eval()
        for row, (prompt, chosen, rejected) in zip(rows_of(found.file.parent, alpha), PAIRS, strict=True):
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                expected, tokens = in_float64(model, tokenizer, prompt, answer)
                assert row[side] == pytest.approx(expected, abs=1e-4)
                assert row[f"{side}_tokens"] == tokens
                seen.add(round(expected, 3))
    assert len(seen) > 30
    assert [one["alpha"] for one in found.record["alphas"]] == list(ALPHAS)
    best = next(one for one in found.record["alphas"] if one["alpha"] == 2.0)
    margins = [row["chosen"] - row["rejected"] for row in rows_of(found.file.parent, 2.0)]
    assert best["margin"]["mean"] == pytest.approx(np.mean(margins))
    assert best["accuracy"]["mean"] == np.mean(np.array(margins) > 0)
    assert found.picture.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="module")
def tied_pair(llama_pair, tmp_path_factory) -> Pair:
    """The pair with one tensor for embedding and head."""
    folder = tmp_path_factory.mktemp("tied")
    for side, source in zip(("sft", "dpo"), llama_pair, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder / side)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder / side)
    return folder / "sft", folder / "dpo"


def dying(patched: pytest.MonkeyPatch, moment: int | None = None) -> Counter[tuple[object, ...]]:
    """How often each batch was read; at a moment the engine dies."""
    original, seen = TransformersThetaLogProbs.log_probs, Counter()

    def noted(self, rows):
        if seen.total() == moment:
            raise EnvironmentFailure("the engine died")
        seen[self._weights["settings"]["alpha"], tuple(rows)] += 1
        return original(self, rows)

    patched.setattr(TransformersThetaLogProbs, "log_probs", noted)
    return seen


@pytest.fixture
def no_picture(monkeypatch) -> None:
    """Half of the time of a sweep of five pairs."""
    monkeypatch.setattr(running, "_picture", lambda *_: b"drawn")


@pytest.mark.usefixtures("no_picture")
def test_a_sweep_that_dies_anywhere_goes_on_and_reads_nothing_twice(llama_pair, pairs, tmp_path):
    """Whatever the batch; and what is complete is not read again, nor anything written."""
    with pytest.MonkeyPatch.context() as patched:
        batches = dying(patched)
        whole = verb.run(settings(llama_pair, pairs))
    files = tree(whole.file.parent)
    assert set(batches.values()) == {1}
    for moment in (1, len(batches) // 2):
        config = settings(llama_pair, pairs, output=str(tmp_path / f"again-{moment}"))
        with pytest.MonkeyPatch.context() as patched:
            before = dying(patched, moment)
            with pytest.raises(EnvironmentFailure, match="the engine died"):
                verb.run(config)
        assert not Path(str(config.output), "likelihood.json").exists()
        with pytest.MonkeyPatch.context() as patched:
            rest = dying(patched)
            again = verb.run(config)
        assert before + rest == batches
        left = tree(again.file.parent)
        assert left.keys() == files.keys()
        assert all(left[name] == files[name] for name in left if not name.endswith(("meta.json", "likelihood.json")))
    assert verb.run(settings(llama_pair, pairs)).status == "already complete"
    assert tree(whole.file.parent) == files


@pytest.mark.usefixtures("no_picture")
def test_further_pairs_and_another_alpha_extend_what_is_there(llama_pair, pairs, monkeypatch):
    """Rows that are there stay as they are, also in a batch with others that is read again."""
    few = verb.run(settings(llama_pair, pairs, limit=2, alpha=(0.5,)))
    first = rows_of(few.file.parent, 0.5)
    assert few.record["pairs"]["read"] == len(first) == 2
    original = TransformersThetaLogProbs.log_probs
    monkeypatch.setattr(TransformersThetaLogProbs, "log_probs", lambda *given: [one - 1 for one in original(*given)])
    all_of_them = verb.run(settings(llama_pair, pairs, alpha=(0.5, 1.0), batch_tokens=60))
    rows = rows_of(all_of_them.file.parent, 0.5)
    assert rows[:2] == first
    assert len(rows) == len(rows_of(all_of_them.file.parent, 1.0)) == len(PAIRS)
    fewer = verb.run(settings(llama_pair, pairs, limit=2, alpha=(0.5,)))
    assert fewer.record["pairs"]["read"] == 2
    with pytest.raises(InputError, match="--overwrite"):
        verb.run(settings(llama_pair, pairs, dtype="bfloat16"))


@pytest.mark.usefixtures("no_picture")
def test_a_pair_that_does_not_fit_fails_and_the_others_are_read(llama_pair, pairs):
    long = " ".join(["w1"] * 200)
    write(
        pairs, [{"prompt": long, "chosen": "w2", "rejected": "w3"}, {"prompt": "w1", "chosen": "w2", "rejected": long}]
    )
    found = verb.run(settings(llama_pair, pairs))
    assert (found.failed, found.record["pairs"]["read"], found.can_retry) == (1, 1, False)
    assert "fills the longest sequence" in found.reason
    cut = rows_of(found.file.parent, 0.0)[1]
    assert cut["truncated"]
    assert cut["rejected_tokens"] < 128


# --- figures --------------------------------------------------------------------------------------------------------


def likelihoods(chosen, rejected, tokens=1.0) -> Likelihoods:
    chosen, rejected = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    return Likelihoods(chosen, rejected, np.full(len(chosen), tokens), np.full(len(chosen), tokens))


def test_linear_is_what_the_line_explains_and_ends_where_it_does_not():
    rng = np.random.default_rng(0)
    base, step = rng.normal(size=(2, 50)), rng.normal(size=(2, 50))
    read = {alpha: likelihoods(*(base + alpha * step)) for alpha in (-1.0, 0.0, 0.5, 1.0)}
    read[2.0] = likelihoods(*(base + 2 * step + 3 * rng.normal(size=(2, 50))))
    read[4.0] = likelihoods(*(base + 4 * step))
    assert explained_by_line(read, 1.0) == pytest.approx(1)
    change = np.concatenate([read[2.0].chosen - base[0], read[2.0].rejected - base[1]])
    off = change - 2 * np.concatenate(step)
    assert explained_by_line(read, 2.0) == pytest.approx(1 - (off @ off) / (change @ change))
    found = figures(read, dict.fromkeys(read, "m"), range(50))
    assert found.linear_up_to == 1.0  # what is linear again beyond a gap does not count
    assert [one.linear for one in found.alphas][:2] == [None, None]


def test_accuracy_counts_ties_half_and_length_is_taken_out():
    equal = likelihoods([-1, -2, -3, -4], [-1, -3, -2, -4])
    longer = Likelihoods(np.array([-4.0]), np.array([-3.0]), np.array([4.0]), np.array([1.0]))
    assert equal.measured("accuracy").tolist() == [0.5, 1, 0, 0.5]
    assert longer.measured("accuracy").tolist() == [0]
    assert longer.measured("accuracy_per_token").tolist() == [1]
    assert longer.measured("margin_per_token").tolist() == [2]


# --- pairs ----------------------------------------------------------------------------------------------------------

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
AS_READ = Preference("0", (USER,), "a", "b")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "prompt_id": "0", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    ],
)
def test_pairs_are_read_in_each_form_that_is_usual(tmp_path, row):
    """TRL's with text and with messages, with the prompt inside, and UltraFeedback's."""
    assert load_preferences(str(write(tmp_path / "p.jsonl", [row])), "--likelihood") == ("p", [AS_READ])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "q", "chosen": "a"}, "row 0 of .*p.jsonl has no rejected column with text or messages"),
        ({"chosen": "a", "rejected": "b"}, "has no prompt, instruction or messages column"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen column that ends with a turn of role 'user'"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "answers to different prompts"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "no pair of different answers"),
    ],
)
def test_a_row_that_is_no_pair_is_refused(tmp_path, row, why):
    with pytest.raises(InputError, match=why):
        load_preferences(str(write(tmp_path / "p.jsonl", [row])), "--likelihood")


def test_a_data_set_of_the_hub_has_a_revision_and_a_split(monkeypatch):
    asked = []

    def rows(source, flag):
        asked.append((source.repository, source.split, flag))
        return [{"prompt": "q", "chosen": "a", "rejected": "b"}]

    monkeypatch.setattr(preferences, "load_from_hub", rows)
    for place in ("me/pairs", "me/pairs@v2:train"):
        assert load_preferences(place, "--likelihood") == ("pairs", [AS_READ])
    assert asked == [("me/pairs", "test_prefs", "--likelihood"), ("me/pairs@v2", "train", "--likelihood")]


def test_pairs_of_one_prompt_are_named_apart_and_counted_together(tmp_path, caplog):
    rows = [{"prompt": "q", "id": "x", "chosen": chosen, "rejected": "b"} for chosen in ("a", "c", "b")]
    _, read = load_preferences(str(write(tmp_path / "p.jsonl", rows)), "--likelihood")
    assert [one.id for one in read] == ["x", "x#2"]
    assert clusters_of(read) == [0, 0]
    assert "1 of 3 pairs have two equal answers" in caplog.text


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        {"reward_model": ("rm",)},
        {"search": "race", "alpha": (1, 2)},
        {"task": "alpaca"},
        {"system": "s"},
        {"space": "logits"},
        {"write": True},
        {"ray": "auto"},
    ],
)
def test_settings_of_what_is_not_done_are_refused(llama_pair, pairs, others):
    with pytest.raises(InputError, match=f"--{next(iter(others)).replace('_', '-')} has no meaning with --likelihood"):
        settings(llama_pair, pairs, **others)


def test_models_engines_and_files_that_cannot_be_are_refused(llama_pair, pairs):
    with pytest.raises(InputError, match="--likelihood runs with transformers, not with --engine vllm"):
        verb.plan(settings(llama_pair, pairs, engine="vllm"))
    with pytest.raises(InputError, match="SFT and DPO are the same files"):
        verb.plan(settings((llama_pair[1], llama_pair[1]), pairs))
    with pytest.raises(InputError, match="no such file of preference pairs"):
        verb.plan(settings(llama_pair, pairs.with_name("missing.jsonl")))
    assert verb.plan(settings(llama_pair, pairs)).describe()["rows_per_alpha"] == len(PAIRS)
