"""Whose answers are evaluated: DPO and θ(α) of a recipe, of a pair of one's own, or answers that are there already."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from evaluations.results import Column, Result, file_name, table
from expo import recipes
from expo.cli.failures import say
from expo.errors import EnvironmentFailure, ExpoError, InputError, Stopped
from expo.files import json_text, read_json
from expo.theta import names

FAILED_ROWS = 3
"""expo's exit code where some rows failed: they are marked, and the rest is evaluated."""


@dataclass(frozen=True)
class Pair:
    """An SFT and a DPO checkpoint, and the α of the θ(α) that is evaluated beside DPO."""

    name: str
    """What DPO's answers are called; those of θ(α) are `NAME-ExPO-a<α>`."""
    sft: str
    dpo: str
    alpha: float
    recipe: str | None = None
    """The recipe that says them, whose other settings hold, too."""
    published: Mapping[str, tuple[float, float]] | None = None
    """The paper's scores, DPO and ExPO, by the keys of `recipes.published.FIGURES`."""

    @property
    def theta_name(self) -> str:
        """What the answers of θ(α) are called."""
        return names.theta_name(self.name, self.alpha)

    @property
    def names(self) -> tuple[str, str]:
        """DPO's name and that of θ(α)."""
        return self.name, self.theta_name

    def flags(self, name: str) -> list[str]:
        """The flags by which `expo generate` answers with the model of that name; θ(α) is made in the engine."""
        if name == self.name:
            return ["--model", self.dpo]
        return ["--sft", self.sft, "--dpo", self.dpo, "--alpha", repr(self.alpha)]


def new_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command line that names a pair; the examples stand below its help as they are."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=examples, formatter_class=kind)
    add_pair_options(parser)
    return parser


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a pair, and where its files are."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a model known by name (`expo recipes`)")
    parser.add_argument("--sft", metavar="MODEL", help="instead of a recipe: the SFT checkpoint")
    parser.add_argument("--dpo", metavar="MODEL", help="the DPO checkpoint trained from it")
    parser.add_argument("--alpha", type=finite, metavar="A", help="strength of extrapolation (default: the recipe's)")
    parser.add_argument("--name", metavar="NAME", help="name of DPO's answers (default: the recipe's, or DPO's)")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights that were published as .bin")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts, or rows of each task")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", default=Path(), help="where files go (default: here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    parser.add_argument("--smoke", action="store_true", help="the whole way with tiny models and no network; checks it")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def finite(text: str) -> float:
    """A number that is one, for argparse."""
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"must be a number, not {text}")
    return number


def pair_of(given: argparse.Namespace) -> Pair:
    """The pair that the command line names.

    Raises:
        InputError: It names none, or an α is missing.
    """
    if given.recipe is not None:
        return _of_recipe(given)
    if given.sft is None or given.dpo is None:
        raise InputError("no pair given: name a recipe (`expo recipes` lists them), or pass --sft, --dpo and --alpha")
    if given.alpha is None:
        raise InputError("--alpha is missing: `expo sweep --sft … --dpo …` finds one")
    name = given.name or _short(given.dpo)
    if file_name(name) != name:
        raise InputError(f"--name is a file's name, not {name!r}")
    return Pair(name, given.sft, given.dpo, given.alpha)


def _of_recipe(given: argparse.Namespace) -> Pair:
    known = recipes.load(given.recipe)
    if isinstance(known, recipes.RewardRecipe):
        raise InputError(f"{known.name} is a reward model, and no pair; `expo recipes` lists the pairs")
    alpha = recipes.require_alpha(known) if given.alpha is None else given.alpha
    same = given.sft is None and given.dpo is None and alpha == known.alpha
    return Pair(
        given.name or known.name,
        given.sft or known.sft,
        given.dpo or known.dpo,
        alpha,
        known.name,
        known.published if same else None,
    )


def _short(model: str) -> str:
    """A folder's name, or that of a hub id without its revision."""
    return Path(model).resolve().name if Path(model).is_dir() else Path(model).name.partition("@")[0]


def add_generate_args(parser: argparse.ArgumentParser) -> None:
    """The option that hands flags to `expo generate`."""
    parser.add_argument(
        "--generate-args", default="", metavar="FLAGS", help='flags of expo generate: "--tensor-parallel 4"'
    )


