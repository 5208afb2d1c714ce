"""The race of a sweep on the page: a table with a row per look, and the one test of the α that it found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expo.output.curves import OF_RACE
from expo.output.races import ConfirmationRecord, DropRecord, LookRecord, RaceRecord
from expo.verbs.compare.verdict import shown_p
from expo.verbs.report.text import digits_for, escaped, number, percent, shown_interval, signed

HEADS = ("Look", "Prompts", "In the race", "Leads", "Dropped", "Added", "Expected loss")
OF_ALL = (
    f"Figures cover all prompts that an α and α = 0 have answered ({OF_RACE}): the race used some of them to find its "
    "α, so only the confirmation is evidence for it."
)
"""What a figure of a race has to say that is not of the confirmation alone."""


def shown(alpha: float | None) -> str:
    """An α for the page."""
    return "–" if alpha is None else f"{alpha:g}".replace("-", "−")


def joined(alphas: Iterable[float]) -> str:
    """Several α in a sentence."""
    *head, last = map(shown, sorted(alphas))
    return f"α = {', '.join(head)} and {last}" if head else f"α = {last}"


# --- words ----------------------------------------------------------------------------------------------------------


def so_far(race: RaceRecord) -> str:
    """Where an unfinished race stands."""
    if not race.looks:
        return "No look has been taken yet."
    last = race.looks[-1]
    out = f"; {joined(race.dropped)} {'is' if len(race.dropped) == 1 else 'are'} dropped" if race.dropped else ""
    says = f"After {_of_its_prompts(race, last)} α = {shown(last.leader)} leads{out}."
    if race.candidate is not None:
        return f"{says} α = {shown(race.candidate)} is to be confirmed."
    return says


def _of_its_prompts(race: RaceRecord, look: LookRecord) -> str:
    return (
        f"{look.prompts:,} of the race's {race.questions:,} prompts" if race.questions else f"{look.prompts:,} prompts"
    )


def confirmation_says(race: RaceRecord) -> str:
    """The test of the candidate, and what it was made on."""
    found = race.confirmation
    if found is None:
        if race.candidate is not None:
            return f"α = {shown(race.candidate)} was found, and has not been confirmed yet."
        return "There was no α to confirm." if race.ended else "Nothing has been confirmed yet."
    figures = [
        f"the difference from α = 0 is {signed(found.difference, _digits(found))}",
        f"{level(found)} interval {shown_interval(found.interval, _digits(found))}" if found.interval else "",
        f"{signed(found.standardized)} standard deviations of the paired difference" if found.standardized else "",
        f"one-sided {shown_p(found.p)}",
    ]
    last = f"It is not chosen: {found.rejected}." if found.rejected else "It is confirmed."
    return f"On the {_set_aside(found)}, which the race did not see, α = {shown(found.alpha)} was tested once: " + (
        f"{', '.join(filter(None, figures))}. {last}"
        if found.difference is not None
        else f"no row has a reward. {last}"
    )


def _set_aside(found: ConfirmationRecord) -> str:
    count = "" if found.prompts is None else f"{found.prompts:,} "
    rows = "" if found.rows in (None, found.prompts) else f" ({found.rows:,} rows)"
    return f"{count}confirmation prompts{rows}"


def level(found: ConfirmationRecord) -> str:
    """How sure the confirmation's interval is: 90 %."""
    return "" if found.level is None else percent(found.level)


def _digits(found: ConfirmationRecord) -> int:
    return digits_for([found.interval[1] - found.interval[0]] if found.interval else [found.difference])


