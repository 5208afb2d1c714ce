"""generate: formats, resume, refusals. The engine here is transformers on a tiny random model, in this process."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from expo.cli import program as cli
from expo.config import GenerateConfig
from expo.engines import transformers as backend
from expo.engines.torch_tools import run_dtype
from expo.errors import EnvironmentFailure, InputError
from expo.verbs import generate as verb

PROMPTS = [" ".join(f"w{(3 * row + word) % 50}" for word in range(1 + row % 7)) for row in range(12)]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "questions.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Path, task: Path | str, folder: Path, **others) -> GenerateConfig:
    defaults = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_tokens": 9, "batch_tokens": 40}
    return GenerateConfig(task=str(task), model=str(model), output_dir=str(folder), **{**defaults, **others})


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_in_prompt_order_in_the_papers_format(llama_pair, prompt_file, tmp_path):
    result = verb.run(settings(llama_pair[1], prompt_file, tmp_path, name="mine"))
    assert result.output == tmp_path / "outputs_questions" / "mine.jsonl"
    rows = rows_of(result.output)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(list(row) == ["prompt", "output", "length", "finish_reason"] for row in rows)
    assert all((row["finish_reason"] == "length") == (row["length"] == 9) or row["length"] == 9 for row in rows)
    meta = json.loads(result.meta.read_text())
    assert meta["rows"] == 12
    assert meta["failed"] == 0
    assert meta["tokens_out"] == sum(row["length"] for row in rows)
    assert meta["repeatable"] is True
    assert (meta["config"]["max_tokens"], meta["config"]["temperature"]) == (9, 0.7)
    given = verb.run(settings(llama_pair[1], prompt_file, tmp_path, name="mine", temperature=0.7))
    assert given.status == "already complete"
    assert sorted(path.name for path in result.output.parent.iterdir()) == ["mine.jsonl", "mine.meta.json"]


def test_alpaca_file_is_what_alpaca_eval_takes(llama_pair, tmp_path):
    rows = [{"instruction": prompt, "dataset": "made", "output": "x", "generator": "y"} for prompt in PROMPTS]
    dataset = tmp_path / "eval.json"
    dataset.write_text(json.dumps(rows))
    result = verb.run(settings(llama_pair[1], "alpaca", tmp_path, dataset=str(dataset), name="M"))
    answers = json.loads(result.output.read_text())
    assert result.output == tmp_path / "outputs_alpaca" / "M.json"
    assert [list(row) for row in answers] == [["dataset", "instruction", "output", "generator"]] * 12
    assert [row["instruction"] for row in answers] == PROMPTS
    assert {(row["dataset"], row["generator"]) for row in answers} == {("made", "M")}


def test_ultrafeedback_uses_the_first_message_only(llama_pair, tmp_path):
    rows = [{"prompt": "no", "messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "no"}]}
            for p in PROMPTS]  # fmt: skip
    dataset = write_rows(tmp_path / "uf.jsonl", rows)
    result = verb.run(settings(llama_pair[1], "ultrafeedback", tmp_path, dataset=str(dataset)))
    assert result.output == tmp_path / "outputs_ultrafeedback" / "dpo.jsonl"
    assert [row["prompt"] for row in rows_of(result.output)] == PROMPTS


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "instruction", "messages"])
def test_prompt_files_of_every_kind_give_the_same_answers(llama_pair, prompt_file, tmp_path, kind):
    expected = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "a", name="m"))
    task = write_prompts(tmp_path, kind)
    result = verb.run(settings(llama_pair[1], task, tmp_path / "b", name="m"))
    assert rows_of(result.output) == rows_of(expected.output)


def write_prompts(folder: Path, kind: str) -> Path:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    if kind == "instruction":
        return write_rows(folder / "i.jsonl", [{"instruction": prompt} for prompt in PROMPTS])
    if kind == "messages":
        turns = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
        return write_rows(folder / "m.jsonl", turns)
    path = folder / f"p.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_several_turns_keep_their_messages(llama_pair, tmp_path):
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    task = write_rows(tmp_path / "t.jsonl", [{"messages": turns}])
    row = rows_of(verb.run(settings(llama_pair[1], task, tmp_path)).output)[0]
    assert row["prompt"] == "w3"
    assert row["messages"] == turns


def test_prompt_ids_are_those_of_the_chat_template(llama_pair, prompt_file, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_pair[1])
    work = verb.plan(settings(llama_pair[1], prompt_file, tmp_path, system="w5"))
    for prompt, request in zip(PROMPTS, work.requests, strict=True):
        turns = [{"role": "system", "content": "w5"}, {"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert list(request.prompt_ids) == ids
        assert ids.count(tokenizer.bos_token_id) == 1


def test_samples_are_prompt_major_and_differ(llama_pair, prompt_file, tmp_path):
    one = rows_of(verb.run(settings(llama_pair[1], prompt_file, tmp_path / "1", name="m")).output)
    two = rows_of(verb.run(settings(llama_pair[1], prompt_file, tmp_path / "2", name="m", n=2)).output)
    assert [row["prompt"] for row in two] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert two[::2] == one
    assert two[1::2] != one


def test_rows_do_not_depend_on_their_batch(llama_pair, prompt_file, tmp_path):
    small = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "a", batch_tokens=1))
    large = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "b", batch_tokens=100_000))
    assert small.output.read_bytes() == large.output.read_bytes()


def test_another_seed_gives_other_rows_and_temperature_0_does_not_care(llama_pair, prompt_file, tmp_path):
    def text(name: str, **others) -> str:
        return verb.run(settings(llama_pair[1], prompt_file, tmp_path, name=name, **others)).output.read_text()

    assert text("a", seed=1) != text("b", seed=2)
    assert text("c", seed=1, temperature=0.0) == text("d", seed=2, temperature=0.0)


def test_complete_is_left_alone_and_a_larger_limit_extends(llama_pair, prompt_file, tmp_path, monkeypatch):
    whole = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "whole")).output.read_bytes()
    first = verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=5))
    assert len(rows_of(first.output)) == 5
    generated = count_rows(monkeypatch)
    assert verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=5)).status == "already complete"
    assert verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=3)).status == "already complete"
    assert generated == []
    extended = verb.run(settings(llama_pair[1], prompt_file, tmp_path, batch_tokens=40))
    assert extended.output.read_bytes() == whole
    assert extended.rows == 12
    assert {request.id for request in generated} >= {str(row) for row in range(5, 12)}


@pytest.mark.parametrize(("dtype", "repeatable"), [("float32", True), ("bfloat16", False)])
def test_an_extended_run_is_repeatable_only_where_batches_do_not_matter(
    llama_pair, prompt_file, tmp_path, dtype, repeatable
):
    first = verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=5, dtype=dtype))
    assert json.loads(first.meta.read_text())["repeatable"] is True
    extended = verb.run(settings(llama_pair[1], prompt_file, tmp_path, dtype=dtype))
    assert json.loads(extended.meta.read_text())["repeatable"] is repeatable


def count_rows(monkeypatch) -> list:
    """Record the requests the engine really works on."""
    seen: list = []
    original = backend.TransformersGenerator._generate_batch

    def recording(self, batch):
        seen.extend(batch)
        return original(self, batch)

    monkeypatch.setattr(backend.TransformersGenerator, "_generate_batch", recording)
    return seen


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"seed": 1}, {"max_tokens": 8}, {"system": "w1"}, {"n": 2}])
def test_other_settings_are_refused_unless_overwritten(llama_pair, prompt_file, tmp_path, change):
    old = verb.run(settings(llama_pair[1], prompt_file, tmp_path)).output.read_bytes()
    key = next(iter(change)).replace("_", "-")
    with pytest.raises(InputError, match=f"made with a different {key} "):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path, **change))
    assert (tmp_path / "outputs_questions" / "dpo.jsonl").read_bytes() == old
    fresh = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "fresh", **change))
    replaced = verb.run(settings(llama_pair[1], prompt_file, tmp_path, overwrite=True, **change))
    assert replaced.output.read_bytes() == fresh.output.read_bytes()


def test_other_prompts_are_refused(llama_pair, prompt_file, tmp_path):
    verb.run(settings(llama_pair[1], prompt_file, tmp_path))
    write_rows(prompt_file, [{"prompt": "w1"}])
    with pytest.raises(InputError, match="a different dataset-sha256"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path))


def test_a_file_expo_did_not_write_is_never_replaced(llama_pair, prompt_file, tmp_path):
    released = tmp_path / "outputs_questions" / "dpo.jsonl"
    released.parent.mkdir()
    released.write_text("precious\n")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="expo did not write it"):
            verb.run(settings(llama_pair[1], prompt_file, tmp_path, overwrite=overwrite))
    assert released.read_text() == "precious\n"


def test_interrupted_runs_end_as_uninterrupted_ones(llama_pair, prompt_file, tmp_path, monkeypatch):
    whole = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "whole")).output.read_bytes()
    original = backend.TransformersGenerator._generate_batch
    calls = []

    def failing(self, batch):
        calls.append(len(batch))
        if len(calls) % 3 == 0:
            raise EnvironmentFailure("the engine died")
        return original(self, batch)

    monkeypatch.setattr(backend.TransformersGenerator, "_generate_batch", failing)
    final = tmp_path / "outputs_questions" / "dpo.jsonl"
    for _ in range(12):
        try:
            verb.run(settings(llama_pair[1], prompt_file, tmp_path))
            break
        except EnvironmentFailure:
            assert not final.exists()
            assert not final.with_name("dpo.meta.json").exists()
    assert len(calls) > 4
    assert final.read_bytes() == whole


def test_a_file_as_the_output_folder_is_refused(llama_pair, prompt_file, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot create the folder .*: choose another --output-dir"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path / "file"))


def test_a_smaller_limit_does_not_drop_what_an_interrupted_run_has(llama_pair, prompt_file, tmp_path):
    with helpers.dying(backend.TransformersGenerator, "_generate_batch"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path))
    journal = tmp_path / "outputs_questions" / ".dpo.journal.jsonl"
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"the unfinished .*dpo\.jsonl has \d+ rows that this run does not include"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=1))
    assert journal.read_bytes() == before
    assert verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=1, overwrite=True)).rows == 1


def test_a_torn_journal_line_is_repaired(llama_pair, prompt_file, tmp_path):
    whole = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "whole")).output.read_bytes()
    with helpers.dying(backend.TransformersGenerator, "_generate_batch"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path))
    journal = tmp_path / "outputs_questions" / ".dpo.journal.jsonl"
    with journal.open("a") as stream:
        stream.write('{"id": "0", "sample": 0, "output": "torn')
    assert verb.run(settings(llama_pair[1], prompt_file, tmp_path)).output.read_bytes() == whole


def test_an_engine_that_does_not_start_leaves_nothing_behind(llama_pair, prompt_file, tmp_path, monkeypatch):
    """So that the corrected command is not refused as another run's continuation."""

    def refusing(self, setup):
        raise InputError("no such argument")

    with monkeypatch.context() as patch:
        patch.setattr(backend.TransformersGenerator, "__init__", refusing)
        with pytest.raises(InputError, match="no such argument"):
            verb.run(settings(llama_pair[1], prompt_file, tmp_path / "out", seed=1))
    assert not (tmp_path / "out" / "outputs_questions").exists()
    assert verb.run(settings(llama_pair[1], prompt_file, tmp_path / "out", seed=2)).rows == 12


