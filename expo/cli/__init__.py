"""The program: a module per command; `options.py` makes their options of the config classes, `program.py` wires all."""

from expo.cli.program import main, run

__all__ = ["main", "run"]
