"""Prompts that come from data sets on the hub, asked of a hub in this process (`hub_server.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import helpers
import pyarrow as pa
import pyarrow.parquet
import pytest
from hub_server import WRITER, FakeHub

LOAD = """
import json, sys, time
time.sleep = lambda _: None
from expo.errors import ExpoError
from expo.tasks import find_task, load_prompts
for line in sys.argv[1:]:
    task, *dataset = line.split()
    try:
        prompts = load_prompts(find_task(task), *dataset)
        print(json.dumps([0, [prompt.messages[0]["content"] for prompt in prompts]]))
    except ExpoError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""

CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train_gen
    path: data/train_gen-*
  - split: test_gen
    path: data/test_gen-*
---
"""

ULTRAFEEDBACK, ALPACA = "HuggingFaceH4/ultrafeedback_binarized", "tatsu-lab/alpaca_eval"
MTBENCH = "lmsys/mt-bench"
QUESTION = {"question_id": 81, "category": "math", "turns": ["1?", "2?"]}


@pytest.fixture
def load(hub: FakeHub, tmp_path: Path) -> Callable[..., list[list[object]]]:
    """`load_prompts` in a process that talks to `hub`, for lines of a task and maybe a data set.

    For each: 0 and the prompts, or the exit code and the message.
    """
    _add_datasets(hub)

    def run(*lines: str, token: str | None = WRITER, **env: str) -> list[list[object]]:
        done = helpers.run_python(LOAD, *lines, env={**hub.environment(tmp_path / "home", token), **env})
        assert done.code == 0, done.stderr
        assert token is None or token not in done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def _add_datasets(hub: FakeHub) -> None:
    files = {"README.md": CARD}
    for split in ("train_gen", "test_gen"):
        turns = [{"role": "user", "content": f"{split}?"}, {"role": "assistant", "content": "!"}]
        stream = BytesIO()
        row = {"prompt": "p", "prompt_id": split, "messages": turns}
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), stream)
        files[f"data/{split}-00000-of-00001.parquet"] = stream.getvalue()
    hub.add(ULTRAFEEDBACK, files, kind="dataset")
    hub.add("org/gated", files, kind="dataset", gated=True)
    rows = [{"instruction": f"{number}?", "dataset": "d", "output": "", "generator": "g"} for number in range(3)]
    script = {"alpaca_eval.py": b"raise SystemExit('no code of a data set is run')"}
    alpaca = hub.add(ALPACA, {"alpaca_eval.json": json.dumps(rows[:1]).encode(), **script}, kind="dataset")
    hub.add(MTBENCH, {"data/mt_bench/question.jsonl": json.dumps(QUESTION).encode()}, kind="space")
    alpaca.refs["v1"] = alpaca.refs["main"]
    alpaca.commit({**alpaca.files, "alpaca_eval.json": json.dumps(rows).encode()})


def test_the_tasks_prompts(load, hub: FakeHub) -> None:
    wanted = [[0, ["test_gen?"]], [0, ["0?", "1?", "2?"]], [0, ["1?"]]]
    assert load("ultrafeedback", "alpaca", "mtbench") == wanted
    hub.forget_requests()
    assert load("ultrafeedback", "alpaca", "mtbench", HF_HUB_OFFLINE="1") == wanted, "all are cached"
    assert hub.requests == []


def test_another_data_set_or_revision(load, hub: FakeHub) -> None:
    hub.add("org/rows", {"rows.jsonl": b'{"prompt": "a?"}\n{"prompt": "b?"}\n'}, kind="dataset")
    copy = {"prompt_id": 7, "category": "math", "prompt": ["copied?", "2?"]}
    hub.add("org/copy", {"rows.jsonl": json.dumps(copy).encode() + b"\n"}, kind="dataset")
    questions = ("mtbench org/copy", f"mtbench {MTBENCH}@main")
    lines = (f"alpaca {ALPACA}@v1", "file.jsonl org/rows", f"file.jsonl {ULTRAFEEDBACK}@main")
    pinned, own, wrong_split, copied, original = load(*lines, *questions)
    assert copied == [0, ["copied?"]]
    assert original == [0, ["1?"]]
    assert pinned == [0, ["0?"]]
    assert own == [0, ["a?", "b?"]]
    assert wrong_split[0] == 2


REFUSED = {
    "ultrafeedback org/gated": "'org/gated' is a gated dataset on the Hub",
    "ultrafeedback org/missing": "'org/missing' doesn't exist on the Hub or cannot be accessed",
    f"ultrafeedback {ULTRAFEEDBACK}@v9": "Revision 'v9' doesn't exist",
    f"ultrafeedback {ALPACA}": "Dataset scripts are no longer supported",
    "ultrafeedback a--b/c": "Cannot have -- or ..",
    f"alpaca {ALPACA}@v9": f"{ALPACA} has no revision 'v9' on the hub",
}


def test_data_sets_that_are_refused(load) -> None:
    answers = dict(zip(REFUSED, load(*REFUSED), strict=True))
    for line, message in REFUSED.items():
        code, said = answers[line]
        assert (code, message in said) == (2, True), said
        assert said.endswith("; --dataset FILE reads a copy")


@pytest.mark.parametrize(
    ("environment", "faults", "code", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, 0, 2, "offline"),
        ({"HF_TOKEN": "hf_anotherHubsToken"}, 0, 2, ""),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 0, 1, ""),
        ({}, 999, 1, "the hub cannot be reached"),
    ],
    ids=["offline", "wrong token", "nobody there", "503"],
)
def test_whose_fault_it_is(load, hub: FakeHub, environment, faults, code, message) -> None:
    hub.fail("/", faults, status=503)
    answers = load("ultrafeedback", "alpaca", token=None, **environment)
    assert [answer[0] for answer in answers] == [code, code], answers
    assert message.lower() in answers[0][1].lower()
    assert all("hf_" not in said.replace("HF_", "") for _, said in answers)
