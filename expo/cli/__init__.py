"""The program: a module per command; `program.py` turns their config classes into options and wires everything."""

from expo.cli.program import main, run

__all__ = ["main", "run"]
