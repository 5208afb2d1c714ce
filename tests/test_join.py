"""Runs in parts: joined they are the run in one piece; what is missing, damaged or made otherwise is named."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import helpers
import pytest
from test_generate import PROMPTS, prompt_file, rows_of, settings, write_rows  # noqa: F401 - a fixture

from expo.engines import Completion, EngineSpec
from expo.errors import EnvironmentFailure, InputError
from expo.journal import Journal
from expo.rows import files, parts
from expo.rows.loop import left_of
from expo.rows.parts import missing_parts
from expo.verbs import generate as verb
from expo.verbs.generate import Generated

SAME_IN_BOTH = (
    *("rows", "failed", "errors", "tokens_in", "tokens_out", "finish_reasons", "rows_this_run", "prompts_sha256"),
    *("fingerprint", "per_row", "versions", "config", "engine", "model", "repeatable", "name", "command"),
)
"""What the meta file of a joined run has in common with that of a run in one piece: all but times."""
TIMES = {"engine_start_seconds", "generate_seconds", "engine_step_seconds", "tokens_per_second"}


class Engine:
    """A generator whose rows depend on the seed, the prompt and the sample only; it comes by two rows a time."""

    repeatable = True
    step_seconds = 0.0
    generated: ClassVar[list[str]] = []
    """The ids of the prompts it has worked on."""
    dies_after: int | None = None
    """After how many steps it fails, once."""

    def __init__(self, setup) -> None:
        self._seed = setup.config.seed

    def load(self, setup) -> None:
        self.__init__(setup)

    def close(self) -> None:
        pass

    def generate(self, requests, done):
        todo = [request for request in requests if request.key not in done]
        for number, start in enumerate(range(0, len(todo), 2)):
            if number == Engine.dies_after:
                Engine.dies_after = None
                raise EnvironmentFailure("the engine died")
            batch = todo[start : start + 2]
            Engine.generated += [request.id for request in batch]
            yield [self._answer(request) for request in batch]

    def _answer(self, request) -> Completion:
        chance = random.Random(f"{self._seed} {request.prompt_ids} {request.sample}")
        return Completion(request, tuple(chance.choices(range(6, 64), k=chance.randint(1, 9))), "length")

    def versions(self) -> dict[str, str]:
        return {"engine": "1.0"}


@pytest.fixture
def engine(monkeypatch) -> type[Engine]:
    monkeypatch.setattr(Engine, "generated", [])
    monkeypatch.setattr(Engine, "dies_after", None)
    monkeypatch.setattr(EngineSpec, "load", lambda spec: Engine)
    return Engine


@pytest.fixture
def run_really(llama_pair, prompt_file, tmp_path):  # noqa: F811 - the fixture
    """`expo generate` in this process, into tmp_path/out, with transformers."""

    def call(part: str | None = None, *, folder: str = "out", task: Path | str = prompt_file, **others) -> Generated:
        return verb.run(settings(llama_pair[1], task, tmp_path / folder, name="m", part=part, **others))

    return call


@pytest.fixture
def run(run_really, engine):
    """The same with an engine that costs nothing."""
    return run_really


@pytest.fixture
def plan(llama_pair, prompt_file, tmp_path):  # noqa: F811 - the fixture
    """What `--dry-run` says of a run of `run`."""

    def call(**others) -> dict[str, Any]:
        return verb.plan(settings(llama_pair[1], prompt_file, tmp_path / "out", name="m", **others)).describe()

    return call


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out" / "outputs_questions"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("count", "others"), [(1, {}), (3, {}), (5, {"n": 2}), (12, {}), (15, {})])
def test_joined_parts_are_the_run_in_one_piece(run, out, count, others):
    whole = run(folder="whole", **others)
    order = list(range(count))
    random.Random(count).shuffle(order)
    for index in order:
        made = run(f"{index}/{count}", **others)
        assert made.output == out / "m.parts" / f"{index}-of-{count}.jsonl"
        assert not (out / "m.jsonl").exists()
    joined = run(join=count, **others)
    assert (joined.output, joined.status, joined.rows) == (out / "m.jsonl", "written", whole.rows)
    assert joined.output.read_bytes() == whole.output.read_bytes()
    metas = [json.loads(result.meta.read_text()) for result in (whole, joined)]
    assert {key: metas[0][key] for key in SAME_IN_BOTH} == {key: metas[1][key] for key in SAME_IN_BOTH}
    assert metas[0].keys() == {*SAME_IN_BOTH, *TIMES}, "a new figure is the same in both, or a time"
    assert metas[1].keys() == {*metas[0].keys(), "parts"}
    assert sum(part["rows"] for part in metas[1]["parts"]) == whole.rows
    assert names(out) == ["m.jsonl", "m.meta.json"]


def test_a_task_with_a_format_of_its_own_is_joined_in_it(run, tmp_path):
    rows = [{"instruction": prompt, "dataset": "made"} for prompt in PROMPTS]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    others = {"task": "alpaca", "dataset": str(tmp_path / "eval.json")}
    for index in range(2):
        run(f"{index}/2", **others)
    joined, whole = run(join=2, **others), run(folder="whole", **others)
    assert joined.output.name == "m.json"
    assert joined.output.read_bytes() == whole.output.read_bytes()


@pytest.mark.parametrize(("dtype", "repeatable"), [("float32", True), ("bfloat16", False)])
def test_transformers_batches_the_rows_of_a_part_otherwise_and_says_where_that_matters(run_really, dtype, repeatable):
    for index in range(2):
        run_really(f"{index}/2", dtype=dtype)
    joined = run_really(join=2, dtype=dtype)
    assert json.loads(joined.meta.read_text())["repeatable"] is repeatable
    if repeatable:
        assert joined.output.read_bytes() == run_really(folder="whole", dtype=dtype).output.read_bytes()


def test_what_is_finished_is_left_alone(run, out, engine):
    for index in range(2):
        run(f"{index}/2")
    before = helpers.tree(out)
    assert run("1/2").status == "already complete"
    run(join=2)
    after = helpers.tree(out)
    del engine.generated[:]
    for again in (run("0/2"), run(join=2), run(join=5), run("3/7"), run()):
        assert again.status == "already complete"
    assert engine.generated == []
    assert helpers.tree(out) == after
    assert before.keys() != after.keys()


def test_an_empty_part_loads_no_engine(run, monkeypatch):
    monkeypatch.setattr(EngineSpec, "load", lambda spec: pytest.fail("loaded"))
    assert run("13/15").rows == 0
    assert run("13/15").status == "already complete"


# --- not all there -------------------------------------------------------------------------------------------------


def test_missing_parts_are_named_with_the_command_that_makes_them(run, out, prompt_file, tmp_path):  # noqa: F811
    run("1/3")
    before = helpers.tree(out)
    with pytest.raises(InputError) as caught:
        run(join=3)
    text = str(caught.value)
    assert text.startswith(
        "2 of 3 parts cannot be joined yet: 0/3 (not started), 2/3 (not started); to make one: expo "
    )
    assert f"expo generate {prompt_file} " in text
    assert "--part 0/3" in text
    assert "--join" not in text
    assert "\n" not in text
    assert helpers.tree(out) == before


def test_a_part_that_is_still_made_is_named_and_a_second_run_of_it_refused(run, out, tmp_path):
    run("0/2")
    meta = json.loads((out / "m.parts" / "0-of-2.meta.json").read_text())
    with Journal(out / "m.parts" / ".1-of-2.journal.jsonl", {"fingerprint": meta["fingerprint"]}) as journal:
        with pytest.raises(InputError, match=r"1 of 2 parts .*: 1/2 \(still running\)"):
            run(join=2)
        with pytest.raises(InputError, match="another run is writing"):
            run("1/2")
        journal.append([{"id": "1", "sample": 0, "output": "o", "length": 1, "finish_reason": "stop"}])
    with pytest.raises(InputError, match=r"1/2 \(unfinished, 1 rows\)"):
        run(join=2)


def damage(name: str, change):
    def do(folder: Path) -> None:
        change(folder / name)

    return do


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


ROWS, META = "1-of-2.jsonl", "1-of-2.meta.json"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage(ROWS, cut), f"damaged, remove .*{ROWS}"),
        (damage(ROWS, flip), f"damaged, remove .*{ROWS}"),
        (damage(ROWS, empty), f"damaged, remove .*{ROWS}"),
        (damage(ROWS, Path.unlink), "missing its file"),
        (damage(META, Path.unlink), f"missing its meta file, remove .*{ROWS}"),
        (damage(META, empty), f"damaged, remove .*{META} and {ROWS}"),
        (damage(META, cut), f"damaged, remove .*{META} and {ROWS}"),
        (damage(META, lambda path: path.write_text("[]")), f"damaged, remove .*{META} and {ROWS}"),
    ],
)
def test_a_damaged_part_is_named_and_made_again(run, out, harm, message):
    whole = run(folder="whole").output.read_bytes()
    for index in range(2):
        run(f"{index}/2")
    harm(out / "m.parts")
    before = helpers.tree(out)
    with pytest.raises(
        InputError, match=rf"1 of 2 parts cannot be joined yet: 1/2 \({message}\); to make one: "
    ) as told:
        run(join=2)
    assert helpers.tree(out) == before
    for name in re.findall(r"1-of-2\.\w+(?:\.json)?", str(told.value)):  # what the message says to remove
        (out / "m.parts" / name).unlink()
    run("1/2")
    assert run(join=2).output.read_bytes() == whole


def test_a_dry_run_says_what_is_there_of_each_part_and_which_ones_to_make(run, plan, out, engine):
    """`parts_to_make` is in the syntax of `sbatch --array`, so that only what failed is submitted again."""

    def told(**others) -> tuple[list[str], str, bool]:
        found = plan(join=4, dry_run=True, **others)
        assert [part["part"] for part in found["parts"]] == ["0/4", "1/4", "2/4", "3/4"]
        return [part["state"] for part in found["parts"]], found["parts_to_make"], found["joined"]

    assert told() == (["not started"] * 4, "0-3", False)
    assert not out.exists()
    run("0/4")
    Engine.dies_after = 1
    with pytest.raises(EnvironmentFailure):
        run("1/4")
    run("3/4")
    flip(out / "m.parts" / "3-of-4.jsonl")
    before = helpers.tree(out)
    damaged = f"damaged, remove {out / 'm.parts' / '3-of-4.jsonl'}"
    assert told() == (["finished", "unfinished, 2 rows", "not started", damaged], "1-3", False)
    with pytest.raises(InputError, match=r"as an array job: --array=1-3 and --part slurm/4$"):
        run(join=4)
    run("2/4")
    assert told()[1] == "1,3"
    assert before.items() <= helpers.tree(out).items()
    with pytest.raises(InputError, match="different seed"):
        told(seed=1)
    with pytest.raises(InputError, match=r"has parts of 4, not of 3: .*--part i/4 \(in an array job slurm/4\)"):
        plan(join=3, dry_run=True)
    (out / "m.parts" / "3-of-4.jsonl").unlink()
    for index in (1, 3):
        run(f"{index}/4")
    assert told() == (["finished"] * 4, "", False)
    run(join=4)
    assert told() == (["nothing left to do"] * 4, "", True)


def test_a_dry_run_asks_nothing_of_a_part_that_another_writes(run, plan, out):
    run("0/2")
    meta = json.loads((out / "m.parts" / "0-of-2.meta.json").read_text())
    with Journal(out / "m.parts" / ".1-of-2.journal.jsonl", {"fingerprint": meta["fingerprint"]}) as journal:
        journal.append([{"id": "1", "sample": 0, "output": "o", "length": 1, "finish_reason": "stop"}])
        before = helpers.tree(out)
        found = plan(join=2, dry_run=True)
        assert [part["state"] for part in found["parts"]] == ["finished", "still running"]
        assert found["parts_to_make"] == "1"
        assert helpers.tree(out) == before


def test_a_larger_limit_asks_only_for_parts_that_get_further_rows(run, plan):
    for index in range(4):
        run(f"{index}/4", limit=4)
    run(join=4, limit=4)
    found = plan(join=4, limit=6, dry_run=True)
    assert (found["parts_to_make"], found["joined"]) == ("0-1", False)
    for index in range(2):
        run(f"{index}/4", limit=6)
    assert plan(join=4, limit=6, dry_run=True)["parts_to_make"] == ""
    assert run(join=4, limit=6).rows == 6


# --- made otherwise ------------------------------------------------------------------------------------------------


def test_parts_of_other_settings_are_refused_naming_the_setting(run, out, prompt_file):  # noqa: F811
    run("0/2", seed=1)
    run("1/2", seed=2)
    with pytest.raises(InputError, match=r"0-of-2.jsonl was made with a different seed \(1 then, 2 now\)"):
        run(join=2, seed=2)
    with pytest.raises(InputError, match=r"0-of-2.jsonl was made with a different seed .*--overwrite replaces it"):
        run("0/2", seed=2)
    run("0/2", seed=2, overwrite=True)
    whole = run(folder="whole", seed=2).output.read_bytes()
    assert run(join=2, seed=2).output.read_bytes() == whole


def test_parts_of_other_prompts_are_refused(run, out, prompt_file):  # noqa: F811
    run("0/2")
    write_rows(prompt_file, [{"prompt": "w1"}, {"prompt": "w2"}])
    run("1/2")
    with pytest.raises(InputError, match=r"0-of-2\.jsonl was made with a different dataset-sha256"):
        run(join=2)


def test_a_run_is_not_cut_otherwise_half_way(run, out):
    run("0/3")
    for other in ({"part": "0/2"}, {"join": 2}, {}, {"data_parallel": 2}):
        with pytest.raises(InputError, match=r"m\.parts has parts of 3.*: continue with --part i/3"):
            run(**other)
    whole = run(folder="whole").output.read_bytes()
    assert run(overwrite=True).output.read_bytes() == whole
    assert run().status == "already complete"


def test_an_output_of_other_settings_is_refused_by_each_part_unless_overwritten(run, out):
    old = run(seed=1).output.read_bytes()
    for way in ({"part": "0/2"}, {"join": 2}):
        with pytest.raises(InputError, match=r"m.jsonl was made with a different seed \(1 then, 2 now\)"):
            run(seed=2, **way)
    for index in range(2):
        run(f"{index}/2", seed=2, overwrite=True)
        assert (out / "m.jsonl").read_bytes() == old
    whole = run(folder="whole", seed=2).output.read_bytes()
    assert run(join=2, seed=2, overwrite=True).output.read_bytes() == whole
    assert names(out) == ["m.jsonl", "m.meta.json"]


def test_overwriting_makes_every_part_anew(run, llama_pair, prompt_file, tmp_path):  # noqa: F811 - the fixture
    run("0/2", seed=1)

    def left(**how):
        job = verb.plan(settings(llama_pair[1], prompt_file, tmp_path / "out", name="m", data_parallel=2, **how))
        return [str(part.part) for part, _ in missing_parts(left_of(job), 2)]

    assert left(seed=1) == left(seed=1, overwrite=True) == ["1/2"]
    with pytest.raises(InputError, match=r"0-of-2.jsonl was made with a different seed"):
        left(seed=2)
    assert left(seed=2, overwrite=True) == ["0/2", "1/2"]


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_part_that_was_stopped_is_continued(run, engine):
    whole = run(folder="whole").output.read_bytes()
    engine.dies_after = 1
    with pytest.raises(EnvironmentFailure):
        run("0/2")
    with pytest.raises(InputError, match=r"0/2 \(unfinished, 2 rows\), 1/2 \(not started\)"):
        run(join=2)
    assert json.loads(run("0/2").meta.read_text())["rows_this_run"] == 4
    run("1/2")
    assert run(join=2).output.read_bytes() == whole


def test_a_larger_limit_extends_parts_before_and_after_they_are_joined(run, engine):
    whole = run(folder="whole").output.read_bytes()
    del engine.generated[:]
    for index in range(2):
        run(f"{index}/2", limit=4)
        run(f"{index}/2", limit=7)
    with pytest.raises(InputError, match=r"0-of-2\.jsonl has 4 rows, made with a larger --limit"):
        run(join=2, limit=4)
    assert run(join=2, limit=7).rows == 7
    with pytest.raises(InputError, match="3 of 3 parts cannot be joined yet"):
        run(join=3)
    for index in range(3):  # another number of parts goes on from the joined output
        run(f"{index}/3")
    assert run(join=3).output.read_bytes() == whole
    assert sorted(engine.generated) == sorted(map(str, range(12)))


def test_a_run_begun_in_one_piece_goes_on_in_parts(run, out, engine):
    whole = run(folder="whole").output.read_bytes()
    engine.dies_after = 2
    with pytest.raises(EnvironmentFailure):
        run()
    del engine.generated[:]
    for index in range(2):
        run(f"{index}/2")
    assert sorted(map(int, engine.generated)) == list(range(4, 12))
    assert run(join=2).output.read_bytes() == whole
    assert names(out) == ["m.jsonl", "m.meta.json"]


def test_failed_rows_stay_marked_and_are_tried_again(run, out, llama_pair, tmp_path):
    task = write_rows(tmp_path / "questions.jsonl", [{"prompt": p} for p in ("w1", " ".join(["w7"] * 200), "w2", "w3")])
    assert [run(f"{index}/2", task=task).failed for index in range(2)] == [0, 1]
    joined = run(join=2, task=task)
    assert (joined.rows, joined.failed) == (4, 1)
    assert joined.output.read_bytes() == run(folder="whole", task=task).output.read_bytes()
    assert json.loads(joined.meta.read_text())["errors"][0]["row"] == 1
    again = run("1/2", task=task)
    assert (again.status, again.rows, again.failed) == ("already complete", 2, 1)
    assert run(join=2, task=task).failed == 1


# --- stopped while joining -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(6))
def test_a_join_that_is_stopped_anywhere_is_joined_by_a_rerun(run, out, monkeypatch, step):
    """Before each file it writes, and before each part it removes."""
    whole = run(folder="whole").output.read_bytes()
    for index in range(3):
        run(f"{index}/3")
    left = iter(range(step))

    def stopping(call):
        def counted(*args, **named):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return call(*args, **named)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", stopping(files.write_atomic))
        patch.setattr(parts, "_remove_part", stopping(parts._remove_part))
        if step < 5:
            with pytest.raises(KeyboardInterrupt):
                run(join=3)
    assert run(join=3).output.read_bytes() == whole
    assert names(out) == ["m.jsonl", "m.meta.json"]


def test_a_part_with_an_answer_the_output_lacks_is_not_removed(run, out, tmp_path):
    for index in range(2):
        run(f"{index}/2", limit=4)
    shutil.copytree(out / "m.parts", tmp_path / "more")
    run(join=2, limit=4)
    for index in range(2):
        run(f"{index}/2", limit=8)
    before = helpers.tree(out)
    assert run(join=2, limit=4).status == "already complete"
    assert helpers.tree(out) == before
