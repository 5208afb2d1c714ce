"""`expo recipes` on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from expo import recipes
from expo.cli.options import DebugOption, JsonOption
from expo.cli.printing import print_result

EXAMPLES = "\b\nExamples:\n  expo recipes\n  expo recipes Starling-LM-7B-beta --json"


def command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models known by name, with their SFT checkpoint, α and source."""
    known = [recipes.load(name) for name in names or recipes.names()]
    print_result({"recipes": [one.describe() for one in known]}, recipes.table(known), as_json=as_json)
