"""What README.md, ARCHITECTURE.md and CONTRIBUTING.md say of the tree is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

ROOT = Path(__file__).parents[1]
FOLDERS = ("expo", "demo", "scripts", "benchmarks", "evaluations", "tests", "tools")


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_every_room_is_named(document: str) -> None:
    """Each folder of the package; ARCHITECTURE.md has the modules beside them, too."""
    words = set(re.findall(r"[\w./]+", (ROOT / document).read_text()))
    rooms = [path for path in (ROOT / "expo").iterdir() if not path.name.startswith("_") and path.name != "py.typed"]
    named = [path.name + "/" * path.is_dir() for path in rooms if path.is_dir() or document != "README.md"]
    assert [name for name in sorted(named) if name not in words] == []


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/reproduction.md"])
def test_every_file_that_is_named_is_there(document: str) -> None:
    named = set(re.findall(r"(?<![\w-])(?!NAME)[\w./-]+\.(?:py|sh)\b", (ROOT / document).read_text()))
    there = [str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in there)] == []


def test_the_check_for_a_gpu_needs_one_before_it_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch sees no CUDA device for --device cuda" in done.stderr
    assert not (tmp_path / "work").exists()
