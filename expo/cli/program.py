"""The command line: wiring, streams, exit codes. Config classes declare; the verbs decide.

stdout carries data only (with `--json` exactly one JSON object); progress, warnings and errors go to stderr.
To add a command, write its module and config class, name it in `config.COMMANDS`, and add it to COMMANDS.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import signal
import sys
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from expo import __version__
from expo.cli import extrapolate, generate, inspect, recipes, score, work
from expo.cli.options import DebugOption, refused_value
from expo.errors import ExpoError, Stopped
from expo.orphans import end_with_parent
from expo.redact import without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130

CONTROL_CHARACTER = r"[\x00-\x08\x0b-\x1f\x7f]"

log = logging.getLogger("expo")

PROCESS_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin make an engine on a CPU ten times slower
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Set before torch is loaded, which reads it then; what is set already stays."""

GC_OBJECTS = 20_000
"""New objects after which garbage is looked for; 700, the default, take a seventh of the time of engines' imports."""

NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Set where stderr is not a terminal; the libraries would draw their bars into a log."""

app = typer.Typer(
    name="expo",
    help="ExPO model extrapolation: θ(α) = θ_dpo + α(θ_dpo − θ_sft), a better-aligned model without training.",
    epilog="\b\nexpo extrapolate --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1"
    "\nexpo recipes",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"expo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    pass


COMMANDS = {
    "extrapolate": extrapolate,
    "generate": generate,
    "score": score,
    "inspect": inspect,
    "recipes": recipes,
}
for name, module in COMMANDS.items():
    app.command(name, epilog=module.EXAMPLES)(module.command)
app.command("work", hidden=True)(work.command)


# --- wiring -----------------------------------------------------------------------------------------------------


def _on_terminate(signal_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(signal_number)


def _clean(text: str) -> str:
    """Text that came from anywhere, fit for a terminal and a log: no secret, no control character."""
    return re.sub(CONTROL_CHARACTER, lambda found: repr(found[0])[1:-1], without_secrets(text))


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _clean(super().format(record))


def _say(message: object) -> None:
    print(_clean(f"expo: {message}").replace("\n", "\\n"), file=sys.stderr)


def _fail(error: Exception, message: str, code: int) -> int:
    if log.isEnabledFor(logging.DEBUG):
        print(_clean("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    _say(f"error: {message}")
    return code


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: The words after `expo`; None takes the process's own.
    """
    try:
        end_with_parent()
        code = int(app(arguments, prog_name="expo", standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except ExpoError as error:
        return _fail(error, str(error), error.exit_code)
    except typer.TyperException as error:
        return _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Stopped as stop:
        return stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(error, f"{error.filename or 'I/O'}: {error.strerror or error}", 1)
    except MemoryError as error:
        return _fail(error, "out of memory", 1)


def _usage_error(error: typer.TyperException) -> int:
    message = getattr(error, "format_message", error.__str__)()
    if message.startswith("Usage:"):
        print(message, file=sys.stderr)
        return 2
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return _fail(error, " ".join(message.split()).rstrip(".") + refused_value(error) + hint, 2)


def main() -> None:
    """The `expo` program."""
    for name, value in (PROCESS_ENVIRONMENT | ({} if sys.stderr.isatty() else NO_BARS)).items():
        os.environ.setdefault(name, value)
    gc.set_threshold(GC_OBJECTS)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the terminal's encoding lacks
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("expo: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    signal.signal(signal.SIGTERM, _on_terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    code = run()
    if code in (INTERRUPTED, 128 + signal.SIGTERM):
        _say("stopped; the same command goes on from here")
    sys.exit(code)
