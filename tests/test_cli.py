"""The program itself: what it imports, prints and returns. What commands do is tested beside their modules."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from helpers import Result, environment, expo_command, run_expo

from expo import __version__, config
from expo.cli import program as cli
from expo.errors import EnvironmentFailure, InputError, Stopped
from expo.settings import flag, headings_of, settings_of

HEAVY = ("torch", "transformers", "vllm", "openai", "datasets", "scipy", "matplotlib")
ALL_COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
COMMANDS = sorted(name for name, command in ALL_COMMANDS.items() if not command.hidden)


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    """`--debug` sets a level for the whole process."""
    level = cli.log.level
    yield
    cli.log.setLevel(level)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The program in this process."""

    def call(*args: object) -> Result:
        code = cli.run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]) -> Callable[..., Result]:
    """`expo extrapolate`, whose verb raises what it is told to."""

    def call(error: BaseException, *args: str) -> Result:
        def verb(_: object) -> None:
            raise error

        monkeypatch.setattr("expo.verbs.extrapolate.run", verb)
        return run("extrapolate", "--sft", "s", "--dpo", "d", "--alpha", "1", *args)

    return call


# --- help and version ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["expo", *COMMANDS])
def test_help_imports_nothing_heavy_and_shows_an_example(command: list[str]) -> None:
    script = (
        "import sys; from expo.cli.program import run; code = run(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [expo_command()[0], "-c", script, *command, "--help"], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert f"Usage: {' '.join(['expo', *command])}" in done.stdout
    examples = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("expo ")]
    assert examples, "help ends with commands that run"
    assert all(words[1] in (command or COMMANDS) for words in examples)


