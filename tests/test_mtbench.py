"""mtbench: two turns in rounds. Whatever is there already, the file ends as an uninterrupted run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expo.config import GenerateConfig, ScoreConfig
from expo.engines import EngineSpec, transformers as backend
from expo.errors import EnvironmentFailure, InputError
from expo.rows.files import RowFiles
from expo.verbs import generate as verb, score

CATEGORIES = ("writing", "math", "stem", "roleplay", "coding", "humanities", "reasoning", "other")
TEMPERATURES = (0.7, 0.0, 0.1, 0.7, 0.0, 0.1, 0.0, 0.7)
QUESTIONS = [
    {
        "question_id": 81 + row,
        "category": category,
        "turns": [" ".join(f"w{(3 * row + 7 * turn + word) % 50}" for word in range(1 + (row + turn) % 5))
                  for turn in range(2)],
    }
    for row, category in enumerate(CATEGORIES)
]  # fmt: skip
FINAL = Path("outputs_mtbench/m.jsonl")


def settings(model: Path, folder: Path, questions: list[dict] | None = None, **others) -> GenerateConfig:
    dataset = folder.parent / "questions.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in questions or QUESTIONS))
    defaults = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_tokens": 6, "batch_tokens": 45}
    given = {"model": str(model), "output_dir": str(folder), "dataset": str(dataset), "name": "m"}
    return GenerateConfig(task="mtbench", **{**defaults, **given, **others})


def answers_of(folder: Path) -> dict[int, list[str]]:
    """Question → its answers, as FastChat's judge reads them."""
    rows = [json.loads(line) for line in (folder / FINAL).read_text().splitlines()]
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def meta_of(folder: Path) -> dict:
    return json.loads((folder / FINAL.with_suffix(".meta.json")).read_text())


@pytest.fixture(scope="module")
def whole(llama_pair, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("mtbench") / "whole"
    verb.run(settings(llama_pair[1], folder))
    return folder


@pytest.fixture
def asked(monkeypatch) -> list:
    """The requests the engine really works on, batch by batch."""
    seen: list = []
    original = backend.TransformersGenerator._generate_batch

    def recording(self, batch):
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(backend.TransformersGenerator, "_generate_batch", recording)
    return seen


def test_a_line_per_question_and_a_row_per_turn(whole):
    assert list(answers_of(whole)) == [row["question_id"] for row in QUESTIONS]
    assert all(len(turns) == 2 and all(turns) for turns in answers_of(whole).values())
    meta = meta_of(whole)
    assert (meta["rows"], meta["failed"]) == (16, 0)
    assert meta["per_row"]["id"] == [str(row["question_id"]) for row in QUESTIONS for _ in range(2)]
    assert meta["per_row"]["turn"] == [0, 1] * 8
    assert sorted(path.name for path in (whole / FINAL).parent.iterdir()) == ["m.jsonl", "m.meta.json"]


def test_the_second_turn_is_asked_with_the_first_answer(llama_pair, tmp_path, asked):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_pair[1])
    verb.run(settings(llama_pair[1], tmp_path / "a", system="w9"))
    answers = answers_of(tmp_path / "a")
    second = {request.id: request for batch in asked for request in batch if request.turn == 1}
    assert len(second) == 8
    for row in QUESTIONS:
        (first, then), answer = row["turns"], answers[row["question_id"]][0]
        turns = [("system", "w9"), ("user", first), ("assistant", answer), ("user", then)]
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        request = second[str(row["question_id"])]
        assert list(request.prompt_ids) == ids
        assert list(request.messages) == messages


def test_temperatures_are_the_categories_unless_one_is_given(llama_pair, tmp_path):
    work = verb.plan(settings(llama_pair[1], tmp_path / "a"))
    assert tuple(request.temperature for request in work.requests) == TEMPERATURES
    assert work.describe()["temperatures"] == {"0.0": 6, "0.1": 4, "0.7": 6}
    given = verb.plan(settings(llama_pair[1], tmp_path / "a", temperature=0.3))
    assert {request.temperature for request in given.requests} == {0.3}
    assert work.fingerprint["temperature"] != given.fingerprint["temperature"] == 0.3


