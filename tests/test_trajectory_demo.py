"""The demo of a training run, at a toy size: its reward, its steps, its checkpoints, and what it writes."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from demo import reinforce, task, train, trajectory

ASKED = "tell me about the teapot in the kitchen"
TINY = reinforce.Run(steps=4, prompts=2, samples=3, learning_rate=1e-3, warm_up=1, keep_every=1, held_out=3)


@pytest.fixture(scope="module")
def tokenizer():
    return train.build_tokenizer()


@pytest.fixture
def sft(tokenizer):
    """Untrained: what it says does not matter here."""
    torch.manual_seed(0)
    return LlamaForCausalLM(train.llama_config(tokenizer)).eval()


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(reinforce, "MAX_TOKENS", 5)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("the teapot is shiny gladly the teapot is old .", True),
        ("the teapot is shiny the teapot is old .", True),
        ("the teapot is shiny gladly the teapot is old", False),  # does not end
        ("the teapot is shiny gladly .", False),  # one fact
        ("the teapot is shiny the teapot is shiny .", False),  # the same twice
        ("the teapot is shiny the teapot is old thanks thanks .", False),
        ("the teapot is shiny the teapot is old the piano is tiny .", False),  # was not asked
        ("the teapot is shiny um the teapot is old .", False),
        ("the teapot is shiny ugh the teapot is old .", False),
        ("the teapot is shiny the teapot is old is .", False),  # a stray word
        ("the teapot is shiny . the teapot is old .", False),
        (".", False),
        ("", False),
    ],
)
def test_the_reward_is_exact(answer, correct):
    assert task.is_correct(ASKED, answer) is correct


def test_the_gradient_is_that_of_the_reward_above_the_other_answers(sft, tokenizer):
    """Where all answers to a prompt are worth the same, nothing is learned from them."""
    answers = reinforce.sample(sft, tokenizer, [ASKED, ASKED], 2, torch.Generator().manual_seed(0))
    assert answers.rewards.shape == (2, 2)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    with torch.no_grad():
        loss = reinforce.policy_loss(sft, reinforce.Answers(answers.batch, rewards))
        first, second, *_ = train.answer_logprobs(sft, answers.batch)
    torch.testing.assert_close(loss, -(first - second) / 4)


def test_likeliest_words_are_those_of_generate(sft, tokenizer):
    """Prompts of several lengths, padded on the left, are answered as transformers answers each alone."""
    prompts = [ASKED, "do you know the clock from the attic ?"]
    batch = reinforce.sample(sft, tokenizer, prompts, 1, None).batch
    for prompt, ids, attention, in_answer in zip(prompts, *batch, strict=True):
        words = train.encode(tokenizer, [(prompt, "")])[0]
        asked = torch.tensor([words.ids[: words.answer_start]])
        assert ids[attention.bool() & ~in_answer].tolist() == asked[0].tolist()
        said = sft.generate(asked, max_new_tokens=5, do_sample=False)[0, asked.shape[1] :]
        assert ids[in_answer].tolist() == said.tolist()


def test_checkpoints_load_and_come_again(sft, tokenizer, tmp_path):
    kept, again = (
        reinforce.train(sft, tokenizer, tmp_path / name, TINY, 0, lambda line: None) for name in ("one", "two")
    )
    assert [*kept] == [0, 1, 2, 3, 4]
    for step, path in kept.items():
        weights = load_file(path / "model.safetensors")
        assert {values.dtype for values in weights.values()} == {torch.float32}
        assert (path / "model.safetensors").read_bytes() == (again[step] / "model.safetensors").read_bytes()
    assert AutoTokenizer.from_pretrained(kept[0]).get_vocab() == tokenizer.get_vocab()
    for name, values in LlamaForCausalLM.from_pretrained(kept[0]).state_dict().items():
        assert torch.equal(values, sft.state_dict()[name])


def test_the_whole_way(sft, tmp_path, monkeypatch):
    """Every model is measured; extrapolating to the last step from it alone is that step."""
    monkeypatch.setattr(train, "train_sft", lambda *_: sft)
    monkeypatch.setattr(reinforce.task, "is_correct", lambda prompt, answer: "teapot" in answer)
    for name, value in {"PARTS": ((0, 0.5), (0.5, 1)), "REACH": (1, 2), "MEASURED_EVERY": 0.5}.items():
        monkeypatch.setattr(trajectory, name, value)
    text = trajectory.run_all(tmp_path, TINY, 0)
    record = json.loads((tmp_path / "trajectory.json").read_text())
    assert record["run"] == asdict(TINY)
    of = {(one["way"], *one["part"], one["step"]): one for one in record["scores"]}
    assert {key for key in of if key[0] == "run"} == {("run", 0, 0, step) for step in (0, 2, 4)}
    assert {key[1:] for key in of if key[0] == "relex"} == {(0, 2, 2), (0, 2, 4), (2, 4, 4), (2, 4, 6)}
    assert of["pair", 2, 4, 4] == {**of["run", 0, 0, 4], "way": "pair", "part": [2, 4]}
    assert [(*one["part"], one["rule"], one["checkpoints"]) for one in record["fits"]] == [
        (*part, rule, 2) for part in ((0, 2), (2, 4)) for rule in ("relex", "linear")
    ]
    assert [one["ahead"] for one in record["fits"][2:]] == [pytest.approx(1)] * 2
    assert (tmp_path / "trajectory.md").read_text() == text
    assert "\n| 0 | 2 | 4 | 2 × | " in text
    assert (tmp_path / "trajectory.png").read_bytes().startswith(b"\x89PNG")
