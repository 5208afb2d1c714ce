"""The table of dtypes against torch, and what `--device` means."""

from __future__ import annotations

import pytest
import torch

from expo.checkpoint.dtypes import DTYPES, EXACT_DTYPES, FLOAT_DTYPES, FROM_TORCH
from expo.engines.torch_tools import find_device
from expo.errors import EnvironmentFailure
from expo.theta.buffers import TORCH_DTYPES


def test_the_table_is_torchs() -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert DTYPES[name].bits == 8 * dtype.itemsize
        assert FROM_TORCH[str(dtype).removeprefix("torch.")] == name
        assert (name in EXACT_DTYPES) == (not dtype.is_floating_point and not dtype.is_complex)
    assert {TORCH_DTYPES[name] for name in FLOAT_DTYPES} == {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    }


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("prefer_gpu", [True, False])
def test_auto_is_the_gpu_only_where_there_is_one_and_it_is_preferred(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, prefer_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert find_device("auto", prefer_gpu=prefer_gpu).type == ("cuda" if gpu and prefer_gpu else "cpu")
    assert find_device("cpu", prefer_gpu=prefer_gpu) == torch.device("cpu")
    if gpu:
        assert find_device("cuda:1", prefer_gpu=prefer_gpu) == torch.device("cuda", 1)
    else:
        with pytest.raises(EnvironmentFailure, match="--device cuda:1: torch sees no CUDA device; use --device cpu"):
            find_device("cuda:1", prefer_gpu=prefer_gpu)
