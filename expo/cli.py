"""The command line: options, wiring, exit codes. It declares; the verbs decide.

Options are read from the context (`_settings`), by the names of the config fields they fill.
stdout carries data only (with `--json` exactly one JSON object); progress, warnings and errors go to stderr.
To add a command, write its module and config class, name it in `config.COMMANDS`, and declare it here.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import sys
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from expo import __version__, config, recipes
from expo.config import ExtrapolateConfig, GenerateConfig, InspectConfig, ScoreConfig
from expo.errors import ExpoError, Stopped
from expo.options import (
    AllowPickleOption,
    BatchTokensOption,
    ChatTemplateOption,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DpoOption,
    DryRunOption,
    JsonOption,
    LimitOption,
    ModelDtypeOption,
    OutputDirOption,
    OverwriteOption,
    PictureOption,
    RecipeOption,
    SftOption,
    TaskArgument,
    TrustRemoteCodeOption,
    WorkersOption,
)
from expo.printing import print_data, print_result

if TYPE_CHECKING:
    from collections.abc import Sequence

Config = TypeVar("Config", bound=config.CommonConfig)

PARTLY_FAILED = 3
INTERRUPTED = 130

ACCESS_TOKEN = r"hf_[A-Za-z0-9]{30,}"
"""Of the hub; it may stand in a path, a URL or an exception, and is never printed."""
CONTROL_CHARACTER = r"[\x00-\x08\x0b-\x1f\x7f]"

log = logging.getLogger("expo")

PROCESS_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin make an engine on a CPU ten times slower
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Set before torch is loaded, which reads it then; what is set already stays."""

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


# --- commands ---------------------------------------------------------------------------------------------------


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    pass


