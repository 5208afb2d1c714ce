"""`import expo`: functions that do what the commands do, with the commands' settings as arguments."""

from __future__ import annotations

import copy
import doctest
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from helpers import random_pair, run_expo, write_checkpoint
from safetensors.torch import load_file

import expo
from expo import config
from expo.engines import GENERATORS, SCORERS
from expo.keywords import read_settings
from expo.output.frames import frame
from expo.settings import settings_of

ROOT = Path(__file__).parents[1]
FUNCTIONS = {name: getattr(expo, name) for name, place in expo.PLACES.items() if place == "expo.api"}
CONFIGS = config.COMMANDS


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a random pair, `sft` and `dpo`, which is the current one."""
    for name, tensors in zip(("sft", "dpo"), random_pair({"w": (4, 3), "b": (5,)}), strict=True):
        write_checkpoint(tmp_path / name, tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def not_here() -> str:
    """Why vLLM is not taken."""
    return "it starts more slowly"


# --- the examples --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_examples_in_the_docstrings_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_workers: object
) -> None:
    for name in ("sft", "dpo", "rm"):
        shutil.copytree(trained / f"tiny-{name}", tmp_path / f"my-{name}")
    write_prompts(trained, tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    for engines in (GENERATORS, SCORERS):  # `auto` takes the one that starts sooner
        monkeypatch.setitem(engines, "vllm", replace(engines["vllm"], why_not="test_api:not_here"))
    examples = [
        one for name in FUNCTIONS for one in doctest.DocTestFinder().find(FUNCTIONS[name], name, globs={"expo": expo})
    ]
    runner = doctest.DocTestRunner()
    told: list[str] = []
    for one in examples:
        runner.run(one, out=told.append)
    assert [one.name for one in examples if one.examples] == list(FUNCTIONS)
    assert runner.failures == 0, "".join(told)


@pytest.mark.full  # in CI the commands of docs/python.md are run, which do the same
@pytest.mark.slow
def test_the_notebook_runs(trained: Path, tmp_path: Path) -> None:
    """With the made trio in the place of the demo's: each cell shows what it shows in the repository."""
    import nbformat
    from nbclient import NotebookClient

    demo = tmp_path / "demo-output"
    demo.mkdir()
    for name in ("sft", "dpo", "rm"):
        shutil.copytree(trained / f"tiny-{name}", demo / name)
    write_prompts(trained, demo / "prompts.jsonl")
    published = nbformat.read(ROOT / "docs" / "examples" / "choose_alpha.ipynb", as_version=4)
    for cell in published.cells:  # so that the models' names are those of the demo
        cell.source = cell.source.replace("demo-output/", f"{demo}/")
    ran = NotebookClient(copy.deepcopy(published), timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert [_shown(cell) for cell in ran.cells] == [_shown(cell) for cell in published.cells]
    assert (demo / "best" / "config.json").is_file()
    assert "DPO" in ran.cells[-4].outputs[0]["data"]["text/plain"]


def _shown(cell: Any) -> list[tuple[str, ...]]:
    """The kinds of what a cell shows, without progress."""
    outputs = [one for one in cell.get("outputs", []) if one.get("name") != "stderr"]
    return [(one.output_type, *sorted(one.get("data", {}))) for one in outputs]


def write_prompts(trained: Path, file: Path) -> None:
    held_out = json.loads((trained / "held_out_prompts.json").read_text())
    file.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in held_out))


# --- settings are arguments ----------------------------------------------------------------------------------------


def test_a_function_does_what_its_command_does(pair: Path) -> None:
    made = expo.extrapolate(sft="sft", dpo="dpo", alpha=0.3, output="ours")
    told = run_expo("extrapolate", "--sft", "sft", "--dpo", "dpo", "--alpha", 0.3, "--output", "theirs", "--json")
    assert told.code == 0
    assert (pair / "ours" / "model.safetensors").read_bytes() == (pair / "theirs" / "model.safetensors").read_bytes()
    described = json.loads(json.dumps(made.describe(), default=str).replace("ours", "theirs"))
    assert described == json.loads(told.stdout)
    assert made.to_pandas()[["alpha", "path"]].values.tolist() == [[0.3, made.path]]
    sft, dpo, ours = (load_file(Path(one, "model.safetensors"))["w"] for one in ("sft", "dpo", made))
    wanted = dpo.double() + 0.3 * (dpo.double() - sft.double())
    torch.testing.assert_close(ours.double(), wanted, atol=0, rtol=torch.finfo(ours.dtype).eps)


def test_every_command_is_a_function_and_every_setting_its_argument() -> None:
    assert FUNCTIONS.keys() == CONFIGS.keys() | {"recipe"}
    for name, kind in CONFIGS.items():
        parameters = inspect.signature(FUNCTIONS[name]).parameters
        assert parameters.keys() == settings_of(kind).keys(), name
        assert all(f"\n    {setting}: " in FUNCTIONS[name].__doc__ for setting in parameters), name


def test_several_alpha_are_a_sequence_of_outputs(pair: Path) -> None:
    made = expo.extrapolate(sft="sft", dpo="dpo", alpha=(a / 10 for a in range(1, 3)), output="grid")
    assert [(one.alpha, one.path) for one in made] == [(0.1, Path("grid/alpha-0.1")), (0.2, Path("grid/alpha-0.2"))]
    with pytest.raises(expo.InputError, match="there are 2 checkpoints"):
        _ = made.path


