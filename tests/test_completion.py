"""Shell completion by the shells' own protocol: what bash asks the program, and what it makes of the answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expo.cli import program as cli

PROGRAM = f'#!/bin/sh\nexec {sys.executable} -X importtime -m expo "$@" 2>>"$IMPORTS"\n'
ASK = """
eval "$(_EXPO_COMPLETE=source_bash expo)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_expo_completion expo
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (["sw"], {"sweep"}, {"score"}),
        (["extrapolate", "--al"], {"--alpha", "--alpha-for", "--aligned"}, {"--sft"}),
        (["generate", "--engine", ""], {"auto", "vllm", "transformers", "openai"}, set()),
        (["extrapolate", "--dtype", "b"], {"bfloat16"}, {"auto"}),
        (["sweep", "--recipe", "Star"], {"Starling-LM-7B-alpha", "Starling-LM-7B-beta"}, {"zephyr-7b-beta"}),
        (["extrapolate", "--sft", "./"], set(), {"./"}),
        (["report", "--config", ""], set(), {"report"}),
    ],
    ids=["commands", "options", "choices of a table", "choices", "recipes", "folders", "files"],
)
def test_words(
    words: list[str], some: set[str], none: set[str], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty answer leaves files to the shell (`complete -o default`)."""
    monkeypatch.setenv("_EXPO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["expo", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    with pytest.raises(SystemExit) as end:
        cli.run([])
    assert end.value.code in (0, None)
    found = set(capsys.readouterr().out.split())
    assert found >= some
    assert not found & none
    assert some or not found


def test_bash_asks_the_program_and_it_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "expo").write_text(PROGRAM)
    (tmp_path / "expo").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "IMPORTS": str(tmp_path / "imports")}
    done = subprocess.run(["bash", "-c", ASK, "bash", "expo", "inspec"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "inspect\n"), done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in (tmp_path / "imports").read_text().splitlines()}
    assert "expo.cli.program" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "datasets", "scipy", "matplotlib", "numpy"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_EXPO_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        cli.run([])
    assert f"_EXPO_COMPLETE=complete_{shell}" in capsys.readouterr().out