@app.command(
    epilog="\b\nExamples:\n"
    "  expo extrapolate --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta --alpha 0.1\n"
    "  expo extrapolate --recipe Starling-LM-7B-beta --output checkpoints/starling --dry-run"
)
def extrapolate(
    ctx: typer.Context,
    *,
    sft: SftOption,
    dpo: DpoOption,
    alpha: Annotated[
        list[float] | None, typer.Option(metavar="A", help="Extrapolation strength α; repeat for several.  [required]")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Output folder; may hold {alpha}. [default: checkpoints/<DPO name>-ExPO-a<A>]",
        ),
    ] = ExtrapolateConfig.output,
    device: DeviceOption = ExtrapolateConfig.device,
    dtype: Annotated[
        config.Dtype, typer.Option(help="Data type of the written weights; auto keeps each DPO tensor's own.")
    ] = ExtrapolateConfig.dtype,
    workers: WorkersOption = ExtrapolateConfig.workers,
    max_shard_size: Annotated[
        str,
        typer.Option(metavar="keep|SIZE", help="Most bytes of one file, such as 500MB or 5GB; keep has DPO's files."),
    ] = ExtrapolateConfig.max_shard_size,
    alpha_for: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=A", help="Tensors with an α of their own; repeatable, first match wins."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Tensors copied from DPO; repeatable.")
    ] = None,
    missing: Annotated[
        config.Missing, typer.Option(help="Tensors that SFT lacks: refuse, or copy from DPO.")
    ] = ExtrapolateConfig.missing,
    vocab: Annotated[
        config.Vocab, typer.Option(help="Vocabularies of different size: refuse, or extrapolate the common rows.")
    ] = ExtrapolateConfig.vocab,
    allow_pickle: AllowPickleOption = ExtrapolateConfig.allow_pickle,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Write NaN and infinity instead of refusing them.")
    ] = ExtrapolateConfig.allow_nonfinite,
    fsync: Annotated[
        bool, typer.Option("--fsync/--no-fsync", help="Force files to the disk before they get their names.")
    ] = ExtrapolateConfig.fsync,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Upload the output to this model repository; may hold {alpha}."),
    ] = ExtrapolateConfig.push_to_hub,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private where it is new.")
    ] = ExtrapolateConfig.private,
    overwrite: OverwriteOption = ExtrapolateConfig.overwrite,
    dry_run: DryRunOption = ExtrapolateConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the extrapolated checkpoint θ(α), streaming both inputs in constant memory."""
    settings = _settings(ctx, ExtrapolateConfig)
    from expo import extrapolate as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    written = verb.run(settings)
    for output_written in written:
        log.info("α = %r: %s: %s", output_written.alpha, output_written.status, output_written.path)
        if output_written.pushed:
            log.info("α = %r: pushed: %s", output_written.alpha, output_written.pushed.url)
    data = {"outputs": [dataclasses.asdict(one) for one in written]}
    print_result(data, "\n".join(str(one.path) for one in written), as_json=as_json)


@app.command(
    epilog="\b\nExamples:\n"
    "  expo generate alpaca --model HuggingFaceH4/zephyr-7b-beta\n"
    "  expo generate prompts.jsonl --model checkpoints/zephyr-7b-beta-ExPO-a0.1 --engine vllm --limit 100"
)
def generate(
    ctx: typer.Context,
    *,
    task: TaskArgument,
    model: Annotated[str, typer.Option(metavar="MODEL", help="A directory, hub id, or id@revision.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the output. [default: the model's name]")
    ] = GenerateConfig.name,
    engine: Annotated[
        config.GenerateEngine, typer.Option(help="auto: vLLM where it is installed and can run.")
    ] = GenerateConfig.engine,
    engine_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Given to the engine as it is; repeatable.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="PATH|ID", help="The task's prompts from a local file or another data set.")
    ] = GenerateConfig.dataset,
    limit: LimitOption = GenerateConfig.limit,
    output_dir: OutputDirOption = GenerateConfig.output_dir,
    device: DeviceOption = GenerateConfig.device,
    dtype: ModelDtypeOption = GenerateConfig.dtype,
    tensor_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs per engine (vllm). [default: all]")
    ] = GenerateConfig.tensor_parallel,
    batch_tokens: BatchTokensOption = GenerateConfig.batch_tokens,
    chat_template: ChatTemplateOption = GenerateConfig.chat_template,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message put before every prompt.")
    ] = GenerateConfig.system,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Samples per prompt.")] = GenerateConfig.n,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = GenerateConfig.temperature,
    top_k: Annotated[int, typer.Option(help="-1 for all tokens.")] = GenerateConfig.top_k,
    top_p: Annotated[float, typer.Option(help="Probability mass to sample from.")] = GenerateConfig.top_p,
    presence_penalty: Annotated[
        float, typer.Option(help="Off the logit of each token generated before.")
    ] = GenerateConfig.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(help="Off a token's logit per time it was generated.")
    ] = GenerateConfig.frequency_penalty,
    seed: Annotated[int, typer.Option(help="Seed of every request.")] = GenerateConfig.seed,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most new tokens.")] = GenerateConfig.max_tokens,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Further token id that ends an answer; repeatable.")
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = GenerateConfig.trust_remote_code,
    overwrite: OverwriteOption = GenerateConfig.overwrite,
    dry_run: DryRunOption = GenerateConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
    """Answer a task's prompts; TASK is ultrafeedback, alpaca, or a file of prompts."""
    settings = _settings(ctx, GenerateConfig)
    from expo import generate as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    result = verb.run(settings)
    log.info("%s: %d rows", result.status, result.rows)
    print_result(dataclasses.asdict(result), result.output, as_json=as_json)
    _exit_after(result.failed)


