"""What the program's own parser says of the command lines that are printed, none of which is run.

`problem` is strict: the line is complete, and each value is one that its setting takes. `mentions` is for lines within
sentences, which may be cut short: the command and its options exist, and so do the values as far as they are given.
"""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

PROGRAMS = frozenset(
    {
        *(
            "expo",
            "python",
            "pytest",
            "lm_eval",
            "alpaca_eval",
            "vllm",
            "sbatch",
            "squeue",
            "ray",
            "pip",
            "uv",
        ),  # of `programs.py`
        *("bash", "git", "curl", "ruff", "mypy", "lint-imports", "source"),
        *("export", "cd", "mkdir", "cp", "mv", "ls", "cat", "head", "tail", "wait", "kill"),
    }
)
"""What `session.py` can run: programs of this machine, those of the environment, and those in `programs/`."""

KEYWORDS = frozenset(["do", "done", "then", "fi", "else", "if", "while", "!", "{", "}", "time", "esac"])
SEPARATORS = frozenset(";|&()\n")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
REDIRECTION = re.compile(r"[<>]+&?|&>+")
ARRAY = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}
"""Where `--part slurm` is given, the command is one of an array job."""
EVALUATION = re.compile(r"scripts/(alpaca_eval|mt_bench|open_llm_leaderboard)\.sh")
SCRIPT = re.compile(r"(?:\./)?(scripts|tests|tools|demo)/\S+\.sh")


def words_of(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell's line, as words; redirections and assignments are left out.

    Commands that are an argument of another one (`--wrap`, `$(…)`) follow it.
    """
    text = without_comments(text).replace("\\\n", " ").replace("$(", " ; ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="".join(SEPARATORS) + "<>")
    lexer.commenters, lexer.whitespace_split, lexer.whitespace = "", True, " \t\r"
    one: list[str] = []
    tokens = iter(list(lexer))
    for token in tokens:
        if SEPARATORS.issuperset(token):
            yield from _with_inner(one)
            one = []
        elif REDIRECTION.fullmatch(token):
            next(tokens, None)
            if one and one[-1].isdigit():
                one.pop()
        else:
            one.append(token)
    yield from _with_inner(one)


def without_comments(text: str) -> str:
    """A shell's line without its comments, which may have quotes of their own."""
    quoted = r"'[^']*'|\"(?:\\\\.|[^\"\\\\])*\"|\\\\."
    return re.sub(rf"({quoted})|(?<!\S)#[^\n]*", lambda found: found[1] or "", text, flags=re.DOTALL)


def _with_inner(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in KEYWORDS or ASSIGNMENT.fullmatch(words[0])):
        words = words[1:]
    if words and words[0] not in ("for", "case"):
        yield words
        for option, value in pairwise(words):
            if option == "--wrap" or (words[0] == "bash" and option == "-c"):
                yield from words_of(value)


def problem(text: str, folder: Path) -> str | None:
    """What is wrong with a command line; None if nothing is.

    Args:
        text: The line, as the shell takes it.
        folder: Where files that it names may be, such as that of `--config`.
    """
    for words in words_of(text):
        name = words[0].rpartition("/")[2] if words[0].startswith((".venv/", "/")) else words[0]
        if words[:3] == ["python", "-m", "expo"]:
            name, words = "expo", words[2:]
        if name == "expo" and not "".join(words[1:2]).startswith("$"):
            if wrong := _refusal([_filled(word) for word in words[1:]], folder):
                return wrong
        elif words[:1] == ["bash"] and (evaluation := EVALUATION.fullmatch(words[1])):
            if wrong := _refused_by(evaluation[1], words[2:]):
                return wrong
        elif SCRIPT.fullmatch(name) is None and name not in PROGRAMS:
            return f"{name} is not a program that the harness knows (`PROGRAMS` in tools/documents/check.py)"
    return None


def _refused_by(script: str, words: list[str]) -> str | None:
    """What an evaluation's parser says of these words."""
    module = import_module(f"evaluations.{script.replace('alpaca_eval', 'alpaca').replace('open_llm_', '')}")
    with redirect_stderr(io.StringIO()) as said:
        try:
            module.parser().parse_args(words)
        except SystemExit as end:
            return said.getvalue().strip().splitlines()[-1] if end.code else None
    return None


def _filled(word: str) -> str:
    """A word with something in the place of the shell's variables."""
    return re.sub(r"\$\{?\w+\}?", "1", word)


def _refusal(words: list[str], folder: Path) -> str | None:
    """What the program says of these words, short of doing what they say."""
    import typer

    from expo.cli.failures import EXPECTED
    from expo.cli.program import refused_value

    here, before = Path.cwd(), {name: os.environ.get(name) for name in ARRAY}
    os.chdir(folder)
    os.environ.update(ARRAY)
    try:
        with redirect_stdout(io.StringIO()):
            _parse(words)
    except typer.Exit:
        return None
    except typer.TyperException as error:
        return f"{getattr(error, 'format_message', error.__str__)()}{refused_value(error)}"
    except EXPECTED as error:
        return str(error)
    finally:
        os.chdir(here)
        for variable, value in before.items():
            os.environ.pop(variable) if value is None else os.environ.update({variable: value})
    return None


def _parse(words: list[str]) -> None:
    """Parse as `expo` does, and make the command's settings, which checks their values."""
    from expo.cli import program

    group = _program()
    with group.make_context("expo", list(words)) as outer:
        rest = [*outer._protected_args, *outer.args]
        name, command, rest = group.resolve_command(outer, rest)
        with command.make_context(name, rest, parent=outer) as context:
            if name in program.COMMANDS:
                about = program.COMMANDS[name].COMMAND
                left_out = about.leave_out(program.given_names(context)) if about.leave_out else ()
                program.settings_from(context, about.config, left_out)


def mentions(text: str) -> str | None:
    """What is wrong with a command line that may be cut short, and have `…` or a word in capitals for a value."""
    words = text.replace("…", " … ").split()[1:]
    known = _commands()
    if not words or words[0].startswith("-"):
        options = known[""]
    elif words[0] not in known:
        return None if words[0].isupper() or words[0][0] in "<…" else f"No such command '{words[0]}'."
    else:
        options = known[words[0]]
    unknown = [word for word in words if re.match(r"--?\w", word) and word.partition("=")[0] not in options]
    return f"No such option: {unknown[0]}" if unknown else None


@cache
def _program() -> Any:  # noqa: ANN401 - typer's
    from typer.main import get_command

    from expo.cli import program

    return get_command(program.app)


@cache
def _commands() -> dict[str, set[str]]:
    """Command → its options; the program's own under no name."""
    group = _program()
    found = {"": group, **group.commands}
    names = {
        name: {one for param in about.params for one in (*param.opts, *param.secondary_opts)}
        for name, about in found.items()
    }
    return {name: {*options, "-h", "--help"} for name, options in names.items()}
