"""score with several reward models in one run: whose files are whose, and that each scores as in a run of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import killed_when
from helpers import tree
from safetensors.torch import load_file, save_file
from test_score import ROWS, edited, make_reward_model, numbers, rewards_alone, settings, write_outputs

from expo.cli import program as cli
from expo.config import ScoreConfig
from expo.engines import transformers_reward as backend
from expo.errors import EnvironmentFailure, InputError
from expo.rows import EngineKeeper
from expo.verbs import score as verb
from expo.verbs.score import scorers

THREE = ["m.jsonl", "m.meta.json", "m.rows.jsonl"]
SIX = sorted([*THREE, *(name.replace("m.", "m@other.", 1) for name in THREE)])


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return write_outputs(tmp_path)


@pytest.fixture(scope="session")
def first(llama_pair, tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("rm") / "rm", llama_pair[1], labels=1, pad_id=2)


@pytest.fixture(scope="session")
def second(llama_pair, tmp_path_factory) -> Path:
    """A reward model with another head."""
    folder = tmp_path_factory.mktemp("rm") / "other"
    model = make_reward_model(folder, llama_pair[1], labels=1, pad_id=2)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"] = torch.flip(tensors["score.weight"], (1,)).contiguous()
    save_file(tensors, file, {"format": "pt"})
    return model


def both(first: Path, second: Path, folder: Path, **others) -> ScoreConfig:
    return several(folder, first, second, **others)


def several(folder: Path, *models: Path | str, **others) -> ScoreConfig:
    return replace(settings(models[0], folder, **others), reward_model=tuple(map(str, models)))


def without_times(folder: Path, stem: str) -> dict[str, object]:
    """A reward model's files of a folder, but for times, under the names of an only one."""
    meta = json.loads((folder / f"{stem}.meta.json").read_text())
    clock = ("engine_start_seconds", "score_seconds", "tokens_per_second")
    rows = [(folder / f"{stem}{suffix}").read_bytes() for suffix in (".jsonl", ".rows.jsonl")]
    return {"meta": {key: value for key, value in meta.items() if key not in clock}, "rows": rows}


def test_each_reward_model_scores_as_in_a_run_of_its_own(first, second, outputs, tmp_path, monkeypatch):
    """In files of its own, the first engine closed before the second is opened."""
    events = []
    for name in ("__init__", "close"):
        original = getattr(backend.TransformersScorer, name)

        def noted(self, *args, name=name, original=original):
            events.append(name)
            return original(self, *args)

        monkeypatch.setattr(backend.TransformersScorer, name, noted)
    result = verb.run(both(first, second, tmp_path))
    assert events == ["__init__", "close"] * 2
    (further,) = result.further
    folder = tmp_path / "rewards_q"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*THREE, *(n.replace("m.", "m@other.") for n in THREE)]
    )
    assert (result.rewards, further.rewards) == (folder / "m.jsonl", folder / "m@other.jsonl")
    assert numbers(result.rewards) == pytest.approx(rewards_alone(first, ROWS), abs=2e-6)
    assert numbers(further.rewards) == pytest.approx(rewards_alone(second, ROWS), abs=2e-6)
    for model, stem in ((first, "m"), (second, "m@other")):
        write_outputs(tmp_path / model.name)
        verb.run(settings(model, tmp_path / model.name))
        alone, beside = without_times(tmp_path / model.name / "rewards_q", "m"), without_times(folder, stem)
        assert beside["meta"]["fingerprint"].pop("output", None) == (None if stem == "m" else "m")
        assert beside == alone
        assert (beside["meta"]["name"], beside["meta"]["reward_model"]) == ("m", model.name)


