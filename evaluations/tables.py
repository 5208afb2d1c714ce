"""The paper's tables from the files that its authors released: `python -m evaluations.tables FOLDER`.

What is read, and from where, is in `released.py`. Beside each computed figure stands the one that the paper prints,
where one is known (`printed`). To add a table, add a function that makes one to `MAKERS`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from evaluations import released
from expo import recipes
from expo.cli.failures import EXPECTED, exit_code_of
from expo.recipes.published import FIGURES

RELEASED = (
    "zephyr-7b-alpha",
    "zephyr-7b-beta",
    "Starling-LM-7B-alpha",
    "Starling-LM-7B-beta",
    "Snorkel-Mistral-PairRM-DPO",
    "LLaMA3-iterative-DPO-final",
    "internlm2-chat-1_8b",
    "internlm2-chat-7b",
    "internlm2-chat-20b",
    "tulu-2-dpo-7b",
    "tulu-2-dpo-13b",
    "tulu-2-dpo-70b",
)
"""The twelve models of others, in the paper's order."""

CONTROLLED = {
    "SFT": "zephyr-7b-sft-full",
    "5 %": "zephyr_0.05",
    "10 %": "zephyr_0.1",
    "20 %": "zephyr_0.2",
    "40 %": "zephyr_0.4",
    "100 %": "zephyr-7b-dpo-full",
}
"""What the authors' own DPO runs began from, and they by how much of the data they saw."""

MT_BENCH_QUESTIONS = 80

Pair = tuple[float | None, float | None]
"""DPO and ExPO; None where there is no figure."""
Cell = str | float | Pair | None


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    heading: str
    decimals: int = 2
    """Of its numbers, in text."""
    computed: str = ""
    """The key of the column that this one should equal; "" where it stands for itself."""
    published: bool = False
    """Whether its figures were rounded to `decimals` when they were published."""


@dataclass(frozen=True)
class Table:
    """One of the paper's tables; a row is its cells in the order of the columns."""

    title: str
    folder: Path
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]

    def column(self, key: str) -> list[Cell]:
        """The cells of a column."""
        place = [one.key for one in self.columns].index(key)
        return [row[place] for row in self.rows]

    def describe(self) -> dict[str, object]:
        """The table as plain data, figures in full."""
        rows = [{column.key: cell for column, cell in zip(self.columns, row, strict=True)} for row in self.rows]
        return {"title": self.title, "folder": str(self.folder), "rows": rows, "notes": list(self.notes)}


def _published(key: str, heading: str, figure: str, computed: str = "") -> Column:
    """The column of a published figure, with its digits."""
    return Column(key, heading, FIGURES[figure].digits, computed, published=True)


def known(name: str) -> recipes.Recipe | None:
    """The recipe of a model, with α and the published scores; SFT has none."""
    recipe = recipes.load(name) if name in recipes.names() else None
    return recipe if isinstance(recipe, recipes.Recipe) else None


def printed(name: str, figure: str) -> Pair | None:
    """A published score of a model, DPO and ExPO; None where there is none."""
    recipe = known(name)
    return recipe.published.get(figure) if recipe else None


# --- the tables ----------------------------------------------------------------------------------------------------

ALPACA_COLUMNS = (
    Column("alpha", "α", 1),
    Column("win_rate", "win rate %"),
    _published("win_rate_published", "published", "alpaca_eval_win_rate", "win_rate"),
    Column("win_rate_judged", "from the verdicts", computed="win_rate"),
    Column("length_controlled", "length-controlled %"),
    _published("length_controlled_published", "published", "alpaca_eval_length_controlled", "length_controlled"),
    Column("length", "characters", 0),
    Column("length_recomputed", "from the outputs", 0, computed="length"),
)


def alpaca_released(folder: Path) -> Table:
    """AlpacaEval 2.0 for the twelve models of others."""
    models = released.alpaca_eval(folder, ALPACA_MODELS)
    rows = [(name, *_alpaca_cells(models, name)) for name in RELEASED]
    columns = (Column("model", "model"), *ALPACA_COLUMNS)
    return _table("AlpacaEval 2.0: released models, DPO → ExPO", folder, columns, rows, _not_there(models, RELEASED))


def alpaca_controlled(folder: Path) -> Table:
    """AlpacaEval 2.0 for SFT and the DPO runs on part of the data."""
    models = released.alpaca_eval(folder, ALPACA_MODELS)
    rows = [(data, name, *_alpaca_cells(models, name)) for data, name in CONTROLLED.items()]
    columns = (Column("data", "data"), Column("model", "model"), *ALPACA_COLUMNS)
    notes = _not_there(models, CONTROLLED.values())
    return _table("AlpacaEval 2.0: DPO on part of the data, DPO → ExPO", folder, columns, rows, notes)


