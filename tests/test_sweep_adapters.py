"""expo sweep --switch adapter: all α of a LoRA pair in one engine's batch, with the rows of one α after the other.

Most tests have an engine that gives each α its weights when its turn comes, in processes forked from this one; what
vLLM's own adapters answer is the last one's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapters import CASES, Maker, save_adapter, wide_llama
from crashes import ended, forked
from forks import Fork
from peft import LoraConfig
from sizes import in_full, sized
from test_orphans import wait_until_gone
from test_sweep import (  # fixtures, too
    assert_same_rows,
    cache,  # noqa: F401
    drawn,  # noqa: F401
    pictures,  # noqa: F401
    processes,  # noqa: F401
    record_of,
    reward_model,  # noqa: F401
    swept,  # noqa: F401
    task,  # noqa: F401
    verdicts,  # noqa: F401
)
from test_sweep_processes import run_sweep  # noqa: F401 - a fixture

from expo.arguments import arguments_of
from expo.cli import program as cli
from expo.config import SweepConfig, ThetaConfig
from expo.engines import GENERATORS, Completion, GeneratorSetup, Probed, Request
from expo.engines.transformers import TransformersGenerator
from expo.errors import InputError
from expo.theta.applied import why_not_applied, write_applied
from expo.theta.pair import plan_theta
from expo.verbs import sweep as verb
from expo.verbs.sweep import adapters
from expo.verbs.sweep.adapters import SLOWER, Trial
from expo.verbs.sweep.plan import plan

ALPHAS = (0.5, 2.0)
RANK, LORA_ALPHA = 4, 128


class Applying(TransformersGenerator):
    """Takes requests of several α, and with each step answers a few of the one whose turn it is."""

    dies: Callable[[int], object] = staticmethod(lambda step: None)
    """Called before each step, with the answers so far."""
    probes: Callable[[list[Probed]], list[Probed]] = staticmethod(lambda answers: answers)
    """What it makes of its answers to a probe."""

    def __init__(self, setup: GeneratorSetup) -> None:
        super().__init__(replace(setup, applied=None))
        self.waiting: dict[str, tuple[Request, GeneratorSetup]] = {}
        self.answered = self.names = 0

    def load(self, setup: GeneratorSetup) -> None:
        super().load(replace(setup, applied=None))

    def submit(self, requests: Sequence[Request], setup: GeneratorSetup) -> list[str]:
        assert setup.applied is not None
        assert setup.theta is not None
        config = json.loads((setup.applied.folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == LORA_ALPHA * (1 + setup.theta.config.alpha)
        assert (setup.applied.rank, setup.applied.room) == (RANK, 3)
        names = [str(self.names + number) for number in range(len(requests))]
        self.names += len(requests)
        self.waiting |= {name: (request, setup) for name, request in zip(names, requests, strict=True)}
        return names

    def step(self) -> list[tuple[str, Completion]]:
        self.dies(self.answered)
        _, setup = next(iter(self.waiting.values()))
        few = [name for name, (_, its) in self.waiting.items() if its is setup][:5]
        asked = {name: self.waiting.pop(name)[0] for name in few}
        self.waiting |= {name: self.waiting.pop(name) for name, (_, its) in [*self.waiting.items()] if its is setup}
        self.load(setup)
        done = {one.request.key: one for batch in self.generate([*asked.values()], set()) for one in batch}
        self.answered += len(done)
        return [(name, done[request.key]) for name, request in asked.items()]

    def give_up(self, names: Sequence[str]) -> None:
        for name in names:
            self.waiting.pop(name)

    def probe_together(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, setups: Sequence[GeneratorSetup]
    ) -> list[list[Probed]]:
        found = []
        for setup in setups:
            self.load(setup)
            found.append(self.probes(self.probe(prompts, new_tokens)))
        return found


@pytest.fixture(autouse=True)
def applying(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Applying]]:
    """The engine; in every process."""
    spec = GENERATORS["transformers"]
    own = replace(spec, place=f"{__name__}:Applying", can=spec.can | {"adapters"})
    monkeypatch.setitem(GENERATORS, "transformers", own)
    yield Applying
    Applying.dies, Applying.probes = staticmethod(lambda step: None), staticmethod(lambda answers: answers)


@pytest.fixture(scope="session")
def lora(llama_pair: helpers.Pair, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the SFT model."""
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=LORA_ALPHA, target_modules=["q_proj", "down_proj"])
    return str(save_adapter(llama_pair[0], tmp_path_factory.mktemp("adapter") / "lora", config))


