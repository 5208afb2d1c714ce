"""Workers on the machines of a Ray cluster: the same processes, started by an actor on a machine with room for one.

Ray finds a machine, gives it GPUs, and says when it is gone; all else is as on one machine: jobs, parts, journals and
locks are those of `process.py`, `worker.py` and `parts.py`, in a folder that all machines share. An actor holds one
`LocalProcess` and passes on what goes to it and comes from it, so that a process ends with its actor, and an actor with
the run that made it.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from expo import __version__
from expo.errors import EnvironmentFailure, InputError, MissingExtra, first_line
from expo.files import Row
from expo.locks import Holder, holder_of, is_locked, release
from expo.rows.process import LocalProcess, Process, work_command
from expo.rows.worker import Task, Worker
from expo.rows.workers import Crew

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
"""How long a machine may take to say what it sees."""
STOP_SECONDS = 10.0
"""How long an actor may take to kill its process."""
RELEASE_SECONDS = 30.0
"""How long a process may take to end after its actor is gone (`orphans.GRACE_SECONDS`), and to be known as dead."""
PASSED_ON = ("HF_", "VLLM_", "NO_COLOR")
"""How the variables begin that processes on other machines get from this one."""
TOKEN_NAME = ".expo-shared-"


@dataclass(frozen=True)
class Machine:
    """A node of the cluster."""

    node_id: str
    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Share:
    """What each process gets of its machine."""

    processes: int
    """How many there are."""
    cpus: int
    gpus: int


# --- on the machines -----------------------------------------------------------------------------------------------


class _Host:
    """The actor: a process on the machine it is placed on."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: str, *, debug: bool) -> None:
        os.chdir(folder)
        self._process = LocalProcess(partial(work_command, debug=debug), words, environment)
        self._holder = asdict(holder_of(self._process.pid))

    def look(self) -> Row:
        """What is to be known of the process."""
        code = self._process.exit_code()
        return {
            "exit_code": code,
            "replies": self._process.replies(),
            "memory_bytes": self._process.memory_bytes() if code is None else 0,
            "tail": "" if code is None else self._process.tail(),
            "holder": self._holder,
        }

    def send(self, line: str) -> None:
        self._process.send(line)

    def dismiss(self) -> None:
        self._process.dismiss()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _look_around(token: str, text: str, paths: Sequence[str], journals: Sequence[str]) -> Row:
    """What a machine sees of the shared folder and of the inputs; locks of processes that died here are removed."""
    for journal in journals:
        with suppress(OSError):
            release(Path(journal), None)
    with suppress(OSError):
        if Path(token).read_text() == text:
            return {"version": __version__, "missing": [path for path in paths if not Path(path).exists()]}
    return {"version": __version__, "missing": [str(Path(token).parent)]}


# --- here ----------------------------------------------------------------------------------------------------------