def _alpaca_names(name: str) -> tuple[str, ...]:
    """What a model is called in the leaderboard, and what θ(α) may be; SFT has no recipe, so no second side."""
    recipe = known(name)
    return (name, f"{name}-ExPO", f"{name}_a{recipe.alpha!r}") if recipe else (name,)


ALPACA_MODELS = frozenset(chain.from_iterable(map(_alpaca_names, (*RELEASED, *CONTROLLED.values()))))


def _not_there(models: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """What the leaderboard lacks of some models."""
    missing = []
    for name in names:
        dpo, *extrapolated = _alpaca_names(name)
        missing += [dpo] * (dpo not in models)
        missing += [f"{name}-ExPO"] * (bool(extrapolated) and models.keys().isdisjoint(extrapolated))
    return [f"leaderboard.csv has no row of {', '.join(missing)}"] if missing else []


def _alpaca_cells(models: Mapping[str, released.AlpacaScores], name: str) -> list[Cell]:
    """A model's cells of `ALPACA_COLUMNS`."""
    recipe = known(name)
    expected = recipe.published if recipe else {}
    dpo, *extrapolated = _alpaca_names(name)
    both = (models.get(dpo), next((models[one] for one in extrapolated if one in models), None))

    def pair(figure: str) -> Cell:
        figures = _pair(getattr(one, figure) if one else None for one in both)
        return figures if extrapolated or figures is None else figures[0]

    return [
        recipe.alpha if recipe else None,
        pair("win_rate"),
        expected.get("alpaca_eval_win_rate"),
        pair("judged_win_rate"),
        pair("length_controlled"),
        expected.get("alpaca_eval_length_controlled"),
        pair("length"),
        pair("recomputed_length"),
    ]


def open_llm_leaderboard(folder: Path) -> Table:
    """The six tasks and their mean, for each pair that has files."""
    models = released.lm_eval(folder)
    pairs = _in_order({name.removesuffix("-ExPO") for name in models})
    rows = []
    for name in pairs:
        both = (models.get(name), models.get(f"{name}-ExPO"))
        tasks = [_pair(one.scores.get(task.file) if one else None for one in both) for task in released.HARNESS]
        rows.append((name, *tasks, _pair(one.mean if one else None for one in both)))
    columns = (
        Column("model", "model"),
        *(Column(task.file, task.heading) for task in released.HARNESS),
        Column("mean", "mean of six"),
    )
    notes = [remark for scores in models.values() for remark in scores.remarks]
    missing = [name for name in RELEASED if name not in pairs]
    if missing:
        notes.append(f"no files here: {', '.join(missing)}")
    return _table("Open LLM Leaderboard: DPO → ExPO, in percent", folder, columns, rows, notes)


def mt_bench(folder: Path) -> Table:
    """The published scores, and what the released answers tell without a judge."""
    models = released.mt_bench(folder)
    rows = []
    for name in _in_order({*RELEASED, *(name.removesuffix("-ExPO") for name in models)}):
        both = (models.get(name), models.get(f"{name}-ExPO"))
        score = printed(name, "mt_bench")
        if both == (None, None) and score is None:
            continue
        questions = _pair(float(one.questions) if one else None for one in both)
        turns = [
            _pair(one.lengths[turn] if one and turn < len(one.lengths) else None for one in both) for turn in range(2)
        ]
        rows.append((name, score, questions, *turns))
    columns = (
        Column("model", "model"),
        _published("score_published", "published", "mt_bench"),
        Column("questions", "questions", 0),
        Column("turn_1", "characters, turn 1", 0),
        Column("turn_2", "turn 2", 0),
    )
    again = f"bash scripts/mt_bench.sh --answers {folder}/NAME.jsonl {folder}/NAME-ExPO.jsonl"
    notes = [f"no verdicts were released; to have the answers judged again: {again}"]
    notes += [
        f"{name} has answers to {one.questions} of {MT_BENCH_QUESTIONS} questions"
        for name, one in models.items()
        if one.questions != MT_BENCH_QUESTIONS
    ]
    return _table("MT-Bench: DPO → ExPO", folder, columns, rows, notes)


MAKERS: dict[str, tuple[str, Callable[[Path], Table]]] = {
    "alpaca_eval_released": ("alpaca_eval", alpaca_released),
    "alpaca_eval_controlled": ("alpaca_eval", alpaca_controlled),
    "open_llm_leaderboard": ("lm_eval", open_llm_leaderboard),
    "mt_bench": ("mt_bench", mt_bench),
}
"""The tables by name: the evaluation whose folder each is made from, and what makes it."""


def make(root: Path) -> dict[str, Table]:
    """The tables that can be made from a folder.

    Raises:
        InputError: There is nothing to read, or a file is not what its name says.
    """
    folders = released.find(root)
    return {name: maker(folders[source]) for name, (source, maker) in MAKERS.items() if source in folders}


def _pair(figures: Iterable[float | None]) -> Pair | None:
    dpo, expo = figures
    return None if dpo is None and expo is None else (dpo, expo)


def _in_order(names: Iterable[str]) -> list[str]:
    """In the paper's order; those that it does not have come last."""
    return sorted(names, key=lambda name: (RELEASED.index(name) if name in RELEASED else len(RELEASED), name))


def _table(
    title: str, folder: Path, columns: tuple[Column, ...], rows: Iterable[tuple[Cell, ...]], notes: Iterable[str] = ()
) -> Table:
    table = Table(title, folder, columns, tuple(rows), ())
    compared = chain.from_iterable(_differences(table, column) for column in columns if column.computed)
    return Table(title, folder, columns, table.rows, (*notes, *compared))


def _differences(table: Table, column: Column) -> list[str]:
    """Where a column differs from the one that it should equal, by more than it was rounded by."""
    computed = next(one for one in table.columns if one.key == column.computed)
    found = []
    for name, here, there in zip(
        table.column("model"), table.column(computed.key), table.column(column.key), strict=True
    ):
        for side, one, other in zip(("DPO", "ExPO"), _sides(here), _sides(there), strict=True):
            if one is not None and other is not None and abs(one - other) > _rounding(column):
                figures = f"{_number(one, computed.decimals)}, {column.heading} {_number(other, column.decimals)}"
                found.append(f"{name}, {side}: {computed.heading} {figures}")
    return found


def _sides(cell: Cell) -> Pair:
    if isinstance(cell, tuple):
        return cell
    return (None if isinstance(cell, str) else cell, None)


def _rounding(column: Column) -> float:
    """Half of the last place of figures that were published; one that is computed again must be the same."""
    return 0.5 * 10.0**-column.decimals + 1e-9 if column.published else 1e-6


# --- how they are shown --------------------------------------------------------------------------------------------


def _number(figure: float | None, decimals: int) -> str:
    return "–" if figure is None else f"{figure:.{decimals}f}"


def _shown(column: Column, cell: Cell) -> str:
    if isinstance(cell, tuple):
        return " → ".join(_number(figure, column.decimals) for figure in cell)
    return cell if isinstance(cell, str) else _number(cell, column.decimals)


def _grid(table: Table) -> list[list[str]]:
    """Headings and rows as text, without columns in which nothing stands."""
    used = [place for place, _ in enumerate(table.columns) if any(row[place] is not None for row in table.rows)]
    lines = [[_shown(table.columns[place], row[place]) for place in used] for row in table.rows]
    return [[table.columns[place].heading for place in used], *lines]


def text(table: Table) -> str:
    """The table for a terminal."""
    grid = _grid(table)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    rule = "─" * max(map(len, lines))
    return "\n".join([table.title, f"from {table.folder}", "", lines[0], rule, *lines[1:], *_spaced(table.notes)])


def markdown(table: Table) -> str:
    """The table for a document."""
    grid = _grid(table)
    lines = [grid[0], ["---"] * len(grid[0]), *grid[1:]]
    rows = ["| " + " | ".join(row) + " |" for row in lines]
    return "\n".join([f"**{table.title}**", "", *rows, *_spaced([f"- {note.strip()}" for note in table.notes])])


def _spaced(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables of the folder on the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.tables",
        description="Print the paper's tables from the files that its authors released.",
        epilog=f"example:\n  git clone {released.REPOSITORY} released\n  bash scripts/paper_tables.sh released",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a clone of that repository, or a folder with alpaca_eval/, lm_eval/")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one object with every figure in full")
    form.add_argument("--markdown", action="store_true", help="for a document")
    arguments = parser.parse_args(words)
    try:
        tables = make(arguments.folder)
    except EXPECTED as error:
        return exit_code_of(error)
    if arguments.json:
        plain = {name: table.describe() for name, table in tables.items()}
        print(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n\n".join(map(markdown if arguments.markdown else text, tables.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
