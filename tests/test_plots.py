"""Pictures: whole, of a sane size, and the same for the same figures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from expo.output.plots import change_map

Modules = dict[str, dict[int, float | None]]


def model(layers: int, modules: int = 9) -> Modules:
    return {f"part.{m}": {layer: 0.001 * (layer + 1) * (m + 1) for layer in range(layers)} for m in range(modules)}


def draw(modules: Modules, outside: dict[str, float | None], suffix: str = ".png") -> bytes:
    title = "some-organization/a-model-sft → some-organization/a-model-dpo\n‖Δ‖ / ‖θ_sft‖: 0.036 in total"
    return change_map(modules, outside, title=title, suffix=suffix, mark="a mark")


CASES: dict[str, tuple[Modules, dict[str, float | None]]] = {
    **{f"{layers} layers": (model(layers), {"embed": 0.01, "head": 0.0}) for layers in (1, 4, 32, 100)},
    "many modules": (model(40, 60), {}),
    "no layers": ({}, {"a": 0.01, "b": 0.02}),
    "one value": ({}, {"a": 0.01}),
    "nothing changed": ({"a": {0: 0.0, 1: 0.0}}, {"b": 0.0}),
    "gaps": ({"a": {0: 0.1, 5: None}, "b": {2: 0.2}}, {"c": None}),
    "many orders of magnitude": ({"a": {0: 1e-9, 1: 3.0}}, {}),
    "names that are no formulas": ({"a$x^2$": {0: 0.1}}, {"_$\\q$": 0.2, "{}": 0.3}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize(("modules", "outside"), CASES.values(), ids=CASES.keys())
def test_any_model_makes_a_picture(modules: Modules, outside: dict[str, float | None]) -> None:
    content = draw(modules, outside)
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        picture.load()
        assert picture.format == "PNG"
        assert picture.text["Comment"] == "a mark"
    assert 400 < width < 2500
    assert 200 < height < 3500
    assert len(content) < 1_000_000


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_same_figures_give_the_same_file(suffix: str, start: bytes) -> None:
    first, second = (draw(model(3), {"head": 0.0}, suffix) for _ in range(2))
    assert first == second
    assert first.startswith(start)
    assert b"a mark" in first
    assert draw(model(3), {"head": 0.5}, suffix) != first


def test_colours_follow_the_values() -> None:
    """A cell is as green or yellow as its value is large; no change is grey, and what is not there white."""
    content = draw({"a": dict.fromkeys(range(20), 0.001), "b": dict.fromkeys(range(20), 0.1)}, {"c": 0.0, "d": None})
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    common = {tuple(map(int, colour)) for colour in colours[counts > 0.02 * len(pixels)]}
    assert common == {(255, 255, 255), (68, 1, 84), (253, 231, 37), (217, 217, 217)}
