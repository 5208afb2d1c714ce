"""`scripts/slurm/sweep.sh` on a stand-in for Slurm: it makes what a sweep makes, and again only what failed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_stand_in as slurm
from helpers import Pair, environment
from test_dates import DATED, Clock
from test_score import make_reward_model
from warm_expo import expo_in

from expo.config import SweepConfig
from expo.journal import Journal
from expo.rows import dates
from expo.verbs import sweep as verb

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm" / "sweep.sh"
NAMES = ("dpo-ExPO-a0.0", "dpo-ExPO-a2.0")
POLICY = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_tokens": 9, "batch_tokens": 40}
REWARDS = {"engine": "transformers", "device": "cpu", "dtype": "float32", "batch_tokens": 1}
"""Each row is a batch, so that rewards do not depend on which rows are a part's."""


MOMENT = "2024-03-02T11:00:00"
"""When the script was first run."""


@pytest.fixture
def dated(llama_pair, tmp_path: Path) -> Pair:
    """A pair whose chat template writes the day, so that jobs of another day would ask another question."""
    sft, dpo = (Path(shutil.copytree(side, tmp_path / side.name)) for side in llama_pair)
    for side in (sft, dpo):
        (side / "chat_template.jinja").write_text(DATED)
    return sft, dpo


@pytest.fixture
def reward_models(dated, tmp_path: Path) -> list[Path]:
    return [
        make_reward_model(tmp_path / name, dated[1], labels=1, pad_id=pad) for name, pad in (("rm", 2), ("other", 3))
    ]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"w{number} w{number * 7 % 50} w{number * 3 % 50}"} for number in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def script(dated, reward_models, task: Path, tmp_path: Path) -> Path:
    """The script, edited as a reader edits it."""
    edits = {
        "SFT": str(dated[0]),
        "DPO": str(dated[1]),
        "REWARD_MODELS": reward_models,
        "ALPHAS": [2.0],
        "TASK": str(task),
        "FOLDER": "swept",
        "PARTS": 2,
        "GENERATE": flags(POLICY),
        "SCORE": flags(REWARDS),
    }
    text = SCRIPT.read_text()
    for name, value in edits.items():
        value = f"({' '.join(map(str, value))})" if isinstance(value, list) else value
        text, count = re.subn(rf"^{name}=(\([^)]*\)|\S+)", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, name
    file = tmp_path / "sweep.sh"
    file.write_text(text)
    return file


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def run_script(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_workers
) -> Iterator[Callable[[], subprocess.CompletedProcess[str]]]:
    """Runs the script, which puts jobs into the queue."""
    import transformers  # noqa: F401

    import expo.engines.transformers
    import expo.engines.transformers_reward  # noqa: F401

    programs = tmp_path / "bin"
    programs.mkdir()
    slurm.install(programs)
    (tmp_path / "queue").mkdir()
    monkeypatch.setenv(slurm.QUEUE, str(tmp_path / "queue"))
    monkeypatch.setenv("EXPO_CACHE", str(tmp_path / "cache"))

    def call() -> subprocess.CompletedProcess[str]:
        env = environment(PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
        return subprocess.run(["bash", script], cwd=tmp_path, env=env, capture_output=True, text=True)

    with expo_in(programs, lambda: die_in_the_middle(tmp_path)):
        yield call


def die_in_the_middle(folder: Path) -> None:
    """A task with a file `kill-JOB-TASK` is killed after its first rows, once."""
    job = f"{os.environ.get('SLURM_ARRAY_JOB_ID')}-{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    marker = folder / f"kill-{job}"
    if marker.exists():
        marker.unlink()
        append = Journal.append

        def killing(journal: Journal, rows: Any) -> None:
            append(journal, rows)
            os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = killing  # type: ignore[method-assign]


def submit(run_script: Callable[[], subprocess.CompletedProcess[str]]) -> list[str]:
    """Run the script, then what it has submitted; returns what it says of it."""
    done = run_script()
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    slurm.run_queue()
    return [line for line in done.stderr.splitlines() if line.startswith(("job", "all"))]


def submitted(after: int = 0) -> list[tuple[str, str | None]]:
    """Of each job after the so-manieth: the command, and its tasks."""
    return [(" ".join(job.words[:2]), job.options.get("array")) for job in slurm.jobs()[after:]]


@pytest.mark.slow
def test_a_sweep_of_job_arrays_is_expo_sweeps_and_only_what_failed_is_made_again(
    run_script, dated, reward_models, task, tmp_path, monkeypatch
):
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "date").write_text(f"{MOMENT}\n")
    for job in ("3-0", "5-1"):  # of the third and the fifth job, whose dependencies are there by then
        (tmp_path / f"kill-{job}").touch()
    submit(run_script)
    first, second = NAMES
    asked = [("generate 0", "0-1"), ("generate 0", None), (f"score {first}", "0-1"), (f"score {first}", None)]
    others = [("generate 2.0", "0-1"), ("generate 2.0", None), (f"score {second}", "0-1"), (f"score {second}", None)]
    assert submitted() == [*asked, *others, (f"choose {first}", None)]
    states = [job.state for job in slurm.jobs()]
    killed = {"0": 137, "1": 0}, {"0": 0, "1": 137}
    assert (slurm.jobs()[2].codes, slurm.jobs()[4].codes) == killed
    done, failed, gone = slurm.COMPLETED, slurm.FAILED, slurm.CANCELLED
    assert states == [done, done, failed, gone, failed, gone, gone, gone, gone]
    assert not (tmp_path / "swept" / "sweep.json").exists()

    [lock] = (tmp_path / "swept").glob("outputs_questions/*/*.lock")
    left = str(lock.readlink())
    lock.unlink()
    lock.symlink_to(json.dumps({**json.loads(left), "boot": "another", "machine": "another", "host": "another"}))
    count = len(slurm.jobs())
    refused = run_script()
    assert (refused.returncode, "part 1/2, state still running" in refused.stderr) == (1, True)
    assert refused.stderr.endswith("to remove it: find swept -name '*.lock' -delete\n")
    assert len(slurm.jobs()) == count
    lock.unlink()
    lock.symlink_to(left)

    before = len(slurm.jobs())
    submit(run_script)
    again = [(f"score {first}", "0"), (f"score {first}", None), ("generate 2.0", "1"), ("generate 2.0", None)]
    assert submitted(before) == [
        *again,
        (f"score {second}", "0-1"),
        (f"score {second}", None),
        (f"choose {first}", None),
    ]
    assert [job.state for job in slurm.jobs()[before:]] == [done] * 7

    [log] = (tmp_path / "swept" / "logs").glob("choose-*.log")
    assert "dpo-ExPO-a2.0" in log.read_text()
    assert "rows to" not in log.read_text(), "all answers and rewards are there"

    before = len(slurm.jobs())
    assert submit(run_script) == ["all there: swept/sweep.json"]
    assert len(slurm.jobs()) == before

    whole = tmp_path / "whole"
    monkeypatch.setattr(dates, "datetime", Clock(MOMENT))
    verb.run(
        SweepConfig(
            sft=str(dated[0]),
            dpo=str(dated[1]),
            reward_model=tuple(map(str, reward_models)),
            task=str(task),
            output=str(whole),
            alpha=(2.0,),
            any_pair=True,
            **POLICY,
            **{f"reward_{name}": value for name, value in REWARDS.items()},
        )
    )
    ours = tmp_path / "swept"
    metas = [json.loads(file.read_text()) for file in ours.glob("*_questions/*.meta.json")]
    assert [meta["fingerprint"]["template_date"] for meta in metas] == [MOMENT] * 6
    rows = sorted(str(file.relative_to(whole)) for file in whole.glob("*_questions/*.jsonl"))
    assert len(rows) == 2 + 2 * 2 * 2
    assert [name for name in rows if (ours / name).read_bytes() != (whole / name).read_bytes()] == []
    records = [json.loads((folder / "sweep.json").read_text()) for folder in (ours, whole)]
    for key in ("alphas", "best_alpha", "verdict", "fingerprint"):
        assert records[0][key] == records[1][key], key


def test_nothing_is_submitted_beside_jobs_in_the_queue(run_script):
    first = run_script()
    assert first.returncode == 0, first.stderr
    count = len(slurm.jobs())
    again = run_script()
    assert (again.returncode, len(slurm.jobs())) == (1, count)
    assert again.stderr.strip() == (
        "jobs of this sweep are in the queue: wait for them, or end them with scancel --name expo-swept"
    )


def test_settings_that_are_refused_submit_nothing(run_script, script):
    script.write_text(script.read_text().replace("--max-tokens 9", "--max-tokens 0"))
    refused = run_script()
    assert (refused.returncode, slurm.jobs()) == (2, [])
    assert "--max-tokens must be positive, not 0" in refused.stderr


# --- the stand-in is as Slurm is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "indices"),
    [("0-3", [0, 1, 2, 3]), ("5", [5]), ("1,5", [1, 5]), ("0-6:3", [0, 3, 6]), ("2,7-9%2", [2, 7, 8, 9])],
)
def test_what_an_array_is(text, indices):
    assert slurm.read_array(text) == indices


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Submits words in tmp_path, and returns what is said."""
    slurm.install(tmp_path)
    (tmp_path / "queue").mkdir()
    monkeypatch.setenv(slurm.QUEUE, str(tmp_path / "queue"))

    def call(*words: str) -> str:
        command = [str(tmp_path / "sbatch"), *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    return call


SHOW = "echo " + " ".join(f"$SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP"))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        ("0-1", ["0 2 0 1 1", "1 2 0 1 1"]),
        ("1,5", ["1 2 1 5 1", "5 2 1 5 1"]),
        ("10-30:10%1", ["10 3 10 30 10", "20 3 10 30 10", "30 3 10 30 10"]),
    ],
)
def test_tasks_are_told_of_the_array_that_was_submitted(sbatch, tmp_path, array, said):
    assert sbatch("--array", array, "--wrap", SHOW) == "Submitted batch job 1\n"
    slurm.run_queue()
    logs = sorted(tmp_path.glob("slurm-1_*.out"))
    assert [log.read_text().strip() for log in logs] == said


def test_a_script_is_taken_as_it_is_when_it_is_submitted(sbatch, tmp_path, monkeypatch):
    monkeypatch.setenv("GIVEN", "then")
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/sh\n#SBATCH --job-name=mine --output=%x-%j.log\n#SBATCH --cpus-per-task=3\n"
        'echo "$SLURM_JOB_NAME $SLURM_CPUS_ON_NODE $GIVEN $1"\n#SBATCH --job-name=late\n'
    )
    assert sbatch("--parsable", "--export=ALL,MORE=1", "job.sh", "--array") == "1\n"
    assert sbatch("--parsable", "--job-name", "other", "--export=NONE", "job.sh", "x") == "2\n"
    script.unlink()
    slurm.run_queue()
    assert (tmp_path / "mine-1.log").read_text() == "mine 3 then --array\n"
    assert (tmp_path / "other-2.log").read_text() == "other 3  x\n"


def test_what_depends_on_a_failed_job_does_not_run(sbatch, tmp_path):
    sbatch("--array=0-2", "--wrap", "exit $((SLURM_ARRAY_TASK_ID % 2))")
    sbatch("--dependency=afterok:1", "--wrap", "true")
    sbatch("--dependency=afterok:1", "--kill-on-invalid-dep=yes", "--wrap", "true")
    sbatch("--dependency=afterany:1", "--wrap", "true")
    sbatch("--dependency=afterok:4:1", "--kill-on-invalid-dep=yes", "--wrap", "true")
    sbatch("--dependency=afterok:4,afternotok:1", "--wrap", "true")
    slurm.run_queue()
    assert slurm.jobs()[0].codes == {"0": 0, "1": 1, "2": 0}
    states = [slurm.FAILED, slurm.STUCK, slurm.CANCELLED, slurm.COMPLETED, slurm.CANCELLED, slurm.COMPLETED]
    assert [job.state for job in slurm.jobs()] == states
    queue = subprocess.run([tmp_path / "squeue", "--noheader"], check=True, capture_output=True, text=True).stdout
    assert [line.split()[:2] for line in queue.splitlines()] == [["2", "wrap"]]
    with pytest.raises(subprocess.CalledProcessError):
        sbatch("--dependency=afterok:9", "--wrap", "true")
