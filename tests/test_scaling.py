"""docs/scaling.md has what `benchmarks/scaling.py` prints, which follows from rates that RESULTS.md has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import scaling
from benchmarks.scaling import GB, MODELS, NODE, NODES

ROOT = Path(__file__).parents[1]


def test_the_page_has_exactly_what_is_printed() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    printed = list(scaling.tables())
    assert [table for table in printed if f"\n\n{table}\n\n" not in page] == []
    tables = [block for block in page.split("\n\n") if block.startswith("| ") and not block.startswith("| | parts")]
    assert sorted(tables) == sorted(printed), "and no other number in a table"


def test_measured_rates_are_rows_of_the_results() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert "| 5 GB a side | 1.593 s " in results
    assert pytest.approx(15 * GB / 1.593) == NODE.combining
    assert "| 1.1 billion parameters | vLLM | 11.9 s | 4.18 s |" in results
    assert pytest.approx(2.2 * GB / 4.18) == NODE.loading
    assert "165,219 tokens/s" in results
    assert pytest.approx(165_219 * 2 * 1.1e9) == NODE.flops


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_more_of_anything_is_not_slower(model: scaling.Model) -> None:
    assert scaling.extrapolate_on_server(model, NODES) < scaling.extrapolate_on_server(model, 1)
    assert scaling.generate(model, 8) <= scaling.generate(model, 1)
    assert scaling.theta(model, NODE.disk_read) <= scaling.theta(model, NODE.disk_read / 8)
    assert 3 * model.nbytes / NODE.combining <= scaling.extrapolate_on_disk(model)
    assert model.parameters * model.bytes_each < NODE.of_memory * NODE.gpu_bytes * model.gpus, "the weights fit"
    assert scaling.engines(model, NODES) == NODES * scaling.engines(model, 1)


def test_671b_in_bfloat16_does_not_fit() -> None:
    assert MODELS[2].nbytes > NODE.gpus * NODE.gpu_bytes