def test_rows_of_all_temperatures_do_not_depend_on_their_batch(llama_pair, whole, tmp_path):
    for budget in (1, 100_000):
        verb.run(settings(llama_pair[1], tmp_path / str(budget), batch_tokens=budget))
        assert (tmp_path / str(budget) / FINAL).read_bytes() == (whole / FINAL).read_bytes()
    verb.run(settings(llama_pair[1], tmp_path / "greedy", temperature=0.0))
    greedy, mixed = answers_of(tmp_path / "greedy"), answers_of(whole)
    same = [row["question_id"] for row in QUESTIONS if mixed[row["question_id"]] == greedy[row["question_id"]]]
    assert {82, 85, 87} <= set(same)
    assert 81 not in same


def test_greedy_rows_beside_sampled_ones_keep_their_scores():
    """Also where the likeliest tokens are equally likely: top-p may rule one of them out, greedy takes the first."""
    config = GenerateConfig(task="t.jsonl", model="m", presence_penalty=0, frequency_penalty=0, top_p=0.3)
    requests = [backend.Request(str(row), 0, (1,), 4, value) for row, value in enumerate((0.0, 0.7, 0.0, 1e-3))]
    scores = torch.tensor([[1.0, 5.0, 5.0, 5.0]]).repeat(4, 1)
    result = backend._processors(config, requests, 1)(torch.ones(4, 1, dtype=torch.long), scores.clone())
    assert torch.equal(result[[0, 2]], scores[[0, 2]])
    assert (result[[1, 3]] == 0).sum() == 2  # one token is chosen in each
    assert (result[[1, 3]] == -torch.inf).sum() == 6


