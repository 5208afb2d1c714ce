"""The figures that papers publish of a model before and after ExPO: what each is called, its unit and its judge.

To add one, add a line to `FIGURES`; a recipe's `[published]` table may then give it, as `[before, after]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from expo.errors import InputError

Scores: TypeAlias = Mapping[str, tuple[float, float]]
"""A key of `FIGURES` → the figure of DPO, and of ExPO."""


class Figure(NamedTuple):
    """One figure."""

    words: str
    """The benchmark and what is measured."""
    unit: str
    """Empty for points on a scale of its own."""
    digits: int
    """After the point, as the paper prints it."""
    judge: str
    """Who gave the scores; empty where answers are right or wrong."""


FIGURES = {
    "alpaca_eval_win_rate": Figure("AlpacaEval 2.0, win rate", "%", 1, "gpt-4-1106-preview"),
    "alpaca_eval_length_controlled": Figure("AlpacaEval 2.0, length-controlled", "%", 1, "gpt-4-1106-preview"),
    "mt_bench": Figure("MT-Bench, of 10", "", 2, "gpt-4"),
    "open_llm_leaderboard": Figure("Open LLM Leaderboard, mean of six, from the released files", "%", 2, ""),
    "reward": Figure("mean reward of RM-Mistral-7B (controlled runs)", "", 2, ""),
}
"""In the order in which they are shown."""


def read_scores(table: Mapping[str, Any], recipe: str) -> Scores:
    """A recipe's `[published]` table.

    Raises:
        InputError: A key is none of `FIGURES`, or its value no pair of numbers.
    """
    scores = {}
    for key, value in table.items():
        if key not in FIGURES:
            raise InputError(f"recipe {recipe}: {key!r} in [published] is none of {', '.join(FIGURES)}")
        if not (isinstance(value, list) and [type(one) for one in value] == [float, float]):
            raise InputError(f"recipe {recipe}: {key!r} in [published] expects [before, after], not {value!r}")
        scores[key] = (value[0], value[1])
    return scores