@app.command(
    epilog="\b\nExamples:\n"
    "  expo score alpaca --name zephyr-7b-beta\n"
    "  expo score prompts.jsonl --name my-model --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1 --json"
)
def score(
    ctx: typer.Context,
    *,
    task: TaskArgument,
    name: Annotated[str, typer.Option(metavar="NAME", help="The output's name, as `expo generate` gave it.")],
    outputs: Annotated[
        str | None, typer.Option(metavar="FILE", help="The file to score, where it lies elsewhere.")
    ] = ScoreConfig.outputs,
    reward_model: Annotated[
        str, typer.Option(metavar="RM", help="A directory, hub id, or id@revision; one label.")
    ] = ScoreConfig.reward_model,
    engine: Annotated[config.ScoreEngine, typer.Option(help="What runs the reward model.")] = ScoreConfig.engine,
    limit: LimitOption = ScoreConfig.limit,
    output_dir: OutputDirOption = ScoreConfig.output_dir,
    device: DeviceOption = ScoreConfig.device,
    dtype: ModelDtypeOption = ScoreConfig.dtype,
    batch_tokens: BatchTokensOption = ScoreConfig.batch_tokens,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Longest conversation in tokens. [default: the model's own]")
    ] = ScoreConfig.max_length,
    chat_template: ChatTemplateOption = ScoreConfig.chat_template,
    trust_remote_code: TrustRemoteCodeOption = ScoreConfig.trust_remote_code,
    overwrite: OverwriteOption = ScoreConfig.overwrite,
    dry_run: DryRunOption = ScoreConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
    """Score generated answers with a reward model: raw logits, one per row."""
    settings = _settings(ctx, ScoreConfig)
    from expo import score as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    result = verb.run(settings)
    if result.mean is not None:
        log.info(
            "%s: mean reward %.4f ± %.4f over %d rows",
            result.status,
            result.mean,
            result.standard_error or 0.0,
            result.n,
        )
    print_result(dataclasses.asdict(result), result.rewards, as_json=as_json)
    _exit_after(result.failed)


@app.command(
    "inspect",
    epilog="\b\nExamples:\n"
    "  expo inspect --sft HuggingFaceH4/mistral-7b-sft-beta --dpo HuggingFaceH4/zephyr-7b-beta\n"
    "  expo inspect --recipe Starling-LM-7B-beta --output starling.png --json",
)
def inspect_pair(
    ctx: typer.Context,
    *,
    sft: SftOption,
    dpo: DpoOption,
    output: PictureOption = InspectConfig.output,
    device: DeviceOption = InspectConfig.device,
    workers: WorkersOption = InspectConfig.workers,
    allow_pickle: AllowPickleOption = InspectConfig.allow_pickle,
    overwrite: OverwriteOption = InspectConfig.overwrite,
    dry_run: DryRunOption = InspectConfig.dry_run,
    as_json: JsonOption = False,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure ‖θ_dpo − θ_sft‖ per layer and module, and tell whether the pair looks like one ExPO suits."""
    settings = _settings(ctx, InspectConfig)
    from expo import inspection as verb

    if settings.dry_run:
        print_data(verb.plan(settings).describe(), as_json=as_json)
        return
    found = verb.run(settings)
    print_result(found.describe(), found.text(), as_json=as_json)
    log.info("%s", f"drawn: {found.picture}" if found.picture else "--output FILE.png draws it, layer by module")


@app.command("recipes", epilog="\b\nExamples:\n  expo recipes\n  expo recipes Starling-LM-7B-beta --json")
def show_recipes(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models known by name, with their SFT checkpoint, α and source."""
    known = [recipes.load(name) for name in names or recipes.names()]
    print_result({"recipes": [one.describe() for one in known]}, recipes.table(known), as_json=as_json)


# --- wiring -----------------------------------------------------------------------------------------------------


def _settings(ctx: typer.Context, kind: type[Config]) -> Config:
    """The command's config object, from the option values typer has parsed and checked."""
    given = {name: value for name, value in ctx.params.items() if value is not None}
    values: dict[str, Any] = {}
    for name in {field.name for field in dataclasses.fields(kind)} & given.keys():
        values[name] = tuple(given[name]) if isinstance(given[name], list) else given[name]
    return kind(**values)


def _exit_after(failed: int) -> None:
    if failed:
        log.warning("%d rows failed and are marked; the same command tries them again", failed)
        raise typer.Exit(PARTLY_FAILED)


def _on_terminate(signal_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(signal_number)


def _clean(text: str) -> str:
    """Text that came from anywhere, fit for a terminal and a log: no access token, no control character."""
    text = re.sub(ACCESS_TOKEN, "hf_…", text)
    secret = os.environ.get("HF_TOKEN", "")
    text = text.replace(secret, "hf_…") if len(secret) > 7 else text
    return re.sub(CONTROL_CHARACTER, lambda found: repr(found[0])[1:-1], text)


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
    return _fail(error, " ".join(message.split()) + hint, 2)


def main() -> None:
    """The `expo` program."""
    for name, value in (PROCESS_ENVIRONMENT | ({} if sys.stderr.isatty() else NO_BARS)).items():
        os.environ.setdefault(name, value)
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