def test_stopped_at_any_batch_it_ends_as_uninterrupted(llama_pair, whole, tmp_path, monkeypatch, asked):
    verb.run(settings(llama_pair[1], tmp_path / "count"))
    batches = len(asked)
    assert batches > 5
    recording, calls = backend.TransformersGenerator._generate_batch, []

    def dying(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise EnvironmentFailure("the engine died")
        return recording(self, batch)

    monkeypatch.setattr(backend.TransformersGenerator, "_generate_batch", dying)
    for _ in range(batches):
        try:
            verb.run(settings(llama_pair[1], tmp_path / "a"))
            break
        except EnvironmentFailure:
            calls.clear()  # every run has one batch more
            assert not (tmp_path / "a" / FINAL).exists()
    assert (tmp_path / "a" / FINAL).read_bytes() == (whole / FINAL).read_bytes()
    assert len(asked) == 2 * batches


@pytest.mark.parametrize(
    "kept", ["none", "first", "1", "5", "7 of each", "all firsts", "firsts and 1", "one torn", "all"]
)
def test_any_mix_of_finished_turns_is_continued(llama_pair, whole, journal, tmp_path, asked, kept):
    header, *rows = journal
    firsts, seconds = rows[:8], rows[8:]
    assert ({row["turn"] for row in firsts}, {row["turn"] for row in seconds}) == ({0}, {1})
    mix = {
        "none": [],
        "first": firsts[:1],
        "1": [firsts[3], *(row for row in seconds if row["id"] == firsts[3]["id"])],
        "5": rows[:5],
        "7 of each": [row for row in rows if row["id"] != "84"],
        "all firsts": firsts,
        "firsts and 1": [*firsts, seconds[-1]],
        "one torn": rows[:11],
        "all": rows,
    }[kept]
    text = "".join(json.dumps(row) + "\n" for row in [header, *mix])
    file = tmp_path / "a" / "outputs_mtbench" / ".m.journal.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(text + ('{"id": "8' if kept == "one torn" else ""))
    verb.run(settings(llama_pair[1], tmp_path / "a"))
    assert (tmp_path / "a" / FINAL).read_bytes() == (whole / FINAL).read_bytes()
    assert meta_of(tmp_path / "a")["rows_this_run"] == 16 - len(mix)
    had = {(row["id"], row["turn"]) for row in mix}
    assert all(any((one.id, one.turn) not in had for one in batch) for batch in asked), "no whole batch is done again"


@pytest.fixture(scope="module")
def journal(llama_pair, tmp_path_factory) -> list[dict]:
    """The journal of a run that ended before its final file was written."""
    folder = tmp_path_factory.mktemp("journal") / "a"

    def dying(*_: object) -> None:
        raise EnvironmentFailure("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowFiles, "finish", dying)
        with pytest.raises(EnvironmentFailure):
            verb.run(settings(llama_pair[1], folder))
    return [json.loads(line) for line in (folder / "outputs_mtbench/.m.journal.jsonl").read_text().splitlines()]


def test_a_larger_limit_extends_by_questions(llama_pair, whole, tmp_path, asked):
    for limit, rows in ((3, 6), (5, 4)):
        verb.run(settings(llama_pair[1], tmp_path / "a", limit=limit))
        assert meta_of(tmp_path / "a")["rows_this_run"] == rows
    assert verb.run(settings(llama_pair[1], tmp_path / "a", limit=4)).status == "already complete"
    verb.run(settings(llama_pair[1], tmp_path / "a"))
    assert (tmp_path / "a" / FINAL).read_bytes() == (whole / FINAL).read_bytes()
    batches = len(asked)
    assert verb.run(settings(llama_pair[1], tmp_path / "a")).status == "already complete"
    assert len(asked) == batches


def test_a_turn_that_does_not_fit_is_marked_and_so_is_the_one_after_it(llama_pair, tmp_path):
    long = " ".join(["w7"] * 200)
    questions = [{**row, "turns": turns} for row, turns in zip(
        QUESTIONS, (["w1", "w2"], [long, "w2"], ["w1", long], ["w3", "w4"]), strict=False)]  # fmt: skip
    result = verb.run(settings(llama_pair[1], tmp_path / "a", questions))
    assert (result.rows, result.failed) == (8, 3)
    assert [[bool(text) for text in turns] for turns in answers_of(tmp_path / "a").values()] == [
        [True, True],
        [False, False],
        [True, False],
        [True, True],
    ]
    errors = meta_of(tmp_path / "a")["errors"]
    assert [(one["row"], one["id"], one["turn"]) for one in errors] == [(2, "82", 0), (3, "82", 1), (5, "83", 1)]
    assert "the model takes 128" in errors[0]["reason"]
    assert errors[1]["reason"] == "the previous turn has no answer"
    assert "the model takes 128" in errors[2]["reason"]
    again = verb.run(settings(llama_pair[1], tmp_path / "a", questions))  # nothing can be otherwise
    assert (again.status, again.failed, meta_of(tmp_path / "a")["rows_this_run"]) == ("already complete", 3, 5)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_question_may_have_any_number_of_turns(llama_pair, tmp_path, asked, turns):
    questions = [QUESTIONS[0], {**QUESTIONS[1], "turns": ["w1", "w2", "w3"][:turns]}]
    verb.run(settings(llama_pair[1], tmp_path / "a", questions))
    assert [len(answers) for answers in answers_of(tmp_path / "a").values()] == [2, turns]
    last = max((one for batch in asked for one in batch if one.id == "82"), key=lambda one: one.turn)
    assert [message["role"] for message in last.messages] == ["user", *["assistant", "user"] * (turns - 1)]


REFUSED = [
    ([{"category": "math", "turns": ["a"]}], "row 0 of .* has no question_id"),
    ([{"question_id": True, "turns": ["a"]}], "row 0 of .* has no question_id"),
    ([{"question_id": 1, "turns": []}], "row 0 of .* has no turns"),
    ([{"question_id": 1, "turns": "a"}], "row 0 of .* has no turns"),
    ([{"question_id": 1, "turns": ["a", None]}], "row 0 of .* has no turns"),
    ([{"question_id": 1, "turns": ["a"]}, {"question_id": "1", "turns": ["a"]}], "two rows with the id 1"),
]


@pytest.mark.parametrize(("questions", "message"), REFUSED)
def test_questions_that_are_refused(llama_pair, tmp_path, questions, message):
    with pytest.raises(InputError, match=message):
        verb.plan(settings(llama_pair[1], tmp_path / "a", questions))


def test_another_category_or_id_is_another_data_set(llama_pair, tmp_path):
    verb.run(settings(llama_pair[1], tmp_path / "a", QUESTIONS[:2]))
    for change in ({"category": "math"}, {"question_id": 7}):
        with pytest.raises(InputError, match="a different dataset-sha256"):
            verb.run(settings(llama_pair[1], tmp_path / "a", [{**QUESTIONS[0], **change}, QUESTIONS[1]]))


def test_a_template_that_refuses_a_second_turn_is_refused_before_any_work(llama_pair, tmp_path, monkeypatch):
    template = tmp_path / "t.jinja"
    template.write_text("{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}w1")
    monkeypatch.setattr(EngineSpec, "load", None)
    with pytest.raises(InputError, match="one turn only"):
        verb.run(settings(llama_pair[1], tmp_path / "a", chat_template=str(template)))
    assert not (tmp_path / "a").exists()


def test_both_turns_are_scored_with_what_came_before(trained, whole, tmp_path):
    questions = whole.parent / "questions.jsonl"
    given = {"task": "mtbench", "name": "m", "reward_model": str(trained / "tiny-rm"), "device": "cpu"}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**QUESTIONS[0], "question_id": 7}))
    with pytest.raises(InputError, match="answers no question of mtbench: 81"):
        score.plan(ScoreConfig(**given, output_dir=str(whole), dataset=str(other)))
    work = score.plan(ScoreConfig(**given, output_dir=str(whole), dataset=str(questions), limit=3))
    assert [(row.id, row.conversation.turn) for row in work.rows] == [
        (str(81 + row), turn) for row in range(3) for turn in range(2)
    ]
    (first, then), (one, two) = QUESTIONS[1]["turns"], answers_of(whole)[82]
    contents = [[message["content"] for message in row.conversation.messages] for row in work.rows]
    assert contents[2:4] == [[first, one], [first, one, then, two]]
    result = score.run(ScoreConfig(**given, output_dir=str(whole), dataset=str(questions)))
    assert (result.n, result.failed) == (16, 0)
    assert json.loads(result.meta.read_text())["prompts_sha256"] == meta_of(whole)["prompts_sha256"]
    with pytest.raises(InputError, match="--dataset is for mtbench"):
        score.plan(ScoreConfig(**{**given, "task": "alpaca"}, outputs=str(whole / FINAL), dataset=str(questions)))


@pytest.mark.vllm
@pytest.mark.slow
def test_both_engines_answer_both_turns_alike(trained, alpaca_data, tmp_path, run_warm):
    """Greedy in float32: what vLLM generates, and is asked in the second turn, is token for token transformers'."""
    arguments = ["generate", "mtbench", "--dataset", alpaca_data / "mt_bench" / "question.jsonl", "--name", "m"]
    arguments += ["--model", trained / "tiny-dpo", "--limit", 8, "--max-tokens", 32, "--temperature", 0]
    arguments += ["--dtype", "float32", "--engine", "vllm", "--output-dir", tmp_path / "vllm"]
    done = run_warm("-m", "expo", *arguments)
    assert done.code == 0, done.stderr
    questions = [json.loads(line) for line in (alpaca_data / "mt_bench" / "question.jsonl").open()]
    greedy = {"limit": 8, "max_tokens": 32, "temperature": 0.0, "batch_tokens": 16384}
    verb.run(settings(trained / "tiny-dpo", tmp_path / "transformers", questions, **greedy))
    assert len(answers_of(tmp_path / "vllm")) == 8
    assert (tmp_path / "vllm" / FINAL).read_bytes() == (tmp_path / "transformers" / FINAL).read_bytes()
