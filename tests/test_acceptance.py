"""What others do with our files: AlpacaEval's own `evaluate`, and FastChat's readers of answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import helpers
import pytest
from made_inputs import on_real_inputs_too

from expo.config import GenerateConfig
from expo.tasks import Answer, find_task, load_prompts, read_conversations
from expo.verbs import generate as verb

needs_alpaca_eval = pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="alpaca_eval is not installed")

EVALUATE = """
import json, sys
from alpaca_eval import evaluate, utils
from alpaca_eval.annotators import PairwiseAnnotator

class Longer(PairwiseAnnotator):
    '''Takes the judge's place: the longer answer wins.'''

    def __call__(self, to_annotate, **_):
        rows = to_annotate.to_dict("records")
        return [{**row, "preference": 1.0 + (len(row["output_2"]) > len(row["output_1"]))} for row in rows]

reference, *files = sys.argv[1:]
for file in files:
    loaded = utils.load_or_convert_to_dataframe(file)
    table, annotations = evaluate(
        file, reference, annotators_config="alpaca_eval_gpt4", Annotator=Longer, caching_path=None,
        precomputed_leaderboard=None, fn_metric="get_winrate", sort_by="win_rate", output_path=None,
        is_return_instead_of_print=True,
    )
    board = json.loads(table.to_json(orient="index"))
    print(json.dumps({"rows": loaded.to_dict("records"), "board": board, "judged": len(annotations)}))
"""


@needs_alpaca_eval
@on_real_inputs_too
def test_alpaca_eval_takes_our_file_as_it_is(llama_pair, alpaca_data, tmp_path):
    """Its own loader gives our texts back, and its `evaluate` finds every instruction in the reference."""
    reference = alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"
    real = alpaca_data / "alpaca_eval" / "Starling-LM-7B-beta.json"
    copied = tmp_path / "copied.json"
    copied.write_text(as_expo_writes_it(json.loads(real.read_text()), reference, "Starling-LM-7B-beta"))
    made = verb.run(
        GenerateConfig(
            task="alpaca",
            model=str(llama_pair[1]),
            dataset=str(reference),
            output_dir=str(tmp_path),
            engine="transformers",
            limit=24,
            max_tokens=4,
            name="mine",
        )
    )
    done = helpers.run_python(EVALUATE, reference, copied, made.output)
    assert done.code == 0, done.stderr
    whole, generated = (json.loads(line) for line in done.stdout.splitlines())
    assert whole["rows"] == json.loads(real.read_text())
    assert list(whole["board"]) == ["Starling-LM-7B-beta"]
    assert (whole["judged"], whole["board"]["Starling-LM-7B-beta"]["n_total"]) == (len(whole["rows"]),) * 2
    assert generated["rows"] == json.loads(made.output.read_text())
    assert list(generated["board"]) == ["mine"]
    assert generated["judged"] == 24


def as_expo_writes_it(rows: list[dict], questions: Path, name: str) -> str:
    """Real answers of another model in the file that `expo generate alpaca` would write of them."""
    task = find_task("alpaca")
    prompts = load_prompts(task, str(questions))
    outputs = {row["instruction"]: row["output"] for row in rows}
    answers = [Answer(prompt, outputs[prompt.messages[0]["content"]], 1, "stop") for prompt in prompts]
    return task.write(answers, name)


def fastchat_answers(folder: Path) -> dict[str, dict[int, dict]]:
    """What FastChat's judge makes of a folder: file name → question → answer."""
    return {
        file.stem: {answer["question_id"]: answer for answer in map(json.loads, file.open(encoding="ascii"))}
        for file in sorted(folder.glob("*.jsonl"))
        if not file.name.startswith(".")
    }


@on_real_inputs_too
@pytest.mark.parametrize("model", ["zephyr-7b-beta", "zephyr-7b-beta-ExPO"])
def test_model_answers_are_written_byte_for_byte_as_fastchat_does(alpaca_data, model):
    """All but the answer's id and time, which are ours."""
    folder = alpaca_data / "mt_bench"
    real = folder / "model_answer" / f"{model}.jsonl"
    task = find_task("mtbench")
    prompts = load_prompts(task, str(folder / "question.jsonl"))
    texts = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, real.open())}
    answers = [Answer(one, text, 1, "stop") for one in prompts for text in texts[one.columns["question_id"]]]
    ours = task.write(answers, model).splitlines()
    assert list(map(without_own, ours)) == list(map(without_own, real.read_text().splitlines()))
    ids = {json.loads(line)["answer_id"] for line in ours}
    assert len(ids) == 80
    assert all(len(one) == 22 and one.isalnum() for one in ids)
    assert {type(json.loads(line)["tstamp"]) for line in ours} == {float}


def without_own(line: str) -> str:
    row = json.loads(line)
    return line.replace(row["answer_id"], "").partition(', "tstamp"')[0]


@on_real_inputs_too
def test_fastchats_judge_finds_every_question(llama_pair, alpaca_data, tmp_path):
    questions = alpaca_data / "mt_bench" / "question.jsonl"
    made = verb.run(
        GenerateConfig(
            task="mtbench",
            model=str(llama_pair[1]),
            dataset=str(questions),
            output_dir=str(tmp_path),
            engine="transformers",
            limit=8,
            max_tokens=4,
            name="v1.5",
        )
    )
    answers = fastchat_answers(made.output.parent)
    real = fastchat_answers(alpaca_data / "mt_bench" / "model_answer")["zephyr-7b-beta"]
    assert list(answers) == ["v1.5"]
    assert list(answers["v1.5"]) == list(real)[:8]
    assert [shape(answer) for answer in answers["v1.5"].values()] == [shape(one) for one in list(real.values())[:8]]
    assert {answer["model_id"] for answer in answers["v1.5"].values()} == {"v1.5"}


def shape(value: object) -> object:
    """A value's types, and its keys in their order."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


@on_real_inputs_too
def test_conversations_of_model_answers(alpaca_data):
    folder = alpaca_data / "mt_bench"
    questions = [json.loads(line) for line in (folder / "question.jsonl").open()]
    file = folder / "model_answer" / "zephyr-7b-beta.jsonl"
    conversations = read_conversations(file, find_task("mtbench"), dataset=str(folder / "question.jsonl"))
    answers = [json.loads(line)["choices"][0]["turns"] for line in file.open()]
    assert [contents(one.messages) for one in conversations[1::2]] == [
        [asked[0], said[0], asked[1], said[1]]
        for asked, said in zip((row["turns"] for row in questions), answers, strict=True)
    ]
    assert [contents(one.messages) for one in conversations[::2]] == [
        contents(one.messages)[:2] for one in conversations[1::2]
    ]


def contents(messages: Iterable[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]
