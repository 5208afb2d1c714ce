"""Which engine scores, at which token, and what a fingerprint says of both. vLLM is a fake here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_score import ROWS, make_reward_model, numbers, outputs, reward_model, settings  # noqa: F401 - fixtures
from test_scorers import SHAPE, make

from expo.engines import ScorerSetup, torch_tools, transformers_reward as backend, vllm_tools as tools
from expo.errors import EnvironmentFailure, InputError
from expo.verbs import score as verb
from expo.verbs.score.rows import cut

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{{ eos_token * ENDS }}"
)


# --- the position that is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "unread", "seen"),
    [
        ([5, 2, 6, 2, 2], 2, (5, 2, 6)),
        ([5, 6], 2, (5, 6)),
        ([2, 2, 2], 2, (2,)),
        ([2], 2, (2,)),
        ([5, 2, 2], None, (5, 2, 2)),
        ([5, 0, 0], -1, (5, 0, 0)),
    ],
)
def test_a_row_ends_where_it_is_read(row, unread, seen):
    assert cut(row, unread) == seen


@pytest.mark.parametrize("pad_id", [2, None])
def test_templates_that_end_with_the_padding_token_any_number_of_times(llama_pair, outputs, tmp_path, pad_id):  # noqa: F811
    """The reward is transformers' for the row as it is, and the tokens are those that are read."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=pad_id)
    reference = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    for ends in range(4):
        template = tmp_path / f"{ends}.jinja"
        template.write_text(TEMPLATE.replace("ENDS", str(ends)))
        result = verb.run(settings(model, tmp_path / str(ends), chat_template=str(template), outputs=str(outputs)))
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = template.read_text()
        expected, tokens = [], []
        for prompt, output in ROWS:
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]
            ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            with torch.inference_mode():
                expected.append(reference(torch.tensor([ids])).logits.item())
            tokens.append(len(ids) - (ends if pad_id == 2 else 0))
        assert numbers(result.rewards) == pytest.approx(expected, abs=2e-6)
        rows = numbers(result.rewards.with_name("m.rows.jsonl"))
        assert [row["tokens"] for row in rows] == tokens


# --- what a fingerprint says ----------------------------------------------------------------------------------------


def edit_fingerprint(meta: Path, **entries: Any) -> None:
    content = json.loads(meta.read_text())
    content["fingerprint"] |= entries
    content["fingerprint"] = {key: value for key, value in content["fingerprint"].items() if value is not None}
    meta.write_text(json.dumps(content))


def test_batch_tokens_are_in_no_fingerprint_and_older_ones_that_have_them_mean_the_same(
    reward_model,  # noqa: F811
    outputs,  # noqa: F811
    tmp_path,
):
    first = verb.run(settings(reward_model, tmp_path, batch_tokens=60))
    assert "batch_tokens" not in json.loads(first.meta.read_text())["fingerprint"]
    for recorded in (60, 16384, None):
        edit_fingerprint(first.meta, batch_tokens=recorded)
        assert verb.run(settings(reward_model, tmp_path, batch_tokens=7)).status == "already complete"
        with pytest.raises(InputError, match="a different max-length"):
            verb.run(settings(reward_model, tmp_path, max_length=5))


