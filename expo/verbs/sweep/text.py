"""A choice as tables of text for a terminal: a row per α, why those that gain were rejected, and the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from expo.output.curves import OF_RACE
from expo.stats.resampling import LEVEL
from expo.verbs.compare.figures import ModelFigures, Table
from expo.verbs.compare.text import NOTHING, WIDTH, Grid, aligned, difference, number, printable, probability, win_rate
from expo.verbs.sweep.figures import AlphaFigures, Choice
from expo.verbs.sweep.words import NOT_CONFIRMED, shown_for, told_look

INSIGNIFICANT = "not significant"
REFERENCES = {0.0: "DPO", -1.0: "SFT"}


def as_text(choice: Choice) -> str:
    """The table of each reward model, the first with what became of each α; then words."""
    tables = choice.comparison.tables
    grids = [_grid(choice, table, place) for place, table in enumerate(tables)]
    paragraphs = [list(_race(choice)), [choice.verdict], list(_rejected(choice)), [_how(choice)]]
    words = [[textwrap.fill(printable(line), WIDTH) for line in lines] for lines in paragraphs if lines]
    return "\n\n".join([*("\n".join(aligned(grid)) for grid in grids), *map("\n".join, words)])


def _grid(choice: Choice, table: Table, place: int) -> Grid:
    """The columns that have something in them."""
    found = choice.comparison
    of = f"{found.task}, " if place == 0 else ""
    title = f"{of}rewards by {table.reward_model or 'an unnamed reward model'}: {found.n} rows, {found.prompts} prompts"
    heads = ("α", "race", "confirmation", "mean reward", "difference", "p", "wins", "tokens", "characters", "ended", "")
    rows = [_row(one, [one.figures, *one.further][place], choice, first=place == 0) for one in choice.alphas]
    used = [number for number in range(len(heads)) if any(row[number] not in ("", NOTHING) for row in rows)]
    kept = tuple(tuple(row[number] for number in used) for row in rows)
    return Grid(title, tuple(heads[number] for number in used), kept, ends_in_words=heads[used[-1]] == "")


def _row(one: AlphaFigures, model: ModelFigures, choice: Choice, *, first: bool) -> tuple[str, ...]:
    error = f" ± {number(model.standard_error)}" if model.standard_error is not None else ""
    figures = (
        shown_for(choice.last_step)(one.alpha),
        *_prompts(one),
        f"{number(model.mean)}{error}",
        difference(model.paired),
        NOTHING if choice.raced else probability(model.paired),
        win_rate(model.paired),
    )
    if not first:
        return (*figures, "", "", "", "")
    characters = "" if model.tokens is not None else number(model.characters, 0)
    ended = NOTHING if model.ended is None else f"{model.ended:.0%}"
    return (*figures, number(model.tokens, 0), characters, ended, _mark(one, choice))


def _prompts(one: AlphaFigures) -> tuple[str, str]:
    """Of a race: which prompts the figures are of."""
    if one.answered is None:
        return "", ""
    return str(one.answered.race), str(one.answered.confirmation or NOTHING)


def _mark(one: AlphaFigures, choice: Choice) -> str:
    """What became of an α."""
    marks = [REFERENCES.get(one.alpha, "")]
    if one.alpha == choice.best_alpha:
        marks.append("chosen" if one.alpha else "")
    reasons = [reason.mark for reason in one.rejections]
    if one.answered is not None and one.answered.dropped_after is not None:
        marks.append(reasons[0])
    elif reasons:
        more = " …" if len(reasons) > 1 else ""
        marks.append(INSIGNIFICANT if reasons == [INSIGNIFICANT] else f"rejected: {reasons[0]}{more}")
    return ", ".join(filter(None, marks))


def _race(choice: Choice) -> Iterator[str]:
    """A race as it went, and what it took."""
    if choice.raced is not None:
        shown = shown_for(choice.last_step)
        yield from (told_look(look, shown) for look in choice.raced.course.looks)
        share = f"{choice.raced.share:.0%}".replace("%", " %")
        yield f"The race and its confirmation took {share} of the tokens that the grid would have."


def _rejected(choice: Choice) -> Iterator[str]:
    """Why significant gains were not accepted."""
    for one in choice.alphas:
        reasons = [str(reason) for reason in one.rejections if reason.mark not in (INSIGNIFICANT, NOT_CONFIRMED)]
        if one.answered is not None and one.answered.dropped_after is not None:
            continue  # the looks say it
        if reasons:
            yield f"α = {shown_for(choice.last_step)(one.alpha)} is rejected: {'; '.join(reasons)}."


def _how(choice: Choice) -> str:
    level, candidates = f"{LEVEL:.0%}".replace("%", " %"), choice.comparison.together
    if choice.raced is not None:
        only = "The race used some of them to find its α, so only the confirmation is evidence for it"
        none = "The race used them to look for an α, so they are not evidence for one"
        return (
            f"The table covers all {OF_RACE} that an α has answered, paired with α = 0; intervals are "
            f"{level}, simultaneous over the {candidates} α above 0. "
            f"{only if choice.raced.confirmation else none}. Wins: ties count half."
        )
    over = f", both simultaneous over the {candidates} α above 0 (max-T)" if choice.comparison.simultaneous else ""
    return (
        f"Differences are paired, to α = 0: {level} bootstrap intervals and sign-flip p by prompt{over}. "
        "Wins: ties count half."
    )
