"""What the engines built on torch share: devices, dtypes, and errors turned into messages of one line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from expo.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from expo.checkpoint.folder import read_config
from expo.checkpoint.header import read_shard
from expo.config import Dtype, RowsConfig, ScoreConfig
from expo.config.logit_space import LOGITS
from expo.cpus import usable_cpus
from expo.engines import EngineSpec
from expo.errors import EnvironmentFailure, InputError, first_line

MISMATCH = "ignore_mismatched_sizes"
"""Part of transformers' message about weights whose shapes do not match the model."""

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def find_device(name: str, *, prefer_gpu: bool) -> torch.device:
    """The torch device that a `--device` value means on this machine.

    Args:
        name: As `require_device` takes it.
        prefer_gpu: Whether auto is the GPU where there is one; otherwise it is always the CPU.

    Raises:
        EnvironmentFailure: CUDA is asked for and cannot be used.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if prefer_gpu and torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentFailure(f"--device {name}: torch sees no CUDA device; use --device cpu")
    return torch.device(name)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; no GPU is initialised."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(number) for number in range(count)]


def gpu_bytes() -> int:
    """The memory of a GPU that this process may use, asked in another process: CUDA here would take some of it.

    Raises:
        EnvironmentFailure: No GPU answers.
    """
    each = "torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())"
    ask = f"import torch; print(min({each}))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFailure(f"torch cannot query the GPU's memory: {said}")
    return int(done.stdout)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn the exceptions that transformers raises for an unusable model folder into an `InputError`.

    Args:
        name: The model's name, for the message.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with out_of_memory_hint("--dtype bfloat16"):
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError, AssertionError) as error:
            raise InputError(f"transformers cannot load {name}: {first_line(error)}") from error
        except RuntimeError as error:
            if MISMATCH not in str(error):
                raise
            reason = "its weights do not have the shapes that its config.json specifies"
            raise InputError(f"transformers cannot load {name}: {reason}") from error


@contextmanager
def out_of_memory_hint(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line.

    Args:
        advice: What reduces memory use, as an option.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFailure(
            f"out of memory; {advice} reduces memory use; rerun the same command to continue"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch has no exception class for that on a CPU."""
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in MEMORY_WORDS)


def run_dtype(dtype: Dtype, device: str, weights_bytes: int) -> Dtype:
    """The dtype that the transformers engine runs in; `auto` is resolved here, once per run.

    A CPU without bfloat16 arithmetic multiplies float32 several times faster, and widening changes no value.

    Args:
        dtype: As `--dtype` has it.
        device: As `--device` has it.
        weights_bytes: Size of the checkpoint's weights; twice that must fit in half of the memory.
    """
    import psutil
    import torch

    if dtype != "auto" or find_device(device, prefer_gpu=True).type != "cpu":
        return dtype
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # as torch itself decides
    is_fast = asked is None or asked()
    fits = 2 * weights_bytes <= psutil.virtual_memory().total // 2
    return "float32" if fits and not is_fast else "auto"


Config = TypeVar("Config", bound=RowsConfig)


def with_run_dtype(config: Config, model: Path) -> Config:
    """The settings with the data type the transformers engine runs in, so that it is recorded and compared."""
    models_at_once = 2 if getattr(config, "space", None) == LOGITS else 1
    weights_bytes = models_at_once * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    dtype = run_dtype(config.dtype, config.device, weights_bytes)
    if dtype != config.dtype:
        log.info("dtype: %s (this CPU has no bfloat16 arithmetic; --dtype bfloat16 takes half the memory)", dtype)
    return replace(config, dtype=dtype)


def with_reward_dtype(config: ScoreConfig, model: Path) -> ScoreConfig:
    """As `with_run_dtype`, for a reward model with any engine; one that is float32 anyway stays with `auto`."""
    return config if own_dtype(model) == "float32" else with_run_dtype(config, model)


def own_dtype(model: Path) -> str:
    """The data type that `--dtype auto` loads a model in: its config's, else that of its first weights."""
    config = read_config(model)
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(said := table.get(key), str):
                return said.removeprefix("torch.")
    for file in sorted(model.glob("*.safetensors"))[:1]:
        for tensor in read_shard(file).tensors:
            if tensor.dtype in FLOAT_DTYPES:
                return str(DTYPES[tensor.dtype].torch)
    return "float32"


def worker_environments(
    engine: str, spec: EngineSpec, config: RowsConfig, count: int, gpus: Sequence[str] | None = None
) -> list[dict[str, str]]:
    """What is set for each of several processes with an engine: the GPUs of its own, or its share of the CPU's threads.

    Args:
        engine: The engine's name.
        spec: What it can do.
        config: The run's settings.
        count: How many processes.
        gpus: The GPUs to share out; None takes those this process may use.

    Raises:
        InputError: There are not GPUs enough, or the engine does not run here.
    """
    if "local" not in spec.can:
        raise InputError(
            f"--data-parallel works only with engines that run on this machine, and this run uses {engine}"
        )
    spreads = "tensor_parallel" in spec.can
    if not spreads and config.device.startswith("cuda:"):
        raise InputError(f"--data-parallel {count} gives each worker a GPU of its own; leave out --device")
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus or (not spreads and config.device == "cpu"):
        threads = max(1, usable_cpus() // count)
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count
    size = (getattr(config, "tensor_parallel", None) or max(1, len(gpus) // count)) if spreads else 1
    if count * size > len(gpus):
        raise InputError(
            f"--data-parallel {count} with --tensor-parallel {size} needs {count * size} GPUs, and there are "
            f"{len(gpus)}"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * size : (i + 1) * size])} for i in range(count)]


def gpus_per_engine(engine: str, spec: EngineSpec, config: RowsConfig, *, asked: str, there: bool) -> int:
    """How many GPUs an engine takes on a machine of a cluster; 0 where it runs on CPUs.

    Args:
        engine: The engine's name.
        spec: What it can do.
        config: The run's settings.
        asked: Its `--engine`.
        there: Whether the cluster has GPUs.

    Raises:
        InputError: The engine does not run on the machines, or was chosen for this one, which has no GPU.
    """
    if "local" not in spec.can:
        raise InputError(f"--ray works only with engines that run on its machines, and this run uses {engine}")
    if config.device.startswith("cuda:"):
        raise InputError("--ray gives each engine GPUs of its own; leave out --device")
    if there and asked == "auto" and not visible_gpus():
        raise InputError(
            "--engine auto looks at this machine, which has no GPU, and the cluster has: say --engine vllm or "
            "transformers"
        )
    if not there or config.device == "cpu":
        return 0
    return (config.tensor_parallel or 1) if "tensor_parallel" in spec.can else 1