def test_a_prompt_longer_than_the_context_is_a_marked_row(llama_pair, tmp_path):
    long = " ".join(["w7"] * 200)
    task = write_rows(tmp_path / "q.jsonl", [{"prompt": "w1"}, {"prompt": long}, {"prompt": "w2"}])
    result = verb.run(settings(llama_pair[1], task, tmp_path))
    rows = rows_of(result.output)
    assert result.failed == 1
    assert [row["finish_reason"] == "error" for row in rows] == [False, True, False]
    assert (rows[1]["output"], rows[1]["length"]) == ("", 0)
    errors = json.loads(result.meta.read_text())["errors"]
    assert [(error["row"], error["id"]) for error in errors] == [(1, "1")]
    assert "the model takes 128" in errors[0]["reason"]
    for again in (result, verb.run(settings(llama_pair[1], task, tmp_path))):
        assert re.fullmatch(r"row 1: the prompt has 20\d tokens, the model takes 128", again.reason)
        assert not again.can_retry


def test_reasons_of_parts_and_of_what_is_joined(llama_pair, tmp_path):
    task = write_rows(tmp_path / "q.jsonl", [{"prompt": "w1"}, {"prompt": " ".join(["w7"] * 200)}, {"prompt": "w2"}])
    made = [verb.run(settings(llama_pair[1], task, tmp_path, part=f"{number}/2")) for number in range(2)]
    assert made[0].reason is None
    assert made[1].reason.startswith("row 0 of part 1/2: the prompt has 20")
    joined = verb.run(settings(llama_pair[1], task, tmp_path, join=2))
    assert joined.reason.startswith("row 1: the prompt has 20")
    assert not joined.can_retry