def test_rewards_of_a_head_in_bfloat16_are_refused_by_name(reward_model, outputs, tmp_path):  # noqa: F811
    made = verb.run(settings(reward_model, tmp_path, dtype="bfloat16"))
    assert json.loads(made.meta.read_text())["fingerprint"]["head_dtype"] == "float32"
    assert verb.run(settings(reward_model, tmp_path, dtype="bfloat16")).status == "already complete"
    edit_fingerprint(made.meta, head_dtype=None)
    with pytest.raises(InputError, match=r"a different head-dtype \('bfloat16' then, 'float32' now\)"):
        verb.run(settings(reward_model, tmp_path, dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_rewards_of_a_model_in_float32_stay(reward_model, outputs, tmp_path, dtype):  # noqa: F811
    """The checkpoint is float32, so that its head always was."""
    made = verb.run(settings(reward_model, tmp_path, dtype=dtype))
    assert "head_dtype" not in json.loads(made.meta.read_text())["fingerprint"]


def test_auto_is_float32_on_a_cpu_without_bfloat16(llama_pair, outputs, tmp_path, monkeypatch):  # noqa: F811
    model = make_reward_model(tmp_path / "rm", llama_pair[1], labels=1, pad_id=2)
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch_tools, "run_dtype", lambda dtype, *_: "float32" if dtype == "auto" else dtype)
    made = verb.run(settings(model, tmp_path, dtype="auto"))
    fingerprint = json.loads(made.meta.read_text())["fingerprint"]
    assert fingerprint["dtype"] == "float32"
    assert "head_dtype" not in fingerprint
    assert verb.run(settings(model, tmp_path, dtype="float32")).status == "already complete"


# --- which engine ---------------------------------------------------------------------------------------------------


def test_auto_goes_on_with_the_engine_of_the_output_that_is_there(tmp_path, outputs, llama_pair, monkeypatch):  # noqa: F811
    model = make("Llama", tmp_path / "rm", llama_pair[1], **SHAPE)
    made = verb.run(settings(model, tmp_path))
    assert json.loads(made.meta.read_text())["engine"] == "transformers"
    edit_fingerprint(made.meta, engine="vllm")
    assert verb.run(settings(model, tmp_path)).status == "already complete"
    with pytest.raises(InputError, match=r"a different engine \('vllm' then, 'transformers' now\)"):
        verb.run(settings(model, tmp_path, engine="transformers"))
    assert verb.plan(settings(model, tmp_path, overwrite=True)).engine == "transformers"


def test_so_it_does_where_the_output_or_a_part_is_unfinished(tmp_path, outputs, llama_pair):  # noqa: F811
    model = make("Llama", tmp_path / "rm", llama_pair[1], **SHAPE)
    for name in ("rewards_q/.m.journal.jsonl", "rewards_q/m.parts/.0-of-2.journal.jsonl"):
        fingerprint = {**verb.plan(settings(model, tmp_path)).fingerprint, "engine": "vllm"}
        journal = tmp_path / name
        journal.parent.mkdir(exist_ok=True, parents=True)
        row = {"row": 0, "token_ids_xxh3": "", "id": "0", "sample": 0, "reward": 1.0, "tokens": 1, "truncated": False}
        journal.write_text("".join(json.dumps(line) + "\n" for line in ({"fingerprint": fingerprint}, row)))
        assert verb.plan(settings(model, tmp_path)).engine == "vllm"
        journal.unlink()
    assert verb.plan(settings(model, tmp_path)).engine == "transformers"


def test_settings_of_vllm_are_refused_with_transformers(reward_model, outputs, tmp_path):  # noqa: F811
    for given in ({"engine_arg": ("a=1",)}, {"tensor_parallel": 2}):
        with pytest.raises(InputError, match="works only with the vllm engine, and this run uses transformers"):
            verb.plan(settings(reward_model, tmp_path, **given))


def test_a_head_with_a_bias_is_refused_before_any_engine_starts(tmp_path, outputs, llama_pair, monkeypatch):  # noqa: F811
    """vLLM would add it, and transformers drop it."""
    from safetensors.torch import load_file, save_file

    model = make("Llama", tmp_path / "rm", llama_pair[1], **SHAPE)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "score.bias": torch.ones(1)}, model / "model.safetensors", {"format": "pt"})
    for engine in ("transformers", "vllm", "auto"):
        with pytest.raises(InputError, match=r"rm has score\.bias, which LlamaForSequenceClassification would ignore"):
            verb.plan(settings(model, tmp_path, engine=engine))


# --- vLLM goes wrong ------------------------------------------------------------------------------------------------


class FakeEngine:
    """Finishes two rows a step; their reward is their length."""

    def __init__(self, fails_at: int | None, error: Exception | None, width: int) -> None:
        self.rows: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self._fails_at, self._error, self._width = fails_at, error, width
        self._steps = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: object) -> None:
        self.rows[name] = prompt["prompt_token_ids"]
        self.asked.append(name)

    def step(self) -> list[SimpleNamespace]:
        if self._steps == self._fails_at and self._error is not None:
            raise self._error
        self._steps += 1
        ready = list(self.rows)[:2]
        given = {name: torch.full((self._width,), float(len(self.rows.pop(name)))) for name in ready}
        return [
            SimpleNamespace(request_id=name, finished=True, outputs=SimpleNamespace(data=data))
            for name, data in given.items()
        ]

    def abort_request(self, names: list[str]) -> None:
        self.rows = {}