def test_results_and_paths_are_taken_where_a_path_is_meant(pair: Path) -> None:
    first = expo.extrapolate(sft=pair / "sft", dpo=pair / "dpo", alpha=np.float32(0.5), output=pair / "first")
    again = expo.extrapolate(sft=pair / "sft", dpo=first, alpha=torch.tensor(1.0), output=Path("again"))
    assert again[0].status == "written"
    assert [one.status for one in expo.extrapolate(sft="sft", dpo=first, alpha=[1], output="again")] == [
        "already complete"
    ]


def test_a_dry_run_gives_the_plan_and_writes_nothing(pair: Path) -> None:
    before = sorted(pair.iterdir())
    planned = expo.extrapolate(sft="sft", dpo="dpo", alpha=0.3, output="out", dry_run=True)
    assert planned["outputs"] == [{"alpha": 0.3, "path": "out", "complete": False}]
    assert sorted(pair.iterdir()) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: expo.extrapolate(sft="s", dpo="d", alhpa=0.3), TypeError, "'alhpa' is not a setting .* mean 'alpha'"),
        (lambda: expo.extrapolate("s", "d", alpha=0.3), TypeError, "settings are given by name"),
        (
            lambda: expo.generate("a", "b", model="m"),
            TypeError,
            "only 'task' may be given without its name, but 2 arguments are",
        ),
        (lambda: expo.generate("a", task="b", model="m"), TypeError, "'task' is given twice"),
        (lambda: expo.extrapolate(sft="s", dpo="d", alpha="much"), expo.InputError, "^--alpha: .*number.*'much'"),
        (lambda: expo.extrapolate(sft="s", dpo="d", alpha=float("nan")), expo.InputError, "finite"),
        (lambda: expo.extrapolate(sft="s", dpo="d", alpha=1, dtype="int8"), expo.InputError, "^--dtype: .*'int8'"),
        (lambda: expo.extrapolate(sft=3, dpo="d", alpha=1), expo.InputError, "^--sft: .*string; got 3"),
        (lambda: expo.generate("a", model="m", limit=2.5), expo.InputError, "^--limit: .*integer.*2.5"),
        (lambda: expo.compare("only one"), expo.InputError, "run"),
        (lambda: expo.recipe("zephyr"), expo.InputError, "no recipe 'zephyr'"),
    ],
)
def test_what_is_wrong_is_said(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_one_of_several_values_may_be_given_as_it_is_and_none_of_them_is_none() -> None:
    pair = {"sft": "s", "dpo": "d"}
    for given, alpha in [(0.5, (0.5,)), ([0.5, 1], (0.5, 1.0)), (np.array([0.5, 1]), (0.5, 1.0)), (None, ())]:
        assert read_settings(config.SweepConfig, (), {**pair, "alpha": given}).alpha == alpha


def test_runs_are_words_a_list_or_named() -> None:
    for words, named in [(("a", "b"), {}), ((["a", Path("b")],), {}), ((), {"runs": ["a", "b"]})]:
        assert read_settings(config.CompareConfig, words, named).runs == ("a", "b")


# --- what is loaded when -------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, expo; print(sorted(m for m in sys.modules if m.startswith('expo')));"
        "expo.sweep, expo.InputError; from expo import *;"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'typer', 'pydantic', 'scipy', 'matplotlib', 'vllm'};"
        "print(sorted(heavy & sys.modules.keys()), compare.__name__)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["['expo']", "[] compare"]


def test_a_call_changes_nothing_of_the_process_that_a_fork_of_it_would_suffer_from(pair: Path) -> None:
    """As `TOKENIZERS_PARALLELISM=true`: a fork of a process with tokenizers then waits for threads that it lacks."""
    code = (
        "import os; before = dict(os.environ); import expo;"
        "expo.extrapolate(sft='sft', dpo='dpo', alpha=0.3, output='out', fsync=False);"
        "print(sorted(set(os.environ) - set(before)))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENIZERS", "OMP_WAIT"))}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    added = set(json.loads(told.stdout.replace("'", '"')))
    assert "OMP_WAIT_POLICY" in added
    assert not {name for name in added if name.startswith(("TOKENIZERS", "HF_"))}


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'extrapolat'"):
        _ = expo.extrapolat
    assert set(expo.__all__) <= set(dir(expo))


# --- for editors and type checkers ---------------------------------------------------------------------------------


def test_the_stub_is_what_the_settings_say() -> None:
    done = subprocess.run([sys.executable, "tools/make_stub.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- results -------------------------------------------------------------------------------------------------------


def test_figures_become_columns_of_single_values() -> None:
    rows = [
        {"name": "a", "interval": None, "finish_reasons": {"stop": 3}, "subsets": {}},
        {"name": "b", "interval": [0.1, 0.2], "equal": {"difference": 1.0, "interval": (0, 2)}, "subsets": {}},
    ]
    found = frame(rows, leave_out=["subsets"])
    assert list(found) == [
        *("name", "interval_low", "interval_high", "finish_reasons_stop"),
        *("equal_difference", "equal_interval_low", "equal_interval_high"),
    ]
    assert found.loc[1].tolist()[:3] == ["b", 0.1, 0.2]
    assert pandas.isna(found.loc[0, "interval_low"])
    assert found.loc[1, "equal_interval_high"] == 2
