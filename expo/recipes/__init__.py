"""Recipes: known models, with the checkpoint they were trained from and their α.

A recipe is a config file (`expo/config_files.py`) with one more table, `[recipe]`. To add one, add a TOML file
here, named after the model; there is no other list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from expo.config_files import Tables, load_tables
from expo.errors import InputError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One known model."""

    name: str
    sft: str
    dpo: str
    alpha: float
    source: str
    """Where α comes from."""
    trust_remote_code: bool
    """Whether the model needs `--trust-remote-code`; only a hint, never enabled from here."""
    note: str
    tables: Tables
    """The settings, as `load_tables` gives them."""

    @property
    def source_and_note(self) -> str:
        """The last column of the table."""
        return f"{self.source}; {self.note}" if self.note else self.source

    def describe(self) -> dict[str, object]:
        """The recipe as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tables"}


def names() -> list[str]:
    """The recipe names, sorted without regard to case."""
    return sorted((path.stem for path in FOLDER.glob("*.toml")), key=str.lower)


def load(name: str) -> Recipe:
    """Read the recipe of that name (in any case).

    Raises:
        InputError: There is none; the message lists all names.
    """
    match = [known for known in names() if known.lower() == name.lower()]
    if not match:
        raise InputError(f"no recipe {name!r}; `expo recipes` lists them: {', '.join(names())}")
    tables = load_tables(FOLDER / f"{match[0]}.toml", extra_tables=frozenset({"recipe"}))
    about = tables.pop("recipe")
    pair = tables["extrapolate"]
    tables.setdefault("inspect", {"sft": pair["sft"], "dpo": pair["dpo"]})
    both = {"sft": pair["sft"], "dpo": pair["dpo"], "alpha": float(pair["alpha"][0])}
    tables["generate"] = both | tables.get("generate", {})
    return Recipe(
        name=match[0],
        sft=pair["sft"],
        dpo=pair["dpo"],
        alpha=float(pair["alpha"][0]),
        source=about["source"],
        trust_remote_code=about.get("trust_remote_code", False),
        note=about.get("note", ""),
        tables=tables,
    )


def table(known: Iterable[Recipe]) -> str:
    """One line per recipe, under headings."""
    rows = [f"{one.name:<38}{one.alpha!r:>6}  {one.sft:<42}{one.dpo:<46}{one.source_and_note}" for one in known]
    return "\n".join([f"{'name':<38}{'α':>6}  {'θ_sft':<42}{'θ_dpo':<46}source", *rows])
