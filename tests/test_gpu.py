"""What only a machine with a GPU can show."""

from __future__ import annotations

import helpers
import pytest
import torch

from expo import extrapolate as verb
from expo.config import ExtrapolateConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", helpers.DTYPES)
@pytest.mark.parametrize("alpha", [0.3, -1.0, 8.0])
def test_cuda_gives_what_the_cpu_gives(tmp_path, dtype, alpha):
    """Bit for bit, or within the law the CPU keeps (a fused multiply-add may round once less)."""
    sides = helpers.random_pair({"w": (4096, 1025), "b": (7,)}, helpers.DTYPES[dtype])
    sft, dpo = (helpers.write_checkpoint(tmp_path / name, side) for name, side in zip(("s", "d"), sides, strict=True))
    outputs = {}
    for device in ("cpu", "cuda"):
        settings = ExtrapolateConfig(
            sft=str(sft), dpo=str(dpo), alpha=(alpha,), device=device, output=str(tmp_path / device)
        )
        verb.run(settings)
        outputs[device] = helpers.read_checkpoint_tensors(tmp_path / device)
    for name, expected in outputs["cpu"].items():
        got = outputs["cuda"][name]
        if dtype == "float32":
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        else:
            helpers.share_off(sides[0][name], sides[1][name], alpha, got)


def test_device_memory_stays_small(tmp_path):
    sides = helpers.random_pair({"w": (8192, 8192)})
    sft, dpo = (helpers.write_checkpoint(tmp_path / name, side) for name, side in zip(("s", "d"), sides, strict=True))
    torch.cuda.reset_peak_memory_stats()
    verb.run(ExtrapolateConfig(sft=str(sft), dpo=str(dpo), alpha=(0.3,), device="cuda", output=str(tmp_path / "o")))
    assert torch.cuda.max_memory_allocated() < 1 << 30
