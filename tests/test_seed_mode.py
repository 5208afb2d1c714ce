"""`--seed-mode`: with `row` a row has random numbers of its own, with `shared` all rows of a sample have the same."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer
from hypothesis import given, strategies as st

from expo.config import GenerateConfig
from expo.engines import Request, request_seed
from expo.engines.transformers import sampling_noise
from expo.rows import EngineKeeper
from expo.verbs import generate

ROWS = 120
MANY = 2000
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def config(**others) -> GenerateConfig:
    return GenerateConfig(**{"task": "q.jsonl", "model": "m", **others})


def request(name: str = "a", sample: int = 0, turn: int = 0, tokens: int = 8) -> Request:
    return Request(name, sample, (1, 2), tokens, 1.0, turn=turn)


@given(st.integers(0, 2**40), st.text(max_size=20), st.integers(0, 9), st.integers(0, 3))
def test_seeds_of_rows_are_taken_by_every_server(seed, name, sample, turn):
    assert 0 <= request_seed(config(seed=seed), (name, sample, turn)) < 2**31


def test_seeds_of_rows_differ_and_shared_ones_do_not():
    keys = list(product(map(str, range(200)), range(3), range(2)))
    assert len({request_seed(config(seed=seed), key) for seed in (1, 2) for key in keys}) == 2 * len(keys)
    assert {request_seed(config(seed_mode="shared", seed=7), key) for key in keys} == {7, 8, 9}


def test_transformers_keeps_its_noise_as_row_to_the_bit():
    """The numbers that c9550b8 drew."""
    drawn = sampling_noise(config(), request("7", 1)).tolist()
    generator = torch.Generator().manual_seed(OLD_SEED)
    assert drawn == torch.rand(8, dtype=torch.float64, generator=generator).tolist()


OLD_SEED = 3219408093062264999
"""The first eight bytes of SHA-256 of "43:1:7", little-endian and signed."""


def test_shared_noise_is_the_same_for_all_rows_of_a_sample():
    shared = config(seed_mode="shared")
    assert torch.equal(sampling_noise(shared, request("a")), sampling_noise(shared, request("b", turn=1)))
    assert not torch.equal(sampling_noise(shared, request("a")), sampling_noise(shared, request("a", sample=1)))
    assert not torch.equal(sampling_noise(config(), request("a")), sampling_noise(config(), request("b")))


# --- engines -------------------------------------------------------------------------------------------------------


def task_of(folder: Path, rows: int, prompt: str = "w1 w2") -> Path:
    """Prompts that are all alike."""
    file = folder / "q.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "id": f"r{row}"}) + "\n" for row in range(rows)))
    return file


def all_modes(engine: str, model: Path, task: Path) -> dict[str, list[str]]:
    """The answers of every mode; of all but one from one engine, which is kept."""
    few = {"engine_arg": ("max_num_seqs=3",)} if engine == "vllm" else {"batch_tokens": 64}
    modes = {
        "shared": {"seed_mode": "shared"},
        "row": {},
        "limited": {"limit": 7},
        "seed": {"seed": 43},
        "many": {"limit": MANY, "max_tokens": 1},
        "batches": few,
    }
    fixed = {"limit": ROWS, "max_tokens": 8, "device": "cpu", "dtype": "float32", **SAMPLING}
    answers = {}
    with closing(EngineKeeper()) as keeper:
        for name, others in modes.items():
            source = {"task": str(task), "model": str(model), "output_dir": str(task.parent)}
            made = generate.run(GenerateConfig(engine=engine, name=name, **source, **{**fixed, **others}), keeper)
            answers[name] = [json.loads(line)["output"] for line in made.output.read_text().splitlines()]
    return answers


VLLM = """
import json, sys
from pathlib import Path
from test_seed_mode import all_modes

if __name__ == "__main__":
    print(json.dumps(all_modes("vllm", Path(sys.argv[1]), Path(sys.argv[2]))))
"""
ENGINES = [
    pytest.param("transformers", marks=pytest.mark.xdist_group("seed modes")),  # asked once
    pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=ENGINES)
def asked(request, tmp_path_factory) -> tuple[dict[str, list[str]], Path, str]:
    """Of an engine: its answers, the model and the one prompt."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "transformers":
        model, prompt = request.getfixturevalue("llama_pair")[1], "w1 w2"
        return all_modes("transformers", model, task_of(folder, MANY, prompt)), model, prompt
    trained: Path = request.getfixturevalue("trained")
    model, prompt = trained / "tiny-sft", json.loads((trained / "held_out_prompts.json").read_text())[0]
    (folder / "script.py").write_text(VLLM)
    done = request.getfixturevalue("run_warm")(folder / "script.py", model, task_of(folder, MANY, prompt))
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), model, prompt


def test_rows_of_one_opening_do_not_go_on_alike(asked):
    """They are alike where they share their seed, and each for itself where they do not."""
    answers, _, _ = asked
    assert len(set(answers["shared"])) == 1
    assert len(set(answers["row"])) > ROWS // 2
    assert answers["row"][:7] == answers["limited"]
    assert answers["row"] == answers["batches"]
    assert answers["row"] != answers["seed"]


def test_first_tokens_have_the_models_distribution(asked):
    from transformers import AutoTokenizer

    answers, model, prompt = asked
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected: Counter[str] = Counter()
    for token, probability in enumerate(first_words(model, prompt)):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += probability
    assert len(answers["many"]) == MANY
    statistic, freedom = chi_square(Counter(answers["many"]), expected, MANY)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def first_words(model: Path, prompt: str) -> list[float]:
    """The probability of each token as the first of an answer, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([ids])).logits[0, -1]
    return logits.double().softmax(-1).tolist()


def chi_square(counts: Counter, expected: dict[object, float], total: int) -> tuple[float, int]:
    """χ² over the cells of at least five expected, the others as one."""
    cells = [(counts[key], total * p) for key, p in expected.items() if total * p >= 5]
    rest = (total - sum(seen for seen, _ in cells), total - sum(wanted for _, wanted in cells))
    cells += [rest] if rest[1] >= 5 else []
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells), len(cells) - 1


def test_a_server_is_sent_the_rows_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    task = task_of(tmp_path, 5)
    seeds = {}
    for mode in ("row", "shared"):
        with ChatServer().serve() as server:
            fixed = {"engine": "openai", "base_url": server.url, "model": "m", "output_dir": str(tmp_path), "n": 2}
            generate.run(GenerateConfig(task=str(task), name=mode, seed_mode=mode, **fixed))
            seeds[mode] = sorted(body["seed"] for body in server.seen)
    assert seeds["shared"] == [42] * 5 + [43] * 5
    keys = [(f"r{row}", sample, 0) for row in range(5) for sample in range(2)]
    assert seeds["row"] == sorted(request_seed(config(), key) for key in keys)