@pytest.fixture
def fake(monkeypatch):
    """Puts a vLLM in place that goes wrong where it is told to; gives its engine and the arguments it was made with."""

    def install(
        *, start: Exception | None = None, step: tuple[int, Exception] | None = None, width: int = 1
    ) -> SimpleNamespace:
        engine = FakeEngine(*(step or (None, None)), width)
        made = SimpleNamespace(engine=engine, arguments={})

        class LLM:
            llm_engine = engine

            def __init__(self, **arguments: Any) -> None:
                made.arguments = arguments
                if start is not None:
                    raise start

        module, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
        module.LLM, module.PoolingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
        inputs.TokensPrompt = dict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
        monkeypatch.setattr(tools, "find_spec", lambda _name: object())
        return made

    return install


@pytest.fixture
def config(llama_pair, tmp_path, outputs):  # noqa: F811
    return settings(make("Llama", tmp_path / "rm", llama_pair[1], **SHAPE), tmp_path, engine="vllm")


def test_vllm_is_asked_for_raw_logits_of_rows_no_longer_than_these(fake, config):
    made = fake()
    result = verb.run(config)
    rows = numbers(result.rewards.with_name("m.rows.jsonl"))
    assert [row["reward"] for row in rows] == [float(row["tokens"]) for row in rows]
    asked = {key: made.arguments[key] for key in ("runner", "pooler_config", "enable_prefix_caching", "dtype")}
    assert asked == {
        "runner": "pooling",
        "pooler_config": {"use_activation": False},
        "enable_prefix_caching": False,
        "dtype": "float32",
    }
    assert made.arguments["max_model_len"] == max(row["tokens"] for row in rows)


def test_an_engine_that_dies_keeps_its_rows_and_the_rerun_asks_for_the_others(fake, config):
    fake(step=(3, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(EnvironmentFailure, match=r"the vLLM engine died: .*smaller --max-length.*rerun the same"):
        verb.run(config)
    journal = Path(config.output_dir) / "rewards_q" / ".m.journal.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 6
    made = fake()
    assert verb.run(config).n == len(ROWS)
    assert len(made.engine.asked) == len(ROWS) - 6


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("max_model_len is too large"), InputError, "vLLM refuses rm: max_model_len is too large"),
        (RuntimeError("Engine core initialization failed."), EnvironmentFailure, "vLLM does not start: Engine core"),
    ],
)
def test_a_vllm_that_does_not_start_says_why_and_leaves_nothing(fake, config, error, kind, message):
    fake(start=error)
    with pytest.raises(kind, match=message) as caught:
        verb.run(config)
    assert "\n" not in str(caught.value)
    assert not (Path(config.output_dir) / "rewards_q").exists()


def test_more_than_one_number_a_row_is_no_reward(fake, config):
    fake(width=3)
    with pytest.raises(InputError, match="rm gives 3 numbers for a row; a reward model gives one"):
        verb.run(config)


@pytest.mark.parametrize("key", ["model", "runner", "convert", "pooler_config", "hf_overrides"])
def test_engine_arguments_that_would_change_what_a_reward_is_are_refused(fake, config, key):
    fake()
    with pytest.raises(InputError, match=f"--engine-arg {key} "):
        verb.run(replace(config, engine_arg=(f"{key}=other",)))


def test_a_row_that_is_not_a_number_in_a_batch_is_asked_again_by_itself(fake, config, monkeypatch):
    """After one that writes over what it left; what it gives alone counts."""
    made = fake()
    original = made.engine.step

    def poisoned() -> list[SimpleNamespace]:
        done = original()
        if len(done) > 1:
            done[1].outputs.data.fill_(float("nan"))
        return done

    monkeypatch.setattr(made.engine, "step", poisoned)
    result = verb.run(config)
    rows = numbers(result.rewards.with_name("m.rows.jsonl"))
    assert [row["reward"] for row in rows] == [float(row["tokens"]) for row in rows]


@pytest.mark.parametrize(("asked", "taken"), [(16384, backend.CPU_BATCH_TOKENS), (60, 60)])
def test_batches_are_small_on_a_cpu(reward_model, tmp_path, asked, taken):  # noqa: F811
    config = settings(reward_model, tmp_path, batch_tokens=asked)
    assert backend.TransformersScorer(ScorerSetup(config, reward_model, 10))._budget == taken
