"""The page: what is on it, in which order. `page.html` is its frame, `page.css` its look, `page.js` steers its rows.

All but the browser is plain HTML and SVG, which shows at once and without JavaScript. The content security policy lets
the page's own script run, by its hash, and nothing else: no request, no script in a text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template

from expo import __version__
from expo.output.charts import COLOURS
from expo.output.curves import OF_RACE
from expo.output.races import RaceRecord
from expo.verbs.compare.curve import length_unit
from expo.verbs.compare.figures import Comparison, Measured, ModelFigures, Paired, Table
from expo.verbs.report.aligned import Aligned
from expo.verbs.report.figures import COURSE, Chart
from expo.verbs.report.payload import columns, packed
from expo.verbs.report.race import OF_ALL, race_section
from expo.verbs.report.text import cut, digits_for, escaped, number, percent, probability, shown_interval, signed
from expo.verbs.report.verdict import INTERVAL, Tally, Verdict, decimals, direction, sign, tally

MARK = "made by expo report"
"""In the head of the page and in figures: whatever bears it may be replaced."""
FLIPS = 4
"""Rows shown of each kind, won and lost, per model."""
FLIP_CHARACTERS = 1500


def build(
    aligned: Aligned,
    comparison: Comparison,
    found: Verdict,
    charts: Sequence[Chart],
    notes: Sequence[str],
    race: RaceRecord | None = None,
) -> str:
    """Write the whole document.

    Args:
        aligned: The runs, the baseline first.
        comparison: What compare found.
        found: The same in words.
        charts: The figures.
        notes: What is missing or was left out, a sentence each.
        race: The race whose runs these are.

    Returns:
        HTML; the same for the same arguments.
    """
    script = _own("page.js")
    course, others = [[one for one in charts if (one.name == COURSE) is of_race] for of_race in (True, False)]
    sections = {
        "verdict": ("Verdict", _verdict(aligned, comparison, found, others[:1], notes)),
        "race": ("Race", "" if race is None else race_section(race, "".join(map(_drawn, course)))),
        "table": ("Table", _tables(aligned, comparison, race)),
        "flips": ("Rows that flip", _flips(aligned, found.best, race)),
        "figures": ("Figures", _figures(others[1:])),
    }
    there = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in there.items())
    names = " vs ".join(escaped(run.name) for run in aligned.runs[:3]) + (" …" if len(aligned.runs) > 3 else "")
    return Template(_own("page.html")).substitute(
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        mark=MARK,
        title=f"{names} · {escaped(aligned.runs[0].task)}",
        task=escaped(aligned.runs[0].task),
        style=_own("page.css").strip(),
        links=f'{links}<a href="#outputs">All outputs</a>',
        sections="\n".join(body for _, body in there.values()),
        rows=f"{len(aligned):,}",
        controls=_controls(aligned, found.best),
        footer=_footer(aligned),
        data=packed(columns(aligned)),
        script=script,
    )


def _own(name: str) -> str:
    return (files("expo.verbs.report") / name).read_text(encoding="utf-8")


def _dot(run: int) -> str:
    """A run's colour, as a style."""
    return f"--dot: var(--m{0 if run == 0 else 1 + (run - 1) % (len(COLOURS) - 1)})"


def _spot(run: int) -> str:
    return f'<span class="dot" style="{_dot(run)}"></span>'


# --- the verdict ---------------------------------------------------------------------------------------------------


def _verdict(
    aligned: Aligned, comparison: Comparison, found: Verdict, charts: Sequence[Chart], notes: Sequence[str]
) -> str:
    says = "".join(f"<p>{escaped(sentence)}</p>" for sentence in found.sentences)
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    missing = f'<div class="note" role="note"><ul>{items}</ul></div>' if notes else ""
    drawn = "".join(map(_drawn, charts))
    tiles = _tiles(aligned, comparison, found) if found.about_best else ""
    return (
        f'<section class="verdict" id="verdict"><h1>{escaped(found.headline)}</h1>{tiles}'
        f'<div class="first"><div><div class="says">{says}</div>{missing}</div>{drawn}</div></section>'
    )