def test_rows_that_cannot_be_otherwise_are_marked_once_and_start_no_engine_again(llama_pair, tmp_path, monkeypatch):
    """A prompt that is too long, one the chat template refuses, and one it makes no tokens of."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if messages[0]['content'] == 'w13' %}{{ raise_exception('no w13') }}{% endif %}"
        "{% if messages[0]['content'] != 'w14' %}{{ bos_token }}<|user|>{{ messages[0]['content'] }}{% endif %}"
    )
    prompts = ["w1", " ".join(["w7"] * 200), "w13", "", "w14", "w2"]
    task = write_rows(tmp_path / "q.jsonl", [{"prompt": prompt} for prompt in prompts])
    words = ["generate", str(task), "--model", str(llama_pair[1]), "--engine", "transformers", "--max-tokens", "4"]
    words += ["--chat-template", str(template), "--output-dir", str(tmp_path), "--name", "m"]
    assert cli.run(words) == 3
    final, meta = tmp_path / "outputs_q" / "m.jsonl", tmp_path / "outputs_q" / "m.meta.json"
    reasons = {error["row"]: error["reason"] for error in json.loads(meta.read_text())["errors"]}
    assert set(reasons) == {1, 2, 4}
    assert "the model takes 128" in reasons[1]
    assert reasons[2].endswith("refuses it: no w13")
    assert reasons[4] == "the chat template renders it as an empty prompt"
    assert all((row["length"] > 0) == (number not in reasons) for number, row in enumerate(rows_of(final)))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in (final, meta)]
    generated = count_rows(monkeypatch)
    assert cli.run(words) == 3
    assert generated == []
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in (final, meta)] == before


def test_too_little_memory_is_one_line_and_keeps_the_rows(llama_pair, prompt_file, tmp_path, monkeypatch):
    """With the CPU's own error, which is a plain RuntimeError."""
    whole = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "whole")).output.read_bytes()
    original = backend.sampling_noise

    def greedy(seed, request):
        return torch.empty(1 << 50) if request.id == "0" else original(seed, request)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "sampling_noise", greedy)
        message = "^out of memory; a smaller --batch-tokens reduces memory use; rerun the same command to continue$"
        with pytest.raises(EnvironmentFailure, match=message):
            verb.run(settings(llama_pair[1], prompt_file, tmp_path))
    journal = tmp_path / "outputs_questions" / ".dpo.journal.jsonl"
    assert len(journal.read_text().splitlines()) > 1
    assert verb.run(settings(llama_pair[1], prompt_file, tmp_path)).output.read_bytes() == whole


