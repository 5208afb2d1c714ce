"""The wheel and the source archive: what is in them, what they say, and that the wheel works where no source is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from made_runs import made_runs, write_files

from expo import __version__

ROOT = Path(__file__).parents[1]
NAME = f"llm_expo-{__version__}"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of this tree, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    _hatchling("sdist", folder, ROOT)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which 3.11.2 lacks
        archive.extractall(folder)
    _hatchling("wheel", folder, folder / NAME)
    return folder / f"{NAME}.tar.gz", folder / f"{NAME}-py3-none-any.whl"


def _hatchling(kind: str, target: Path, source: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it, which takes all other packages from the one of the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    words = ["install", "-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", archives[1]]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *words], check=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))  # .pth files that lie there count for nothing here
    return python


def _run(installed: Path, folder: Path, *words: object) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [installed, "-I", "-m", "expo", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_files() -> set[str]:
    """Every file of the package in this tree."""
    found = (path for path in (ROOT / "expo").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_wheel_has_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert "expo/py.typed" in names
    assert {Path(name).suffix for name in names} >= {".toml", ".html", ".css", ".js", ".pyi"}


def test_the_archive_has_the_sources_and_no_outputs(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    assert names >= package_files() | {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO"}
    kept = {"benchmarks", "demo", "docs", "evaluations", "expo", "scripts", "tests", "tools"}
    assert {name.split("/")[0] for name in names if "/" in name} <= kept


def test_what_it_says_of_itself(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        said = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("llm-expo", __version__, "Apache-2.0")
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload() == (ROOT / "README.md").read_text()
    assert {"eval", "openai", "peft", "vllm", "test"} <= set(said.get_all("Provides-Extra", []))
    oldest = said["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in said.get_all("Classifier", [])


def test_the_version_has_its_section_in_the_changelog() -> None:
    assert __version__.count(".") == 2
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_wheel_works(installed: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    where = "import expo, importlib.metadata as m; print(expo.__file__, m.version('llm-expo'))"
    path, version = subprocess.check_output([installed, "-I", "-c", where], text=True).split()
    assert Path(path).is_relative_to(installed.parents[1])
    assert version == __version__
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = subprocess.check_output([installed.with_name("expo"), "--version"], cwd=tmp_path, env=env, text=True)
    assert program == f"expo {__version__}\n"
    assert "zephyr-7b-beta" in _run(installed, tmp_path, "recipes")
    words = ("--sft", pair[0], "--dpo", pair[1], "--alpha", "0.3", "--output", "made")
    _run(installed, tmp_path, "extrapolate", *words)
    assert (tmp_path / "made" / "expo.json").exists()
    runs = write_files(tmp_path / "runs", made_runs(8, ("dpo", "dpo-ExPO-a0.3"), characters=40))
    _run(installed, tmp_path, "report", *runs, "--output", "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_run_what_is_there_and_may_do_little(file: Path) -> None:
    flow = yaml.safe_load(file.read_text())
    assert flow["permissions"] == {"contents": "read"}
    assert flow.keys() >= {"name", True, "jobs"}  # YAML takes "on" for true
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert set(job.get("permissions", {})) <= {"id-token", "pages"}
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= flow["jobs"].keys()
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))
            named = re.findall(r"(?:bash|-c) (\S+)", step.get("run", ""))
            assert all((ROOT / name).is_file() for name in named)


def test_ci_runs_the_test_command() -> None:
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"run": "bash .ci/run"} in flow["jobs"]["tests"]["steps"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_for_something(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form.keys() >= {"name", "description", "body"}
    assert all(part["type"] in ("textarea", "input", "markdown", "dropdown", "checkboxes") for part in form["body"])
    assert len({part["id"] for part in form["body"]}) == len(form["body"])
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_citation_is_of_this_version_and_the_paper_in_the_readme() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert {"message", "title", "authors"} <= citation.keys()
    readme, paper = (ROOT / "README.md").read_text(), citation["preferred-citation"]
    assert paper["title"] in readme
    assert paper["url"] in readme
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    assert authors in readme
