"""A stand-in for Slurm: `sbatch` puts jobs into a queue, which `run_queue` runs in order, one at a time.

    python tests/slurm_stand_in.py sbatch --array=0-3 --wrap 'expo generate alpaca --model M --part slurm'
    python tests/slurm_stand_in.py run

The queue is a folder, `SLURM_STAND_IN`, with a JSON file for each job that was ever submitted. `install` puts `sbatch`
and `squeue` into a folder of programs; with `SLURM_STAND_IN_AT_ONCE=1` `sbatch` runs
what it has queued before it returns.

As in Slurm: a script is copied when it is submitted, and runs in the folder and the environment of `sbatch`, whose
options go before those of `#SBATCH` lines; SLURM_ARRAY_TASK_COUNT, _MIN and _MAX are those of the array that was
submitted, _STEP is what stands after its first colon; a job whose dependency failed never runs, and stays in the queue
unless it has `--kill-on-invalid-dep=yes`; the tasks of an array run on when one fails, and the array has then failed.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

QUEUE, AT_ONCE = "SLURM_STAND_IN", "SLURM_STAND_IN_AT_ONCE"
OPTIONS = ("array", "dependency", "export", "job-name", "output", "error", "chdir", "kill-on-invalid-dep", "wrap")
"""Options that mean something here."""
RESOURCES = (
    *(
        "account",
        "constraint",
        "cpus-per-task",
        "gpus",
        "gpus-per-task",
        "gres",
        "mem",
        "mem-per-cpu",
        "nodes",
        "ntasks",
    ),
    *("open-mode", "partition", "qos", "signal", "time"),
)
"""Options that are taken and mean nothing where there is one machine."""
SHORT = {
    "array": "-a",
    "dependency": "-d",
    "job-name": "-J",
    "output": "-o",
    "error": "-e",
    "partition": "-p",
    "time": "-t",
}
PENDING, COMPLETED, FAILED, CANCELLED, STUCK = "PENDING", "COMPLETED", "FAILED", "CANCELLED", "DependencyNeverSatisfied"


@dataclass
class Job:
    """What was submitted, and how its tasks ended."""

    id: int
    name: str
    options: dict[str, str]
    script: str
    """Its text."""
    words: list[str]
    folder: str
    environment: dict[str, str]
    tasks: list[int] | None
    """The numbers of an array."""
    state: str = PENDING
    codes: dict[str, int] = field(default_factory=dict)
    """Task → its exit code."""

    @property
    def file(self) -> Path:
        return _folder() / f"{self.id}.json"

    def write(self) -> None:
        self.file.write_text(json.dumps(asdict(self)))


def jobs() -> list[Job]:
    """All jobs in the order in which they were submitted."""
    files = sorted(_folder().glob("*.json"), key=lambda file: int(file.stem))
    return [Job(**json.loads(file.read_text())) for file in files]


def _folder() -> Path:
    return Path(os.environ[QUEUE])


def install(folder: Path) -> None:
    """Put `sbatch` and `squeue` into a folder of programs."""
    for name in ("sbatch", "squeue"):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(__file__).resolve()}" {name} "$@"\n')
        file.chmod(0o755)


# --- sbatch ---------------------------------------------------------------------------------------------------------


def sbatch(words: Sequence[str]) -> int:
    """Submit a job."""
    own, script, rest = _parse(words)
    if (script is None) is ("wrap" not in own):
        sys.exit("sbatch: error: give a script, or --wrap COMMAND")
    text = script.read_text(encoding="utf-8") if script else f"#!/bin/sh\n{own['wrap']}\n"
    of_script, *_ = _parse([word for line in _directives(text) for word in shlex.split(line, comments=True)])
    options = {**of_script, **own}
    environment = _exported(options.get("export", "ALL"))
    job = Job(
        id=len(jobs()) + 1,
        name=options.get("job-name", script.name if script else "wrap"),
        options=options,
        script=text,
        words=rest,
        folder=str(Path(options.get("chdir", ".")).resolve()),
        environment=environment,
        tasks=read_array(options["array"]) if "array" in options else None,
    )
    for number in re.findall(r"\d+", options.get("dependency", "")):
        if not 0 < int(number) < job.id:
            sys.exit("sbatch: error: Batch job submission failed: Job dependency problem")
    job.write()
    print(job.id if "parsable" in options else f"Submitted batch job {job.id}", flush=True)
    return run_queue() if os.environ.get(AT_ONCE) == "1" else 0


def _parse(words: Sequence[str]) -> tuple[dict[str, str], Path | None, list[str]]:
    """The options, the script, and its words; the first word that is no option's is the script."""
    parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
    for name in (*OPTIONS, *RESOURCES):
        parser.add_argument(*filter(None, [SHORT.get(name), f"--{name}"]), dest=name)
    for name in ("parsable", "requeue", "no-requeue", "exclusive"):
        parser.add_argument(f"--{name}", dest=name, action="store_const", const="yes")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    given = vars(parser.parse_args(list(words)))
    script, *rest = given.pop("script") or [None]
    options = {name: value for name, value in given.items() if value is not None}
    return options, None if script is None else Path(script), rest


def _directives(text: str) -> Iterator[str]:
    """What stands in `#SBATCH` lines, which end at the first command."""
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            yield line.removeprefix("#SBATCH")
        elif line.strip() and not line.startswith("#"):
            return