@pytest.mark.parametrize(
    ("dtype", "device", "has_bfloat16", "nbytes", "expected"),
    [
        ("auto", "cpu", False, 1, "float32"),
        ("auto", "cpu", True, 1, "auto"),
        ("auto", "cpu", False, 1 << 60, "auto"),
        ("bfloat16", "cpu", False, 1, "bfloat16"),
    ],
)
def test_auto_is_float32_where_the_cpu_has_no_bfloat16_and_the_weights_fit(
    monkeypatch, dtype, device, has_bfloat16, nbytes, expected
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    assert run_dtype(dtype, device, nbytes) == expected


def test_answers_stop_at_the_context(llama_pair, tmp_path):
    task = write_rows(tmp_path / "q.jsonl", [{"prompt": " ".join(["w7"] * 120)}])
    row = rows_of(verb.run(settings(llama_pair[1], task, tmp_path, max_tokens=50)).output)[0]
    assert row["length"] <= 128 - 124


def test_a_stop_token_ends_the_answer_and_is_not_in_the_text(llama_pair, prompt_file, tmp_path):
    free = rows_of(verb.run(settings(llama_pair[1], prompt_file, tmp_path / "a", temperature=0.0)).output)
    word = free[0]["output"].split()[2]
    token = int(word[1:]) + 6
    stopped = verb.run(settings(llama_pair[1], prompt_file, tmp_path / "b", temperature=0.0, stop_token_id=(token,)))
    row = rows_of(stopped.output)[0]
    before = free[0]["output"].split()
    before = before[: before.index(word)]
    assert row["output"].split() == before
    assert row["finish_reason"] == "stop"
    assert row["length"] == len(before) + 1


BAD = [
    ({"task": "no-such-task"}, "no task 'no-such-task'"),
    ({"task": "missing.jsonl"}, "no such file: missing.jsonl"),
    ({"model": "/no/such/model"}, "no such directory: /no/such/model"),
    ({"dataset": "/no/such.json"}, "no such prompt file"),
    ({"chat_template": "/no/such.jinja"}, "chat template /no/such.jinja cannot be read"),
    ({"engine_arg": ("x=1",)}, "--engine-arg works only with the vllm engine"),
    ({"system": "w1", "chat_template": "refusing"}, "refuses the prompts: no system here"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_and_nothing_written(llama_pair, prompt_file, tmp_path, change, message):
    if change.get("chat_template") == "refusing":
        template = tmp_path / "t.jinja"
        template.write_text("{{ raise_exception('no system here') }}")
        change = {**change, "chat_template": str(template)}
    change = {"task": prompt_file, "model": llama_pair[1], **change}
    with pytest.raises(InputError, match=message) as caught:
        verb.run(settings(change.pop("model"), change.pop("task"), tmp_path / "out", **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -2}, "--top-k"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"limit": 0}, "--limit"),
        ({"n": 0}, "--n"),
        ({"name": "a/b"}, "--name"),
        ({"name": ""}, "--name"),
        ({"name": "a\nb"}, "--name"),
        ({"name": "\udcff"}, "--name"),
        ({"name": "é" * 101}, "--name .* has 202 bytes"),
        ({"system": "\udcff"}, "--system .* is not UTF-8"),
        ({"output_dir": "\udcff"}, "--output-dir .* is not UTF-8"),
        ({"task": "\udcff.jsonl"}, "TASK .* is not UTF-8"),
        ({"stop_token_id": (2, -1)}, "--stop-token-id"),
        ({"engine_arg": ("novalue",)}, "--engine-arg"),
        ({"presence_penalty": 3.0}, "--presence-penalty"),
    ],
)
def test_values_out_of_range_name_their_flag(value, flag):
    with pytest.raises(InputError, match=flag):
        GenerateConfig(**{"task": "alpaca", "model": "m", **value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"task": "alpaca", "n": 2}, "--n above 1 is not supported for alpaca: its format holds one answer per prompt"),
        ({"task": "mtbench", "n": 2}, "--n above 1 is not supported for mtbench"),
        ({"engine": "magic"}, "--engine must be one of auto, vllm, transformers, openai, not 'magic'"),
    ],
)
def test_what_the_tables_of_tasks_and_engines_refuse_names_its_flag(value, message):
    with pytest.raises(InputError, match=message):
        verb.plan(GenerateConfig(**{"task": "q.jsonl", "model": "m", "engine": "transformers", **value}))