def test_a_plan_from_folders_imports_neither_torch_nor_the_hubs_client(pair: tuple[Path, Path], tmp_path: Path) -> None:
    script = (
        "import sys; from expo.cli.program import run; code = run(sys.argv[1:]);"
        "heavy = ('torch', 'huggingface_hub.hf_api');"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    (pair[1] / "README.md").write_text("---\nbase_model: me/sft\n---\n# A card\n")
    words = ["extrapolate", "--sft", *pair[:1], "--dpo", *pair[1:], "--alpha", "0.5", "--output", tmp_path / "out"]
    command = [expo_command()[0], "-c", script, *map(str, words), "--dry-run", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("command", list(config.COMMANDS))
def test_help_lists_each_option_once_under_the_heading_of_its_class(
    command: str, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    kind = config.COMMANDS[command]
    under, heading = {}, ""
    for line in run(command, "--help").stdout.partition("Examples:")[0].splitlines():
        heading = line.rstrip(":") if line.endswith(":") and not line.startswith(" ") else heading
        for spelled in re.findall(r"^  (--[a-z-]+)", line):
            assert under.setdefault(spelled, heading) == heading, spelled
    wanted = {
        flag(name): heading for name, heading in headings_of(kind).items() if not settings_of(kind)[name].positional
    }
    assert wanted.keys() - under.keys() <= {"--rule"}  # while there is only one
    assert [one for one in wanted if under.get(one, wanted[one]) != wanted[one]] == []
    assert {under[one] for one in under.keys() - wanted.keys()} == {"All commands"}


def test_module_and_script_are_the_same_program() -> None:
    module = run_expo("--version")
    script = subprocess.run(["expo", "--version"], env=_with_scripts(), capture_output=True, text=True)
    assert (module.code, module.stdout, module.stderr) == (0, f"expo {__version__}\n", "")
    assert (script.returncode, script.stdout, script.stderr) == (0, module.stdout, "")


def _with_scripts() -> dict[str, str]:
    folder = Path(expo_command()[0]).parent
    return environment(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_no_command_is_a_usage_error_on_stderr(run: Callable[..., Result]) -> None:
    result = run()
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: expo")


@pytest.mark.parametrize("args", [["extrapolat"], ["extrapolate"], ["extrapolate", "--sft"], ["--nonsense"]])
def test_usage_errors_are_one_line(run: Callable[..., Result], args: list[str]) -> None:
    result = run(*args)
    assert (result.code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("expo: error: ")


@pytest.mark.parametrize(
    ("args", "value"), [(("--alpha", "half"), "'half'"), (("--alpha=1", "--workers=1.5"), "'1.5'")]
)
def test_a_refused_value_is_named(run: Callable[..., Result], args: tuple[str, ...], value: str) -> None:
    result = run("extrapolate", "--sft", "s", "--dpo", "d", *args)
    assert result.code == 2
    assert result.stderr.endswith(f"; got {value} (see `expo extrapolate --help`)\n")


SHARED = "--config --debug --dry-run --json --overwrite --recipe"
PAIR = f"{SHARED} --aligned --allow-pickle --device --dpo --sft"
RULES = "--allow-nonfinite --alpha --alpha-for --checkpoint --exclude --missing --rule --vocab"
ROWS = (
    f"{SHARED} --batch-tokens --chat-template --dataset --device --dtype --engine --limit --name --output-dir"
    " --template-date"
)
PARTS = "--data-parallel --join --part --ray"
FLAGS = {
    "extrapolate": f"{PAIR} {RULES} {PARTS} --as-adapter --dtype --fsync --max-shard-size --no-fsync --output"
    " --private --push-to-hub --rank --stream-sft --target-step --verify --workers",
    "generate": f"{PAIR} {RULES} {ROWS} {PARTS} --base-url --concurrency --engine-arg --frequency-penalty"
    " --max-tokens --model --n --presence-penalty --seed --seed-mode --space --stop-token-id --system"
    " --target-step --temperature"
    " --tensor-parallel --top-k --top-p --trust-remote-code",
    "score": f"{ROWS} {PARTS} --aligned --beta --bos --dpo --implicit-reward --max-length"
    " --outputs --reward-model --sft --trust-remote-code --engine-arg --tensor-parallel",
    "compare": "--config --dataset --debug --dry-run --flips --intersect --json --markdown --output-dir --task",
    "report": "--config --dataset --debug --dry-run --figures --intersect --json --output --output-dir --overwrite"
    " --task",
    "inspect": f"{PAIR} --checkpoint --output --rule --workers",
    "sweep": f"{PAIR} {RULES}"
    " --any-pair --batch-tokens --chat-template --confidence --confirm --data-parallel --dataset --dtype --engine"
    " --engine-arg --frequency-penalty --indifference --likelihood --limit --max-tokens --n --output --presence-penalty"
    " --ray --refine --reward-batch-tokens --reward-bos --reward-chat-template --reward-device --reward-dtype"
    " --reward-engine --reward-engine-arg --reward-max-length --reward-model --reward-tensor-parallel"
    " --search --seed --seed-mode --slice --space --stop-token-id --switch --system --target-step --task --temperature"
    " --tensor-parallel --top-k --top-p --trust-remote-code --with-sft --write",
    "recipes": "--debug --json --show",
}
ARGUMENTS = {"generate": {"task"}, "score": {"task"}, "compare": {"runs"}, "report": {"runs"}, "recipes": {"names"}}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_every_command(command: str) -> None:
    params = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    spellings = {word for param in params for word in (*param.opts, *param.secondary_opts)}
    assert spellings == {*FLAGS[command].split(), *ARGUMENTS.get(command, ())}


# --- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("alpha is odd"), 2, "expo: error: alpha is odd\n"),
        (EnvironmentFailure("the disk is gone"), 1, "expo: error: the disk is gone\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "expo: error: /x/y: No space left on device\n"),
        (OSError("strange"), 1, "expo: error: I/O: strange\n"),
        (MemoryError(), 1, "expo: error: out of memory\n"),
        (KeyboardInterrupt(), 130, ""),
        (Stopped(15), 143, ""),
    ],
)
def test_errors_become_a_line_and_a_code(
    fail: Callable[..., Result], error: BaseException, code: int, line: str
) -> None:
    assert fail(error) == Result(code, "", line)


def test_bugs_keep_their_traceback(fail: Callable[..., Result]) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_debug_shows_the_traceback_of_known_errors(fail: Callable[..., Result]) -> None:
    result = fail(InputError("alpha is odd"), "--debug")
    assert result.code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("expo: error: alpha is odd\n")
    assert result.stdout == ""


# --- output -------------------------------------------------------------------------------------------------------


def test_stdout_is_data_and_stderr_is_talk(pair: tuple[Path, Path], tmp_path: Path) -> None:
    args = ("extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", 0.5, "--output", tmp_path / "out")
    first, second = run_expo(*args), run_expo(*args)
    assert first == Result(0, f"{tmp_path}/out\n", f"expo: α = 0.5: written: {tmp_path}/out\n")
    assert second == Result(0, f"{tmp_path}/out\n", f"expo: α = 0.5: already complete: {tmp_path}/out\n")


def test_json_is_exactly_one_object(run: Callable[..., Result], pair: tuple[Path, Path], tmp_path: Path) -> None:
    args = ("extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", 0.5, "--output", tmp_path / "out", "--json")
    for status in ("written", "already complete"):
        result = run(*args)
        assert result.code == 0
        assert len(result.stdout.splitlines()) == 1
        expected = {"outputs": [{"alpha": 0.5, "path": f"{tmp_path}/out", "status": status, "pushed": None}]}
        assert json.loads(result.stdout) == expected


@pytest.mark.parametrize("as_json", [True, False])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    run: Callable[..., Result], pair: tuple[Path, Path], tmp_path: Path, as_json: bool
) -> None:
    args = [
        "extrapolate",
        "--sft",
        pair[0],
        "--dpo",
        pair[1],
        "--alpha",
        0.5,
        "--output",
        tmp_path / "out",
        "--dry-run",
    ]
    before = sorted(tmp_path.rglob("*"))
    result = run(*args, *(["--json"] if as_json else []))
    assert (result.code, result.stderr) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    if as_json:
        plan = json.loads(result.stdout)
        assert plan["outputs"] == [{"alpha": 0.5, "path": f"{tmp_path}/out", "complete": False}]
        assert plan["tensors"] == {"extrapolated": 3, "copied": 0, "equal": 0}
        sizes = {file.name: file.stat().st_size for file in pair[1].glob("*.safetensors")}
        assert {shard["file"]: shard["bytes"] for shard in plan["shards"]} == sizes
        assert plan["bytes_per_output"] == sum(sizes.values())
    else:
        assert f"outputs           alpha 0.5, path {tmp_path}/out, complete False\n" in result.stdout


def test_a_json_run_that_fails_prints_no_data(run: Callable[..., Result]) -> None:
    result = run("extrapolate", "--sft", "./no/such/x", "--dpo", "d", "--alpha", 1, "--json")
    assert (result.code, result.stdout) == (2, "")


def test_a_closed_pipe_is_no_traceback(pair: tuple[Path, Path], tmp_path: Path) -> None:
    args = ["extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", 0.5, "--output", tmp_path / "out"]
    command = expo_command(*args, "--dry-run")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_warnings_go_to_stderr(
    run: Callable[..., Result], pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (pair[1] / "stray.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes())
    with caplog.at_level(logging.WARNING):
        result = run("extrapolate", "--sft", pair[0], "--dpo", pair[1], "--alpha", 1, "--dry-run", "--json")
    assert json.loads(result.stdout)["bytes_per_output"] > 0
    assert caplog.messages == ["dpo: ignoring stray.safetensors, which is not part of it"]


def test_letters_that_the_terminals_encoding_lacks_are_escaped() -> None:
    result = run_expo("recipes", "zephyr_0.1", env={"PYTHONIOENCODING": "ascii"})
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.split()[:2] == ["name", r"\u03b1"]


# --- what is never printed ----------------------------------------------------------------------------------------

SECRETS = {"a token of the hub": "hf_" + "Aa0" * 12, "HF_TOKEN, whatever it looks like": "password123"}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize("args", [(), ("--debug",)])
def test_a_token_is_never_printed(
    secret: str, args: tuple[str, ...], fail: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", secret)
    result = fail(EnvironmentFailure(f"https://me:{secret}@hub/api did not answer"), *args)
    assert secret not in result.stderr
    assert result.stderr.endswith("expo: error: https://…@hub/api did not answer\n")


def test_a_token_is_not_logged_either() -> None:
    record = logging.LogRecord("expo", logging.WARNING, "", 0, "%s", ("a hf_" + "Aa0" * 12 + "\x1b[2J",), None)
    assert cli._LineFormatter("expo: %(message)s").format(record) == "expo: a hf_…\\x1b[2J"


def test_a_message_is_one_line_and_moves_no_cursor(fail: Callable[..., Result]) -> None:
    result = fail(InputError("the folder a\nb\x1b[2J\r is gone"))
    assert result.stderr == "expo: error: the folder a\\nb\\x1b[2J\\r is gone\n"
