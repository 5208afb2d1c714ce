"""Names and small files from other people's folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from expo.errors import InputError
from expo.files import SHOWN_CHARACTERS, is_utf8, name_problem, read_json, repeated, shown


@pytest.mark.parametrize("name", ["a", "model.layers.0.mlp/w:0", "a/b", "..a", "a..b", "ж", "a b", "C:a", " "])
def test_names_that_are_taken(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name", ["", "/", "/a", "\\a", "..", "../a", "a/../b", "a/..", "a\\..\\b", "a\n", "\0", "\x7f", "\x9b", "\udc80"]
)
def test_names_that_are_refused(name: str) -> None:
    assert name_problem(name) is not None


@given(st.text(st.characters()) | st.integers() | st.lists(st.text()) | st.none() | st.floats())
def test_whatever_is_shown_fits_on_a_line(value: object) -> None:
    assert len(shown(value)) <= SHOWN_CHARACTERS + 1
    assert shown(value).isprintable()
    assert is_utf8(shown(value))


@given(st.lists(st.text(max_size=1)))
def test_the_first_that_appears_again(names: list[str]) -> None:
    again = [name for position, name in enumerate(names) if name in names[:position]]
    assert repeated(names) == (again[0] if again else None)


def test_python_takes_the_last_of_two_keys_and_an_index_does_not(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"a": 1, "b": {"a": 1, "a": 2}}')
    assert read_json(file) == {"a": 1, "b": {"a": 2}}
    with pytest.raises(InputError, match="'a' appears twice"):
        read_json(file, unique=True)
