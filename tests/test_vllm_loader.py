"""θ(α) in vLLM without a checkpoint of it: the same tokens as from one, at any α of a live engine.

That vLLM's own server answers so, too, is in `test_engines.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import helpers
import pytest

from expo import extrapolate
from expo.config import ThetaConfig
from expo.config_files import LOADER_KEYS, theta_from
from expo.engines import vllm
from expo.errors import EnvironmentFailure, InputError

# --- the loader's keys --------------------------------------------------------------------------------------------


def test_the_model_is_dpo_unless_the_keys_say_another() -> None:
    assert theta_from({"sft": "s", "alpha": 1}, "model@r") == ThetaConfig(sft="s", dpo="model@r", alpha=1.0)
    rules = {"alpha_for": ["a=1"], "exclude": ["b"], "missing": "copy-dpo", "vocab": "common"}
    flags = {"allow_pickle": True, "allow_nonfinite": True}
    made = theta_from({"sft": "s", "checkpoint": ["1=a", "2=b"], "target_step": 5, "rule": "linear"}, "model")
    assert made == ThetaConfig(sft="s", checkpoint=("1=a", "2=b"), alpha=1.5, rule="linear")
    assert made.dpo == "b"
    made = theta_from({"sft": "s", "dpo": "d", "alpha": 0.5, **rules, **flags}, "model")
    tuples = {"alpha_for": ("a=1",), "exclude": ("b",), "missing": "copy-dpo", "vocab": "common"}
    assert made == ThetaConfig(sft="s", dpo="d", alpha=0.5, **tuples, **flags)


def test_every_setting_of_a_theta_is_a_key() -> None:
    assert LOADER_KEYS.keys() == ThetaConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sfft": "s"}, "the load format expo takes sft, alpha, dpo, .*alpha_for, exclude, .*, not sfft"),
        ({"alpha": None}, "alpha of the load format expo cannot be None"),
        ({"alpha": True}, "alpha of the load format expo cannot be True"),
        ({"alpha": "0.3"}, "alpha of the load format expo cannot be '0.3'"),
        ({"exclude": "norm"}, "exclude of the load format expo cannot be 'norm'"),
        ({"exclude": [1]}, r"exclude of the load format expo cannot be \[1\]"),
        ({"allow_pickle": 1}, "allow_pickle of the load format expo cannot be 1"),
        ({"missing": "drop"}, "--missing must be one of error, copy-dpo, not 'drop'"),
        ({"alpha": float("nan")}, "--alpha must be a finite number"),
        ({"target_step": 5}, "--target-step needs the training run's checkpoints"),
        ({"target_step": 5, "checkpoint": ["1=a"]}, "--alpha and --target-step cannot be combined"),
    ],
)
def test_keys_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        theta_from({"sft": "s", "alpha": 0.3, **changed}, "model")


def test_what_must_be_given_is_named() -> None:
    with pytest.raises(InputError, match="and sft and alpha must be given"):
        theta_from({}, "model")


# --- one process --------------------------------------------------------------------------------------------------

OFFLINE = """
import gc, json, sys
from expo.config import GenerateConfig
from expo.verbs.generate import plan

