"""`expo recipes` on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from expo import recipes
from expo.cli.command import Shown

EXAMPLES = "\b\nExamples:\n  expo recipes\n  expo recipes Starling-LM-7B-beta --json"


def show(names: Sequence[str] | None) -> Shown:
    """Some recipes, or all: a table of pairs, and one of reward models."""
    known = [recipes.load(name) for name in names or [*recipes.names(), *recipes.reward_model_names()]]
    pairs = [one for one in known if isinstance(one, recipes.Recipe)]
    reward_models = [one for one in known if isinstance(one, recipes.RewardRecipe)]
    data = {
        "recipes": [one.describe() for one in pairs],
        "reward_models": [one.describe() for one in reward_models],
    }
    tables = [
        *([recipes.table(pairs)] if pairs else []),
        *([recipes.reward_table(reward_models)] if reward_models else []),
    ]
    return Shown(data, "\n\n".join(tables))
