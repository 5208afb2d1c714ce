"""`expo recipes` on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from expo import recipes
from expo.cli.command import Shown

EXAMPLES = "\b\nExamples:\n  expo recipes\n  expo recipes Starling-LM-7B-beta --json"


def show(names: Sequence[str] | None) -> Shown:
    """Some recipes, or all."""
    known = [recipes.load(name) for name in names or recipes.names()]
    return Shown({"recipes": [one.describe() for one in known]}, recipes.table(known))