@pytest.mark.parametrize("source", ["model", "pair"])
def test_an_output_inside_an_input_is_refused(llama_pair, prompt_file, tmp_path, source):
    (tmp_path / "link").symlink_to(llama_pair[1])
    pair = {"model": None, "sft": str(llama_pair[0]), "dpo": str(llama_pair[1]), "alpha": 0.5}
    changes = pair if source == "pair" else {}
    with pytest.raises(InputError, match=r" or lies inside it; choose another --output-dir"):
        verb.plan(replace(settings(llama_pair[1], prompt_file, tmp_path / "link" / "out"), **changes))


def test_an_output_that_is_the_prompt_file_is_refused(llama_pair, tmp_path):
    (tmp_path / "outputs_q").mkdir()
    task = write_rows(tmp_path / "outputs_q" / "q.jsonl", [{"prompt": "w1"}])
    with pytest.raises(InputError, match=r"q\.jsonl is the input .*q\.jsonl; choose another --name"):
        verb.plan(settings(llama_pair[1], task, tmp_path, name="q", overwrite=True))


HARM = {
    "no object": lambda final, meta: meta.write_text("[]"),
    "no rows": lambda final, meta: meta.write_text(json.dumps({"fingerprint": {}, "failed": 0, "prompts_sha256": ""})),
    "no figures of rows": lambda final, meta: meta.write_text(meta.read_text().replace('"per_row"', '"other"')),
    "a line less": lambda final, meta: final.write_text("".join(final.read_text().splitlines(keepends=True)[1:])),
    "a torn line": lambda final, meta: final.write_text(final.read_text()[:-9]),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_output_is_one_line_that_says_what_to_move(llama_pair, prompt_file, tmp_path, harm, overwrite):
    first = verb.run(settings(llama_pair[1], prompt_file, tmp_path, limit=5))
    harm(first.output, first.meta)
    before = first.output.read_bytes(), first.meta.read_bytes()
    with pytest.raises(InputError, match=r"damaged.*: move (it and dpo.jsonl|both) away$"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path, overwrite=overwrite))
    assert before == (first.output.read_bytes(), first.meta.read_bytes())


