"""score in parts, joined, and in several processes: the machinery is generate's, so here is what is score's own."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
from test_score import ROWS, numbers, outputs, reward_model, settings, write_outputs  # noqa: F401 - fixtures

from expo.engines import transformers_reward as backend
from expo.errors import InputError
from expo.rows.parts import read_part
from expo.rows.worker import Worker
from expo.rows.workers import Crew
from expo.verbs import score as verb

SAME = ("n", "rows", "failed", "truncated", "prompts_sha256", "outputs_sha256", "fingerprint", "config", "versions")


def same_files(one: Path, other: Path) -> None:
    """Two folders of rewards that are the same but for the last bits, which batches decide, and times."""
    files = [sorted(file.name for file in folder.iterdir()) for folder in (one, other)]
    assert files[0] == files[1] == ["m.jsonl", "m.meta.json", "m.rows.jsonl"]
    assert numbers(one / "m.jsonl") == pytest.approx(numbers(other / "m.jsonl"), abs=2e-6)
    rows = [
        [json.loads(line) for line in (folder / "m.rows.jsonl").read_text().splitlines()] for folder in (one, other)
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert {**mine, "reward": 0.0} == {**theirs, "reward": 0.0}
    metas = [json.loads((folder / "m.meta.json").read_text()) for folder in (one, other)]
    assert {key: metas[0][key] for key in SAME} == {key: metas[1][key] for key in SAME}


@pytest.fixture
def whole(reward_model, tmp_path) -> Path:  # noqa: F811
    """The rewards of one run."""
    write_outputs(tmp_path / "whole")
    return verb.run(settings(reward_model, tmp_path / "whole")).rewards.parent


@pytest.mark.parametrize("count", [1, 3, 14, 20])
def test_joined_parts_are_the_run_in_one_piece(reward_model, outputs, whole, tmp_path, count):  # noqa: F811
    for index in reversed(range(count)):
        made = verb.run(settings(reward_model, tmp_path, part=f"{index}/{count}"))
        assert made.rewards == tmp_path / "rewards_q" / "m.parts" / f"{index}-of-{count}.jsonl"
    joined = verb.run(settings(reward_model, tmp_path, join=count))
    assert (joined.status, joined.n) == ("written", 14)
    same_files(joined.rewards.parent, whole)
    parts = json.loads(joined.meta.read_text())["parts"]
    assert [part["part"] for part in parts] == [f"{index}/{count}" for index in range(min(count, 14))]
    assert all({"rows", "failed", "score_seconds", "tokens_per_second"} <= part.keys() for part in parts)
    before = helpers.tree(tmp_path)
    for again in ({"join": count}, {"part": f"0/{count}"}, {}):
        assert verb.run(settings(reward_model, tmp_path, **again)).status == "already complete"
    assert helpers.tree(tmp_path) == before


def test_a_row_without_an_answer_stays_without_a_reward(reward_model, tmp_path):  # noqa: F811
    path = write_outputs(tmp_path)
    lines = path.read_text().splitlines()
    lines[4] = json.dumps({"prompt": "w1", "output": "", "length": 0, "finish_reason": "error"})
    path.write_text("\n".join(lines) + "\n")
    assert [verb.run(settings(reward_model, tmp_path, part=f"{index}/2")).failed for index in range(2)] == [1, 0]
    joined = verb.run(settings(reward_model, tmp_path, join=2))
    assert [number for number, reward in enumerate(numbers(joined.rewards)) if reward is None] == [4]
    assert (joined.n, joined.failed) == (13, 1)
    assert verb.run(settings(reward_model, tmp_path, join=2)).status == "already complete"


def test_what_is_missing_or_of_other_outputs_is_refused(reward_model, outputs, tmp_path):  # noqa: F811
    verb.run(settings(reward_model, tmp_path, part="0/2"))
    with pytest.raises(InputError, match=r"1 of 2 parts cannot be joined yet: 1/2 \(not started\).*expo score q.jsonl"):
        verb.run(settings(reward_model, tmp_path, join=2))
    with pytest.raises(InputError, match="has parts of 2"):
        verb.run(settings(reward_model, tmp_path))
    with pytest.raises(InputError, match=r"0-of-2.jsonl was made with a different max-length \(None then, 7 now\)"):
        verb.run(settings(reward_model, tmp_path, part="0/2", max_length=7))
    write_outputs(tmp_path, [("w1", f"w{number}") for number in range(14)])
    verb.run(settings(reward_model, tmp_path, part="1/2"))
    with pytest.raises(InputError, match=r"0-of-2\.jsonl was made from different prompts"):
        verb.run(settings(reward_model, tmp_path, join=2))


def test_a_stopped_part_and_a_begun_whole_are_taken_up(reward_model, outputs, whole, tmp_path, monkeypatch):  # noqa: F811
    """No row is scored twice, whichever way a run goes on."""
    original, scored = backend.TransformersScorer._logits, []

    def counting(self, rows):
        scored.append(len(rows))
        return original(self, rows)

    with helpers.dying(backend.TransformersScorer, "_logits"):
        verb.run(settings(reward_model, tmp_path))
    done = len((tmp_path / "rewards_q" / ".m.journal.jsonl").read_text().splitlines()) - 1
    assert 0 < done < len(ROWS)
    monkeypatch.setattr(backend.TransformersScorer, "_logits", counting)
    for index in range(2):
        part = verb.plan(settings(reward_model, tmp_path, part=f"{index}/2"))
        verb.run(part.config)
        assert len(read_part(part).rows) == 7
    same_files(verb.run(settings(reward_model, tmp_path, join=2)).rewards.parent, whole)


@pytest.mark.usefixtures("forked_workers")
def test_two_processes_score_what_one_does(reward_model, outputs, whole, tmp_path):  # noqa: F811
    done = verb.run(settings(reward_model, tmp_path, data_parallel=2))
    assert (done.status, done.n) == ("written", 14)
    same_files(tmp_path / "rewards_q", whole)
    assert verb.run(settings(reward_model, tmp_path, data_parallel=2)).status == "already complete"


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("stays", [True, False])
def test_a_worker_that_stays_does_one_job_after_another_in_one_process(reward_model, outputs, whole, tmp_path, stays):  # noqa: F811
    """One that does not is started again for each; both by the same protocol."""
    jobs = [verb.plan(settings(reward_model, tmp_path, part=f"{index}/2")) for index in range(2)]
    pids: list[int] = []

    class Noted(Worker):
        def start(self) -> None:
            super().start()
            pids.append(self._process.pid)

    with Crew([Noted(None, {}, stays=stays)], [(job, 0) for job in jobs]) as crew:
        crew.watch("score", 14, 0)
        assert [worker.exit_code() for worker in crew._workers] == [None if stays else 0]
    assert len(pids) == 2
    assert len(set(pids)) == (1 if stays else 2)
    assert [len(read_part(job).rows) for job in jobs] == [7, 7]
    same_files(verb.run(settings(reward_model, tmp_path, join=2)).rewards.parent, whole)
