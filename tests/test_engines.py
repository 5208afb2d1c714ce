"""The contract of `expo.engines.Generator`, the same for every engine; the openai engine asks vLLM's own server.

All answer with one θ(α) that none of them was given as a checkpoint: the server loads it by the load format `expo`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from observe import observe
from transformers import AutoTokenizer

from demo import task
from expo.engines import GENERATORS

HERE = Path(__file__).parent
ROWS = 64
ALPHA = 0.5
SERVER = [
    *("--max-model-len", 512, "--kv-cache-memory-bytes", 256 << 20, "--served-model-name", "tiny-dpo"),
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", 2048),  # else seeded rows end it on a CPU
]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(trained, plugin, serve_vllm, tmp_path_factory) -> Iterator[Callable[[], str]]:
    """Starts vLLM's server; waits for it and gives its URL when it is called."""
    folder = tmp_path_factory.mktemp("served")
    model = opinionated(trained / "tiny-dpo", folder / "model")
    keys = {"sft": str(trained / "tiny-sft"), "alpha": ALPHA}
    theta = ["--load-format", "expo", "--model-loader-extra-config", json.dumps(keys)]
    with serve_vllm(model, *SERVER, *theta, folder=folder, **plugin) as answering:
        yield answering


def opinionated(model: Path, copy: Path) -> Path:
    """The model, with a generation_config.json of decided taste, which a server takes its defaults from."""
    shutil.copytree(model, copy, copy_function=os.symlink)
    file = copy / "generation_config.json"
    taste = {"repetition_penalty": 1.7, "top_k": 3, "top_p": 0.3, "min_p": 0.4, "temperature": 1.5}
    text = json.dumps({**json.loads(file.read_text()), **taste})
    file.unlink()
    file.write_text(text)
    return copy


@pytest.fixture(scope="module")
def observed(server, trained, alpaca_data, run_warm, tmp_path_factory) -> dict[str, dict[str, list[list[dict]]]]:
    """Engine → way of asking → batches of rows. The engines in this machine are asked while the server starts."""
    folder = tmp_path_factory.mktemp("observed")
    settings = {
        "task": str(alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"),
        "output_dir": str(folder),
        "limit": ROWS,
        "max_tokens": 64,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    pair = {"sft": str(trained / "tiny-sft"), "dpo": str(trained / "tiny-dpo"), "alpha": ALPHA}
    local = json.dumps({**settings, **pair, "dtype": "float32", "batch_tokens": 1200})
    stop_ids = AutoTokenizer.from_pretrained(trained / "tiny-dpo").convert_tokens_to_ids(list(task.TRAITS))
    names = sorted(GENERATORS.keys() - {"openai"})
    done = run_warm(HERE / "observe.py", local, json.dumps(stop_ids), *names)
    assert done.code == 0, done.stderr
    served = observe("openai", {**settings, "model": "tiny-dpo", "base_url": f"{server()}/v1"}, stop_ids)
    for row in (row for batches in served.values() for batch in batches for row in batch):
        # The server goes on from the prompt's last word; where words are joined by blanks, its answers begin with one.
        row["output"] = row["output"].removeprefix(" ")
    return {**json.loads(done.stdout.splitlines()[-1]), "openai": served}


@pytest.fixture(params=GENERATORS)
def seen(request, observed) -> dict[str, list[list[dict]]]:
    """What was observed of one engine."""
    return observed[request.param]


def rows_of(batches: list[list[dict]]) -> dict[tuple[str, int], dict]:
    """The rows by key; none comes twice."""
    rows = [row for batch in batches for row in batch]
    keyed = {(row["id"], row["sample"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def test_every_request_is_answered_once(seen):
    assert sorted(rows_of(seen["greedy"])) == sorted((str(number), 0) for number in range(ROWS))
    assert sorted(rows_of(seen["sampled"])) == sorted((str(row), sample) for row in range(ROWS) for sample in range(2))


def test_rows_that_are_done_are_not_answered_again(seen):
    assert sorted(rows_of(seen["half done"])) == sorted((str(number), 1) for number in range(ROWS))
    assert seen["all done"] == []


def test_no_batch_is_empty_and_rows_come_as_they_finish(seen):
    for batches in seen.values():
        assert all(batches)
    assert len(seen["uneven"]) > 1
    assert sorted(rows_of(seen["uneven"])) == sorted(rows_of(seen["greedy"]))


def test_closing_gives_up_the_rest_and_harms_nothing(seen):
    assert 0 < len(rows_of(seen["closed"])) < ROWS
    assert rows_of(seen["greedy again"]) == rows_of(seen["greedy"])


def test_max_tokens_are_kept_and_told(seen):
    for row in rows_of(seen["short"]).values():
        assert row["length"] <= 3
        assert row["finish_reason"] == "stop" if row["length"] < 3 else "length"
    for (name, _), row in rows_of(seen["uneven"]).items():
        assert row["length"] <= (1 if int(name) % 2 else 48)
    assert {row["finish_reason"] for row in rows_of(seen["short"]).values()} >= {"length"}


def test_samples_of_a_prompt_differ_and_are_sampled(seen):
    rows = rows_of(seen["sampled"])
    firsts = {name: row["output"] for (name, sample), row in rows.items() if sample == 0}
    seconds = {name: row["output"] for (name, sample), row in rows.items() if sample == 1}
    greedy = {name: row["output"] for (name, _), row in rows_of(seen["greedy"]).items()}
    for one, other in ((firsts, seconds), (firsts, greedy), (seconds, greedy)):
        assert sum(one[name] != other[name] for name in one) > ROWS // 2


def test_a_seed_gives_the_same_row_again(seen):
    """With other rows beside it: these engines are repeatable on a CPU, and so is a server that is one of them."""
    sampled = rows_of(seen["sampled"])
    assert all(row == sampled[key] for key, row in rows_of(seen["half done"]).items())


def test_stop_tokens_end_answers_and_are_not_in_them(seen):
    greedy, stopped = rows_of(seen["greedy"]), rows_of(seen["stopped"])
    assert {row["finish_reason"] for row in stopped.values()} >= {"stop"}
    assert sum(row["length"] < greedy[key]["length"] for key, row in stopped.items()) > ROWS // 2
    for key, row in stopped.items():
        assert greedy[key]["output"].startswith(row["output"])


@pytest.mark.parametrize("way", ["greedy", "short", "stopped"])
def test_greedy_rows_are_the_same_on_all_engines(observed, way):
    """Text, lengths, reasons and the prompts' tokens; the server's own defaults do not get in."""
    engines = {name: rows_of(seen[way]) for name, seen in observed.items()}
    assert engines["openai"] == engines["vllm"]
    assert engines["transformers"] == engines["vllm"]
    if way == "greedy":
        assert sum(row["length"] for row in engines["vllm"].values()) > 400


def test_sampled_rows_of_the_server_are_vllms(observed):
    assert rows_of(observed["openai"]["sampled"]) == rows_of(observed["vllm"]["sampled"])