@pytest.fixture
def asked(swept: Callable[..., SweepConfig], lora: str) -> Callable[..., SweepConfig]:  # noqa: F811
    """A function that gives the settings of a sweep with adapters."""
    return lambda **others: swept(**{"dpo": lora, "switch": "adapter", **others})


@pytest.fixture(scope="session")
def whole() -> dict[str, Path]:
    """The sweep whose rows others must have, once it is there."""
    return {}


@pytest.fixture
def expected(
    asked: Callable[..., SweepConfig], whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a sweep that loads each α."""
    if "folder" not in whole:
        config = asked(switch="reload", output=str(tmp_path_factory.mktemp("reload") / "sweep"))
        assert verb.run(config).record["switch"]["way"] == "reload"
        whole["folder"] = Path(config.output or "")
    return whole["folder"]


def metas_of(folder: Path) -> list[dict[str, Any]]:
    """What is said of the answers of each α."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("outputs_*/*.meta.json"))]


# --- the rows -----------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_loaded_weights(
    asked: Callable[..., SweepConfig],
    expected: Path,
    processes: list[Fork],  # noqa: F811
) -> None:
    config = asked()
    processes.clear()
    done = verb.run(config)
    folder = Path(config.output or "")
    assert_same_rows(folder, expected)
    assert done.record["switch"]["way"] == "adapter"
    assert done.record["switch"]["slowdown"] > 0
    assert len(processes) == 3  # an engine with loaded weights to compare with, the one with adapters, rewards
    for meta in metas_of(folder):
        assert meta["weights"] == "applied as an adapter"
        assert meta["generate_seconds"] == pytest.approx(meta["engine_step_seconds"], abs=2e-3)
    assert verb.run(config).status == "already complete"
    assert verb.run(replace(config, switch="reload")).status == "already complete"


def test_alphas_that_are_added_join_the_others(asked: Callable[..., SweepConfig], expected: Path) -> None:
    """Those that are there are loaded weights' rows, which are the same."""
    config = asked(alpha=ALPHAS[:1], switch="reload")
    verb.run(config)
    folder = Path(config.output or "")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*a0.*.jsonl")}
    assert before
    done = verb.run(asked())
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert_same_rows(folder, expected)
    assert done.record["clock"]["alphas_generated"] == [2.0]


def test_a_race_has_the_looks_of_one_that_loads_weights(asked: Callable[..., SweepConfig], tmp_path: Path) -> None:
    questions = tmp_path / "many.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"w{number} w{number + 3}"}) + "\n" for number in range(27)))
    folders = []
    for switch in ("reload", "adapter"):
        race = {"search": "race", "slice": 5, "task": str(questions), "output": str(tmp_path / switch)}
        config = asked(switch=switch, **race)
        folders.append(Path(config.output or ""))
        assert verb.run(config).record["switch"]["way"] == switch
    assert_same_rows(*folders)
    ours, theirs = (record_of(folder)["race"] for folder in folders)
    assert ours == theirs


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_adapters_answer_as_checkpoints_do(
    swept: Callable[..., SweepConfig],  # noqa: F811
    reward_model: Path,  # noqa: F811
    llama_pair: helpers.Pair,
    made: Maker,
    run_sweep: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Greedily and in float32; prompts share a start that fills a block of the prefix cache. SFT is one of the α."""
    base, lora = made((wide_llama, CASES["all linear"][1]), torch.float32)
    sft = shutil.copytree(base, tmp_path / "sft")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama_pair[0] / file, sft)
    questions = tmp_path / "long.jsonl"
    questions.write_text("".join(json.dumps({"prompt": "w7 w40 " * 70 + f"w{number}"}) + "\n" for number in range(6)))
    greedy = {"task": str(questions), "temperature": 0.0, "max_tokens": 32, "dtype": "float32", "with_sft": True}
    pair = {"sft": str(sft), "dpo": str(lora), **greedy}
    config = swept(**pair, engine="vllm", device="auto", switch="adapter")
    done = run_sweep(*arguments_of(config), "--json", env={"EXPO_CACHE": str(tmp_path / "cache")})
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)["switch"]
    assert said["way"] == "adapter", said
    other = sized(ci={"engine": "transformers"}, full={"engine": "vllm", "device": "auto"})
    loaded = swept(**pair, **other, switch="reload", output=str(tmp_path / "loaded"))
    done = run_sweep(*arguments_of(loaded))
    assert done.code == 0, done.stderr
    assert_same_rows(*(Path(one.output or "") for one in (config, loaded)))
    for meta in metas_of(Path(config.output or "")):
        assert meta["weights"] == "applied as an adapter"
        assert not meta["repeatable"]


# --- faults -------------------------------------------------------------------------------------------------------


def once(file: Path, at: int, action: Callable[[], object]) -> Callable[[int], None]:
    """What does something after so many answers, in the first process that comes so far."""

    def look(answered: int) -> None:
        if answered >= at and not file.exists():
            file.touch()
            action()

    return look


@pytest.mark.parametrize("at", [in_full(0), 15, in_full(33)])
def test_an_engine_that_is_killed_is_started_again_and_loses_no_row(
    asked: Callable[..., SweepConfig],
    expected: Path,
    applying: type[Applying],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    at: int,
) -> None:
    """Before any row, with all α under way, and with some complete."""
    applying.dies = staticmethod(once(tmp_path / "died", at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    config = asked()
    verb.run(config)
    assert (tmp_path / "died").exists()
    assert_same_rows(Path(config.output or ""), expected)
    said = [message for message in caplog.messages if "restarting" in message]
    assert said == ["the policy: killed by SIGKILL; restarting"]


def test_a_sweep_that_is_killed_and_run_again_ends_as_one_that_was_not(
    asked: Callable[..., SweepConfig], expected: Path, applying: type[Applying], tmp_path: Path
) -> None:
    config, pid = asked(), tmp_path / "pid"

    def stop() -> None:
        pid.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)

    applying.dies = staticmethod(once(tmp_path / "stopped", 15, stop))
    assert ended(forked(lambda: cli.run(["sweep", *arguments_of(config)]))) == -signal.SIGKILL
    wait_until_gone(int(pid.read_text()))
    folder = Path(config.output or "")
    assert len([*folder.rglob(".*.journal.jsonl")]) == 3
    verb.run(config)
    assert_same_rows(folder, expected)
    assert [file.name for file in folder.rglob(".*")] == []


def test_an_error_of_one_ends_all_and_keeps_their_rows(
    asked: Callable[..., SweepConfig], expected: Path, applying: type[Applying]
) -> None:
    def fail(answered: int) -> None:
        if answered >= 15:
            raise InputError("the engine takes no more")

    applying.dies = staticmethod(fail)
    config = asked()
    with pytest.raises(InputError, match=r"^the engine takes no more$"):
        verb.run(config)
    folder = Path(config.output or "")
    assert len([*folder.rglob(".*.journal.jsonl")]) == 3
    applying.dies = staticmethod(lambda answered: None)
    verb.run(config)
    assert_same_rows(folder, expected)


# --- the trial ----------------------------------------------------------------------------------------------------


def test_an_engine_that_answers_otherwise_has_one_alpha_after_the_other(
    asked: Callable[..., SweepConfig],
    expected: Path,
    applying: type[Applying],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("EXPO_CACHE", str(tmp_path / "cache"))
    applying.probes = staticmethod(lambda answers: [replace(one, log_probs=(-9.0,) * 8) for one in answers])
    config = asked()
    done = verb.run(config)
    assert done.record["switch"]["way"] == "reload"
    assert_same_rows(Path(config.output or ""), expected)
    assert "weights" not in metas_of(Path(config.output or ""))[0]
    [said] = [message for message in caplog.messages if message.startswith("each α is loaded by itself")]
    assert "applied as an adapter, α = 2.0 gives other answers than loaded: the log probability of token 1" in said


class Process:
    """Stands for a live engine."""

    ended = False

    def end(self, seconds: float) -> None:
        self.ended = seconds > 0


@pytest.mark.parametrize(
    ("insist", "slowdown", "works", "again"),
    [(False, SLOWER, True, True), (False, 1.5, False, False), (True, 1.5, True, True)],
)
def test_a_trial_is_made_once(
    asked: Callable[..., SweepConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    insist: bool,
    slowdown: float,
    works: bool,
    again: bool,
) -> None:
    monkeypatch.setenv("EXPO_CACHE", str(tmp_path / "cache"))
    trials: list[Any] = []

    def trial(*given: Any) -> Trial:
        trials.append(given)
        return Trial(True, "it was seen", Process(), slowdown)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters, "_trial", trial)
    first = plan(asked()).first
    found = adapters.try_adapters(list, first, (0.0, *ALPHAS), insist=insist)  # type: ignore[arg-type]
    assert (found.works, found.worker is not None, found.slowdown) == (works, works, slowdown)
    assert trials[0][2:4] == ((0.0, 2.0), 3)
    known = adapters.try_adapters(list, first, (0.0, *ALPHAS), insist=insist)  # type: ignore[arg-type]
    assert (known.works, known.worker, known.slowdown, len(trials)) == (again, None, None, 1)
    assert adapters.try_adapters(list, first, (0.0, *ALPHAS), insist=True).works  # type: ignore[arg-type]
    assert len(trials) == 1
    adapters.try_adapters(list, first, (0.0, 2.0), insist=insist)  # type: ignore[arg-type]
    assert len(trials) == 2, "with room for others it is another engine"


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_has_no_adapters_is_refused_where_they_are_asked_for(
    asked: Callable[..., SweepConfig],
    llama_pair: helpers.Pair,
    made: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dpo": str(llama_pair[1])}, "DPO is a whole checkpoint, not a LoRA adapter"),
        ({"ray": "auto", "output": str(tmp_path / "shared")}, "on a cluster each engine loads one α at a time"),
    ]
    for settings, why in refused:
        with pytest.raises(InputError, match=f"--switch adapter has all α in one batch as LoRA adapters: {why}; leave"):
            plan(asked(**settings))
        assert not plan(asked(**{**settings, "switch": "auto"})).tries_adapters
    monkeypatch.setitem(GENERATORS, "transformers", replace(GENERATORS["transformers"], can=frozenset({"local"})))
    with pytest.raises(InputError, match="the transformers engine loads one α at a time"):
        plan(asked())
    with pytest.raises(InputError, match="--switch must be one of auto, reload, adapter, not 'lora'"):
        asked(switch="lora")


@pytest.mark.parametrize("case", ["saved modules", "trained biases"])
def test_an_adapter_with_whole_tensors_is_not_applied(made: Maker, case: str) -> None:
    sft, dpo = made(CASES[case], torch.float32)
    plan = plan_theta(ThetaConfig(sft=str(sft), dpo=str(dpo), alpha=0.5)).pair
    assert (why_not_applied(plan) or "").startswith(
        "its adapter has tensors that are no LoRA factors (base_model.model."
    )


@pytest.mark.parametrize("case", ["plain", "patterns, rank-stabilised"])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("own", [(), ("q_proj=0",)])
def test_what_is_applied_is_what_as_adapter_writes(
    made: Maker, tmp_path: Path, case: str, alpha: float, own: tuple[str, ...]
) -> None:
    sft, dpo = made(CASES[case], torch.float32)
    pair = plan_theta(ThetaConfig(sft=str(sft), dpo=str(dpo), alpha=alpha, alpha_for=own)).pair
    helpers.write((sft, dpo), tmp_path / "written", alpha, alpha_for=own, as_adapter=True)
    (tmp_path / "applied").mkdir()
    write_applied(pair, alpha, tmp_path / "applied")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("applied", "written")]
    for config in configs:
        del config["base_model_name_or_path"]
        config.pop("revision", None)
    assert configs[0] == configs[1]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("applied", "written")]
    assert weights[0] == weights[1]
