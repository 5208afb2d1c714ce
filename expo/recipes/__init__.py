"""Recipes: known models, with the checkpoint they were trained from and their α; and known reward models.

A recipe is a config file (`expo/config_files.py`) with one more table, `[recipe]`, and with `[published]` where scores
before and after ExPO are known (`published.py`). To add one, add a TOML file here, named after the model, or one with
a `[score]` table in `reward_models/`; there is no other list. Where nobody has published an α, it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from expo.config_files import Tables, field_names, load_tables
from expo.errors import InputError
from expo.recipes.published import Scores, read_scores

FOLDER = Path(__file__).parent
REWARD_MODELS = FOLDER / "reward_models"


@dataclass(frozen=True)
class Recipe:
    """One known model."""

    name: str
    sft: str
    dpo: str
    alpha: float | None
    """None where none is published: `expo sweep` finds it."""
    source: str
    """Where the pair comes from, and α."""
    link: str
    """The source's address."""
    trust_remote_code: bool
    """Whether the model needs `--trust-remote-code`; only a hint, never enabled from here."""
    allow_pickle: bool
    """Whether a checkpoint was published as .bin, and needs `--allow-pickle`; a hint, too."""
    note: str
    published: Scores
    """The scores before and after ExPO; empty where none are published."""
    tables: Tables
    """The settings, as `load_tables` gives them."""

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
    link: str
    """Its address."""
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
    tables = load_tables(folder / f"{found}.toml", extra_tables=frozenset({"recipe", "published"}))
    return found, tables, tables.pop("recipe")


def load(name: str) -> Recipe | RewardRecipe:
    """Read the recipe of that name (in any case).

    Raises:
        InputError: There is none; the message has those that are spelled like it.
    """
    if (found := _read(FOLDER, name)) is not None:
        return _pair(*found)
    if (found := _read(REWARD_MODELS, name)) is not None:
        return _reward_model(*found)
    known = {one.lower(): one for one in [*names(), *reward_model_names()]}
    near = [known[one] for one in get_close_matches(name.lower(), known)]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"no recipe {name!r}; `expo recipes` lists them{meant}")


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
        link=about.get("link", ""),
        trust_remote_code=about.get("trust_remote_code", False),
        note=about.get("note", ""),
        tables=tables,
    )


def _pair(name: str, tables: Tables, about: dict[str, Any]) -> Recipe:
    scores = read_scores(tables.pop("published", {}), name)
    both = {key: tables["extrapolate"][key] for key in ("sft", "dpo")}
    alphas = tables["extrapolate"].get("alpha", [])
    alpha = float(alphas[0]) if alphas else None
    tables.setdefault("inspect", dict(both))
    tables["generate"] = both | ({} if alpha is None else {"alpha": alpha}) | tables.get("generate", {})
    sampling = {key: value for key, value in tables["generate"].items() if key in field_names("sweep")}
    tables.setdefault("sweep", sampling | both).pop("alpha", None)
    return Recipe(
        name=name,
        **both,
        alpha=alpha,
        source=about["source"],
        link=about.get("link", ""),
        trust_remote_code=about.get("trust_remote_code", False),
        allow_pickle=about.get("allow_pickle", False),
        note=about.get("note", ""),
        published=scores,
        tables=tables,
    )


def sweep_command(recipe: Recipe) -> str:
    """The command that finds an α for a recipe's pair."""
    return " ".join(["expo sweep --recipe", recipe.name, "--output", f"sweeps/{recipe.name}", *hints(recipe)])


def hints(recipe: Recipe) -> list[str]:
    """The flags that its checkpoints need, and that whoever runs them has to give."""
    return ["--allow-pickle"] * recipe.allow_pickle + ["--trust-remote-code"] * recipe.trust_remote_code


def require_alpha(recipe: Recipe) -> float:
    """The α that is published for a recipe's pair.

    Raises:
        InputError: None is; the message says how to find one.
    """
    if recipe.alpha is None:
        finds = f"`{sweep_command(recipe)}` finds one"
        raise InputError(f"no α is published for {recipe.name}: {finds}; or choose one, such as --alpha 0.3")
    return recipe.alpha


UNPUBLISHED = "–"
"""In the place of an α that nobody has published."""


def table(known: Iterable[Recipe]) -> str:
    """One line per recipe, under headings, and what to do where there is no α."""
    known = list(known)
    alphas = [UNPUBLISHED if one.alpha is None else repr(one.alpha) for one in known]
    rows = [(one.name, alpha, one.sft, one.dpo, one.source) for one, alpha in zip(known, alphas, strict=True)]
    lines = _aligned([("name", "α", "θ_sft", "θ_dpo", "source"), *rows])
    if UNPUBLISHED in alphas:
        lines.append(f"α {UNPUBLISHED}: not published; `expo sweep --recipe NAME` finds it")
    return "\n".join(lines)


def reward_table(known: Iterable[RewardRecipe]) -> str:
    """One line per reward model, under headings."""
    rows = [
        (
            one.name,
            one.reward_model,
            " ".join(f"{key}={value}" for key, value in one.settings.items()) or "-",
            one.source,
        )
        for one in known
    ]
    return "\n".join(_aligned([("name", "reward model", "settings", "source"), *rows]))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
