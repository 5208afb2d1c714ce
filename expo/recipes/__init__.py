"""Recipes: known models, with the checkpoint they were trained from and their α; and known reward models.

A recipe is a config file (`expo/config_files.py`) with one more table, `[recipe]`. To add one, add a TOML file
here, named after the model, or one with a `[score]` table in `reward_models/`; there is no other list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from expo.config_files import Tables, field_names, load_tables
from expo.errors import InputError

FOLDER = Path(__file__).parent
REWARD_MODELS = FOLDER / "reward_models"


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


@dataclass(frozen=True)
class RewardRecipe:
    """One known reward model."""

    name: str
    reward_model: str
    """Its hub id."""
    settings: dict[str, Any]
    """What is special about it, as settings of `score`."""
    source: str
    """Where that is said."""
    trust_remote_code: bool
    note: str
    tables: Tables

    def describe(self) -> dict[str, object]:
        """The recipe as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tables"}


def names() -> list[str]:
    """The names of the recipes of pairs, sorted without regard to case."""
    return _names_in(FOLDER)


def reward_model_names() -> list[str]:
    """The names of the recipes of reward models, sorted without regard to case."""
    return _names_in(REWARD_MODELS)


def _names_in(folder: Path) -> list[str]:
    return sorted((path.stem for path in folder.glob("*.toml")), key=str.lower)


def _read(folder: Path, name: str) -> tuple[str, Tables, dict[str, Any]] | None:
    """A recipe's name as it is spelled, its tables and what it says of itself; None where a folder has none."""
    found = next((known for known in _names_in(folder) if known.lower() == name.lower()), None)
    if found is None:
        return None
    tables = load_tables(folder / f"{found}.toml", extra_tables=frozenset({"recipe"}))
    return found, tables, tables.pop("recipe")


def load(name: str) -> Recipe | RewardRecipe:
    """Read the recipe of that name (in any case).

    Raises:
        InputError: There is none; the message lists all names.
    """
    if (found := _read(FOLDER, name)) is not None:
        return _pair(*found)
    if (found := _read(REWARD_MODELS, name)) is not None:
        return _reward_model(*found)
    known = ", ".join([*names(), *reward_model_names()])
    raise InputError(f"no recipe {name!r}; `expo recipes` lists them: {known}")


def of_reward_model(hub_id: str) -> RewardRecipe | None:
    """The recipe of a reward model on the hub; None where there is none."""
    found = _read(REWARD_MODELS, hub_id.rpartition("/")[2])
    recipe = None if found is None else _reward_model(*found)
    return recipe if recipe is not None and recipe.reward_model.lower() == hub_id.lower() else None


def _reward_model(name: str, tables: Tables, about: dict[str, Any]) -> RewardRecipe:
    score = tables["score"]
    hub_id = score["reward_model"]
    return RewardRecipe(
        name=name,
        reward_model=hub_id if isinstance(hub_id, str) else hub_id[0],
        settings={key: value for key, value in score.items() if key != "reward_model"},
        source=about["source"],
        trust_remote_code=about.get("trust_remote_code", False),
        note=about.get("note", ""),
        tables=tables,
    )


def _pair(name: str, tables: Tables, about: dict[str, Any]) -> Recipe:
    pair = tables["extrapolate"]
    tables.setdefault("inspect", {"sft": pair["sft"], "dpo": pair["dpo"]})
    both = {"sft": pair["sft"], "dpo": pair["dpo"], "alpha": float(pair["alpha"][0])}
    tables["generate"] = both | tables.get("generate", {})
    sampling = {key: value for key, value in tables["generate"].items() if key in field_names("sweep")}
    tables.setdefault("sweep", {**sampling, "sft": pair["sft"], "dpo": pair["dpo"]}).pop("alpha", None)
    return Recipe(
        name=name,
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


def reward_table(known: Iterable[RewardRecipe]) -> str:
    """One line per reward model, under headings."""
    rows = [
        f"{one.name:<38}{one.reward_model:<46}"
        f"{' '.join(f'{key}={value}' for key, value in one.settings.items()) or '-':<20}"
        f"{one.source}{f'; {one.note}' if one.note else ''}"
        for one in known
    ]
    return "\n".join([f"{'name':<38}{'reward model':<46}{'settings':<20}source", *rows])
