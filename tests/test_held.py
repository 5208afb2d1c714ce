"""What a live model holds: hashes that see every bit of every tensor, in its place."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import nn

from expo.engines import held
from expo.engines.held import PACKED, bits_hash, differing, held_by, is_packed, mixed_hash


@pytest.fixture(params=["on a CPU", "on a device"])
def hashed(request, monkeypatch):
    """Both hashes; that of a device in chunks of few words."""
    monkeypatch.setattr(held, "CHUNK_WORDS", 3)
    own = {"on a CPU": bits_hash, "on a device": lambda values: mixed_hash(values.reshape(-1).view(torch.uint8))}
    return own[request.param]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("count", [1, 7, 13])
def test_every_bit_counts(hashed, dtype, count):
    flat = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    seen = {hashed(flat.view(dtype))}
    for byte, bit in product(range(len(flat)), (0, 7)):
        changed = flat.clone()
        changed[byte] ^= 1 << bit
        seen.add(hashed(changed.view(dtype)))
    assert len(seen) == 1 + 2 * len(flat)
    assert hashed(flat.clone().view(dtype)) in seen


def test_equal_values_signs_and_orders_are_told_apart(hashed):
    rows = [
        torch.ones(64),
        torch.full((64,), 2.0),
        torch.zeros(64),
        -torch.zeros(64),
        torch.arange(64.0),
        torch.arange(64.0).flip(0),
        torch.arange(64.0).roll(1),
        torch.arange(64.0).view(4, 16).T.reshape(-1),
    ]
    assert all(hashed(one) != hashed(other) for one, other in combinations(rows, 2))


def test_a_view_is_hashed_as_what_it_shows(hashed):
    values = torch.randn(8, 6)
    assert hashed(values.T) == hashed(values.T.contiguous()) != hashed(values)
    assert hashed(values[1:, 1:]) == hashed(values[1:, 1:].clone())
    assert hashed(values.view(-1)[1:4]) == hashed(values.view(-1)[1:4].clone())


@pytest.mark.gpu
def test_a_gpu_gives_the_sum_of_a_cpu():
    values = torch.randn(1 << 20).to(torch.bfloat16)
    assert bits_hash(values.cuda()) == mixed_hash(values.view(torch.uint8))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.bfloat16))
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.register_parameter("bias", None)
        self.absorbed, self.places = torch.ones(2), torch.ones(2, dtype=torch.int32)
        self.kv_cache = torch.ones(5)


def test_parameters_buffers_and_what_is_made_of_them_are_held_and_no_cache():
    model = nn.Sequential(Layer(), Layer())
    model[1].weight = model[0].weight
    found = held_by(model)
    assert list(found) == [f"{layer}.{name}" for layer in range(2) for name in ("weight", "table", "absorbed")]
    assert found["0.weight"] == found["1.weight"]
    assert found["0.weight"].startswith("bfloat16 [2, 3] ")
    model[1].table[3] = -1.0
    assert differing([found], [held_by(model)]) == "1.table"
    model[0].weight.data += 1
    assert differing([found], [held_by(model)]) == "0.weight, 1.weight, 1.table"
    model[0].table = model[1].absorbed = torch.zeros(4)
    assert differing([found], [held_by(model)]) == "0.weight, 0.table, 1.weight and 2 more"
    assert differing([found, found], [found]) == "2 processes instead of 1"
    assert differing([found], [{**found, "more": ""}]) == "more"


def test_weights_that_were_packed_elsewhere_are_said_to_be():
    model = nn.Sequential(Layer())
    assert not is_packed([held_by(model)])
    model[0].table = torch.empty(0)
    assert held_by(model)["0.table"] == "empty"
    assert not is_packed([held_by(model)])
    model[0].weight = nn.Parameter(torch.empty(0))
    assert held_by(model)["0.weight"] == PACKED
    assert is_packed([{}, held_by(model)])
    assert held_by(nn.Linear(2, 2, device="meta")) == dict.fromkeys(("weight", "bias"), "on no device")
