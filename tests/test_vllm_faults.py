"""Whatever goes wrong in vLLM is one line that says what to do, and keeps the rows there are. vLLM is a fake here."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from expo.config import GenerateConfig
from expo.engines import vllm as backend, vllm_tools as tools
from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra
from expo.verbs import generate as verb

ROWS = 8
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 15.7 GiB"


class FakeEngine:
    """Finishes two requests a step."""

    def __init__(self, fails_at: int | None, error: Exception | None) -> None:
        self.waiting: list[str] = []
        self.asked = 0
        self._fails_at, self._error = fails_at, error
        self._steps = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[SimpleNamespace]:
        if self._steps == self._fails_at and self._error is not None:
            raise self._error
        self._steps += 1
        ready, self.waiting = self.waiting[:2], self.waiting[2:]
        answer = SimpleNamespace(token_ids=[7, 8], finish_reason="length")
        return [SimpleNamespace(request_id=name, finished=True, outputs=[answer]) for name in ready]

    def abort_request(self, names: list[str]) -> None:
        self.waiting = []


@pytest.fixture
def fake(monkeypatch):
    """Puts a vLLM in place that goes wrong where it is told to; gives its engine."""

    def install(
        *, start: Exception | None = None, asked: Exception | None = None, step: tuple[int, Exception] | None = None
    ) -> FakeEngine:
        engine = FakeEngine(*(step or (None, None)))

        class LLM:
            llm_engine = engine

            def __init__(self, **_: Any) -> None:
                if start is not None:
                    raise start

            def enqueue(self, prompts: list[Any], params: list[Any], lora_request: None, use_tqdm: bool) -> list[str]:
                if asked is not None:
                    raise asked
                engine.waiting = [f"{number}-x" for number in range(len(prompts))]
                engine.asked = len(prompts)
                return engine.waiting

        module, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
        module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
        inputs.TokensPrompt = dict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
        monkeypatch.setattr(tools, "find_spec", lambda _name: object())
        return engine

    return install


@pytest.fixture
def config(llama_pair, tmp_path):
    task = tmp_path / "q.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{row}"}) + "\n" for row in range(ROWS)))
    return GenerateConfig(
        task=str(task), model=str(llama_pair[1]), engine="vllm", max_tokens=2, name="m", output_dir=str(tmp_path)
    )


def one_line(error: ExpoError) -> str:
    assert "\n" not in str(error)
    return str(error)


class VLLMClientError(Exception):
    """As vLLM's own since 0.32, which is no ValueError."""


class VLLMValidationError(VLLMClientError):
    pass


PYDANTIC = (
    "1 validation error for SchedulerConfig\nmax_num_seqs\n  Input should be greater than or equal to 1 "
    "[type=greater_than_equal, input_value=0, input_type=int]\n    For further information visit https://errors"
)

STARTS = [
    (VLLMValidationError("no such model"), InputError, "vLLM refuses dpo: no such model"),
    (ValueError(PYDANTIC), InputError, "refuses dpo: max_num_seqs: Input should be greater than or equal to 1, not 0$"),
    (Exception("WorkerProc initialization failed"), EnvironmentFailure, r"does not start: WorkerProc .*\(--debug"),
    (ValueError("max_model_len (9) is too large"), InputError, r"vLLM refuses dpo: max_model_len \(9\) is too large"),
    (TypeError("unexpected keyword argument 'x'"), InputError, "vLLM refuses dpo: unexpected keyword argument 'x'"),
    (RuntimeError("Engine core initialization failed."), EnvironmentFailure, r"does not start: .*\(--debug shows its"),
    (RuntimeError(CUDA), EnvironmentFailure, r"does not start: CUDA out of memory.*\(--engine-arg max_num_seqs=32"),
    (MemoryError(), EnvironmentFailure, r"does not start: MemoryError \(--engine-arg max_num_seqs=32"),
    (OSError("no such file"), EnvironmentFailure, "vLLM does not start: no such file"),
]


@pytest.mark.parametrize(("error", "kind", "message"), STARTS, ids=[message for _, _, message in STARTS])
def test_a_vllm_that_does_not_start_says_why_and_leaves_nothing(fake, config, error, kind, message):
    fake(start=error)
    with pytest.raises(kind, match=message) as caught:
        verb.run(config)
    one_line(caught.value)
    assert not (Path(config.output_dir) / "outputs_q").exists()


class EngineDeadError(Exception):
    """As vLLM's own, which says the same whatever ended its process."""


STEPS = [
    (EngineDeadError("EngineCore encountered an issue. See stack trace"), "EngineDeadError: EngineCore encountered"),
    (RuntimeError(CUDA), r"CUDA out of memory.*; --engine-arg max_num_seqs=32.*memory; rerun the same command"),
    (AssertionError(), "AssertionError: AssertionError; rerun the same command"),
]


