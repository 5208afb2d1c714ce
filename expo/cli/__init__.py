"""The program: a module per command, which declares its options; `program.py` wires them together."""

from expo.cli.program import main, run

__all__ = ["main", "run"]
