"""Outputs that hold some rows of a task: whatever came first, they end as one run's, and a kill loses no row."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from crashes import DIED, die_at, ended, forked
from helpers import tree
from sizes import in_full, sized
from test_generate import settings, write_rows
from test_mtbench import QUESTIONS
from test_score import make_reward_model, settings as score_settings

from expo import rows
from expo.config import GenerateConfig
from expo.engines import GENERATORS, Completion, EngineSpec, Failure
from expo.errors import EnvironmentFailure, InputError
from expo.rows.job import Done, RowJob
from expo.verbs import generate, score
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.reading import read_runs
from expo.verbs.generate import GenerateJob
from expo.verbs.report.aligned import align
from expo.verbs.score.job import ScoreJob

PROMPTS = [
    {"id": f"q{row}", "prompt": " ".join(f"w{(3 * row + word) % 50}" for word in range(1 + row % 7))}
    for row in range(12)
]
IDS = [str(row["id"]) for row in PROMPTS]
TOO_LONG = {"id": "long", "prompt": " ".join(["w7"] * 200)}
MIXED = [
    {**row, "turns": row["turns"][: 1 + number % 2], "category": "writing"} for number, row in enumerate(QUESTIONS)
]
"""Questions of one turn and of two."""
TIMES = {"engine_start_seconds", "generate_seconds", "score_seconds", "engine_step_seconds", "tokens_per_second"}
BY_RUN = {*TIMES, "rows_this_run", "config", "versions"}
"""What a meta file says of its last run, or of where it lies."""


class Engine:
    """Generates and scores, by two rows a time; what it gives depends on the row and on `nonce` alone."""

    repeatable = True
    step_seconds = 0.0
    nonce: ClassVar[int] = 0
    """Another one shows what is made again."""
    made: ClassVar[list[Any]] = []
    """The keys that it has answered, and the token ids that it has scored."""
    failing: ClassVar[set[str]] = set()
    """The ids of prompts that it cannot answer this time."""
    dies_after: ClassVar[int | None] = None
    """After how many steps it fails, once."""

    def __init__(self, setup: object) -> None:
        pass

    load = __init__

    def close(self) -> None:
        pass

    def versions(self) -> dict[str, str]:
        return {"engine": "1.0"}

    def generate(self, requests, done):
        for batch in self._batches([request for request in requests if request.key not in done]):
            Engine.made += [request.key for request in batch]
            yield [self._answer(request) for request in batch]

    def _answer(self, request):
        if request.id in Engine.failing:
            return Failure(request, "not this time")
        chance = random.Random(f"{Engine.nonce} {request.prompt_ids} {request.sample}")
        return Completion(request, tuple(chance.choices(range(6, 64), k=chance.randint(1, 9))), "length")

    def score(self, ids):
        for batch in self._batches(list(enumerate(ids))):
            Engine.made += [tuple(row) for _, row in batch]
            yield [(place, random.Random(f"{Engine.nonce} {tuple(row)}").random()) for place, row in batch]

    def log_probs(self, side, batch):
        Engine.made += [(side, *row.token_ids) for row in batch]
        if Engine.dies_after is not None:
            Engine.dies_after -= 1
            if Engine.dies_after < 0:
                Engine.dies_after = None
                raise EnvironmentFailure("the engine died")
        return [-random.Random(f"{Engine.nonce} {side} {row.token_ids} {row.start}").random() for row in batch]

    def _batches(self, todo: list[Any]) -> Iterator[list[Any]]:
        for number, start in enumerate(range(0, len(todo), 2)):
            if number == Engine.dies_after:
                Engine.dies_after = None
                raise EnvironmentFailure("the engine died")
            yield todo[start : start + 2]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    for name, value in {"nonce": 0, "made": [], "failing": set(), "dies_after": None}.items():
        monkeypatch.setattr(Engine, name, value)
    monkeypatch.setattr(EngineSpec, "load", lambda spec: Engine)
    return Engine


@pytest.fixture(scope="session")
def reward_model(llama_pair, tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("rm") / "rm", llama_pair[1], labels=1, pad_id=2)


@pytest.fixture
def config(llama_pair, tmp_path) -> Callable[..., GenerateConfig]:
    """The settings of one output, by its folder."""

    def make(folder: str = "out", task: list[dict] = PROMPTS, **others) -> GenerateConfig:
        if "turns" in task[0]:
            others |= {"dataset": str(write_rows(tmp_path / "asked.jsonl", task))}
            return settings(llama_pair[1], "mtbench", tmp_path / folder, name="m", **others)
        return settings(llama_pair[1], write_rows(tmp_path / "q.jsonl", task), tmp_path / folder, name="m", **others)

    return make


@pytest.fixture
def job(config) -> Callable[..., GenerateJob]:
    """The job of all prompts, by its folder."""
    return lambda *args, **others: generate.plan(config(*args, **others))


@pytest.fixture
def scoring(reward_model, tmp_path) -> Callable[..., ScoreJob]:
    """The job that scores the answers in a folder."""

    def make(folder: str = "out", **others) -> ScoreJob:
        return score.plan(score_settings(reward_model, tmp_path / folder, **{"task": "q.jsonl", **others}))

    return make


def meta_of(job: RowJob) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(job.files.meta.read_text())
    return content


def content_of(job: RowJob) -> dict[str, object]:
    """The finished files, but for what differs from run to run."""
    folder, name = job.files.final.parent, job.files.name
    files: dict[str, object] = {path: data for path, data in tree(folder).items() if path.startswith(name)}
    meta = f"{name}.meta.json"
    return {**files, meta: {key: value for key, value in meta_of(job).items() if key not in BY_RUN}}


def answers_of(job: GenerateJob) -> dict[tuple[str, int, int], str]:
    """What the finished file says, by row."""
    meta = meta_of(job)
    keys = job.finished_keys(meta)
    assert keys is not None
    return {key: row["output"] for key, row in zip(keys, job.finished_rows(meta, keys), strict=True)}


def rewards_of(job: ScoreJob) -> dict[str, float]:
    lines = job.files.final.with_name("m.rows.jsonl").read_text().splitlines()
    named = {row["id"]: row["reward"] for row in map(json.loads, lines)}
    assert list(named.values()) == [json.loads(line) for line in job.files.final.read_text().splitlines()]
    return named


def some(ids: Collection[str], seed: int, count: int) -> list[str]:
    return random.Random(seed).sample(sorted(ids), count)


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "others"), [(1, {}), (2, {"n": 3}), (3, {"task": MIXED}), (4, {"task": [*PROMPTS[:5], TOO_LONG]})]
)
def test_any_order_of_prompts_ends_as_one_run(job, seed, others):
    whole, one = job("out", **others), job("one", **others)
    ids, chance = [prompt.id for prompt in whole.prompts], random.Random(seed)
    there: set[str] = set()
    for count in (1, 3, 2):
        asked = chance.sample(ids, count)
        there |= set(asked)
        rows.run(whole.of(asked))
        fresh = job(f"as {len(there)} of {count}", **others).of(there)
        made = Counter(Engine.made)
        rows.run(fresh)
        assert content_of(whole) == content_of(fresh)
        Engine.made[:] = made.elements()
    rows.run(whole)
    assert max(Counter(Engine.made).values()) == 1, "no row is made again"
    assert {key[0] for key in Engine.made} == {request.id for request in whole.requests}
    rows.run(one)
    assert content_of(whole) == content_of(one)


def test_a_job_of_some_prompts_is_planned_alike_in_every_way(job, config):
    whole, asked = job(limit=10), some(IDS[:10], 1, 4)
    ways = [whole.of(asked), whole.of(IDS[:2]).of(asked), generate.plan(config(limit=10), prompts=asked)]
    ways.append(generate.plan(config(limit=10), **ways[0].worker_options()))
    for way in ways:
        assert way.keys == [(name, 0, 0) for name in IDS if name in asked]
        assert [request.key for request in way.requests] == way.keys
        assert way.only == tuple(name for name in IDS if name in asked)
        assert (way.setup, way.fingerprint) == (whole.setup, whole.fingerprint)
        assert way.setup.takes_over(whole.setup)
    assert "prompts" not in whole.worker_options()
    for unknown in ("q10", "x"):
        with pytest.raises(InputError, match=f"q has no prompt '{unknown}' among the 10 to answer"):
            generate.plan(config(limit=10), prompts=["q1", unknown])
    with pytest.raises(InputError, match="none of the prompts of q is to be answered"):
        whole.of([])


def test_what_is_there_beyond_a_limit_stays_and_what_lacks_is_made(job, config):
    """Four rows are not the first four."""
    rows.run(job().of(["q2", "q7", "q9", "q11"]))
    before = answers_of(job())
    Engine.nonce = 1
    limited = generate.run(config(limit=4))
    assert (limited.status, limited.rows) == ("written", 7)
    assert list(answers_of(job())) == [(name, 0, 0) for name in ("q0", "q1", "q2", "q3", "q7", "q9", "q11")]
    assert before.items() <= answers_of(job()).items()
    files = content_of(job())
    for config_of in (config(limit=4), config(limit=1)):
        assert generate.run(config_of).status == "already complete"
    assert rows.run(job().of(["q7", "q0"])).status == "already complete"
    assert not rows.is_complete(job())
    assert rows.missing_rows(job()) == 5
    assert content_of(job()) == files


def test_failed_rows_that_are_not_asked_for_stay_failed_with_their_reason(job):
    whole = job(task=[*PROMPTS[:6], TOO_LONG])
    Engine.failing = {"q1", "q3"}
    rows.run(whole.of(["q1", "q2", "q3", "long"]))
    errors = meta_of(whole)["errors"]
    assert [(error["row"], error.get("lasting", False)) for error in errors] == [(0, False), (2, False), (3, True)]
    Engine.failing = set()
    rows.run(whole.of(["q0", "q3"]))
    assert meta_of(whole)["errors"] == [{**errors[0], "row": 1}, {**errors[2], "row": 4}]
    rows.run(whole)
    one = job("one", task=[*PROMPTS[:6], TOO_LONG])
    rows.run(one)
    assert content_of(whole) == content_of(one)


def test_an_unfinished_run_of_other_prompts_is_gone_on_with(job, config):
    whole = job(n=2)
    Engine.dies_after = 3
    with pytest.raises(EnvironmentFailure):
        rows.run(whole.of(["q3", "q5", "q8", "q9"]))
    made = set(Engine.made)
    with pytest.raises(
        InputError, match=r"m\.jsonl has \d rows that this run does not include \(a smaller --limit\?\)"
    ):
        generate.run(config(n=2, limit=3))
    with pytest.raises(InputError, match="does not include"):
        rows.run(job(n=2, limit=3).of(["q1"]))
    Engine.nonce = 1
    rows.run(whole.of(["q1"]))
    begun = {key[0] for key in made}
    assert list(dict.fromkeys(key[0] for key in answers_of(whole))) == sorted({"q1", *begun})
    assert max(Counter(Engine.made).values()) == 1
    rows.run(whole)
    assert max(Counter(Engine.made).values()) == 1


@pytest.mark.usefixtures("forked_workers")
def test_parts_of_some_prompts(job, config, tmp_path):
    """Of what is there already too, and a part that an earlier run has left."""
    whole, one = job(), job("one")
    rows.run(whole.of(["q4", "q10"]))
    first = ["q1", "q2", "q6", "q10"]
    generate.run(config(part="1/2"), prompts=first)
    assert set(Engine.made) == {(name, 0, 0) for name in ("q1", "q4", "q10")}, "the odd ones, whichever are asked for"
    asked = generate.run(config(data_parallel=2), prompts=[*first, "q7"])
    assert (asked.rows, asked.status) == (6, "written")
    rows.run(one.of(["q4", *first, "q7"]))
    assert content_of(whole)["m.jsonl"] == content_of(one)["m.jsonl"]
    generate.run(config(data_parallel=2))
    rows.run(one)
    assert content_of(whole)["m.jsonl"] == content_of(one)["m.jsonl"]
    assert [path.name for path in sorted(whole.files.final.parent.iterdir())] == ["m.jsonl", "m.meta.json"]


def renamed(meta: dict[str, Any]) -> None:
    meta["per_row"]["id"][0] = "q1"


def unknown(meta: dict[str, Any]) -> None:
    meta["per_row"]["id"][0] = "x"


def nameless(meta: dict[str, Any]) -> None:
    del meta["per_row"]


@pytest.mark.parametrize("change", [renamed, unknown, nameless])
def test_an_output_of_other_rows_is_refused(job, change):
    whole = job()
    rows.run(whole.of(["q2", "q5"]))
    meta = meta_of(whole)
    change(meta)
    whole.files.meta.write_text(json.dumps(meta))
    files = tree(whole.files.final.parent)
    for asked in (whole, whole.of(["q2"]), whole.of(["q2", "q7"])):
        with pytest.raises(InputError, match=r"m\.jsonl was made from different rows; --overwrite replaces it"):
            rows.run(asked)
    assert tree(whole.files.final.parent) == files


def test_an_output_that_does_not_name_its_rows_has_the_first_ones(job):
    whole = job()
    rows.run(job(limit=5))
    meta = meta_of(whole)
    nameless(meta)
    whole.files.meta.write_text(json.dumps(meta))
    for asked in (job(limit=5), job(limit=2), whole.of(["q1", "q4"])):
        assert rows.run(asked).status == "already complete"
    with pytest.raises(InputError, match=r"m\.jsonl is damaged, or m\.meta\.json does not belong to it"):
        rows.run(whole)


# --- score ----------------------------------------------------------------------------------------------------------


def test_rewards_stay_with_their_answers_when_rows_are_inserted(job, scoring):
    whole = job(n=2)
    for asked in (["q5", "q9"], ["q1", "q9", "q10"], ["q0"], IDS):
        rows.run(whole.of(asked))
        rows.run(scoring())
    shutil.copytree(whole.files.final.parent, whole.files.final.parents[2] / "one" / "outputs_q")
    scored = [ids for ids in Engine.made if isinstance(ids[0], int)]
    assert len(scored) == len(whole.keys), "no answer is scored again"
    rows.run(scoring("one"))
    assert content_of(scoring()) == content_of(scoring("one"))
    assert [json.loads(line)["id"] for line in (scoring().files.final.with_name("m.rows.jsonl")).open()] == [
        name for name in IDS for _ in range(2)
    ]


def test_an_unfinished_scoring_goes_on_when_rows_were_inserted(job, scoring):
    whole = job()
    rows.run(whole.of(IDS[4:]))
    Engine.dies_after = 2
    with pytest.raises(EnvironmentFailure):
        rows.run(scoring())
    before = Counter(ids for ids in Engine.made if isinstance(ids[0], int))
    assert before.total() == 4
    rows.run(whole)
    Engine.nonce = 1
    rows.run(scoring())
    scored = {row.id: row.token_ids for row in scoring().rows}
    expected = {
        name: random.Random(f"{int(ids not in before)} {ids}").random() for name, ids in scored.items()
    }  # fmt: skip
    assert rewards_of(scoring()) == expected
    assert list(expected) == IDS


@pytest.mark.parametrize("dies_after", [2, 6, None])
def test_the_implicit_reward_of_answers_that_have_become_more(llama_pair, job, tmp_path, dies_after):
    """Also where only one of the two models had scored some of them."""

    def scoring(folder: str = "out") -> ScoreJob:
        pair = {"implicit_reward": True, "sft": str(llama_pair[0]), "dpo": str(llama_pair[1])}
        common = score_settings(llama_pair[1], tmp_path / folder, task="q.jsonl", batch_tokens=30, **pair)
        return score.plan(replace(common, reward_model=()))

    rows.run(job().of(IDS[3:]))
    Engine.dies_after = dies_after
    with nullcontext() if dies_after is None else pytest.raises(EnvironmentFailure):
        rows.run(scoring())
    assert scoring().files.journal.exists() is (dies_after is not None)
    rows.run(job())
    rows.run(scoring())
    shutil.copytree(tmp_path / "out" / "outputs_q", tmp_path / "one" / "outputs_q")
    rows.run(scoring("one"))
    assert content_of(scoring()) == content_of(scoring("one"))


def test_a_limit_keeps_the_rewards_of_rows_beyond_it(job, scoring):
    whole = job()
    rows.run(whole.of(IDS[6:]))
    rows.run(scoring())
    before = rewards_of(scoring())
    rows.run(whole)
    Engine.nonce = 1
    assert rows.run(scoring(limit=4)).status == "written"
    assert before.items() <= rewards_of(scoring()).items()
    assert list(rewards_of(scoring())) == [*IDS[:4], *IDS[6:]]
    assert rows.run(scoring(limit=3)).status == "already complete"


def test_other_answers_than_were_scored_are_refused(job, scoring):
    whole = job()
    rows.run(whole.of(["q3", "q8"]))
    rows.run(scoring())
    shutil.rmtree(whole.files.final.parent)
    Engine.nonce = 1
    rows.run(whole.of(["q1", "q3", "q8"]))
    with pytest.raises(InputError, match=r"m\.jsonl was made from different rows; --overwrite replaces it"):
        rows.run(scoring())


def test_answers_are_not_scored_under_the_names_of_others(job, scoring):
    """Where a run was killed before the meta file of answers that have become more was written."""
    whole = job()
    rows.run(whole.of(IDS[3:]))
    older = whole.files.meta.read_bytes()
    rows.run(whole)
    newer = whole.files.meta.read_bytes()
    whole.files.meta.write_bytes(older)
    for limited in ({}, {"limit": 2}):
        with pytest.raises(
            InputError, match=r"m\.meta\.json is about different prompts from those in m\.jsonl: `expo generate`"
        ):
            scoring(**limited)
    whole.files.meta.write_bytes(newer)
    assert scoring().keys == whole.keys


def test_rewards_without_names_are_those_of_the_first_rows(job, scoring):
    rows.run(job(limit=5))
    rows.run(scoring())
    scoring().files.final.with_name("m.rows.jsonl").unlink()
    assert rows.run(scoring()).status == "already complete"
    rows.run(job())
    rows.run(scoring())
    assert list(rewards_of(scoring())) == IDS


def test_answers_of_others_that_repeat_a_name_have_one_each(scoring, tmp_path):
    turns = [{"question_id": 81, "choices": [{"turns": [text]}]} for text in ("w1 w2", "w3", "w1 w2")]
    (tmp_path / "out" / "outputs_mtbench").mkdir(parents=True)
    write_rows(tmp_path / "out" / "outputs_mtbench" / "m.jsonl", turns)
    questions = write_rows(tmp_path / "asked.jsonl", [{**QUESTIONS[0], "turns": ["w5"]}])
    job = scoring(task="mtbench", dataset=str(questions))
    assert job.keys == [("81", 0, 0), ("81", 1, 0), ("81", 2, 0)]
    rows.run(job)
    first, second, third = (json.loads(line) for line in job.files.final.read_text().splitlines())
    assert first == third != second


# --- kills ----------------------------------------------------------------------------------------------------------


def ends_after_every_kill(job: RowJob, check: Callable[[Done], None]) -> None:
    """End a run before each of its changes to the disk, go on, and check what the rerun leaves; the rerun is ended once
    more before."""
    folder = job.files.final.parents[1]
    saved = folder.with_name("saved")
    shutil.copytree(folder, saved, symlinks=True)
    whole = [path for path in job.files.final.parent.iterdir() if path.is_file()]

    def broken(step: int) -> int:
        die_at(step, folder)
        Engine.nonce = 1
        rows.run(job)
        return 0

    for step in itertools.count(0, sized(ci=3, full=1)):
        code = ended(forked(lambda step=step: broken(step)))
        if code != 0:
            assert code == DIED
            assert ended(forked(lambda step=step: broken(3 + step % 5))) in (0, DIED)
        Engine.nonce = 2
        check(rows.run(job))
        assert set(whole) == {path for path in job.files.final.parent.iterdir() if path.is_file()}
        shutil.rmtree(folder)
        shutil.copytree(saved, folder, symlinks=True)
        if code == 0:
            assert step > 12, "it is ended at many moments"
            return


@pytest.mark.parametrize("asked", [in_full(None), ["q0", "q6", "q8"]])
def test_a_kill_at_any_moment_of_an_extension_loses_no_answer(job, asked):
    whole = job()
    rows.run(whole.of(["q2", "q3", "q6", "q11"]))
    before = answers_of(whole)

    def check(done: Done) -> None:
        after = answers_of(whole)
        assert before.items() <= after.items()
        assert [key[0] for key in after] == [
            name for name in IDS if asked is None or name in {"q2", "q3", "q11", *asked}
        ]
        assert done.meta["failed"] == 0

    ends_after_every_kill(whole if asked is None else whole.of(asked), check)


def test_a_kill_at_any_moment_of_an_extension_loses_no_reward(job, scoring):
    rows.run(job().of(["q2", "q3", "q6", "q11"]))
    rows.run(scoring())
    before = rewards_of(scoring())
    rows.run(job())

    def check(done: Done) -> None:
        assert before.items() <= rewards_of(scoring()).items()
        assert list(rewards_of(scoring())) == IDS

    ends_after_every_kill(scoring(), check)


def test_a_kill_at_any_moment_of_joining_loses_no_answer(job, config):
    whole = job()
    rows.run(whole.of(["q2", "q3", "q6", "q11"]))
    before = answers_of(whole)
    for index in range(2):
        generate.run(config(part=f"{index}/2"))
    joined = generate.plan(config(join=2))
    ends_after_every_kill(joined, lambda done: before.items() <= answers_of(whole).items() or pytest.fail("lost"))


# --- who reads them -------------------------------------------------------------------------------------------------


def test_compare_and_report_pair_rows_by_name_and_compare_says_what_it_drops(job, scoring, tmp_path):
    rows.run(job())
    rows.run(scoring())
    folder = tmp_path / "out"
    for kind in ("outputs_q", "rewards_q"):
        for path in sorted((folder / kind).glob("m.*")):
            path.rename(path.with_name(path.name.replace("m.", "A.", 1)))
    Engine.nonce = 1
    kept = ["q3", "q7", "q8", "q10"]
    rows.run(job().of(kept))
    rows.run(scoring())
    runs = read_runs(["A", "m"], task="q", output_dir=str(folder))
    with pytest.raises(
        InputError, match="8 rows only in A: q0, q1, q2 and 5 more; --intersect compares the 4 that all"
    ):
        compare(runs)
    found = compare(runs, intersect=True)
    base, other = (dict(zip((row.id for row in run.rows), *run.rewards.values(), strict=True)) for run in runs)
    assert found.tables[0].models[1].paired.difference == pytest.approx(sum(other[k] - base[k] for k in kept) / 4)
    (model,) = runs[0].rewards
    aligned = align(runs, [model])
    differences = zip((row.id for row in aligned.first), aligned.differences(model, 1), strict=True)
    assert dict(differences) == {name: other[name] - base[name] if name in kept else None for name in IDS}
    left = [row["id"] for row in found.describe()["left_out"]]
    assert left == [name for name in IDS if name not in kept]


def test_compare_pairs_rows_that_ask_the_same_by_their_ids(job, tmp_path):
    """Here one run has only the second of two."""
    task = [*PROMPTS, {"id": "again", "prompt": PROMPTS[4]["prompt"]}]
    for name, asked in (("A", ["q1", "q4", "again"]), ("B", ["q1", "again"]), ("C", ["again", "q4", "q1"])):
        rows.run(generate.plan(replace(job(task=task).config, name=name)).of(asked))
    runs = read_runs(["A", "B", "C"], task="q", output_dir=str(tmp_path / "out"))
    keys = [{row.id: row.key for row in run.rows} for run in runs]
    assert keys[0] == keys[2]
    assert keys[1] == {name: keys[0][name] for name in ("q1", "again")}
    assert keys[0]["q4"] != keys[0]["again"]


def test_rewards_of_answers_that_have_become_more_are_read_by_name(job, scoring, tmp_path):
    rows.run(job().of(["q3", "q7"]))
    rows.run(scoring())
    known = rewards_of(scoring())
    rows.run(job().of(["q1", "q3", "q7", "q9"]))
    (run,) = read_runs(["m"], task="q", output_dir=str(tmp_path / "out"))
    (values,) = run.rewards.values()
    assert {row.id: value for row, value in zip(run.rows, values, strict=True)} == {"q1": None, **known, "q9": None}


def test_the_engines_are_those_of_this_file() -> None:
    assert all(spec.load() is Engine for spec in GENERATORS.values())