def _tiles(aligned: Aligned, comparison: Comparison, found: Verdict) -> str:
    """The figures that people ask for first."""
    tiles = _of_best(aligned, comparison, found.best) if found.tiles is None else found.tiles
    cells = (f"<div><dt>{title}</dt><dd>{value}<small>{under}</small></dd></div>" for title, value, under in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else ""


def _of_best(aligned: Aligned, comparison: Comparison, best: int) -> Sequence[tuple[str, str, str]]:
    first = comparison.tables[0]
    model, digits = first.models[best], decimals(first)
    if first.key is None or model.paired is None:
        return ()
    counted, paired, equal = tally(aligned, first.key, best), model.paired, model.at_equal_length
    return [
        ("Difference in reward", signed(paired.difference, digits), shown_interval(paired.interval, digits)),
        ("At equal length", signed(equal.difference, digits), shown_interval(equal.interval, digits))
        if equal
        else ("At equal length", "–", "not known"),
        ("In standard deviations", signed(model.standardized_difference), "of the baseline"),
        ("Win rate", percent(paired.win_rate), f"{counted.better:,} better, {counted.worse:,} worse"),
        *_length_tile(model, first.baseline),
        ("Rows compared", f"{counted.compared:,}", f"{counted.unknown:,} left out" if counted.unknown else ""),
    ]


def _length_tile(model: ModelFigures, baseline: ModelFigures) -> list[tuple[str, str, str]]:
    unit = length_unit(model, baseline)
    if unit is None:
        return []
    before, after = getattr(baseline, unit), getattr(model, unit)
    change = f"{signed(100 * (after / before - 1), 0)}\N{NO-BREAK SPACE}%"
    return [("Length", change, f"{number(before, 0)} → {number(after, 0)} {unit}")]


# --- the table -----------------------------------------------------------------------------------------------------


def _tables(aligned: Aligned, comparison: Comparison, race: RaceRecord | None) -> str:
    but = f" but {escaped(', '.join(comparison.apart))}" if comparison.apart else ""
    at_once = f" and hold for all models{but} at once" if comparison.simultaneous else ""
    lead = (
        f"{comparison.n:,} rows of {comparison.prompts:,} prompts, paired. Intervals are {INTERVAL}{at_once}. "
        f"The baseline is {escaped(aligned.runs[0].name)}." + (f" {escaped(OF_ALL)}" if race else "")
    )
    tables = "".join(_table(table, race) for table in comparison.tables)
    return f'<section id="table" aria-label="Table"><h2>Every model</h2><p class="lead">{lead}</p>{tables}</section>'


HEADS = (
    "Prompts",
    "Mean reward",
    "Difference",
    "p",
    "SD",
    "Win rate",
    "At equal length",
    "Tokens",
    "Characters",
    "Rows",
)


def _table(table: Table, race: RaceRecord | None) -> str:
    title = "Lengths" if table.key is None else f"Reward model {escaped(table.key)}"
    digits = decimals(table)
    lines = [
        [f"{_spot(place)}{escaped(model.name)}", *_cells(model, digits, race)]
        for place, model in enumerate(table.models)
    ]
    used = [place for place in range(1, len(HEADS) + 1) if any(line[place] not in ("–", "") for line in lines)]
    head = "".join(f'<th scope="col">{HEADS[place - 1]}</th>' for place in used)
    rows = "".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{line[place]}</td>" for place in used)}</tr>'
        for line in lines
    )
    return (
        f'<h3>{title}</h3><div class="box" tabindex="0" role="region" aria-label="{title}"><table class="compare">'
        f'<thead><tr><th scope="col">Model</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cells(model: ModelFigures, digits: int, race: RaceRecord | None) -> list[str]:
    """A model's figures; of a race no difference is called one, and none has a p, since it chose by these prompts."""
    error, paired, equal = model.standard_error, model.paired, model.at_equal_length
    p = None if paired is None or race else paired.p
    return [
        _prompts(model.alpha, race),
        number(model.mean, digits) + (f" <small>± {number(error, digits_for([error]))}</small>" if error else ""),
        _with_interval(paired, digits, 0 if race else direction(model)),
        probability(p).removeprefix("p ").removeprefix("= ") or "–",
        signed(model.standardized_difference),
        percent(paired.win_rate if paired else None),
        _with_interval(equal, digits, 0 if race or equal is None else sign(equal.interval)),
        number(model.tokens, 0),
        number(model.characters, 0),
        f"{model.n:,}",
    ]


def _prompts(alpha: float | None, race: RaceRecord | None) -> str:
    """Which prompts of a race an α has answered."""
    answered = race.answered.get(alpha) if race and alpha is not None else None
    if answered is None:
        return "–"
    aside = f"<small>+ {answered.confirmation:,} confirmation</small>" if answered.confirmation else ""
    return f"{answered.race:,} race{aside}"


def _with_interval(figure: Paired | Measured | None, digits: int, shows: int) -> str:
    if figure is None or figure.difference is None:
        return "–"
    kind = {1: "gain", 0: "", -1: "loss"}[shows]
    under = shown_interval(figure.interval, digits)
    return f'<b class="{kind}">{signed(figure.difference, digits)}</b><small>{under}</small>'


# --- the rows that flip --------------------------------------------------------------------------------------------


def _flips(aligned: Aligned, best: int, race: RaceRecord | None) -> str:
    if not aligned.reward_models:
        return ""
    model = aligned.reward_models[0]
    counts = {run: tally(aligned, model, run) for run in range(1, len(aligned.runs))}
    blocks = "".join(_flips_of(aligned, model, run, counts[run], opened=run == best) for run in counts)
    lead = (
        f"Where a model's answer gained and lost most against {escaped(aligned.runs[0].name)}, by the reward of "
        f"{escaped(model)}." + (f" Of all prompts that both have answered, {OF_RACE}." if race else "")
    )
    return f'<section id="flips"><h2>The rows that flip most</h2><p class="lead">{lead}</p>{blocks}</section>'


def _flips_of(aligned: Aligned, model: str, run: int, counted: Tally, *, opened: bool) -> str:
    found = [(value, row) for row, value in enumerate(aligned.differences(model, run)) if value]
    gains = sorted((one for one in found if one[0] > 0), key=lambda one: (-one[0], one[1]))[:FLIPS]
    losses = sorted((one for one in found if one[0] < 0), key=lambda one: (one[0], one[1]))[:FLIPS]
    name = escaped(aligned.runs[run].name)
    parts = "".join(
        f"<h3>{title}</h3>{''.join(_flip(aligned, model, run, row) for _, row in rows)}"
        for title, rows in ((f"{name} gains most", gains), (f"{name} loses most", losses))
        if rows
    )
    counts = f"better on {counted.better:,} rows, worse on {counted.worse:,}, equal on {counted.equal:,}"
    summary = f"{name}<small>{counts}</small>"
    state = " open" if opened else ""
    body = parts or "<p>No row differs in its reward.</p>"
    return f'<details class="flips" name="flips"{state}><summary>{summary}</summary><div>{body}</div></details>'


def _flip(aligned: Aligned, model: str, run: int, row: int) -> str:
    first, changed = aligned.first[row], aligned.differences(model, run)[row]
    kind = "gain" if (changed or 0) > 0 else "loss"
    where = " · ".join(filter(None, [f"row {escaped(first.id)}", escaped(first.subset or "")]))
    sides = "".join(_side(aligned, model, one, row) for one in (0, run))
    return (
        f'<article class="flip"><header><span class="badge {kind}">{signed(changed, aligned.decimals[model])}</span>'
        f'<span class="muted">{where}</span><a href="#row-{row}">open in the list</a></header>'
        f'{_text(first.prompt or "(no prompt)", "text asked")}<div class="sides">{sides}</div></article>'
    )


def _side(aligned: Aligned, model: str, run: int, row: int) -> str:
    length, reason = aligned.lengths(run)[row], aligned.finish_reasons(run)[row]
    facts = [f"reward {number(aligned.rewards(model, run)[row], aligned.decimals[model])}"]
    facts += [] if length is None else [f"{length:,.0f} {aligned.unit}"]
    facts += [] if reason is None else [escaped(reason)]
    output = aligned.outputs(run)[row]
    empty = f'<p class="text empty">{"no text" if output is None else "empty answer"}</p>'
    body = _text(output, "text") if output else empty
    head = f"<b>{escaped(aligned.runs[run].name)}</b>" + "".join(f"<span>{fact}</span>" for fact in facts)
    return f'<div class="side" style="{_dot(run)}"><header>{head}</header>{body}</div>'


def _text(text: str, kind: str) -> str:
    start, missing = cut(text, FLIP_CHARACTERS)
    more = f'<p class="more">… and {missing:,} more characters, in the list of all outputs</p>' if missing else ""
    return f'<div class="{kind}" dir="auto">{escaped(start)}</div>{more}'


# --- figures, and what the browser is steered with -------------------------------------------------------------------


def _figures(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f'<section id="figures"><h2>Figures</h2><div class="charts">{"".join(map(_drawn, charts))}</div></section>'


def _drawn(chart: Chart) -> str:
    caption = f"<figcaption>{escaped(chart.title)}<small>{escaped(chart.says)}</small></figcaption>"
    return f"<figure>{caption}{chart.svg}</figure>"


def _controls(aligned: Aligned, best: int) -> str:
    names = [escaped(run.name) for run in aligned.runs]
    scored, reasons = bool(aligned.reward_models), _reasons(aligned)
    sorts = [("order", "prompt order"), *([("difference", "difference in reward")] if scored else [])]
    sorts += [(f"reward:{place}", f"reward of {name}") for place, name in enumerate(names) if scored]
    sorts += [(f"length:{place}", f"{aligned.unit} of {name}") for place, name in enumerate(names)]
    who = [("", "all rows"), ("better", "rows it wins"), ("worse", f"rows {names[0]} wins"), ("equal", "equal rows")]
    parts = [
        '<label class="search">Search prompts and answers<input type="search" name="q" id="q" autocomplete="off" '
        'spellcheck="false" aria-keyshortcuts="/"></label>',
        _select("model", f"Compare with {names[0]}", [(str(n), name) for n, name in enumerate(names) if n], str(best)),
        _select("reward", "Reward model", [(str(n), escaped(one)) for n, one in enumerate(aligned.reward_models)])
        if len(aligned.reward_models) > 1
        else "",
        _select("who", "Show", [*who, ("unknown", "rows without a reward")]) if scored else "",
        _select("subset", "Subset", [("", "all"), *((str(n), escaped(one)) for n, one in enumerate(aligned.subsets))])
        if aligned.subsets
        else "",
        _select("finish", "An answer ended by", [("", "anything"), *((str(n), one) for n, one in enumerate(reasons))])
        if reasons
        else "",
        _select("sort", "Sort by", sorts),
        _select("direction", "Direction", [("ascending", "lowest first"), ("descending", "highest first")]),
        '<button type="button" id="clear">Reset</button>',
        _checks(names, best),
    ]
    return "\n".join(filter(None, parts))


def _reasons(aligned: Aligned) -> list[str]:
    """Finish reasons in the order in which the rows' columns number them."""
    found = (reason for run in range(len(aligned.runs)) for reason in aligned.finish_reasons(run))
    return [escaped(reason) for reason in dict.fromkeys(found) if reason is not None]


def _select(name: str, label: str, options: Iterable[tuple[str, str]], chosen: str = "") -> str:
    listed = "".join(
        f'<option value="{value}"{" selected" if value and value == chosen else ""}>{text}</option>'
        for value, text in options
    )
    return f'<label>{label}<select name="{name}">{listed}</select></label>'


def _checks(names: Sequence[str], best: int) -> str:
    """Which models stand side by side; with two runs both do."""
    if len(names) < 3:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" name="column" value="{n}"{" checked" if n in (0, best) else ""}>'
        f"<span>{_spot(n)}{name}</span></label>"
        for n, name in enumerate(names)
    )
    return f'<fieldset><legend>Side by side</legend><div class="checks">{boxes}</div></fieldset>'


def _footer(aligned: Aligned) -> str:
    runs = ", ".join(escaped(run.name) for run in aligned.runs)
    return (
        f"<p>Written by <b>expo report</b> {__version__} from {len(aligned):,} rows of {runs}. It needs no network.</p>"
    )
