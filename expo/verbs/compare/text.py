"""A comparison as tables of text, for a terminal or in GitHub's markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from expo.stats.means import Interval
from expo.stats.resampling import LEVEL
from expo.verbs.compare.figures import Agreed, Comparison, ModelFigures, Paired, Table
from expo.verbs.compare.verdict import verdicts

WIDTH = 100
"""Columns of a terminal that tables keep to, by shortening names."""
MIN_NAME = 12
NOTHING = "–"


@dataclass(frozen=True)
class Grid:
    """A table of text; its first column is names, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ends_in_words: bool = False
    """Whether the last column is words, too."""


def as_text(comparison: Comparison) -> str:
    """For a terminal."""
    grids = ["\n".join(aligned(grid)) for grid in _grids(comparison)]
    lines = [[textwrap.fill(printable(line), WIDTH) for line in lines] for lines in _below(comparison)]
    return "\n\n".join([*grids, *map("\n".join, lines)])


def as_markdown(comparison: Comparison) -> str:
    """For GitHub."""
    grids = ["\n".join(_piped(grid)) for grid in _grids(comparison)]
    return "\n\n".join([*grids, *(_escaped(printable(line)) for lines in _below(comparison) for line in lines)])


# --- what is shown --------------------------------------------------------------------------------------------------


def _grids(comparison: Comparison) -> Iterator[Grid]:
    for table in comparison.tables:
        by = f", rewards by {table.reward_model or 'an unnamed reward model'}" if table.key else ", without rewards"
        yield _own(f"{comparison.task}{by}: {comparison.n} rows, {comparison.prompts} prompts", table)
        if table.key:
            yield _against(comparison.baseline, table)
            yield from _subsets(table)
            yield from _flips(table)
    if comparison.agreement:
        yield _agreement(comparison.agreement)


def _own(title: str, table: Table) -> Grid:
    head = ("model", "n", "mean reward", "s.e.", "tokens", "characters", "longer by")
    return Grid(title, head, tuple(map(_own_row, table.models)))


def _own_row(model: ModelFigures) -> tuple[str, ...]:
    return (
        model.name,
        str(model.n),
        number(model.mean),
        number(model.standard_error),
        _length(model.tokens),
        _length(model.characters),
        signed(model.longer.difference, 0) if model.longer else "",
    )


def _against(baseline: str, table: Table) -> Grid:
    head = ("model", "difference", "SD", "p", "win rate", "at equal length")
    return Grid(f"against {baseline}", head, tuple(map(_paired_row, table.others)))


def _paired_row(model: ModelFigures) -> tuple[str, ...]:
    equal = model.at_equal_length
    return (
        model.name,
        difference(model.paired),
        signed(model.standardized_difference, 2),
        probability(model.paired),
        win_rate(model.paired),
        _measured(equal.difference, equal.interval) if equal else NOTHING,
    )


def _subsets(table: Table) -> Iterator[Grid]:
    for model in table.others:
        if model.subsets:
            rows = [
                (name, str(one.n), difference(one), probability(one), win_rate(one))
                for name, one in model.subsets.items()
            ]
            yield Grid(f"{model.name}, by subset", ("subset", "n", "difference", "p", "win rate"), tuple(rows))


def _flips(table: Table) -> Iterator[Grid]:
    rows = []
    for model in table.others:
        for winner, sign in ((model.name, 1), (table.baseline.name, -1)):
            flips = [f"{flip.label} ({flip.difference:+.2f})" for flip in model.flips if flip.difference * sign > 0]
            rows += [(winner if number == 0 else "", chunk) for number, chunk in enumerate(_chunks(flips))]
    if rows:
        yield Grid("", ("wins by the most", "rows (difference)"), tuple(rows), ends_in_words=True)


def _chunks(words: Sequence[str], width: int = 64) -> Iterator[str]:
    """Words in lines."""
    line = ""
    for word in words:
        if line and len(line) + len(word) + 2 > width:
            yield line
            line = ""
        line += f", {word}" if line else word
    if line:
        yield line


def _agreement(agreed: Sequence[Agreed]) -> Grid:
    head = ("two reward models on", "n", "correlation", "same sign", "gain", "seen by it alone")
    rows = []
    for one in agreed:
        figures = one.figures
        same = NOTHING if figures.same_sign is None else f"{figures.same_sign:.1%}"
        rows.append((one.name, str(figures.n), number(figures.correlation, 2), same, "", ""))
        for model, gain in zip(one.reward_models, figures.gains or (), strict=False):
            share = "" if gain.share_only_here is None else f" ({gain.share_only_here:.0%})"
            alone = f"{signed(gain.only_here)}{share}"
            rows.append((f"  {model}", "", "", "", signed(gain.difference), alone))
    return Grid("", head, tuple(rows))


def _below(comparison: Comparison) -> list[list[str]]:
    """What is said under the tables, in paragraphs of lines."""
    if not any(table.key for table in comparison.tables):
        return [verdicts(comparison)]
    level = f"{LEVEL:.0%}".replace("%", " %")
    first = comparison.baseline
    over = f", both simultaneous over the {comparison.together} models (max-T)" if comparison.simultaneous else ""
    how = f"Differences are paired, to {first}: {level} bootstrap intervals and sign-flip p by prompt{over}."
    units = f"SD: in standard deviations of {first}'s rewards. Win rate: ties count half. Lengths: characters."
    return [verdicts(comparison), [how, units]]


# --- numbers --------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A figure with its sign."""
    return NOTHING if value is None else f"{value:+.{digits}f}"


def _length(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}"


def _measured(value: float, interval: Interval | None) -> str:
    return signed(value) + ("" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]")


def difference(paired: Paired | None) -> str:
    """A difference with its interval."""
    if paired is None or paired.difference is None:
        return NOTHING
    return _measured(paired.difference, paired.interval)


def probability(paired: Paired | None) -> str:
    """A p."""
    return NOTHING if paired is None or paired.p is None else f"{paired.p:.4f}"


def win_rate(paired: Paired | None) -> str:
    """A win rate."""
    return NOTHING if paired is None or paired.win_rate is None else f"{paired.win_rate:.1%}"


# --- how it is laid out ---------------------------------------------------------------------------------------------


def aligned(grid: Grid) -> Iterator[str]:
    """A table as lines for a terminal."""
    rows = [tuple(map(printable, row)) for row in (grid.head, *grid.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(room, MIN_NAME))
    if grid.title:
        yield _shortened(printable(grid.title), WIDTH)
    for number, row in enumerate(rows):
        cells = [_shortened(row[0], widths[0]).ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        if grid.ends_in_words:
            cells[-1] = row[-1]
        yield "  ".join(cells).rstrip()
        if number == 0:
            yield "─" * min(sum(widths) + 2 * (len(widths) - 1), WIDTH)


def printable(text: str) -> str:
    """A name or an id, which files of others may have, without what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _shortened(name: str, width: int) -> str:
    """A name without its middle: the ends of models' names are what differs."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def _piped(grid: Grid) -> Iterator[str]:
    if grid.title:
        yield f"**{_escaped(printable(grid.title))}**\n"
    yield "| " + " | ".join(map(_escaped, grid.head)) + " |"
    yield "| " + " | ".join([":--", *["--:"] * (len(grid.head) - 1)]) + " |"
    for row in grid.rows:
        yield "| " + " | ".join(_escaped(printable(cell)) for cell in row) + " |"


def _escaped(text: str) -> str:
    """Names as text: nothing in them is markdown or HTML."""
    for letter in "\\|*_`<~":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("](", "]\\(").strip()
