"""The Open LLM Leaderboard by lm-evaluation-harness: command lines, scores, and the whole of it on tiny models."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helpers
import pytest
from hub_server import FakeHub

from evaluations import leaderboard, pairs, results
from evaluations.smoke import leaderboard as smoke, leaderboard_tasks
from evaluations.smoke.setting import CheckFailed
from expo import recipes
from expo.errors import EnvironmentFailure, InputError, MissingExtra

OWN = ("--sft", "s", "--dpo", "org/d@main", "--alpha", "0.3")

# --- command lines ------------------------------------------------------------------------------------------------


def planned(*words: str) -> tuple[leaderboard.Run, leaderboard.Run]:
    given = leaderboard.parser().parse_args(words)
    return leaderboard.runs(pairs.pair_of(given), given, leaderboard.LEADERBOARD)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_a_run_for_dpo_and_one_that_extrapolates_in_the_engine(name: str) -> None:
    known = recipes.load(name)
    dpo, theta = planned(name, "--alpha", "0.3")
    model = leaderboard.pretrained(known.dpo)
    assert dpo.model_args == model
    loader = {"load_format": "expo", "model_loader_extra_config": {"sft": known.sft, "alpha": 0.3}}
    assert theta.model_args == {**model, **loader}
    assert (dpo.name, theta.name) == (name, f"{name}-ExPO-a0.3")


def test_what_is_printed_in_a_dry_run_is_the_harness_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main([*OWN, "--dry-run", "--limit", "4", "--model-args", '{"dtype": "float32"}']) == 0
    out, err = capsys.readouterr()
    assert out == ""
    from lm_eval._cli.harness import HarnessCLI

    dpo, theta = (HarnessCLI()._parser.parse_args(shlex.split(line)[2:]) for line in err.splitlines())
    revisions = {"revision": "main", "tokenizer_revision": "main"}
    assert dpo.model_args == {"pretrained": "org/d", **revisions, "dtype": "float32"}
    assert theta.model_args["model_loader_extra_config"] == {"sft": "s", "alpha": 0.3}
    assert (theta.tasks, theta.limit, theta.log_samples) == (["expo_open_llm_leaderboard"], 4, True)


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert leaderboard.pretrained(str(tmp_path / "a@b")) == {"pretrained": str(tmp_path / "a@b")}


def test_flags_reach_the_engine() -> None:
    dpo, theta = planned(*OWN, "--allow-pickle", "--trust-remote-code")
    assert dpo.model_args["trust_remote_code"] is theta.model_args["trust_remote_code"] is True
    assert theta.model_args["model_loader_extra_config"] == {"sft": "s", "alpha": 0.3, "allow_pickle": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
        ([], "no pair given"),
        (["--sft", "s", "--dpo", "d"], "--alpha is missing"),
        ([*OWN, "--name", "a/b"], "--name is a file's name, not 'a/b'"),
        ([*OWN, "--model-args", "dtype=auto"], "--model-args is no JSON"),
        ([*OWN, "--model-args", "[1]"], "--model-args must be a JSON object"),
        ([*OWN, "--model-args", '{"pretrained": "x"}'], "--model-args cannot set pretrained: the pair does"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        leaderboard.main([*words, "--dry-run"])


@pytest.mark.parametrize(("module", "extra"), [("lm_eval", "eval"), ("vllm", "vllm")])
def test_what_is_missing_is_named_with_what_installs_it(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"lm_eval", "vllm"} - {module}
    monkeypatch.setattr(leaderboard.importlib.util, "find_spec", lambda name: object() if name in found else None)
    with pytest.raises(MissingExtra, match=rf"^{module} is not installed: pip install 'llm-expo\[{extra}\]'$"):
        leaderboard.main([*OWN])


# --- tasks and scores ---------------------------------------------------------------------------------------------


def test_the_harness_reads_the_leaderboards_group_as_the_paper_ran_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager, _factory
    from lm_eval.tasks._index import TaskIndex

    class Named:
        """A task of which only the settings are read: its data are elsewhere."""

        def __init__(self, config: Mapping[str, Any]) -> None:
            self.settings, self.task_name = config, config["task"]

    monkeypatch.setattr(_factory, "ConfigurableTask", Named)
    tasks = Path(_factory.__file__).parent
    folders = [tasks / one for one in ("arc", "hellaswag", "truthfulqa", "mmlu/default", "winogrande", "gsm8k")]
    index = TaskIndex().build([*folders, leaderboard.LEADERBOARD.folder])
    monkeypatch.setattr(TaskIndex, "build", lambda *_, **__: index)  # 14,000 others take many seconds
    group = leaderboard.LEADERBOARD.group
    found = TaskManager().load([group])
    shots = dict(_shots(found["groups"][group], found["groups"]))
    subjects = {name for name in shots if name.startswith("mmlu_")}
    assert len(subjects) == 57
    assert {shots.pop(name) for name in subjects} == {5}
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5
    }  # fmt: skip


def _shots(group: Any, groups: Mapping[str, Any]) -> Any:
    for child in group:
        if hasattr(child, "settings"):
            yield child.task_name, child.settings["num_fewshot"]
        else:
            yield from _shots(child, groups)


def report(**changed: float | None) -> dict[str, Any]:
    """What lm-evaluation-harness writes, as far as it is read: mmlu of two subjects, one three times as large."""
    values = {"arc_challenge": 0.5, "hellaswag": 0.75, "truthfulqa_mc2": 0.25, "winogrande": 0.5, "gsm8k": 0.125}
    found = {task: {leaderboard.METRICS[task]: value, "acc,none": 0.0} for task, value in values.items()}
    found["truthfulqa_mc2"] = found["winogrande"] = {"acc,none": 0.5}
    found["gsm8k"]["exact_match,flexible-extract"] = 0.25
    subjects = {"mmlu_small": {"acc,none": 0.2}, "mmlu_large": {"acc,none": 0.6}, "mmlu": {"acc,none": 0.5}}
    results_of = {**found, **subjects}
    for task, value in changed.items():
        results_of[task] = {} if value is None else {leaderboard.METRICS.get(task, "acc,none"): value}
    subtasks = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_small", "mmlu_large"]}
    rows = {task: {"original": 9, "effective": 4} for task in ["mmlu_small", "mmlu_large", *values]}
    return {"results": results_of, "group_subtasks": subtasks, "n-samples": rows}


def test_mmlu_is_the_plain_mean_over_subjects_and_the_six_count_alike() -> None:
    found = leaderboard.scores(report(), leaderboard.LEADERBOARD)
    assert found["mmlu"] == pytest.approx(40)
    assert found["mmlu_by_question"] == pytest.approx(50)
    assert (found["gsm8k"], found["gsm8k_flexible"]) == (12.5, 25)
    assert found["mean"] == pytest.approx((50 + 75 + 50 + 40 + 50 + 12.5) / 6)


@pytest.mark.parametrize("task", ["hellaswag", "mmlu_small"])
def test_a_task_without_a_score_gives_no_mean(task: str) -> None:
    with pytest.raises(EnvironmentFailure, match="lm_eval reports no acc"):
        leaderboard.scores(report(**{task: None}), leaderboard.LEADERBOARD)


# --- rerunning ----------------------------------------------------------------------------------------------------


class Harness:
    """Writes a report where lm-evaluation-harness does, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Sequence[str]] = []
        self.report: dict[str, Any] | None = report()
        self.commits = {"s": "1" * 40, "org/d": "2" * 40}
        self.while_running: Callable[[], None] = lambda: None
        monkeypatch.setattr(pairs, "run", self)
        monkeypatch.setattr(leaderboard, "fetch_file", self.fetch)

    def fetch(self, repository: str, file: str, revision: str | None, *, kind: str) -> Path:
        """Where the hub's cache has a file of the main branch."""
        assert (revision, kind) in [("main", "model"), (None, "model")]
        return Path("snapshots", self.commits.get(repository, "0" * 40), file)

    def asked_for(self, run: int) -> dict[str, Any]:
        """The model of one run."""
        command = self.asked[run]
        return dict(json.loads(command[command.index("--model_args") + 1]))

    def cache(self, run: int) -> Path:
        """The file of answers of one run."""
        command = self.asked[run]
        return Path(command[command.index("--use_cache") + 1] + "_rank0.db")

    def __call__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self.asked.append(command)
        self.cache(-1).write_text("answers")
        self.while_running()
        folder = Path(command[command.index("--output_path") + 1]) / "model"
        folder.mkdir(parents=True, exist_ok=True)
        if self.report is not None:
            (folder / f"results_2026-01-0{len(self.asked)}.json").write_text(json.dumps(self.report))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setattr(leaderboard, "require_tools", lambda: None)
    if find_spec("vllm") is None:
        monkeypatch.setattr(leaderboard, "vllm_distribution", lambda: "torch")  # whose version stands in for it
    return Harness(monkeypatch)


