"""What is special about a known reward model: its recipe's settings, where the user gives none."""

from __future__ import annotations

import logging
from dataclasses import replace

from expo import recipes
from expo.checkpoint.folder import Location
from expo.config import ScoreConfig

log = logging.getLogger(__name__)

UNSET = {"bos": "auto", "max_length": None}
"""The settings that a recipe may decide, and the value that leaves them to it."""


def with_recipe(config: ScoreConfig, location: Location) -> ScoreConfig:
    """The settings for one reward model: given ones stay, others are its recipe's; they are recorded as if given.

    Args:
        config: The settings.
        location: The reward model; a recipe is found by its hub id.
    """
    recipe = None if location.hub_id is None else recipes.of_reward_model(location.hub_id)
    known = {} if recipe is None else recipe.settings
    taken = {name: known[name] for name, unset in UNSET.items() if name in known and getattr(config, name) == unset}
    if recipe is not None and taken:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in taken.items())
        log.info("recipe %s: %s (%s)", recipe.name, flags, recipe.note)
    decided = replace(config, **taken)
    return replace(decided, bos="template") if decided.bos == "auto" else decided
