"""The engines against each other and against transformers itself; the noise and the batches they share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from hypothesis import given, strategies as st

from expo.config import GenerateConfig
from expo.engines import GENERATORS, SCORERS, Request
from expo.engines.batches import token_batches
from expo.engines.transformers import PenaltyProcessor, SeededChoice, sampling_noise

COMPARE = """
import json, sys
from expo.config import GenerateConfig
from expo.errors import InputError
from expo.config import GenerateConfig
from expo.verbs.generate import plan

def main():
    settings = json.loads(sys.argv[1])
    settings["engine_arg"] = ()
    answers = {}
    try:
        plan(GenerateConfig(**{**settings, "engine_arg": ("no_such=1",)}, engine="vllm")).open_engine()
    except InputError as error:
        answers["refused"] = str(error)
    for engine in ("transformers", "vllm"):
        work = plan(GenerateConfig(engine=engine, **settings))
        generator = work.open_engine()
        answers[engine] = {
            f"{one.request.id}-{one.request.sample}": [list(one.token_ids), one.finish_reason]
            for rows in generator.generate(work.requests, set()) for one in rows
        }
    print(json.dumps(answers))

if __name__ == "__main__":
    main()
"""


def both_engines(settings: dict[str, Any], folder: Path, run_warm: helpers.Run) -> dict[str, dict[str, Any]]:
    """Engine → row → [token ids, finish reason], from one process."""
    script = folder / "compare.py"
    script.write_text(COMPARE)
    done = run_warm(script, json.dumps({**settings, "output_dir": str(folder)}))
    assert done.code == 0, done.stderr
    answers: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.vllm
def test_sampled_answers_follow_the_same_distribution_on_both_engines(trained, tmp_path, run_warm):
    """χ² over 1,000 samples, at the first token and at one that penalties, top-k and top-p have shaped.

    An engine argument that vLLM does not know is refused in one line, by the way.
    """
    task = tmp_path / "q.jsonl"
    prompt = json.loads((trained / "held_out_prompts.json").read_text())[0]
    task.write_text(json.dumps({"prompt": prompt}))
    settings = {"task": str(task), "model": str(trained / "tiny-dpo"), "dtype": "float32", "n": 1000, "max_tokens": 4}
    answers = both_engines({**settings, "presence_penalty": 0.5, "frequency_penalty": 0.5}, tmp_path, run_warm)
    refused: Any = answers.pop("refused")
    assert "no_such" in refused
    assert "\n" not in refused
    for position in (0, 3):
        counts = [
            Counter(ids[position] for ids, _ in rows.values() if len(ids) > position) for rows in answers.values()
        ]
        chi_squared, freedom = homogeneity(*counts)
        assert freedom >= 10
        assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def homogeneity(ours: Counter[int], theirs: Counter[int]) -> tuple[float, int]:
    """χ² of two samples being from one distribution, and its degrees of freedom; rare tokens are one class."""
    common = [token for token in ours | theirs if ours[token] + theirs[token] >= 10]
    cells = [(ours[token], theirs[token]) for token in common]
    cells.append((ours.total() - sum(a for a, _ in cells), theirs.total() - sum(b for _, b in cells)))
    weight = (theirs.total() / ours.total()) ** 0.5
    return sum((a * weight - b / weight) ** 2 / (a + b) for a, b in cells if a + b), len(cells) - 1


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_in_the_table_is_there(name):
    assert {"generate", "load", "close", "versions"} <= set(dir(GENERATORS[name].load()))


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_in_the_table_is_there(name):
    assert {"score", "load", "close", "versions"} <= set(dir(SCORERS[name].load()))


def test_penalties_are_counted_over_generated_tokens_only():
    ids = torch.tensor([[7, 7, 1, 3, 3, 3], [5, 1, 1, 2, 0, 2]])  # (batch 2, 3 prompt + 3 generated)
    scores = torch.zeros(2, 8)
    result = PenaltyProcessor(3, presence=0.5, frequency=0.25)(ids, scores)
    expected = torch.zeros(2, 8)
    expected[0, 3] = -0.5 - 3 * 0.25
    expected[1, 2] = -0.5 - 2 * 0.25
    expected[1, 0] = -0.5 - 0.25
    assert torch.equal(result, expected)
    assert torch.equal(scores, torch.zeros(2, 8))


def test_choices_follow_the_distribution():
    """Counts of 40,000 draws lie within five standard deviations of softmax; a token ruled out is never drawn."""
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    draws = 40_000
    noise = torch.rand(draws, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = SeededChoice(0, noise)(torch.empty(draws, 0, dtype=torch.long), logits.expand(draws, -1)).argmax(-1)
    counts = torch.bincount(chosen, minlength=5).double()
    expected = logits.double().softmax(-1)
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert counts[2] == 0
    assert torch.all((counts - draws * expected).abs() <= 5 * deviation)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-53])
def test_choices_at_the_edges_are_possible_tokens(noise):
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 500, 998]] = 0.0
    chosen = SeededChoice(0, torch.tensor([[noise]], dtype=torch.float64))(torch.empty(1, 0, dtype=torch.long), logits)
    assert chosen.argmax().item() in (3, 500, 998)


def test_noise_depends_on_seed_row_sample_and_turn_only():
    def noise(seed: int, row: str, sample: int, tokens: int = 20) -> list[float]:
        config = GenerateConfig(task="alpaca", model="m", seed=seed)
        return sampling_noise(config, Request(row, sample, (1, 2), tokens, 1.0)).tolist()

    assert noise(42, "a", 0) == noise(42, "a", 0)
    assert noise(42, "a", 0, 5) == noise(42, "a", 0)[:5]
    second = sampling_noise(GenerateConfig(task="alpaca", model="m"), Request("a", 0, (1, 2), 20, 1.0, turn=1)).tolist()
    others = [noise(43, "a", 0), noise(42, "b", 0), noise(42, "a", 1), noise(41, "a", 1), second]
    assert all(other != noise(42, "a", 0) for other in others)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 2000))
def test_batches_hold_every_row_once_and_keep_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[number] for number in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
    assert batches == token_batches(list(lengths), budget)


def test_batches_are_full():
    assert len(token_batches([10] * 100, 200)) == 5