def test_what_one_has_scored_is_not_scored_again(first, second, outputs, tmp_path, monkeypatch):
    verb.run(settings(first, tmp_path))
    before, opened = tree(tmp_path / "rewards_q"), []
    original = backend.TransformersScorer.__init__

    def noted(self, setup):
        opened.append(setup.model)
        original(self, setup)

    monkeypatch.setattr(backend.TransformersScorer, "__init__", noted)
    result = verb.run(both(first, second, tmp_path))
    assert [result.status, result.further[0].status] == ["already complete", "written"]
    assert opened == [second]
    now = tree(tmp_path / "rewards_q")
    assert {name: content for name, content in now.items() if name in before} == before
    again = verb.run(both(first, second, tmp_path))
    assert [again.status, again.further[0].status] == ["already complete"] * 2
    assert tree(tmp_path / "rewards_q") == now
    assert opened == [second]


def test_what_was_finished_before_a_fault_stays_and_a_rerun_goes_on(first, second, outputs, tmp_path):
    broken = shutil.copytree(second, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    whole = verb.run(both(first, broken, tmp_path)).further[0]
    expected = whole.rewards.read_bytes()
    for file in (tmp_path / "rewards_q").iterdir():
        file.unlink()
    with pytest.MonkeyPatch.context() as patched:
        original = backend.TransformersScorer.score

        def dying(self, rows):
            if self._name == "broken":
                raise EnvironmentFailure("the engine died")
            return original(self, rows)

        patched.setattr(backend.TransformersScorer, "score", dying)
        with pytest.raises(EnvironmentFailure, match="the engine died"):
            verb.run(both(first, broken, tmp_path))
    assert sorted(file.name for file in (tmp_path / "rewards_q").iterdir()) == THREE
    assert (broken / "model.safetensors").read_bytes() == weights
    done = verb.run(both(first, broken, tmp_path))
    assert [done.status, done.further[0].status] == ["already complete", "written"]
    assert done.further[0].rewards.read_bytes() == expected


def test_a_second_that_is_no_reward_model_is_refused_at_once(first, llama_pair, outputs, tmp_path):
    with pytest.raises(InputError, match="dpo is a LlamaForCausalLM, not a reward model"):
        verb.run(both(first, llama_pair[1], tmp_path))
    assert not (tmp_path / "rewards_q").exists()


@pytest.mark.parametrize("count", [2, 5])
def test_parts_of_several_are_joined_for_each(first, second, outputs, tmp_path, count):
    whole = tmp_path / "whole"
    write_outputs(whole)
    verb.run(both(first, second, whole, batch_tokens=1))
    for index in reversed(range(count)):
        made = verb.run(both(first, second, tmp_path, part=f"{index}/{count}", batch_tokens=1))
        folders = [one.rewards.parent.name for one in (made, *made.further)]
        assert folders == ["m.parts", "m@other.parts"]
        if index:
            with pytest.raises(InputError, match=r"--reward-model \S+/rm --reward-model \S+/other"):
                verb.run(both(first, second, tmp_path, join=count, batch_tokens=1))
    verb.run(both(first, second, tmp_path, join=count, batch_tokens=1))
    for name, content in tree(whole / "rewards_q").items():
        if not name.endswith(".meta.json"):
            assert (tmp_path / "rewards_q" / name).read_bytes() == content
    assert tree(whole / "rewards_q").keys() == tree(tmp_path / "rewards_q").keys()


@pytest.mark.usefixtures("forked_workers")
def test_processes_are_told_which_one_they_score_with(first, llama_pair, outputs, tmp_path):
    """A reward model, and the implicit reward after it; of which two processes each make half the rows."""
    pair = {"implicit_reward": True, "sft": str(llama_pair[0]), "dpo": str(llama_pair[1]), "batch_tokens": 1}
    one = verb.run(settings(first, tmp_path / "one", outputs=str(outputs), **pair))
    done = verb.run(settings(first, tmp_path, data_parallel=2, **pair))
    assert [done.status, done.further[0].status] == ["written"] * 2
    for ours, theirs in zip((done, *done.further), (one, *one.further), strict=True):
        assert ours.rewards.name == theirs.rewards.name
        assert ours.rewards.read_bytes() == theirs.rewards.read_bytes()
    assert tree(tmp_path / "rewards_q").keys() == tree(tmp_path / "one" / "rewards_q").keys()


# --- the command line ---------------------------------------------------------------------------------------------


def command(folder: Path, *words: object) -> list[str]:
    options = ["--output-dir", folder, "--dtype", "float32", "--device", "cpu"]
    return ["score", "q.jsonl", "--name", "m", *map(str, options), *map(str, words)]


def test_json_is_the_firsts_object_with_the_others_under_further(first, second, outputs, tmp_path, capsys):
    assert cli.run(command(tmp_path, "--reward-model", first, "--json")) == 0
    alone = json.loads(capsys.readouterr().out)
    keys = ["rewards", "meta", "status", "n", "mean", "standard_error", "failed", "reason", "can_retry"]
    assert list(alone) == keys
    assert cli.run(command(tmp_path, "--reward-model", first, "--reward-model", second, "--json")) == 0
    several = json.loads(capsys.readouterr().out)
    (further,) = several.pop("further")
    assert several == alone | {"status": "already complete"}
    assert list(further) == keys
    assert further["rewards"] == str(tmp_path / "rewards_q" / "m@other.jsonl")
    assert cli.run(command(tmp_path, "--reward-model", first, "--reward-model", second)) == 0
    assert capsys.readouterr().out.split() == [alone["rewards"], further["rewards"]]


@pytest.mark.parametrize("of", ["rm", "other"])
def test_a_row_that_one_of_them_cannot_score_is_exit_code_3(first, second, outputs, tmp_path, monkeypatch, of):
    original = backend.TransformersScorer._logits

    def nan(self, rows):
        lost = torch.tensor([[self._name == of and len(row) == 6] for row in rows])
        return original(self, rows).masked_fill(lost, float("nan"))

    monkeypatch.setattr(backend.TransformersScorer, "_logits", nan)
    assert cli.run(command(tmp_path, "--reward-model", first, "--reward-model", second)) == 3
    nulls = [(tmp_path / "rewards_q" / name).read_text().count("null") for name in ("m.jsonl", "m@other.jsonl")]
    assert [count > 0 for count in nulls] == [of == "rm", of == "other"]


def test_a_dry_run_shows_all_and_writes_nothing(first, second, outputs, tmp_path, capsys):
    words = command(tmp_path, "--reward-model", first, "--reward-model", second, "--dry-run")
    before = tree(tmp_path)
    assert cli.run([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [Path(one["reward_model"]).name for one in (shown, *shown["further"])] == ["rm", "other"]
    assert [Path(one["rewards"]).name for one in (shown, *shown["further"])] == ["m.jsonl", "m@other.jsonl"]
    assert cli.run(words) == 0
    assert str(second) in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_a_part_is_to_be_made_if_one_of_them_lacks_it(first, second, outputs, tmp_path):
    for index in range(3):
        verb.run(settings(first, tmp_path, part=f"{index}/3"))
    verb.run(both(first, second, tmp_path, part="1/3"))

    def told() -> tuple[list[str], str, bool]:
        found = verb.plan(both(first, second, tmp_path, join=3, dry_run=True)).describe()
        assert [part["part"] for part in found["parts"]] == ["0/3", "1/3", "2/3"]
        assert found["further"][0]["parts_to_make"] == found["parts_to_make"]
        return [part["state"] for part in found["parts"]], found["parts_to_make"], found["joined"]

    other = "m: finished; m@other: not started"
    assert told() == ([other, "finished", other], "0,2", False)
    verb.run(settings(first, tmp_path, join=3))
    for index in (0, 2):
        verb.run(both(first, second, tmp_path, part=f"{index}/3"))
    assert told() == (["m: nothing left to do; m@other: finished"] * 3, "", False)
    verb.run(both(first, second, tmp_path, join=3))
    assert told() == (["nothing left to do"] * 3, "", True)


@pytest.mark.parametrize("several", [False, True])
def test_a_config_file_names_one_or_several(first, second, outputs, tmp_path, capsys, several):
    value = json.dumps([str(first), str(second)] if several else str(first))
    (tmp_path / "c.toml").write_text(f'[common]\nsft = "a"\ndpo = "b"\n[score]\nreward-model = {value}\n')
    assert cli.run(command(tmp_path, "--config", tmp_path / "c.toml", "--json")) == 0
    assert len(json.loads(capsys.readouterr().out).get("further", [])) == several


# --- names ----------------------------------------------------------------------------------------------------------

NAMED = {
    "one": (["org/a"], ["m"]),
    "two": (["org/a", "org/b"], ["m", "m@b"]),
    "a revision is no part of the name": (["org/a", "org/b@v1"], ["m", "m@b"]),
    "two of one short name": (["org/a", "one/b", "two/b"], ["m", "m@one--b", "m@two--b"]),
    "the first's short name": (["org/b", "two/b"], ["m", "m@two--b"]),
    "other cases, which some disks hold for one": (["org/a", "one/b", "two/B"], ["m", "m@one--b", "m@two--B"]),
    "two revisions": (["org/a", "org/b@v1", "org/b@refs/pr/1"], ["m", "m@b@v1", "m@b@refs--pr--1"]),
    "two revisions, one of them unsaid": (["org/a", "org/b", "org/b@v1"], ["m", "m@b@main", "m@b@v1"]),
    "two revisions, and another's": (["org/b@v1", "org/b@v2", "two/b@v2"], ["m", "m@org--b@v2", "m@two--b"]),
}  # fmt: skip


@pytest.mark.parametrize(("models", "names"), NAMED.values(), ids=NAMED)
def test_what_files_are_called(models, names):
    assert scorers.file_names("m", [scorers.called(model) for model in models]) == names


def test_folders_of_one_name_are_called_by_those_above_them(tmp_path):
    folders = [tmp_path / name for name in ("x", "one/s/rm", "two/s/rm", "three/implicit")]
    for folder in folders:
        folder.mkdir(parents=True)
    called = [*(scorers.called(str(folder)) for folder in folders), scorers.Called((scorers.IMPLICIT,))]
    assert scorers.file_names("m", called)[1:3] == ["m@one--s--rm", "m@two--s--rm"]
    assert scorers.file_names("m", called)[3:] == ["m@three--implicit", "m@implicit"]


def test_a_further_one_keeps_its_files_whatever_is_beside_it(first, second, outputs, tmp_path):
    third = shutil.copytree(second, tmp_path / "else" / "other")
    verb.run(both(first, second, tmp_path))
    with pytest.raises(InputError, match=r"/other and .*/else/other are the same model: give it once"):
        verb.run(several(tmp_path, first, second, third))
    os.utime(third / "model.safetensors")
    done = verb.run(several(tmp_path, first, second, third))
    assert [one.rewards.name for one in done.further] == ["m@other.jsonl", "m@else--other.jsonl"]
    assert [one.status for one in (done, *done.further)] == ["already complete", "already complete", "written"]


TWICE = {
    "one text": (lambda rm: (str(rm), str(rm)), "--reward-model .*rm is given twice"),
    "two texts": (lambda rm: (str(rm), f"{rm}/"), "two reward models are called .*/rm: give each one once"),
    "a link": (lambda rm: (str(rm), str(rm.parent / "link")), "two reward models are called .*/rm: give each one once"),
}


@pytest.mark.parametrize(("models", "message"), TWICE.values(), ids=TWICE)
def test_a_reward_model_that_is_given_twice_is_refused(first, outputs, tmp_path, models, message):
    model = shutil.copytree(first, tmp_path / "models" / "rm")
    (tmp_path / "models" / "link").symlink_to(model)
    with pytest.raises(InputError, match=message):
        verb.run(several(tmp_path, *models(model)))


def test_a_name_with_the_mark_and_the_files_of_a_further_one_are_kept_apart(first, second, outputs, tmp_path):
    other = [("w1 w2", "w3"), ("w4", "w5")]
    lines = [{"prompt": p, "output": o, "length": 3, "finish_reason": "stop"} for p, o in other]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    verb.run(both(first, second, tmp_path))
    before = tree(tmp_path / "rewards_q")
    outputs.with_name("m@other.jsonl").write_text(text)
    for more in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"m@other.jsonl has the rewards of m, not of m@other: move them away"):
            verb.run(settings(first, tmp_path, name="m@other", **more))
        with pytest.raises(InputError, match=r"is where the rewards of the output m@other belong, not those of m by a"):
            verb.run(both(first, second, tmp_path, **more))
    assert tree(tmp_path / "rewards_q") == before
    shutil.rmtree(tmp_path / "rewards_q")
    assert verb.run(settings(first, tmp_path, name="m@other")).n == 2
    outputs.with_name("m@other.jsonl").unlink()
    with pytest.raises(InputError, match=r"m@other.jsonl has the rewards of an output m@other, not of m: move"):
        verb.run(both(first, second, tmp_path, overwrite=True))


def test_a_name_that_is_too_long_with_the_reward_models_is_refused(first, second, tmp_path):
    write_outputs(tmp_path)
    (tmp_path / "outputs_q" / "m.jsonl").rename(tmp_path / "outputs_q" / f"{'m' * 199}.jsonl")
    with pytest.raises(InputError, match="has 205 bytes; the limit is 200"):
        verb.run(both(first, second, tmp_path, name="m" * 199))


def test_a_run_killed_in_the_second_goes_on_there(trained, alpaca_data, tmp_path):
    """By SIGKILL, while the second one's journal grows."""
    other = edited(trained / "tiny-rm", tmp_path / "tiny-other", initializer_range=0.5)
    file = alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"
    words = [
        "score",
        "alpaca",
        "--name",
        "m",
        "--batch-tokens",
        120,
        "--dtype",
        "float32",
        "--limit",
        200,
        "--outputs",
        file,
    ]
    words += ["--outputs", file, "--reward-model", trained / "tiny-rm", "--reward-model", other, "--device", "cpu"]
    assert cli.run([*map(str, words), "--output-dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "killed" / "rewards_alpaca"
    words += ["--output-dir", folder.parent]
    journal = folder / ".m@tiny-other.journal.jsonl"
    command = list(map(str, words))
    code = killed_when(lambda: journal.exists() and journal.stat().st_size > 1000, lambda: cli.run(command))
    assert code == -signal.SIGKILL, "it ended before it could be killed"
    done = len(journal.read_text().splitlines()) - 1
    assert 0 < done < 200
    assert cli.run(command) == 0
    for name, content in tree(tmp_path / "whole").items():
        if not name.endswith(".meta.json"):
            assert (tmp_path / "killed" / name).read_bytes() == content
    meta = json.loads((folder / "m@tiny-other.meta.json").read_text())
    assert meta["rows_this_run"] <= 200 - done + 1


def test_an_engine_stays_for_all_rows_that_it_had_room_for(first, second, outputs):
    """Also after shorter ones, and only with the same engine."""
    short, long = (verb.plan(settings(first, outputs.parents[1])).with_room(room, None) for room in (24, 40))
    other = verb.plan(settings(second, outputs.parents[1]))
    with closing(EngineKeeper()) as keeper:
        opened = keeper.engine_for(long)
        assert keeper.engine_for(short) is opened
        assert keeper.engine_for(long) is opened
        assert keeper.engine_for(other) is not opened
        opened = keeper.engine_for(long)
        assert keeper.engine_for(replace(long, engine="another")) is not opened