def _exported(export: str) -> dict[str, str]:
    """The environment that `--export` asks for."""
    kept: dict[str, str] = {}
    for item in export.split(","):
        name, is_set, value = item.partition("=")
        if item == "ALL":
            kept |= os.environ
        elif is_set:
            kept[name] = value
        elif name in os.environ and item != "NONE":
            kept[name] = os.environ[name]
    return kept


def read_array(text: str) -> list[int]:
    """The indices of `--array`: lists, ranges, steps, and how many may run at once, which is one here."""
    numbers: set[int] = set()
    for item in text.partition("%")[0].split(","):
        span, _, step = item.partition(":")
        first, _, last = span.partition("-")
        numbers.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return sorted(numbers)


# --- the queue ------------------------------------------------------------------------------------------------------


def squeue(words: Sequence[str]) -> int:
    """List the jobs that have not ended, one a line, after a line of titles."""
    parser = argparse.ArgumentParser(prog="squeue", allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--noheader", action="store_true")
    parser.add_argument("-u", "--user")
    parser.add_argument("-n", "--name")
    parser.add_argument("--me", action="store_true")
    given = parser.parse_args(list(words))
    if not given.noheader:
        print("JOBID NAME USER ST")
    if given.user in (None, getpass.getuser()):
        for job in jobs():
            if job.state in (PENDING, STUCK) and (given.name is None or job.name in given.name.split(",")):
                print(job.id, job.name, getpass.getuser(), "PD")
    return 0


def run_queue() -> int:
    """Run every job that can run; the worst exit code."""
    ended = {job.id: job.state for job in jobs()}
    worst = 0
    for job in jobs():
        if job.state == PENDING:
            if _may_run(job, ended):
                worst = max(worst, _run(job))
            else:
                job.state = CANCELLED if job.options.get("kill-on-invalid-dep") == "yes" else STUCK
            job.write()
        ended[job.id] = job.state
    return worst


def _may_run(job: Job, ended: dict[int, str]) -> bool:
    for kind, *numbers in (one.split(":") for one in re.split("[,?]", job.options.get("dependency", "")) if one):
        states = [ended[int(number)] for number in numbers]
        if kind == "afterok" and any(state != COMPLETED for state in states):
            return False
        if kind == "afternotok" and any(state != FAILED for state in states):
            return False
        if kind == "afterany" and any(state == STUCK for state in states):
            return False
    return True


def _run(job: Job) -> int:
    """Run a job, or every task of an array."""
    for place, task in enumerate(job.tasks or [None]):
        variables = _variables(job, task, job.id if task is None else job.id * 1000 + place)
        log = Path(job.folder, _file_name(job, variables))
        script = job.file.with_suffix(".sh")
        script.write_text(job.script)
        script.chmod(0o755)
        with log.open("ab") as stream:
            job.codes[str(task)] = subprocess.run(
                [str(script), *job.words],
                cwd=job.folder,
                env={**job.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            ).returncode
        if job.codes[str(task)] and os.environ.get(AT_ONCE) == "1":
            sys.stderr.write(log.read_text(errors="replace"))
    worst = max(code if code >= 0 else 128 - code for code in job.codes.values())
    job.state = FAILED if worst else COMPLETED
    return worst


def _variables(job: Job, task: int | None, number: int) -> dict[str, str]:
    """What Slurm sets."""
    of_array: dict[str, object] = {}
    if job.tasks is not None and task is not None:
        step = re.search(r":(\d+)", job.options["array"])
        of_array = {
            "SLURM_ARRAY_JOB_ID": job.id,
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_ARRAY_TASK_COUNT": len(job.tasks),
            "SLURM_ARRAY_TASK_MIN": min(job.tasks),
            "SLURM_ARRAY_TASK_MAX": max(job.tasks),
            "SLURM_ARRAY_TASK_STEP": step[1] if step else 1,
        }
    every = {
        "SLURM_JOB_ID": number,
        "SLURM_JOBID": number,
        "SLURM_JOB_NAME": job.name,
        "SLURM_JOB_NUM_NODES": 1,
        "SLURM_NNODES": 1,
        "SLURM_CPUS_ON_NODE": job.options.get("cpus-per-task", "1"),
        "SLURM_JOB_NODELIST": os.uname().nodename,
        "SLURM_SUBMIT_DIR": job.folder,
        "SLURM_SUBMIT_HOST": os.uname().nodename,
        **({"SLURM_CPUS_PER_TASK": job.options["cpus-per-task"]} if "cpus-per-task" in job.options else {}),
    }
    return {name: str(value) for name, value in {**every, **of_array}.items()}


def _file_name(job: Job, variables: dict[str, str]) -> str:
    """Where a task writes: `--output`, with its %-signs filled in."""
    pattern = job.options.get("output", "slurm-%j.out" if job.tasks is None else "slurm-%A_%a.out")
    signs = {
        "%j": variables["SLURM_JOB_ID"],
        "%A": str(job.id),
        "%a": variables.get("SLURM_ARRAY_TASK_ID", "4294967294"),
        "%x": job.name,
        "%u": getpass.getuser(),
        "%N": os.uname().nodename,
        "%%": "%",
    }
    return re.sub("%.", lambda sign: signs[sign[0]], pattern)


if __name__ == "__main__":
    program, *given = sys.argv[1:]
    _folder().mkdir(parents=True, exist_ok=True)
    sys.exit({"sbatch": sbatch, "squeue": squeue, "run": lambda _: run_queue()}[program](given))
