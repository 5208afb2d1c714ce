"""`expo inspect` with a LoRA adapter as DPO: against PEFT's merge in float64."""

from __future__ import annotations

import pytest
import torch
from adapters import CASES, Maker
from helpers import read_checkpoint_tensors
from test_inspection import exact

from expo.config import InspectConfig
from expo.errors import InputError
from expo.verbs import inspect

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of every unusual choice, and these are


@pytest.mark.parametrize("case", ["saved modules", "embedding", "fan-in fan-out"])
def test_an_adapter_is_measured_as_peft_merges_it(made: Maker, case: str) -> None:
    base, adapter = made(CASES[case], torch.float32)
    found = inspect.run(InspectConfig(sft=str(base), dpo=str(adapter)))
    sft, dpo = read_checkpoint_tensors(base), made.merged((base, adapter))
    assert {one.name for one in found.tensors} == set(sft)
    for one in found.tensors:
        relative, distance = exact(sft[one.name], dpo[one.name])
        assert one.figures.relative == pytest.approx(relative, rel=1e-5, abs=0)
        assert one.figures.one_minus_cosine == pytest.approx(distance, rel=1e-4, abs=1e-9)
    assert 0 < found.total.identical < found.total.tensors
    assert not found.mismatches


def test_an_adapter_as_sft_is_refused(made: Maker) -> None:
    base, adapter = made(CASES["plain"], torch.float32)
    with pytest.raises(InputError, match="is an adapter, not a checkpoint"):
        inspect.run(InspectConfig(sft=str(adapter), dpo=str(base)))
