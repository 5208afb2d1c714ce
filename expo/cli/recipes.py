"""`expo recipes` on the command line: tables of all, and one recipe with its scores and the commands that use it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from expo import recipes
from expo.cli.command import Shown
from expo.errors import InputError
from expo.recipes.published import FIGURES, Scores
from expo.settings import flag

EXAMPLES = (
    "\b\nExamples:\n"
    "  expo recipes\n"
    "  expo recipes --show Starling-LM-7B-beta\n"
    "  expo recipes Starling-LM-7B-beta --json"
)

EVALUATIONS = ("alpaca_eval", "mt_bench", "open_llm_leaderboard")
"""The scripts that evaluate a recipe's model."""

NEEDS = {
    "--allow-pickle": "which reads weights that were published as .bin",
    "--trust-remote-code": "which runs the code that comes with the model",
}
"""Why a model needs a flag that no recipe sets."""

WIDTH = 100
"""Characters of a line, if no word is longer."""

OF_PAIR = frozenset({"model", "sft", "dpo", "alpha"})
"""Settings of a recipe that name its models, and say nothing special about them."""


def show(names: Sequence[str] | None, one: str | None = None) -> Shown:
    """Some recipes, or all: a table of pairs, and one of reward models; or one of them in full."""
    if one is not None:
        if names:
            raise InputError(f"--show {one} prints one recipe: leave out {', '.join(names)}")
        return show_one(recipes.load(one))
    known = [recipes.load(name) for name in names or [*recipes.names(), *recipes.reward_model_names()]]
    pairs = [recipe for recipe in known if isinstance(recipe, recipes.Recipe)]
    reward_models = [recipe for recipe in known if isinstance(recipe, recipes.RewardRecipe)]
    data = {
        "recipes": [recipe.describe() for recipe in pairs],
        "reward_models": [recipe.describe() for recipe in reward_models],
    }
    tables = [
        *([recipes.table(pairs)] if pairs else []),
        *([recipes.reward_table(reward_models)] if reward_models else []),
        "`expo recipes --show NAME` prints one in full: notes, published scores, commands",
    ]
    return Shown(data, "\n\n".join(tables))


def show_one(recipe: recipes.Recipe | recipes.RewardRecipe) -> Shown:
    """All that is known of one model: where it comes from, what is special, its scores, and what to run next."""
    if isinstance(recipe, recipes.Recipe):
        models = [("θ_dpo", recipe.dpo), ("θ_sft", recipe.sft), ("α", _alpha(recipe))]
        settings = {key: value for key, value in recipe.tables["generate"].items() if key not in OF_PAIR}
        commands, published, needed = _of_pair(recipe), recipe.published, recipes.hints(recipe)
    else:
        models, settings = [("reward model", recipe.reward_model)], recipe.settings
        commands, published = _of_reward_model(recipe), {}
        needed = ["--trust-remote-code"] * recipe.trust_remote_code
    facts = [
        *models,
        ("source", recipe.source),
        ("", recipe.link),
        ("note", recipe.note),
        ("settings", " ".join(_flags(settings))),
        *(("needs", f"{name}, {NEEDS[name]}") for name in needed),
    ]
    blocks = [
        [recipe.name, *(line for key, value in facts for line in _fact(key, value))],
        _score_lines(published) if published else [],
        ["next", *(f"  {command}" for command in commands)],
    ]
    data = {**recipe.describe(), "settings": settings, "scores": _scores(published), "commands": commands}
    return Shown(data, "\n\n".join("\n".join(lines) for lines in blocks if lines))


def require_alpha(name: str, pair: tuple[str, str]) -> None:
    """Refuse a recipe without α where a command needs one for its pair; of another pair it says nothing.

    Raises:
        InputError: The recipe has none.
    """
    recipe = recipes.load(name)
    if isinstance(recipe, recipes.Recipe) and pair == (recipe.sft, recipe.dpo):
        recipes.require_alpha(recipe)


def _fact(key: str, value: str) -> list[str]:
    """Lines with a fact under its heading; none where there is nothing to say."""
    lines = textwrap.wrap(value, WIDTH - 16, break_long_words=False, break_on_hyphens=False)
    return [f"  {heading:<14}{line}" for heading, line in zip([key, *[""] * len(lines)], lines, strict=False)]


def _alpha(recipe: recipes.Recipe) -> str:
    found = f"not published; `expo sweep --recipe {recipe.name}` finds it"
    return found if recipe.alpha is None else repr(recipe.alpha)


def _flags(settings: dict[str, object]) -> Iterable[str]:
    for key, value in settings.items():
        for each in value if isinstance(value, list) else [value]:
            yield f"{flag(key)} {each}"


def _of_pair(recipe: recipes.Recipe) -> list[str]:
    alpha = " --alpha A" if recipe.alpha is None else ""
    needed = "".join(f" {name}" for name in recipes.hints(recipe))
    pickle = " --allow-pickle" * recipe.allow_pickle  # weights alone are read: no code of the model runs
    return [
        recipes.sweep_command(recipe),
        f"expo extrapolate --recipe {recipe.name}{alpha}{pickle}",
        *(f"bash scripts/{evaluation}.sh {recipe.name}{alpha}{needed}" for evaluation in EVALUATIONS),
    ]


def _of_reward_model(recipe: recipes.RewardRecipe) -> list[str]:
    model = f"--reward-model {recipe.reward_model}" + " --trust-remote-code" * recipe.trust_remote_code
    return [f"expo score alpaca --name NAME {model}", f"expo sweep --sft SFT --dpo DPO {model}"]


def _scores(published: Scores) -> list[dict[str, object]]:
    """The published scores as plain data, in the order of `FIGURES`."""
    return [
        {
            "figure": key,
            "benchmark": figure.words,
            "unit": figure.unit,
            "before": published[key][0],
            "after": published[key][1],
            "judge": figure.judge,
        }
        for key, figure in FIGURES.items()
        if key in published
    ]


def _score_lines(published: Scores) -> list[str]:
    """A table of the published scores, under headings."""
    rows = [("published", "DPO", "ExPO", "judge")]
    for key, figure in FIGURES.items():
        if key in published:
            before, after = (f"{score:.{figure.digits}f}" for score in published[key])
            unit = f" ({figure.unit})" if figure.unit else ""
            rows.append((f"  {figure.words}{unit}", before, after, figure.judge))
    width = max(len(words) for words, *_ in rows) + 2
    return [f"{words:<{width}}{before:>6}{after:>8}   {judge}".rstrip() for words, before, after, judge in rows]