@pytest.mark.parametrize(("error", "message"), STEPS, ids=[message for _, message in STEPS])
def test_an_engine_that_dies_keeps_its_rows_and_the_rerun_asks_for_the_others(fake, config, error, message):
    fake(step=(3, error))
    with pytest.raises(EnvironmentFailure, match=f"the vLLM engine died: .*{message}") as caught:
        verb.run(config)
    assert one_line(caught.value).endswith("rerun the same command to continue")
    folder = Path(config.output_dir) / "outputs_q"
    assert not (folder / "m.jsonl").exists()
    kept = (folder / ".m.journal.jsonl").read_text().splitlines()[1:]
    assert len(kept) == 6
    engine = fake()
    assert verb.run(config).rows == ROWS
    assert engine.asked == ROWS - 6


@pytest.mark.parametrize("kind", [ValueError, VLLMValidationError])
def test_prompts_that_vllm_refuses_are_an_input_error(fake, config, kind):
    fake(asked=kind("Token id 9999 is out of vocabulary"))
    with pytest.raises(InputError, match="vLLM refuses the prompts of dpo: Token id 9999 is out of vocabulary"):
        verb.run(config)


@pytest.mark.parametrize("kind", [ValueError, VLLMValidationError])
def test_sampling_settings_that_vllm_refuses_are_an_input_error(fake, config, kind, monkeypatch):
    def refuse(**_: Any) -> None:
        raise kind("temperature must be in [0, 2], got 3.0")

    fake()
    monkeypatch.setattr(sys.modules["vllm"], "SamplingParams", refuse)
    with pytest.raises(InputError, match=r"vLLM refuses the sampling settings: temperature must be in \[0, 2\], got 3"):
        verb.run(replace(config, temperature=3.0))


@pytest.mark.parametrize("source", ["model", "pair"])
def test_engine_arguments_that_would_let_another_model_answer_are_refused(fake, config, llama_pair, source):
    fake()
    sft, dpo = map(str, llama_pair)
    pair = {"model": None, "sft": sft, "dpo": dpo, "alpha": 0.5} if source == "pair" else {}
    for key in ("model", "load_format", "model_loader_extra_config", "kv_transfer_config"):
        given = replace(config, engine_arg=(f"{key}=other",), **pair)
        if key == "model" or source == "pair":
            with pytest.raises(InputError, match=f"--engine-arg {key} would run a different model"):
                verb.plan(given)
        else:
            assert backend.engine_arguments(verb.plan(given).setup)[key] == "other"


@pytest.mark.parametrize("source", ["model", "pair"])
def test_an_engine_without_expos_part_in_its_workers_tells_nothing_of_what_it_holds(fake, config, llama_pair, source):
    fake()
    sft, dpo = map(str, llama_pair)
    if source == "pair":
        own = ("worker_extension_cls=their.Own",)
        config = replace(config, model=None, sft=sft, dpo=dpo, alpha=0.5, engine_arg=own)
    setup = verb.plan(config).setup
    assert backend.engine_arguments(setup).get("worker_extension_cls") == (None if source == "model" else "their.Own")
    engine = backend.VllmGenerator.__new__(backend.VllmGenerator)
    engine._started = setup
    assert engine.held() == []


def test_a_prompt_that_is_too_long_for_the_engine_is_a_marked_row(fake, config):
    with Path(config.task).open("a") as file:
        file.write(json.dumps({"prompt": "w1 " * 30}) + "\n")
    engine = fake()
    result = verb.run(replace(config, engine_arg=("max_model_len=20",)))
    assert (result.rows, result.failed, engine.asked) == (ROWS + 1, 1, ROWS)
    assert "the model takes 20" in json.loads(result.meta.read_text())["errors"][0]["reason"]


@pytest.mark.parametrize(
    ("argument", "repeatable"),
    [("max_num_seqs=2", True), ("max_model_len=20", True), ("enable_chunked_prefill=true", False)],
)
def test_rows_are_repeatable_with_the_arguments_it_was_shown_with(fake, config, monkeypatch, argument, repeatable):
    monkeypatch.setattr(backend, "has_gpu", lambda: False)
    fake()
    result = verb.run(replace(config, engine_arg=(argument,)))
    assert json.loads(result.meta.read_text())["repeatable"] is repeatable


def test_a_missing_vllm_names_the_command_that_installs_it(config, monkeypatch):
    monkeypatch.setattr(tools, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'llm-expo[vllm]', or use --engine transformers")):
        verb.run(config)
    assert not (Path(config.output_dir) / "outputs_q").exists()


def test_a_vllm_that_cannot_be_imported_is_one_line(fake, config, monkeypatch):
    fake()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EnvironmentFailure, match=r"vLLM cannot be imported: .*; reinstall it") as caught:
        verb.run(config)
    one_line(caught.value)