def run(
    command: Sequence[str],
    *,
    dry_run: bool = False,
    accept: Sequence[int] = (0,),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    chatter: bytes | None = None,
    typed: bytes = b"",
) -> None:
    """Run a command, after printing it; what it prints goes to stderr.

    Args:
        command: The program's words; a program that this environment has is taken from there.
        dry_run: Print it only.
        accept: The exit codes after which the evaluation goes on.
        env: Its environment; by default this process'.
        cwd: Where it runs.
        log: A file that gets all it prints, instead of the terminal alone.
        chatter: An expression for what only the log gets.
        typed: What it reads from its standard input.

    Raises:
        InputError: It is expo, and found its input at fault.
        EnvironmentFailure: It ended with another exit code.
        Stopped: It was stopped by a signal.
    """
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    if dry_run:
        return
    own = Path(sys.executable).parent / command[0]
    words = [str(own) if own.exists() else command[0], *command[1:]]
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        Path(log or os.devnull).open("wb") as file,
        subprocess.Popen(words, env=env, cwd=cwd, start_new_session=True, **streams) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended at once; its exit code says how
                process.stdin.write(typed)
                process.stdin.close()
            for line in _lines(process.stdout):
                file.write(line)
                sys.stderr.buffer.write(re.sub(chatter, b"", line) if chatter else line)
                sys.stderr.buffer.flush()
        except BaseException:  # nothing goes on by itself, whatever stops this process
            _end(process)
            raise
    _require(process.returncode, command[0], accept, f"see {log}" if log else "see what it printed above")


def _require(code: int, program: str, accept: Sequence[int], where: str) -> None:
    if code in accept:
        return
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(code - 128)
    kind = InputError if program == "expo" and code == InputError.exit_code else EnvironmentFailure
    raise kind(f"{program} ended with exit code {code}: {where}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started, which may take a while to leave whole files."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE_S)


GRACE_S = 30.0
"""How long a command may take to end."""


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """What comes, cut behind line ends and the carriage returns of progress bars."""
    rest = b""
    while piece := stream.read1(65536):  # type: ignore[attr-defined]
        *whole, rest = re.split(rb"(?<=[\r\n])", rest + piece)
        yield from whole
    yield rest


def answers(pair: Pair, task: str, given: argparse.Namespace, *, dataset: Path | None = None) -> list[Path]:
    """Have DPO and θ(α) answer a task, and return their files; what is there already is left alone.

    Args:
        pair: The pair.
        task: `alpaca` or `mtbench`.
        given: The command line, with limit, output_dir, generate_args and dry_run.
        dataset: The task's prompts; by default those on the hub.
    """
    suffix = {"alpaca": "json", "mtbench": "jsonl"}[task]
    for name in pair.names:
        command = ["expo", "generate", task, *(["--recipe", pair.recipe] if pair.recipe else []), *pair.flags(name)]
        command += ["--name", name, "--output-dir", str(given.output_dir)]
        command += ["--dataset", str(dataset)] if dataset else []
        command += ["--limit", str(given.limit)] if given.limit else []
        command += ["--trust-remote-code"] if given.trust_remote_code else []
        command += ["--allow-pickle"] if given.allow_pickle and name == pair.theta_name else []
        command += shlex.split(given.generate_args)
        run(command, dry_run=given.dry_run, accept=(0, FAILED_ROWS))
    return [given.output_dir / f"outputs_{task}" / f"{name}.{suffix}" for name in pair.names]


def unanswered(file: Path) -> int:
    """How many rows of an output failed, as `expo generate` says beside it."""
    meta = file.with_name(f"{file.stem}.meta.json")
    return int(read_json(meta).get("failed", 0)) if meta.exists() else 0


def show(found: Sequence[Result], columns: Sequence[Column], pair: Pair | None, *, as_json: bool) -> int:
    """Print the results: a table, or one JSON object; the exit code, 3 where answers or judgments are missing."""
    published = pair.published if pair else None
    if as_json:
        print(json_text({"results": [asdict(one) for one in found], "published": published}))
    else:
        print(table(found, columns, published))
    return FAILED_ROWS if any(one.failed or one.unanswered for one in found) else 0


def script(main: Callable[[], int]) -> int:
    """Run a script's main; what is expected to go wrong ends with one line and expo's exit codes."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        return main()
    except (ExpoError, OSError) as error:
        say(f"error: {error}")
        return error.exit_code if isinstance(error, ExpoError) else 1
    except (KeyboardInterrupt, Stopped) as stop:
        say("stopped; rerun the same command to continue")
        return stop.exit_code if isinstance(stop, Stopped) else 128 + signal.SIGINT


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(number)