def test_a_finished_run_is_left_alone_and_another_alpha_or_limit_is_not(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*OWN, "--output-dir", str(tmp_path)]
    assert leaderboard.main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["results"]
    assert [one["name"] for one in first] == ["d", "d-ExPO-a0.3"]
    assert {one["rows"] for one in first} == {28}
    assert leaderboard.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"] == first
    assert err.count(": already complete: ") == 2
    assert len(harness.asked) == 2
    assert leaderboard.main([*words, "--alpha", "0.5"]) == 0
    assert len(harness.asked) == 3  # DPO's holds
    assert leaderboard.main([*words, "--limit", "3"]) == 0
    assert len(harness.asked) == 5
    assert capsys.readouterr().err.count("made from something else: it is made again") == 2


def test_the_papers_mean_stands_below_that_of_a_recipe(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leaderboard.main(["tulu-2-dpo-7b", "--output-dir", str(tmp_path)]) == 0
    lines = {line[:16]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["published, DPO  "][-1] == "57.90"
    assert lines["published, ExPO "][-1] == "58.71"
    assert lines["tulu-2-dpo-7b-Ex"][-2:] == [lines["tulu-2-dpo-7b   "][-2], "28"]


def test_a_hub_model_is_evaluated_at_its_commit_and_again_when_that_moves(harness: Harness, tmp_path: Path) -> None:
    words = [*OWN, "--output-dir", str(tmp_path)]
    leaderboard.main(words)
    revisions = {"revision": "2" * 40, "tokenizer_revision": "2" * 40}
    assert harness.asked_for(0) == {"pretrained": "org/d", **revisions}
    theta = harness.asked_for(1)
    assert theta["model_loader_extra_config"]["sft"] == "s@" + "1" * 40
    record = results.read(tmp_path / leaderboard.FOLDER / "d-ExPO-a0.3.json")
    assert record is not None
    assert record.made_from["model_args"] == theta
    vllm = leaderboard.vllm_distribution()
    assert record.made_from[vllm] == record.versions[vllm]
    harness.commits["s"] = "3" * 40
    leaderboard.main(words)
    assert len(harness.asked) == 3  # DPO's holds
    harness.commits["org/d"] = "4" * 40
    leaderboard.main(words)
    assert len(harness.asked) == 5


def test_another_vllm_is_another_run(harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*OWN, "--output-dir", str(tmp_path)]
    leaderboard.main(words)
    known = results.versions_of
    monkeypatch.setattr(results, "versions_of", lambda *names: dict.fromkeys(known(*names), "999"))
    leaderboard.main(words)
    assert len(harness.asked) == 4


def test_a_dry_run_asks_the_hub_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(leaderboard, "fetch_file")
    assert leaderboard.main([*OWN, "--dry-run"]) == 0


def test_a_model_that_cannot_be_found_is_named_before_anything_runs(harness: Harness, tmp_path: Path) -> None:
    words = ["--sft", str(tmp_path / "gone"), "--dpo", "org/d", "--alpha", "1", "--output-dir", str(tmp_path)]
    with pytest.raises(InputError, match="gone is neither a directory nor a hub id"):
        leaderboard.main(words)
    assert harness.asked == []


COMMITS = """
import sys
from evaluations import leaderboard, pairs
from huggingface_hub import constants
for constants.HF_HUB_OFFLINE in (False, True):
    found = leaderboard.at_commits(pairs.Pair("d", "org/s@v1", "org/d", 1.0))
    print(found.sft, found.dpo)
"""


def test_commits_are_the_hubs_or_the_caches_and_no_weights_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    sft, dpo = hub.add("org/s", files), hub.add("org/d", files)
    tagged = sft.commit({**files, "README.md": b"x"}, branch="v1")
    done = helpers.run_python(COMMITS, env=hub.environment(tmp_path / "home"))
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines() == [f"org/s@{tagged} org/d@{dpo.refs['main']}"] * 2
    assert hub.fetched() == {"org/s/config.json", "org/d/config.json"}


def test_a_second_run_is_refused_while_the_first_works(harness: Harness, tmp_path: Path) -> None:
    words = [*OWN, "--output-dir", str(tmp_path)]
    seen: list[str] = []

    def second() -> None:
        harness.while_running = lambda: None
        with pytest.raises(InputError, match="another run is at work") as refusal:
            leaderboard.main(words)
        seen.append(str(refusal.value))

    harness.while_running = second
    assert leaderboard.main(words) == 0
    assert len(seen) == 1
    assert len(harness.asked) == 2


def test_answers_of_a_run_that_failed_are_kept_for_the_same_run_alone(harness: Harness, tmp_path: Path) -> None:
    words = [*OWN, "--output-dir", str(tmp_path)]
    harness.report = None
    for more in ([], [], ["--limit", "3"]):
        with pytest.raises(EnvironmentFailure, match="wrote no results"):
            leaderboard.main([*words, *more])
    first, second, limited = map(harness.cache, range(3))
    assert first == second != limited
    assert first.read_text() == "answers"
    harness.report = report()
    leaderboard.main(words)
    assert harness.cache(3) == first
    assert harness.cache(4).name != first.name  # that of θ(α)
    assert [limited] == list((tmp_path / leaderboard.FOLDER).rglob("*.db"))  # nothing needs the others any more


def touch_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def test_a_model_that_was_trained_again_is_evaluated_again(
    harness: Harness, pair: helpers.Pair, tmp_path: Path
) -> None:
    sft, dpo = pair
    words = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", "1", "--output-dir", str(tmp_path / "out")]
    for _ in range(2):
        assert leaderboard.main(words) == 0
    assert len(harness.asked) == 2
    touch_weights(sft)
    assert leaderboard.main(words) == 0
    assert len(harness.asked) == 3  # DPO's holds
    touch_weights(dpo)
    assert leaderboard.main(words) == 0
    assert len(harness.asked) == 5


def test_a_run_that_wrote_nothing_is_no_result_even_where_an_earlier_one_lies(harness: Harness, tmp_path: Path) -> None:
    words = [*OWN, "--output-dir", str(tmp_path)]
    leaderboard.main(words)
    harness.report = None
    with pytest.raises(EnvironmentFailure, match=r"lm_eval wrote no results to .*d-ExPO-a0\.5: see what it printed"):
        leaderboard.main([*words, "--alpha", "0.5"])
    assert not (tmp_path / leaderboard.FOLDER / "d-ExPO-a0.5.json").exists()


# --- the whole way ------------------------------------------------------------------------------------------------

WARM = """
import os, sys
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
from lm_eval.tasks import TaskManager
whole = TaskManager.__init__
TaskManager.__init__ = lambda self, *args, **more: whole(self, *args, **{**more, "include_defaults": False})
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
"""lm-evaluation-harness in a process that has imported vLLM, without reading its own 14,000 tasks: half of the time."""


@pytest.fixture
def smoke_folder(run_warm: helpers.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "warm_lm_eval.py"
    script.write_text(WARM)

    def run(command: Sequence[str], *, env: Mapping[str, str]) -> None:
        done = run_warm(script, *command[1:], env={**env, "HF_HUB_OFFLINE": "1"})
        if done.code:
            raise EnvironmentFailure(done.stderr[-5000:])

    monkeypatch.setattr(pairs, "run", run)
    return tmp_path


@pytest.mark.full  # its parts are above; `tools/full_check.sh` runs the smoke of each evaluation
@pytest.mark.vllm
@pytest.mark.slow
def test_the_smoke_run_finds_what_it_checks_and_its_checks_can_fail(
    smoke_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke.run(smoke_folder) == 0
    out, err = capsys.readouterr()
    assert "tiny-dpo-ExPO-a2.0" in out
    assert err.count("checked: ") == 8
    folder = smoke_folder / "smoke_open_llm_leaderboard"
    name = "tiny-dpo-ExPO-a2.0"
    found = {one: results.read(folder / leaderboard.FOLDER / f"{one}.json") for one in ("tiny-dpo", name, "written")}
    samples = {one: smoke.read_samples(folder / leaderboard.FOLDER / one) for one in found}
    suite = leaderboard.Suite(
        folder / "tasks", leaderboard_tasks.GROUP, {key: f"made_{key}" for key in leaderboard.METRICS}
    )
    given = (suite, folder / "written", ("tiny-dpo", name))
    with pytest.raises(CheckFailed, match="loader equals its written checkpoint"):  # a loader that gives DPO
        smoke.check_all({**samples, name: samples["tiny-dpo"]}, found, *given)
    with pytest.raises(CheckFailed, match="answers otherwise than DPO"):
        smoke.check_all({**samples, "tiny-dpo": samples[name]}, found, *given)
    with pytest.raises(CheckFailed, match="log-likelihoods are transformers'"):
        smoke.check_all(samples, found, suite, trained / "tiny-dpo", ("tiny-dpo", name))
    with pytest.raises(CheckFailed, match="counted again from the samples"):
        smoke.check_all(samples, {**found, "tiny-dpo": found[name]}, *given)