def planned(**settings):
    decoding = {"temperature": 0.0, "max_tokens": 8, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return plan(GenerateConfig(engine="vllm", **{**given["settings"], **decoding, **settings}))

def start(**settings):
    work = planned(**settings)
    return work, work.open_engine()

def ask(work, engine):
    found = {one.request.id: list(one.token_ids) for rows in engine.generate(work.requests, set()) for one in rows}
    prompts = [list(one.prompt_ids) for one in work.requests]
    return {"prompts": prompts, "answers": [found[key] for key in sorted(found)]}

def switch(engine, **theta):
    engine.load(planned(**theta).setup)

def main():
    work, engine = start(**pair, alpha=0.5)
    found = {"theta auto": ask(work, engine)}
    for name, alpha in ("switched", 1.5), ("back", 0.5):
        switch(engine, **pair, alpha=alpha)
        found[name] = ask(work, engine)
    switch(engine, **course)
    found["course"] = ask(work, engine)
    del work, engine
    for name, model in ("fresh", "1.5"), ("fresh course", "step"):
        gc.collect()
        found[name] = ask(*start(model=given["written"][model]))
    for dtype in ("auto", "float32"):
        gc.collect()  # one engine at a time
        found[f"checkpoint {dtype}"] = ask(*start(model=given["written"]["0.5"], dtype=dtype))
    gc.collect()
    found["theta float32"] = ask(*start(**pair, alpha=0.5, dtype="float32"))
    print(json.dumps(found))

given = json.loads(sys.argv[1])
pair, course = given["pair"], {**given["course"], "checkpoint": tuple(given["course"]["checkpoint"])}
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def course(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training run of two checkpoints, the first of which is a third of the way, and a step beyond."""
    folder = tmp_path_factory.mktemp("course") / "early"
    helpers.write((trained / "tiny-sft", trained / "tiny-dpo"), folder, -2 / 3)
    steps = [f"100={folder}", f"200={trained / 'tiny-dpo'}"]
    return {"sft": str(trained / "tiny-sft"), "checkpoint": steps, "target_step": 500.0}


@pytest.fixture(scope="module")
def written(trained: Path, course: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """α → the checkpoint of θ(α), and that of the course."""
    folder = tmp_path_factory.mktemp("written")
    helpers.write((trained / "tiny-sft", trained / "tiny-dpo"), folder / "a{alpha}", 0.5, 1.5)
    extrapolate(**course, output=folder / "step", fsync=False)
    return {"step": str(folder / "step"), **{alpha: str(folder / f"a{alpha}") for alpha in ("0.5", "1.5")}}


@pytest.fixture(scope="module")
def answers(
    trained: Path,
    course: dict[str, Any],
    written: dict[str, str],
    run_warm: helpers.Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Rows of long prompts from engines in one process; engine → prompts and answers as token ids."""
    folder = tmp_path_factory.mktemp("offline")
    prompts = json.loads((trained / "held_out_prompts.json").read_text())
    task = folder / "long.json"
    task.write_text(json.dumps([{"prompt": " ".join(prompts[row : row + 16])[:900]} for row in range(0, 64, 16)]))
    pair = {"sft": str(trained / "tiny-sft"), "dpo": str(trained / "tiny-dpo")}
    script = folder / "offline.py"
    script.write_text(OFFLINE)
    settings = {"task": str(task), "output_dir": str(folder)}
    done = run_warm(script, json.dumps({"pair": pair, "course": course, "written": written, "settings": settings}))
    assert done.code == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_an_engine_on_a_pair_answers_as_one_on_the_written_checkpoint(answers: Any, dtype: str) -> None:
    assert answers[f"theta {dtype}"] == answers[f"checkpoint {dtype}"]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_live_engine_is_given_another_alpha_and_the_first_again(answers: Any) -> None:
    assert min(map(len, answers["switched"]["prompts"])) > 128  # a prefix of blocks is cached
    assert answers["switched"] == answers["fresh"]
    assert answers["switched"] != answers["theta auto"]
    assert answers["back"] == answers["theta auto"]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_live_engine_is_given_a_later_step_of_a_training_run(answers: Any) -> None:
    assert answers["course"] == answers["fresh course"]
    assert answers["course"] not in (answers["switched"], answers["theta auto"])


# --- several processes --------------------------------------------------------------------------------------------


KILLED = """
import json, multiprocessing, os, signal, sys
from pathlib import Path
from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor
from expo.config import GenerateConfig
from expo.errors import EnvironmentFailure
from expo.verbs.generate import plan
from expo.theta.tensors import Theta

settings, started = json.loads(sys.argv[1]), Path(sys.argv[2])
for module in (utils, multiproc_executor):
    module.get_mp_context = lambda: multiprocessing.get_context("fork")  # what is put in place here is there, too
whole = Theta.tensor

def tensor(theta, name):
    if started.exists():  # on a CPU the engine's process has another one load weights
        os.kill(os.getppid(), signal.SIGKILL)
    return whole(theta, name)

def main():
    Theta.tensor = tensor
    first, second = (plan(GenerateConfig(engine="vllm", alpha=alpha, **settings)) for alpha in (0.5, 1.5))
    engine = first.open_engine()
    started.touch()
    try:
        engine.load(second.setup)
    except EnvironmentFailure as error:
        print(json.dumps([str(error), engine._llm is None, len(multiprocessing.active_children())]))

main()
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_a_switch_whose_process_is_killed_ends_with_one_line(
    trained: Path, run_warm: helpers.Run, plugin: dict[str, str], tmp_path: Path
) -> None:
    """vLLM waits for the answer of such a process forever."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "run.py").write_text(KILLED)
    settings = {"task": str(tmp_path / "q.jsonl"), "output_dir": str(tmp_path), "max_tokens": 4}
    settings |= {"sft": str(trained / "tiny-sft"), "dpo": str(trained / "tiny-dpo")}
    own_process = {**plugin, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = run_warm(tmp_path / "run.py", json.dumps(settings), tmp_path / "started", env=own_process)
    assert done.code == 0, done.stderr[-5000:]
    message, is_closed, children = json.loads(done.stdout.splitlines()[-1])
    assert re.fullmatch(
        r"the vLLM engine died: ChildProcessError: its process \d+ ended \(signal 9: killed, .*; rerun .* continue",
        message,
    )
    assert (is_closed, children) == (True, 0)


def test_without_the_entry_point_vllms_other_processes_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "entry_points", lambda **_: ())
    with pytest.raises(EnvironmentFailure, match="cannot find expo's loader: reinstall expo"):
        vllm._make_loader_known({"tensor_parallel_size": 2})
