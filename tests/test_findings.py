"""What the figures of a pair add up to, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from expo.checkpoint.folder import TensorInfo
from expo.checkpoint.places import places
from expo.output.findings import PRETRAINED_TO_SFT, SFT_TO_DPO, Figures, Inspection, Measured
from expo.theta.pair_checks import UNRELATED_CHANGE
from expo.theta.plan import Overlap, Segment, Vocabulary

FIGURES = {"tensors", "identical", "relative", "cosine", "one_minus_cosine", "delta_norm", "sft_norm", "dpo_norm"}
NOTHING = Overlap((), (), (), (), (), (), (), None)


def info(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (2, 3)) -> TensorInfo:
    return TensorInfo(name, dtype, shape, Path("model.safetensors"), 0, 0)


def segment(name: str) -> Segment:
    return Segment("extrapolate", info(name), info(name, "F32"), (), "BF16", 0, 0)


def moved(relative: float, size: float = 1.0) -> Figures:
    """One tensor of norm `size`, turned by about `relative`."""
    return Figures(1, int(relative == 0), (relative * size) ** 2, size**2, size**2)


def found(tensors: dict[str, Figures], overlap: Overlap = NOTHING, **others: tuple[str, ...]) -> Inspection:
    where = places(tensors)
    measured = tuple(Measured(segment(name), where[name], figures) for name, figures in tensors.items())
    return Inspection("sft", "dpo", overlap, measured, others.get("unequal", ()), others.get("untied", ()))


# --- sums ---------------------------------------------------------------------------------------------------------


MODEL = {
    "model.layers.0.q.weight": moved(0.01),
    "model.layers.0.q.bias": moved(0.03, 10.0),
    "model.layers.1.q.weight": moved(0.02),
    "model.layers.0.experts.0.w": moved(0.0),
    "model.layers.0.experts.1.w": moved(0.04),
    "model.q.weight": moved(0.0),
}


def test_figures_add_up_by_layer_and_module() -> None:
    pair = found(MODEL)
    modules = {module.name + ("" if module.layers else " outside"): module for module in pair.modules}
    assert list(modules) == ["experts.*.w", "q", "q outside"]
    pooled = math.sqrt((0.01**2 + 0.3**2) / 101)
    assert modules["q"].layers[0].relative == pytest.approx(pooled)
    assert modules["q"].figures.relative == pytest.approx(math.sqrt((0.01**2 + 0.3**2 + 0.02**2) / 102))
    assert modules["q"].extremes == ((1, pytest.approx(0.02)), (0, pytest.approx(pooled)))
    assert (modules["experts.*.w"].figures.tensors, modules["experts.*.w"].figures.identical) == (2, 1)
    assert modules["q outside"].extremes == ()
    assert list(pair.layers) == [0, 1]
    assert (pair.total.tensors, pair.total.identical) == (6, 2)
    squares = [figures.delta_squared for figures in MODEL.values()]
    assert pair.total.delta_squared == math.fsum(squares) == found(dict(reversed(MODEL.items()))).total.delta_squared


def test_tensors_without_a_norm_spoil_no_sum() -> None:
    pair = found({**MODEL, "model.layers.0.bad": Figures(1, 0, math.nan, 1.0, math.inf)})
    assert pair.total == found(MODEL).total
    assert pair.nonfinite == ("model.layers.0.bad",)
    assert pair.suits == "suspect"


# --- the verdict --------------------------------------------------------------------------------------------------

ONE = info("x", "I32"), info("x", "BF16")
VERDICTS = [
    ({"a": moved(SFT_TO_DPO)}, {}, "likely", "‖Δ‖ is 0.0360 of ‖θ_sft‖ (zephyr's"),
    ({"a": moved(UNRELATED_CHANGE)}, {}, "likely", "0.300"),
    ({"a": moved(UNRELATED_CHANGE * 1.001)}, {}, "suspect", "8 times zephyr's step"),
    ({"a": moved(PRETRAINED_TO_SFT)}, {}, "suspect", "0.990 of ‖θ_sft‖, 28 times zephyr's step"),
    ({"a": moved(0.0)}, {}, "identical", "θ_dpo equals θ_sft"),
    ({"a": moved(0.0), "b": moved(0.01)}, {}, "likely", "consistent with"),
    ({"a": Figures(1, 0, 1.0, 0.0, 1.0)}, {}, "suspect", "θ_sft is all zeros"),
    ({"a": moved(0.01), "b": Figures(1, 0, math.nan, 1.0, math.nan)}, {}, "suspect", "infinity or values too large"),
    ({"a": Figures(1, 0, math.nan, 1.0, math.nan)}, {}, "suspect", "squared: a; check these first"),
    ({"a": moved(0.03)}, {"unequal": ("ids",)}, "mismatched", "1 tensor does not match, and `expo extrapolate`"),
    ({"a": moved(0.0)}, {"untied": ("lm_head",)}, "mismatched", "‖Δ‖ of the others is 0 of ‖θ_sft‖"),
    ({"a": moved(0.9)}, {"overlap": Overlap((), (), (), ("b",), ("c", "d"), (ONE,), (), None)}, "mismatched", "4 tens"),
    ({"a": moved(0.9)}, {"overlap": Overlap((), (), (), (), (), (), (ONE,), None)}, "mismatched", "1 tensor does not"),
    ({}, {"overlap": Overlap((), (), (), ("b",), ("c",), (), (), None)}, "mismatched", "2 tensors do not match"),
    ({}, {}, "mismatched", "nothing can be compared"),
    ({"a": moved(0.03)}, {"overlap": Overlap((), (), (), (), (), (), (), Vocabulary(3, 5))}, "likely", "consistent"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "others", "suits", "words"), VERDICTS)
def test_verdicts(tensors: dict[str, Figures], others: dict[str, object], suits: str, words: str) -> None:
    pair = found(tensors, **others)
    assert (pair.suits, words in pair.verdict) == (suits, True), pair.verdict
    assert "\n" not in pair.verdict
    assert pair.text().endswith(f"\n{suits}: {pair.verdict}")
    json.dumps(pair.describe(), allow_nan=False)


# --- text and data ------------------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_names_what_does_not_match() -> None:
    both = Overlap(
        (), (), (), ("a", "b", "c", "d"), ("e",), ((info("s", shape=(2,)), info("s")),), (ONE,), Vocabulary(3, 5)
    )
    table, notes = found(MODEL, both, unequal=("ids",)).text().split("\n\n")
    rows = table.splitlines()
    assert [row.split()[0] for row in rows] == ["module", "experts.*.w", "q", "q", "total"]
    assert len({len(row) for row in rows}) == 1
    assert notes.splitlines()[:-1] == [
        "only in SFT (4): a, b, c and 1 more",
        "only in DPO (1): e",
        "shapes differ (1): s [2] ≠ [2, 3]",
        "dtypes that cannot be combined (1): x I32, BF16",
        "integers that differ (1): ids",
        "vocabularies of 3 and 5 rows: only the 3 in both are compared (`expo extrapolate` needs --vocab "
        "common for this pair)",
    ]


def test_the_data_has_everything() -> None:
    both = Overlap(
        (), (segment("ids"), segment("mask")), (segment("head"),), ("a",), ("e",), (ONE,), (ONE,), Vocabulary(5, 3)
    )
    data = found(MODEL, both, unequal=("ids",)).describe()
    assert data.keys() == {
        "sft", "dpo", "suits", "verdict", "total", "modules", "layers", "cells", "tensors", "only_in_sft",
        "only_in_dpo", "shapes", "dtypes", "integers", "tied_heads", "nonfinite", "moved_tokens",
        "vocabulary", "picture",
    }  # fmt: skip
    assert data["total"].keys() == FIGURES
    assert [module.keys() - FIGURES for module in data["modules"]] == [
        {"module", "layers", "min", "max"}, {"module", "layers", "min", "max"}, {"module", "layers"},
    ]  # fmt: skip
    assert data["modules"][1]["min"] == {"layer": 1, "relative": pytest.approx(0.02)}
    assert [(cell["layer"], cell["module"]) for cell in data["cells"]] == [(0, "experts.*.w"), (0, "q"), (1, "q")]
    assert all(cell.keys() == FIGURES | {"layer", "module"} for cell in data["cells"])
    assert [one["name"] for one in data["tensors"]] == list(MODEL)
    extra = {"name", "layer", "module", "shape", "sft_dtype", "dpo_dtype"}
    assert all(one.keys() == FIGURES - {"tensors"} | extra for one in data["tensors"])
    assert (data["tensors"][0]["sft_dtype"], data["tensors"][0]["dpo_dtype"]) == ("F32", "BF16")
    assert [one["identical"] for one in data["tensors"]] == [False, False, False, True, False, True]
    assert data["shapes"] == [{"name": "x", "sft": [2, 3], "dpo": [2, 3]}]
    assert data["dtypes"] == [{"name": "x", "sft": "I32", "dpo": "BF16"}]
    assert data["integers"] == [{"name": "ids", "equal": False}, {"name": "mask", "equal": True}]
    assert data["tied_heads"] == [{"name": "head", "equal": True}]
    assert data["vocabulary"] == {"sft": 5, "dpo": 3, "compared": 3}
