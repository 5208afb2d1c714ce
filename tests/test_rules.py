"""θ(α) against float64, on every bfloat16 and float16 value and on adversarial pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_bytes, exact, plan, round_to, share_off, stream, tensors_of
from hypothesis import given, strategies as st

from expo.theta import norms
from expo.theta.rules import linear

ALPHAS = (0.1, 0.3, 0.5, -1.0, -0.7, -2.0, 8.0, 25.0)
SIXTEEN_BIT = {torch.bfloat16: 2.0**100, torch.float16: 600.0}
"""Type → magnitude up to which no α above overflows."""
SIDES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit type up to its magnitude limit: zeros, subnormals, normals, both signs."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite() & (values.abs() <= SIXTEEN_BIT[dtype])]


def partners(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """For every d an s that makes trouble: equal, opposite, a step away, near, of another magnitude, zero."""
    generator = torch.Generator().manual_seed(1)
    shuffled = values[torch.randperm(len(values), generator=generator)]
    near = (values.double() * (1 + 0.03 * torch.randn(len(values), generator=generator))).to(values.dtype)
    return {
        "equal": values.clone(),
        "opposite": -values,
        "almost opposite": -values.roll(1),
        "one step away": values.roll(1),
        "near": near,
        "any": shuffled,
        "zero": torch.zeros_like(values),
    }


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_every_16_bit_value_is_the_rounded_float64_result_or_a_near_tie(dtype: torch.dtype, alpha: float) -> None:
    dpo = every_value(dtype)
    for kind, other in partners(dpo).items():
        for sft, aligned in ((other, dpo), (dpo, other)):
            out = linear.combine(sft, aligned, alpha, torch.empty_like(dpo))
            share_off(sft, aligned, alpha, out)
            if kind == "equal":
                assert torch.equal(out, dpo)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_pairs_like_real_ones_are_off_in_less_than_one_weight_in_5000(dtype: torch.dtype, alpha: float) -> None:
    generator = torch.Generator().manual_seed(2)
    sft = 0.02 * torch.randn(500_000, generator=generator)
    dpo = sft + 0.0007 * torch.randn(500_000, generator=generator)
    sft, dpo = sft.to(dtype), dpo.to(dtype)
    assert share_off(sft, dpo, alpha, linear.combine(sft, dpo, alpha, torch.empty_like(dpo))) < 1 / 5000


@pytest.mark.parametrize("alpha", [*ALPHAS, 0.7, 0.45, 3.3])
def test_float32_pairs(alpha: float) -> None:
    generator = torch.Generator().manual_seed(3)
    sft = torch.randn(200_000, generator=generator)
    for dpo in (sft * 1.01, -sft, sft.roll(1), sft.roll(1) * 1e4, sft * 1e-4):
        share_off(sft, dpo, alpha, linear.combine(sft, dpo, alpha, torch.empty_like(dpo)))


def test_float64_pairs_are_computed_in_float64() -> None:
    generator = torch.Generator().manual_seed(4)
    sft, dpo = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    out = linear.combine(sft, dpo, 0.3, torch.empty_like(dpo))
    np.testing.assert_allclose(out.numpy(), exact(sft, dpo, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dpo_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sft_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mixed_types(sft_dtype: torch.dtype, dpo_dtype: torch.dtype, out_dtype: torch.dtype, alpha: float) -> None:
    generator = torch.Generator().manual_seed(5)
    sft = torch.randn(20_000, generator=generator).to(sft_dtype)
    dpo = (sft * (1 + 0.03 * torch.randn(20_000, generator=generator))).to(dpo_dtype)
    out = linear.combine(sft, dpo, alpha, torch.empty_like(dpo, dtype=out_dtype))
    share_off(sft, dpo, alpha, out)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_alpha_zero_copies_every_bit_pattern(tmp_path: Path, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    dpo = patterns.view(dtype)
    pair = plan(tmp_path, {"w": torch.ones_like(dpo)}, {"w": dpo}, alphas=(0.0,), allow_nonfinite=True)
    assert pair.count("extrapolate") == 1
    assert as_bytes(tensors_of(pair, stream(pair)[0])["w"]) == as_bytes(dpo)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_alpha_minus_one_is_sft_up_to_the_sign_of_zero(dtype: torch.dtype) -> None:
    sft = every_value(dtype)
    for dpo in partners(sft).values():
        out = linear.combine(sft, dpo, -1.0, torch.empty_like(sft))
        assert torch.equal(out, sft)
        nonzero = sft != 0
        assert as_bytes(out[nonzero]) == as_bytes(sft[nonzero])


@given(alpha=st.floats(-30, 30), seed=st.integers(0, 2**32), dtype=st.sampled_from(list(SIXTEEN_BIT)))
def test_any_alpha(alpha: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    dpo = torch.randn(2000, generator=generator).to(dtype)
    sft = (dpo * (1 + 0.1 * torch.randn(2000, generator=generator))).to(dtype)
    share_off(sft, dpo, alpha, linear.combine(sft, dpo, alpha, torch.empty_like(dpo)))


SCRATCH = norms.Scratch(4 << 20, torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 100_000, norms.FEW_ELEMENTS - 1, norms.FEW_ELEMENTS, 400_001])
@pytest.mark.parametrize("types", [(a, b) for a in SIDES for b in SIDES], ids=str)
def test_norms_against_numpy(types: tuple[torch.dtype, torch.dtype], count: int) -> None:
    generator = torch.Generator().manual_seed(6)
    sft = torch.randn(count, generator=generator)
    dpo = (sft + 0.03 * torch.randn(count, generator=generator)).to(types[1])
    sft = sft.to(types[0])
    s, d = sft.double().numpy(), dpo.double().numpy()
    expected = ((d - s) ** 2).sum(), (s**2).sum(), (d**2).sum()
    assert norms.pair_norms(sft, dpo, SCRATCH, of_dpo=True)[:3] == pytest.approx(expected, rel=5e-4)
    if torch.bfloat16 not in types or count < norms.FEW_ELEMENTS:
        assert norms.pair_norms(sft, dpo, SCRATCH, of_dpo=True)[:3] == pytest.approx(expected, rel=2e-5)
    assert norms.pair_norms(sft, dpo, SCRATCH).dpo == 0


@pytest.mark.parametrize("count", [1, norms.FEW_ELEMENTS - 1, norms.FEW_ELEMENTS, 400_001, 1 << 19])
@pytest.mark.parametrize("dtype", SIDES, ids=str)
def test_sampled_norms_are_near_the_exact_ones(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(8)
    sft = torch.randn(count, generator=generator)
    dpo = (sft + 0.03 * torch.randn(count, generator=generator)).to(dtype)
    sft = sft.to(dtype)
    exact, found = norms.pair_norms(sft, dpo, SCRATCH), norms.sampled_norms(sft, dpo, SCRATCH)
    if found.sampled:
        assert count * dtype.itemsize >= norms.SAMPLED_BYTES
        assert found[:2] == pytest.approx(exact[:2], rel=0.03)
        assert not norms.stays_finite(linear.bound, found, 0.3, dtype), "an estimate bounds no element"
    else:
        assert found == exact


@pytest.mark.parametrize("place", [0, norms.NORM_ROW, 3 * norms.NORM_ROW + 5, 600_000])
def test_one_weight_that_differs_is_never_overlooked(place: int) -> None:
    sft = torch.ones(600_001, dtype=torch.bfloat16)
    dpo = sft.clone()
    assert norms.sampled_norms(sft, dpo, SCRATCH).delta == 0
    dpo[place] = 2.0
    assert norms.sampled_norms(sft, dpo, SCRATCH).delta > 0


@pytest.mark.parametrize("width", [1024, 2048, 4096, 2560, 7168])
def test_sampled_norms_meet_every_column(width: int) -> None:
    sft = torch.ones((1 << 20) // width * width, dtype=torch.bfloat16)
    for first in range(0, width, norms.NORM_ROW):
        dpo = sft.clone()
        dpo.view(-1, width)[:, first : first + norms.NORM_ROW] = 1.5
        exact, found = norms.pair_norms(sft, dpo, SCRATCH), norms.sampled_norms(sft, dpo, SCRATCH)
        assert found.sampled
        assert found.delta == pytest.approx(exact.delta, rel=0.5)


@given(
    count=st.integers(1, 3000),
    dtype=st.sampled_from(SIDES),
    size=st.sampled_from([0.0, 1.0, 6e4, 1e38]),
    strange=st.lists(
        st.tuples(st.integers(0), st.sampled_from([float("nan"), float("inf"), -float("inf")])), max_size=3
    ),
)
def test_finite_is_what_isfinite_says(
    count: int, dtype: torch.dtype, size: float, strange: list[tuple[int, float]]
) -> None:
    values = torch.full((count,), size).to(dtype)
    for place, value in strange:
        values[place % count] = value
    assert norms.is_finite(values) == bool(values.isfinite().all())


@pytest.mark.parametrize("types", [(a, b) for a in SIDES for b in SIDES], ids=str)
def test_scratch_changes_nothing(types: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(7)
    sft, dpo = (torch.randn(norms.WIDE_BLOCK + 9, generator=generator).to(dtype) for dtype in types)
    for dtype in SIDES:
        plain, blocks = (torch.empty(len(dpo), dtype=dtype) for _ in range(2))
        linear.combine(sft, dpo, 0.3, plain)
        assert torch.equal(plain, linear.combine(sft, dpo, 0.3, blocks, SCRATCH))


@given(
    alpha=st.floats(-30, 30),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    size=st.sampled_from([1.0, 100.0, 3e4, 1e38]),
    strange=st.sampled_from([None, *NOT_FINITE]),
)
def test_what_the_norms_call_finite_is_finite(
    alpha: float, seed: int, dtype: torch.dtype, size: float, strange: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sft, dpo = (size * torch.randn(2, 50, generator=generator)).to(dtype)
    if strange is not None:
        (sft, dpo)[seed % 2][seed % 50] = strange
    finite = norms.is_finite(linear.combine(sft, dpo, alpha, torch.empty_like(dpo)))
    told = norms.stays_finite(linear.bound, norms.pair_norms(sft, dpo, SCRATCH), alpha, dtype)
    assert finite or not told
    if strange is not None:
        assert not told
    if size == 1 and strange is None:
        assert told, "ordinary weights need no second look"


@pytest.mark.parametrize("shape", [(40, 3, 25), (1, 2, 1000), (1000, 4, 1), (13, 1, 77)], ids=str)
def test_a_low_rank_delta_is_the_product(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    rows, rank, columns = shape
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    delta = norms.low_rank_delta(left, right, 1.7, torch.empty(rows, columns))
    bound = 2.0**-22 * 1.7 * (left.double().abs() @ right.double().abs())
    assert ((delta - 1.7 * (left.double() @ right.double())).abs() <= bound).all()


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sft_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_delta_added_is_the_rounded_float64_result(
    sft_dtype: torch.dtype, out_dtype: torch.dtype, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(8)
    sft = torch.randn(norms.WIDE_BLOCK + 9, generator=generator).to(sft_dtype)
    delta = 0.03 * torch.randn(len(sft), generator=generator)
    out = linear.from_delta(sft, delta, alpha, torch.empty_like(sft, dtype=out_dtype), SCRATCH).double().numpy()
    right = sft.double().numpy() + (1 + alpha) * delta.double().numpy()
    bound = 2.0**-22 * (np.abs(sft.double().numpy()) + (1 + abs(alpha)) * np.abs(delta.double().numpy()))
    assert (round_to(right - bound, out_dtype) <= out).all()
    assert (out <= round_to(right + bound, out_dtype)).all()


def test_at_minus_one_a_delta_leaves_every_bit() -> None:
    sft = torch.tensor([0.0, -0.0, 1.5, float("nan")], dtype=torch.bfloat16)
    delta = torch.tensor([1.0, 1.0, float("inf"), 1.0])
    assert as_bytes(linear.from_delta(sft, delta, -1.0, torch.empty_like(sft), SCRATCH)) == as_bytes(sft)


def test_adding_a_delta_changes_neither_of_its_inputs() -> None:
    sft, delta = torch.ones(5), torch.full((5,), 2.0)
    assert linear.from_delta(sft, delta, 1.0, torch.empty(5), SCRATCH).tolist() == [5.0] * 5
    assert (sft.tolist(), delta.tolist()) == ([1.0] * 5, [2.0] * 5)


def test_a_replaced_tensor_adds_its_difference() -> None:
    sft, dpo = torch.ones(norms.WIDE_BLOCK + 9, dtype=torch.bfloat16), torch.full((norms.WIDE_BLOCK + 9,), 1.5)
    delta = torch.full_like(dpo, 0.25)
    norms.add_difference(delta, sft, dpo, SCRATCH)
    assert torch.equal(delta, torch.full_like(dpo, 0.75))


@pytest.mark.parametrize("count", [1, 10_000, 300_000])
@pytest.mark.parametrize("dtype", SIDES, ids=str)
def test_norms_of_a_delta_against_numpy(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(9)
    sft, delta = torch.randn(count, generator=generator).to(dtype), torch.randn(count, generator=generator)
    delta = delta.to(norms.wider(sft, sft))
    d, s = delta.double().numpy(), sft.double().numpy()
    expected = (d**2).sum(), (s**2).sum(), ((s + d) ** 2).sum()
    bound = 5e-4 if dtype == torch.bfloat16 and count >= norms.FEW_ELEMENTS else 1e-5
    assert norms.delta_norms(sft, delta, SCRATCH, of_dpo=True)[:3] == pytest.approx(expected, rel=bound)
    assert norms.delta_norms(sft, delta, SCRATCH).dpo == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_nonfinite_value_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    for position in (0, 511, 1022):
        values = torch.ones(1023, dtype=dtype)
        assert norms.is_finite(values)
        values[position] = value
        assert not norms.is_finite(values)


def test_infinities_that_cancel_are_found() -> None:
    assert not norms.is_finite(torch.tensor([float("inf"), -float("inf")]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_finite_values_are_finite(dtype: torch.dtype) -> None:
    """Their sum overflows, they do not."""
    assert norms.is_finite(torch.full((100_000,), torch.finfo(dtype).max, dtype=dtype))


def test_the_reference_rounds_once() -> None:
    """1 + 2⁻⁸ + 2⁻⁴⁰ is above the tie between two bfloat16 values; through float32 it would be the tie itself."""
    value = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert round_to(value, torch.bfloat16).tolist() == [1 + 2.0**-7, 1.0, 1 + 2 * 2.0**-7]
