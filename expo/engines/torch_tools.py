"""What the backends built on torch share: GPUs, errors turned into one line, the data type of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from expo.checks import find_device
from expo.config import Dtype
from expo.errors import EnvironmentFailure, InputError, first_line

MISMATCH = "ignore_mismatched_sizes"
"""In what transformers says of weights that do not fit a model."""

MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; none is touched."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(number) for number in range(count)]


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for an unusable model folder into an `InputError`.

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
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(f"transformers cannot load {name}: {first_line(error)}") from error
        except RuntimeError as error:
            if MISMATCH not in str(error):
                raise
            reason = "its weights do not have the shapes that its config.json says"
            raise InputError(f"transformers cannot load {name}: {reason}") from error


@contextmanager
def out_of_memory_hint(flag: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line.

    Args:
        flag: The option that lowers the need.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFailure(f"out of memory; {flag} lowers the need, and the same command goes on") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was lacking; torch has no class of its own for the CPU's."""
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in MEMORY_WORDS)


def run_dtype(dtype: Dtype, device: str, weights_bytes: int) -> Dtype:
    """The data type the transformers engine runs in; what auto means is decided here, once for a run.

    A CPU without bfloat16 arithmetic multiplies float32 several times faster, and widening the weights changes none.

    Args:
        dtype: As `--dtype` has it.
        device: As `--device` has it.
        weights_bytes: Size of the checkpoint's weights; twice as much must be within half of the machine's memory.
    """
    import psutil
    import torch

    if dtype != "auto" or find_device(device, prefer_gpu=True).type != "cpu":
        return dtype
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # how torch itself decides
    is_fast = asked is None or asked()
    fits = 2 * weights_bytes <= psutil.virtual_memory().total // 2
    return "float32" if fits and not is_fast else "auto"