def race_tiles(race: RaceRecord) -> tuple[tuple[str, str, str], ...]:
    """The figures that people ask for first, of the confirmation alone: title, value, what it is."""
    found = race.confirmation
    if found is None or found.difference is None:
        return ()
    interval = f"{shown_interval(found.interval, _digits(found))} ({level(found)})" if found.interval else ""
    asked = f"{race.looks[-1].prompts:,}" if race.looks else "–"
    return (
        ("Confirmed difference in reward", signed(found.difference, _digits(found)), interval),
        ("One-sided p", shown_p(found.p).removeprefix("p ").removeprefix("= "), "of the confirmation"),
        ("In standard deviations", signed(found.standardized), "of the paired difference, confirmation"),
        ("Confirmed on", "–" if found.prompts is None else f"{found.prompts:,}", "prompts, which the race did not see"),
        ("Found on", asked, "prompts" if race.questions is None else f"of {race.questions:,} prompts of the race"),
        ("Tokens", percent(race.share_of_grid), "of what the grid would take"),
    )


# --- the section ----------------------------------------------------------------------------------------------------


def race_section(race: RaceRecord, drawn: str) -> str:
    """The race as HTML.

    Args:
        race: As sweep.json has it.
        drawn: Its chart, HTML already; empty where there is none.
    """
    lead = _lead(race)
    table = _table(race.looks) if race.looks else ""
    over = "".join(
        f"<p>α = {shown(alpha)} was ahead of the α that the race found, and was passed over on the race's prompts: "
        f"{escaped(why)}.</p>"
        for alpha, why in race.passed_over.items()
    )
    cost = (
        f"<p>The race and its confirmation took {percent(race.share_of_grid)} of the tokens that the grid would "
        "have.</p>"
        if race.share_of_grid is not None
        else ""
    )
    return (
        f'<section id="race" aria-label="The race"><h2>The race</h2><p class="lead">{escaped(lead)}</p>{table}{drawn}'
        f"{over}<h3>Confirmation</h3><p>{escaped(confirmation_says(race))}</p>{cost}</section>"
    )


def _lead(race: RaceRecord) -> str:
    there = (
        "" if race.questions is None else f"The race uses {race.questions:,} prompts, in an order fixed beforehand. "
    )
    aside = "" if race.aside is None else f"{race.aside:,} others are set aside to confirm what the race finds. "
    ended = f"It ended because {race.ended}." if race.ended else "It is not finished: the same command continues it."
    return (
        f"{there}{aside}Each row is a look at the first of the race's prompts, those that all α in the race had "
        "answered by then, and its figures are of these alone. An α is dropped if it is worse than another one with a "
        "p, simultaneous over all pairs of α in the race, of at most the look's limit δ; α = 0 is never dropped. "
        "Expected loss is the most that choosing the leader at that look would lose; sd are standard deviations of the "
        "paired difference. " + ended
    )


def _table(looks: Sequence[LookRecord]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in HEADS)
    rows = "".join(map(_row, looks))
    title = "Looks of the race"
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{title}"><table class="looks"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _row(look: LookRecord) -> str:
    limit = "" if look.error is None else f"<small>limit δ = {look.error:.2g}</small>"
    out = [_dropped(one) for one in look.dropped]
    out += [f"<b>{shown(alpha)}</b><small>too few of its answers have a reward</small>" for alpha in look.unscored]
    cells = [
        f"{look.prompts:,}" + ("" if look.rows is None else f"<small>{look.rows:,} rows</small>"),
        f'<span class="num">{len(look.means)}</span><small>{", ".join(map(shown, sorted(look.means)))}</small>',
        shown(look.leader),
        ("".join(f"<div>{one}</div>" for one in out) or "–") + limit,
        ", ".join(map(shown, look.added)) or "–",
        f"{number(look.expected_loss)}<small>sd</small>" if look.expected_loss is not None else "–",
    ]
    ends = f'<tr><td colspan="{len(HEADS)}">The race ends here: {escaped(look.ends)}.</td></tr>' if look.ends else ""
    return f'<tr><th scope="row">{look.number}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>{ends}'


def _dropped(one: DropRecord) -> str:
    size = "" if one.standardized is None else f"{number(abs(one.standardized))} sd "
    return f"<b>{shown(one.alpha)}</b><small>{size}below α = {shown(one.behind)}, {escaped(shown_p(one.p))}</small>"
