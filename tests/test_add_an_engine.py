"""CONTRIBUTING's recipe "Add an engine", carried out from outside of expo: one class and one line for each protocol."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pytest
from test_score import make_reward_model

from expo.cli import program as cli
from expo.config import GenerateConfig, ScoreConfig
from expo.engines import GENERATORS, SCORERS, Completion, EngineSpec, Failure
from expo.errors import InputError
from expo.rows import EngineKeeper
from expo.verbs import generate, score

HERE = "test_add_an_engine"


class Dice:
    """A generator: tokens are drawn from the row's seed. Prompts that hold the token w13 it cannot answer."""

    repeatable = True
    step_seconds = 0.0
    opened = closed = 0

    def __init__(self, setup) -> None:
        Dice.opened += 1
        self.loaded = [setup]

    def load(self, setup) -> None:
        self.loaded.append(setup)

    def close(self) -> None:
        Dice.closed += 1

    def generate(self, requests, done):
        for request in requests:
            if request.key not in done:
                yield [self._answer(request)]

    def _answer(self, request):
        if 19 in request.prompt_ids:
            return Failure(request, "unlucky")
        drawn = random.Random(request.seed).choices(range(6, 64), k=min(5, request.max_tokens))
        return Completion(request, tuple(drawn), "length")

    def versions(self) -> dict[str, str]:
        return {"dice": "1.0"}


class Length:
    """A scorer: the longer the better."""

    def __init__(self, setup) -> None:
        pass

    def load(self, setup) -> None:
        pass

    def close(self) -> None:
        pass

    def score(self, rows):
        yield [(place, float(len(row))) for place, row in enumerate(rows)]

    def versions(self) -> dict[str, str]:
        return {"length": "1.0"}


@pytest.fixture(autouse=True)
def added(monkeypatch) -> None:
    monkeypatch.setitem(GENERATORS, "dice", EngineSpec(f"{HERE}:Dice", can=frozenset({"local"})))
    monkeypatch.setitem(SCORERS, "length", EngineSpec(f"{HERE}:Length", can=frozenset({"local"})))
    monkeypatch.setattr(Dice, "opened", 0)
    monkeypatch.setattr(Dice, "closed", 0)


@pytest.fixture
def task(tmp_path) -> Path:
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"w{number} w9" + " w8" * (number % 2)}) + "\n" for number in range(14))
    )
    return file


def settings(folder_of_model: Path, task: Path, **others) -> GenerateConfig:
    folder = others.pop("folder", task.parent)
    fixed = {
        "task": str(task),
        "model": str(folder_of_model),
        "engine": "dice",
        "max_tokens": 8,
        "name": "m",
        "output_dir": str(folder),
    }
    return GenerateConfig(**{**fixed, **others})


def test_it_generates_and_scores(llama_pair, task, tmp_path):
    made = generate.run(settings(llama_pair[1], task))
    meta = json.loads(made.meta.read_text())
    assert (made.rows, made.failed, meta["versions"]["dice"]) == (14, 1, "1.0")
    assert meta["errors"] == [{"row": 13, "id": "13", "sample": 0, "reason": "unlucky"}]
    assert (Dice.opened, Dice.closed) == (1, 1)
    again = json.loads(generate.run(settings(llama_pair[1], task)).meta.read_text())
    assert again["rows_this_run"] == 1, "a failed row is tried again"

    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2)
    fixed = {"task": str(task), "name": "m", "reward_model": str(model), "output_dir": str(tmp_path)}
    rated = score.run(ScoreConfig(engine="length", **fixed))
    rows = [json.loads(line) for line in (tmp_path / "rewards_q" / "m.rows.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [float(row["tokens"]) for row in rows[:13]] + [None]
    assert rated.failed == 1


def test_the_command_line_knows_it(llama_pair, task, tmp_path, capsys):
    words = ["generate", str(task), "--model", str(llama_pair[1]), "--output-dir", str(tmp_path), "--max-tokens", "8"]
    assert cli.run([*words, "--engine", "dice", "--limit", "3"]) == 0
    assert cli.run([*words, "--engine", "cards"]) == 2
    assert "--engine must be one of auto, vllm, transformers, openai, dice, not 'cards'" in capsys.readouterr().err


def test_settings_of_other_engines_are_refused(llama_pair, task):
    with pytest.raises(InputError, match="--base-url works only with the openai engine, and this run uses dice"):
        generate.plan(settings(llama_pair[1], task, base_url="http://localhost:1/v1"))
    with pytest.raises(InputError, match="--engine-arg works only with the vllm engine"):
        generate.plan(settings(llama_pair[1], task, engine_arg=("a=1",)))


def test_one_engine_does_one_job_after_another(llama_pair, task, tmp_path):
    """An engine that is kept takes other settings and other weights; another model needs another engine."""
    pair = {"model": None, "sft": str(llama_pair[0]), "dpo": str(llama_pair[1])}
    with closing(EngineKeeper()) as keeper:
        for alpha in (0.0, 0.5, 1.0):
            config = settings(llama_pair[1], task, name=f"a{alpha}", **{**pair, "alpha": alpha})
            assert generate.run(config, keeper).status == "written"
        engine = keeper._engine
        assert [setup.theta.config.alpha for setup in engine.loaded] == [0.0, 0.5, 1.0]
        assert (Dice.opened, Dice.closed) == (1, 0)
        generate.run(settings(llama_pair[1], task, name="plain"), keeper)
        assert (Dice.opened, Dice.closed) == (2, 1)
    assert (Dice.opened, Dice.closed) == (2, 2)
    files = [tmp_path / "outputs_q" / f"{name}.jsonl" for name in ("a0.0", "a1.0", "plain")]
    assert len({file.read_bytes() for file in files}) == 1, "its rows hang on the seeds alone, whatever the weights"


def test_an_engine_is_closed_when_a_run_fails(llama_pair, task, monkeypatch):
    def fail(self, request):
        raise InputError("no")

    monkeypatch.setattr(Dice, "_answer", fail)
    with pytest.raises(InputError, match="no"):
        generate.run(settings(llama_pair[1], task))
    assert (Dice.opened, Dice.closed) == (1, 1)
