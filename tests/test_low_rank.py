"""The best approximation of low rank: its error is that of float64's singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expo.theta.low_rank import EXACT_SIZE, factors, is_exact


def spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    """A random matrix with these singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    return (left * values) @ right.T


def best(delta: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(delta.double())[rank:].norm())


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (1, 7)])
def test_the_error_is_that_of_the_exact_truncation(shape: tuple[int, int], scale: float) -> None:
    torch.manual_seed(0)
    delta = scale * torch.randn(shape, dtype=torch.float64)
    for rank in range(1, min(shape) + 1):
        found = factors(delta, rank, torch.float64)
        assert (found.a.shape, found.b.shape) == ((rank, shape[1]), (shape[0], rank))
        real = float((delta - found.b @ found.a).norm())
        assert found.norm == pytest.approx(float(delta.norm()), rel=1e-12)
        assert found.error == pytest.approx(real, abs=1e-13 * scale)
        assert found.error == pytest.approx(best(delta, rank), rel=1e-9, abs=1e-12 * found.norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_includes_what_the_factors_are_rounded_by(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    delta = 1e-4 * spectrum(64, 48, torch.ones(5, dtype=torch.float64))
    found = factors(delta, 5, dtype)
    assert found.a.dtype == found.b.dtype == dtype
    real = float((delta - found.b.double() @ found.a.double()).norm())
    assert found.error == pytest.approx(real, rel=1e-9)
    assert 0 < found.error / found.norm < 8 * torch.finfo(dtype).eps


def test_nothing_has_factors_of_zero() -> None:
    found = factors(torch.zeros(6, 4), 2, torch.float32)
    assert not found.a.any()
    assert not found.b.any()
    assert (found.norm, found.error) == (0.0, 0.0)


SIZE = EXACT_SIZE + 76
TAILS = {
    "flat": lambda: torch.randn(SIZE, SIZE, dtype=torch.float64),
    "falling": lambda: spectrum(SIZE, SIZE, torch.arange(1, SIZE + 1).double() ** -0.7),
    "exactly of this rank": lambda: spectrum(SIZE, SIZE, torch.ones(16, dtype=torch.float64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TAILS)
def test_of_a_large_matrix_it_is_as_close_as_is_said(kind: str) -> None:
    torch.manual_seed(0)
    delta, rank = TAILS[kind](), 16
    assert not is_exact(*delta.shape, rank)
    state = torch.random.get_rng_state()
    found = factors(delta.float(), rank, torch.float32)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are its own"
    norm, tolerance = float(delta.norm()), 2e-4 if kind == "flat" else 1e-6
    assert found.error <= best(delta, rank) * (1 + tolerance) + 1e-6 * norm
    again = factors(delta.float(), rank, torch.float32)
    assert torch.equal(found.a, again.a)
    assert torch.equal(found.b, again.b)