class Cluster:
    """A connection to a Ray cluster; a context manager.

    Args:
        address: Its address, or auto for the cluster that this machine belongs to.

    Raises:
        MissingExtra: Ray is not installed.
        EnvironmentFailure: There is no such cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtra("--ray needs Ray: pip install 'llm-expo[ray]', on every machine") from None
        self.ray: Any = ray
        self._stack = ExitStack()
        self._stack.enter_context(redirect_stdout(sys.stderr))  # its threads print what the cluster says
        try:
            if not ray.is_initialized():
                _require_answer(address)
                on_terminate = signal.getsignal(signal.SIGTERM)
                ray.init(
                    address, log_to_driver=False, logging_level=logging.ERROR, namespace=f"expo-{secrets.token_hex(4)}"
                )
                self._stack.callback(ray.shutdown)
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, on_terminate)  # which Ray has replaced by its own
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            self._stack.close()
            raise EnvironmentFailure(
                f"--ray {address}: no cluster answers ({first_line(error)}); start one by `ray start --head`, or give "
                "its address"
            ) from error

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def machines(self) -> list[Machine]:
        """The machines that are there and have CPUs."""
        made = [
            Machine(node["NodeID"], _name(node), node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in self.ray.nodes()
            if node["Alive"]
        ]
        return [machine for machine in made if machine.cpus >= 1]

    @property
    def hardware(self) -> list[str]:
        """What machines there are, as far as the cluster says."""
        return ["Ray", *sorted(f"{one.name}: {one.cpus:g} CPUs, {one.gpus:g} GPUs" for one in self.machines)]

    @property
    def has_gpus(self) -> bool:
        """Whether any machine has a GPU."""
        return any(machine.gpus >= 1 for machine in self.machines)

    def share(self, processes: int | None, gpus: int) -> Share:
        """What each process gets.

        Args:
            processes: How many; None for as many as there is room for: by GPUs, else one on each machine.
            gpus: The GPUs of each; 0 for none.

        Raises:
            InputError: There is no room for them.
        """
        machines = self.machines
        if not machines:
            raise InputError("--ray: the cluster has no machine with a CPU")
        if gpus:
            room = sum(int(machine.gpus) // gpus for machine in machines)
            if (processes or 1) > room:
                there = ", ".join(f"{int(machine.gpus)} in {machine.name}" for machine in machines)
                raise InputError(
                    f"--ray: there is room for {room} engines with {gpus} GPUs each in one machine ({there}), and "
                    f"{processes or 1} are asked for"
                )
            return Share(processes or room, 1, gpus)
        count = processes or len(machines)
        on_each = -(-count // len(machines))
        return Share(count, max(1, int(min(machine.cpus for machine in machines)) // on_each), 0)

    def require_shared(self, folder: Path, inputs: Iterable[str], journals: Sequence[Path]) -> None:
        """See that every machine has the folder that is written to, and the inputs; wait for what still writes there.

        Processes of an earlier run end soon after it; where they were killed on another machine, that machine says so.

        Args:
            folder: The folder, which is made.
            inputs: Paths that must be there.
            journals: Those that the run will write.

        Raises:
            InputError: A machine lacks something.
            EnvironmentFailure: A machine does not answer, or the folder cannot be written.
        """
        folder = folder.absolute()
        token, text = folder / f"{TOKEN_NAME}{secrets.token_hex(8)}", secrets.token_hex(16)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text(text)
        except OSError as error:
            raise EnvironmentFailure(f"cannot write to {folder}: {error.strerror}") from error
        try:
            paths = [str(Path(path).absolute()) for path in ("", *inputs)]
            self._ask_all(str(token), text, paths, [str(one.absolute()) for one in journals if is_locked(one)])
        finally:
            token.unlink(missing_ok=True)
        deadline = time.monotonic() + RELEASE_SECONDS
        while any(map(is_locked, journals)) and time.monotonic() < deadline:
            time.sleep(0.2)  # an earlier run's processes are about to end

    def _ask_all(self, token: str, text: str, paths: Sequence[str], journals: Sequence[str]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self.ray.remote(_look_around)
        asked = {}
        for machine in self.machines:
            there = NodeAffinitySchedulingStrategy(machine.node_id, soft=False)
            options = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[machine] = options.remote(token, text, paths, journals)
        for machine, answer in asked.items():
            try:
                said = self.ray.get(answer, timeout=ANSWER_SECONDS)
            except self.ray.exceptions.GetTimeoutError:
                raise EnvironmentFailure(f"--ray: machine {machine.name} does not answer") from None
            except self.ray.exceptions.RayError as error:
                what = next((line for line in str(error).splitlines() if "No module" in line), first_line(error))
                raise EnvironmentFailure(
                    f"--ray: machine {machine.name} cannot run expo ({what.strip()}); install llm-expo {__version__} "
                    "there"
                ) from error
            if said["version"] != __version__:
                raise InputError(f"--ray: machine {machine.name} has llm-expo {said['version']}, and not {__version__}")
            if said["missing"]:
                raise InputError(
                    f"--ray: machine {machine.name} does not have {said['missing'][0]} as it is here: inputs and "
                    "outputs must be in folders that all machines share"
                )

    def crew(self, share: Share, jobs: Sequence[tuple[Task, int]]) -> Crew:
        """Workers for some jobs, each with its number of finished rows; their processes start when there is room."""
        return Crew([ClusterWorker(self, share) for _ in range(min(share.processes, len(jobs)))], jobs)


def local_inputs(config: object) -> list[str]:
    """The values of settings that are paths on this machine."""
    values = (getattr(config, field.name) for field in fields(config))  # type: ignore[arg-type]
    texts = [text for value in values for text in (value if isinstance(value, tuple) else (value,))]
    return [text for text in texts if isinstance(text, str) and text and Path(text).exists()]


def _require_answer(address: str) -> None:
    """See that something listens where the cluster should be: Ray itself would try for minutes.

    Raises:
        OSError: Nothing does.
    """
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or (current.read_text() if current.is_file() else "")
    where = urlsplit(address if "://" in address else f"ray://{address}")
    if where.hostname and where.port:
        socket.create_connection((where.hostname, where.port), CONNECT_SECONDS).close()


def forget_names(folders: Iterable[Path]) -> None:
    """Let this machine see files that others have just made.

    On a network file system a name that was not there when it was looked for is remembered as such for up to a minute,
    unless the folder is changed from here.
    """
    for folder in folders:
        name = folder / f"{TOKEN_NAME}{secrets.token_hex(8)}"
        with suppress(OSError):
            name.touch()
            name.unlink()


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


class ClusterWorker(Worker):
    """A worker whose process runs somewhere in a cluster."""

    def __init__(self, cluster: Cluster, share: Share) -> None:
        super().__init__(None, {}, stays=True)
        self._cluster, self._share = cluster, share

    def new_process(self, words: Sequence[str]) -> Process:
        """As `Worker`."""
        return ClusterProcess(self._cluster, self._share, words)


class ClusterProcess:
    """A `Process` on a machine of the cluster, which may still have to be found; no call here waits for it."""

    def __init__(self, cluster: Cluster, share: Share, words: Sequence[str]) -> None:
        self._ray, debug = cluster.ray, log.isEnabledFor(logging.DEBUG)
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        kind = self._ray.remote(_Host).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._actor = kind.remote(list(words), environment, str(Path.cwd()), debug=debug)
        self._asked = self._actor.look.remote()
        self._code: int | None = None
        self._replies: list[Row] = []
        self._tail, self._memory_bytes = "", 0
        self._holder: Holder | None = None
        self._lost: str | None = None
        self._is_killed = False

    @property
    def is_placed(self) -> bool:
        """Whether it runs, or has run; no machine has room for it otherwise."""
        self._look()
        return self._holder is not None or self._code is not None

    @property
    def lost(self) -> str | None:
        """As `Process`."""
        return self._lost

    @property
    def holder(self) -> Holder | None:
        """As `Process`."""
        return self._holder

    def _look(self) -> None:
        """Take what the actor has answered, and ask again."""
        if self._code is not None or not self._ray.wait([self._asked], timeout=0)[0]:
            return
        try:
            said = self._ray.get(self._asked)
        except self._ray.exceptions.ActorUnavailableError:
            self._asked = self._actor.look.remote()
            return
        except self._ray.exceptions.RayError as error:
            log.debug("the actor: %s", error)
            self._lost = f"its machine, or Ray there, is gone ({first_line(error).rstrip('.')})"
            self._code = -signal.SIGKILL
            return
        self._replies += said["replies"]
        self._tail, self._memory_bytes = said["tail"], said["memory_bytes"]
        self._holder = Holder(**{field.name: said["holder"][field.name] for field in fields(Holder)})
        self._code = said["exit_code"]
        if self._code is None:
            self._asked = self._actor.look.remote()

    def exit_code(self) -> int | None:
        """As `Process`."""
        self._look()
        return self._code

    def replies(self) -> list[Row]:
        """As `Process`."""
        said, self._replies = self._replies, []
        return said

    def send(self, line: str) -> None:
        """As `Process`."""
        self._actor.send.remote(line)

    def dismiss(self) -> None:
        """As `Process`."""
        self._actor.dismiss.remote()

    def tail(self) -> str:
        """As `Process`."""
        return self._tail

    def memory_bytes(self) -> int:
        """As `Process`."""
        return self._memory_bytes

    def terminate(self) -> None:
        """As `Process`."""
        if self.is_placed and self._code is None:
            self._actor.terminate.remote()

    def wait(self, seconds: float) -> None:
        """As `Process`."""
        self._wait_until(lambda: not self.is_placed or self.exit_code() is not None, seconds)

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)

    def kill(self) -> None:
        """As `Process`; where nothing is heard of it in time, it counts as lost. Its machine then has room again."""
        if self._is_killed:
            return
        self._is_killed = True
        if self.exit_code() is None and self.is_placed:
            self._actor.kill.remote()
            self._wait_until(lambda: self.exit_code() is not None, STOP_SECONDS)
        if self._code is None:
            self._lost = "it could not be stopped" if self.is_placed else None
            self._code = -signal.SIGKILL
        self._ray.kill(self._actor)

    def close(self) -> None:
        """As `Process`."""