SOUND = {"id": "0", "sample": 0, "output": "", "length": 0, "finish_reason": "stop", "prompt_tokens": 1}


@pytest.mark.parametrize(
    "lines",
    [
        [{"id": "0"}, {"id": "1"}],
        [{"fingerprint": [1]}, {}],
        [None, {"id": "0"}],
        [None, {**SOUND, "sample": [0]}],
        [None, {**SOUND, "finish_reason": 5}],
    ],
)
def test_a_damaged_journal_is_one_line_that_says_what_to_remove(llama_pair, prompt_file, tmp_path, lines):
    work = verb.plan(settings(llama_pair[1], prompt_file, tmp_path))
    work.files.journal.parent.mkdir()
    write_rows(work.files.journal, [line if line is not None else {"fingerprint": work.fingerprint} for line in lines])
    with pytest.raises(InputError, match=r"\.dpo\.journal\.jsonl is damaged: remove it to start over$"):
        verb.run(settings(llama_pair[1], prompt_file, tmp_path))


@pytest.mark.parametrize("name", ["m.meta", "m.rows", "n" * 201])
def test_a_models_name_that_cannot_be_an_outputs_asks_for_another(llama_pair, prompt_file, tmp_path, name):
    shutil.copytree(llama_pair[1], tmp_path / name)
    with pytest.raises(InputError, match=f"--name '{name[:9]}"):
        verb.plan(settings(tmp_path / name, prompt_file, tmp_path))
    verb.plan(settings(tmp_path / name, prompt_file, tmp_path, name="m"))


@pytest.mark.parametrize("expression", ["messages[0].content + 1", "1 / 0", "messages[0].content.index('zzz')"])
def test_a_template_whose_expressions_fail_refuses_the_prompts(llama_pair, prompt_file, tmp_path, expression):
    template = tmp_path / "t.jinja"
    template.write_text(f"{{{{ {expression} }}}}")
    with pytest.raises(InputError, match=r"the chat template of .* refuses the prompts: "):
        verb.plan(settings(llama_pair[1], prompt_file, tmp_path, chat_template=str(template)))


def test_a_temperature_near_0_is_vllms_lowest(llama_pair, prompt_file, tmp_path):
    lowest, *others = (
        verb.run(settings(llama_pair[1], prompt_file, tmp_path / str(value), temperature=value)).output.read_bytes()
        for value in (0.01, 1e-40, 1e-300)
    )
    assert others == [lowest, lowest]


def test_a_reward_model_cannot_generate(trained, prompt_file, tmp_path):
    with pytest.raises(
        InputError, match=r"tiny-rm is a reward model \(LlamaForSequenceClassification\), which cannot generate"
    ):
        verb.run(settings(trained / "tiny-rm", prompt_file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def lacking(model: Path, copy: Path, name: str) -> Path:
    """A copy of a model without one of its tensors."""
    shutil.copytree(model, copy)
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = copy / content["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    index.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_in_the_plan(llama_pair, prompt_file, tmp_path, engine, name):
    model = lacking(llama_pair[1], tmp_path / "half", name)
    with pytest.raises(InputError, match=f"half lacks {name}, which LlamaForCausalLM reads: it would answer"):
        verb.plan(settings(model, prompt_file, tmp_path, engine=engine))
    assert not (tmp_path / "outputs_questions").exists()


def test_missing_weights_that_only_loading_shows_are_refused(llama_pair, prompt_file, tmp_path, monkeypatch):
    model = lacking(llama_pair[1], tmp_path / "half", "lm_head.weight")
    monkeypatch.setattr("expo.verbs.generate.model.require_whole", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"half lacks lm_head.weight: it would answer with random weights"):
        verb.run(settings(model, prompt_file, tmp_path))


@pytest.mark.parametrize("pad_id", [-1, 10_000], ids=["-1", "beyond the vocabulary"])
def test_a_padding_id_that_is_no_token_changes_no_row(llama_pair, prompt_file, tmp_path, pad_id):
    job = verb.plan(settings(llama_pair[1], prompt_file, tmp_path))
    rows = [
        {one.request.id: one.token_ids for batch in engine.generate(job.requests, set()) for one in batch}
        for engine in (
            backend.TransformersGenerator(job.setup),
            backend.TransformersGenerator(replace(job.setup, pad_id=pad_id)),
        )
    ]
    assert rows[0] == rows[1]


def test_a_model_without_chat_template_is_refused(llama_pair, prompt_file, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(llama_pair[1], model)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template; pass one with --chat-template"):
        verb.run(settings(model, prompt_file, tmp_path / "out"))
    given = verb.plan(
        settings(model, prompt_file, tmp_path / "out", chat_template=str(llama_pair[1] / "chat_template.jinja"))
    )
    assert given.requests[0].prompt_ids[0] == 1


def test_empty_prompts_file_and_missing_column(llama_pair, tmp_path):
    with pytest.raises(InputError, match="contains no prompts"):
        verb.plan(settings(llama_pair[1], write_rows(tmp_path / "e.jsonl", []), tmp_path))
    with pytest.raises(InputError, match=r"row 1 of .* has no prompt, instruction or messages column"):
        verb.plan(settings(llama_pair[1], write_rows(tmp_path / "c.jsonl", [{"prompt": "a"}, {"text": "b"}]), tmp_path))


def test_exit_codes_and_streams_of_the_program(llama_pair, prompt_file, tmp_path, run_expo, capsys):
    write_rows(prompt_file, [{"prompt": " ".join(["w7"] * 200)}, {"prompt": "w1"}])
    arguments = ["generate", prompt_file, "--model", llama_pair[1], "--engine", "transformers", "--max-tokens", 4]
    partly = run_expo(*arguments, "--output-dir", tmp_path, "--json")
    assert partly.code == 3, partly.stderr
    result = json.loads(partly.stdout)
    assert (result["rows"], result["failed"]) == (2, 1)
    assert "Traceback" not in partly.stderr
    assert "\r" not in partly.stderr  # no progress bar in a log file
    assert cli.run(list(map(str, [*arguments, "--output-dir", tmp_path, "--temperature", 0]))) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.strip().splitlines()[-1].startswith("expo: error: ")
