"""What a comparison says, in plain sentences: who wins, by how much, whether it is only longer, where it was lost."""

from __future__ import annotations

from dataclasses import dataclass

from expo.output.curves import OF_RACE
from expo.output.races import RaceRecord
from expo.output.sweeps import SweepRecord
from expo.stats.means import Interval
from expo.stats.resampling import LEVEL
from expo.verbs.compare.curve import length_unit
from expo.verbs.compare.figures import Agreed, Comparison, ModelFigures, Table
from expo.verbs.compare.verdict import is_significant
from expo.verbs.report.aligned import Aligned
from expo.verbs.report.race import race_tiles, so_far
from expo.verbs.report.text import digits_for, number, percent, probability, shown_interval, signed

INTERVAL = f"{LEVEL:.0%}".replace("%", "\N{NO-BREAK SPACE}%")
"""How sure the intervals are."""


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page."""

    headline: str
    sentences: tuple[str, ...]
    best: int
    """Which run the headline is about; where it is about none, the one whose rows are shown first."""
    about_best: bool = True
    """Whether it is about that run."""
    tiles: tuple[tuple[str, str, str], ...] | None = None
    """Figures of its own, as title, value and what it is; None for those of the run."""


@dataclass(frozen=True)
class Tally:
    """How many rows a model answers better than the baseline, by one reward model."""

    better: int
    worse: int
    equal: int
    unknown: int
    """Rows without a reward on either side, or that a run lacks."""

    @property
    def compared(self) -> int:
        """Rows with a reward on both sides."""
        return self.better + self.worse + self.equal


def tally(aligned: Aligned, reward_model: str, run: int) -> Tally:
    """Count the rows that a run wins and loses against the baseline."""
    found = aligned.differences(reward_model, run)
    known = [value for value in found if value is not None]
    better, worse = sum(value > 0 for value in known), sum(value < 0 for value in known)
    return Tally(better, worse, len(known) - better - worse, len(found) - len(known))


def decimals(table: Table) -> int:
    """How many decimals a table's rewards are shown with: two digits of the width of its narrowest interval."""
    intervals = [model.paired.interval for model in table.others if model.paired]
    widths = [interval[1] - interval[0] for interval in intervals if interval]
    return digits_for(widths or [model.standard_error for model in table.models])


def sign(interval: Interval | None) -> int:
    """1 and −1 for a difference that the interval shows, else 0."""
    return 0 if interval is None else int(interval[0] > 0) - int(interval[1] < 0)


def verdict(aligned: Aligned, comparison: Comparison, sweep: SweepRecord | None = None) -> Verdict:
    """Put a comparison into words; its first table leads, and a sweep's choice where there is one."""
    found = _of_models(aligned, comparison)
    if sweep is not None and sweep.race is not None:
        return _of_race(comparison, sweep, sweep.race, found.best)
    if sweep is None or sweep.verdict is None or sweep.best_alpha is None:
        return found
    first, *further = comparison.tables
    if not sweep.best_alpha:
        return Verdict("No α is chosen", (sweep.verdict,), found.best, about_best=False)
    best = next((place for place, one in enumerate(first.models) if one.alpha == sweep.best_alpha), found.best)
    sentences = (
        sweep.verdict,
        _only_longer(first.models[best], first.baseline, decimals(first)),
        *(_second_opinion(table, best, first, comparison.agreement) for table in further),
    )
    return Verdict(f"α = {sweep.shown(sweep.best_alpha)} is chosen", tuple(filter(None, sentences)), best)


def _of_race(comparison: Comparison, sweep: SweepRecord, race: RaceRecord, best: int) -> Verdict:
    """What a race found, in its own words: the comparison's p and intervals are of the prompts that chose."""
    first, *further = comparison.tables
    about = race.candidate if race.candidate is not None else race.looks[-1].leader if race.looks else None
    best = next((place for place, one in enumerate(first.models) if place and one.alpha == about), best)
    if sweep.best_alpha is None or sweep.verdict is None:
        said = (so_far(race), "Nothing is confirmed until the race has ended: the same command continues it.")
        return Verdict("The race is not finished: no α is chosen yet", said, best, about_best=False)
    if not sweep.best_alpha:
        return Verdict("No α is chosen", (sweep.verdict,), best, about_best=False)
    model = first.models[best]
    figures = [_how_long(model, first.baseline), *(_seen_by(table, best) for table in further)]
    described = f"On all that it answered, {OF_RACE} together: {'; '.join(filter(None, figures))}."
    sentences = (sweep.verdict, described if any(figures) else "")
    headline = f"α = {sweep.shown(sweep.best_alpha)} is chosen"
    return Verdict(headline, tuple(filter(None, sentences)), best, tiles=race_tiles(race))


def _seen_by(table: Table, best: int) -> str:
    paired = table.models[best].paired
    if paired is None or paired.difference is None:
        return ""
    return f"by {table.key} the difference is {signed(paired.difference, decimals(table))}"


def _how_long(model: ModelFigures, baseline: ModelFigures) -> str:
    unit = length_unit(model, baseline)
    if unit is None:
        return ""
    before, after = getattr(baseline, unit), getattr(model, unit)
    return f"its answers have {number(after, 0)} {unit} on average (α = 0: {number(before, 0)})"


def _of_models(aligned: Aligned, comparison: Comparison) -> Verdict:
    first, *further = comparison.tables
    if first.key is None:
        return _lengths_only(first)
    known = {
        place: model.paired.difference
        for place, model in enumerate(first.models)
        if model.paired and model.paired.difference is not None
    }
    if not known:
        return Verdict("No row has a reward in both runs, so nothing is compared", (), 1)
    best = max(known, key=lambda place: known[place])
    model, counted = first.models[best], tally(aligned, first.key, best)
    sentences = (
        _by_how_much(model, counted, decimals(first)),
        _only_longer(model, first.baseline, decimals(first)),
        _others([direction(one) for place, one in enumerate(first.models) if place not in (0, best)]),
        *(_second_opinion(table, best, first, comparison.agreement) for table in further),
    )
    return Verdict(_headline(first, best), tuple(filter(None, sentences)), best)


def direction(model: ModelFigures) -> int:
    """1 and −1 for a model that is better or worse than the baseline, 0 where its p does not say so."""
    if model.paired is None or model.paired.difference is None or not is_significant(model):
        return 0
    return 1 if model.paired.difference > 0 else -1


def _headline(table: Table, best: int) -> str:
    model, baseline, alone = table.models[best], table.baseline, len(table.models) == 2
    if _may_be_only_longer(model, baseline):
        return f"{model.name} scores higher than {baseline.name}, but perhaps only by being longer"
    words = {
        1: f"{model.name} is better than",
        0: f"{model.name} is not shown to be better than" if alone else "No model is shown to be better than",
        -1: f"{model.name} is worse than" if alone else "Every model is worse than",
    }
    return f"{words[direction(model)]} {baseline.name}"


def _may_be_only_longer(model: ModelFigures, baseline: ModelFigures) -> bool:
    """Whether there is a gain, which is not shown at equal length, of longer answers."""
    equal, unit = model.at_equal_length, length_unit(model, baseline)
    if direction(model) <= 0 or equal is None or unit is None:
        return False
    return sign(equal.interval) <= 0 and getattr(model, unit) > getattr(baseline, unit)


def _by_how_much(model: ModelFigures, counted: Tally, digits: int) -> str:
    paired, size = model.paired, model.standardized_difference
    if paired is None or paired.difference is None:
        return ""
    details = [
        f"{INTERVAL} interval {shown_interval(paired.interval, digits)}" if paired.interval else "",
        f"{number(abs(size))} standard deviations" if size is not None else "",
        probability(paired.p),
    ]
    inside = f" ({'; '.join(filter(None, details))})" if any(details) else ""
    equal = f", equal on {counted.equal:,}" if counted.equal else ""
    return (
        f"The mean reward of {model.name} is {number(abs(paired.difference), digits)} "
        f"{'higher' if paired.difference >= 0 else 'lower'}{inside}. It is better on {counted.better:,} of "
        f"{counted.compared:,} rows, worse on {counted.worse:,}{equal}: a win rate of {percent(paired.win_rate)}."
    )


def _only_longer(model: ModelFigures, baseline: ModelFigures, digits: int) -> str:
    unit = length_unit(model, baseline)
    if unit is None:
        return "Whether it is only longer cannot be judged: the answers' texts are missing."
    before, after = getattr(baseline, unit), getattr(model, unit)
    ratio = after / before - 1
    longer = f"{percent(abs(ratio))} {'longer' if ratio > 0 else 'shorter'}" if abs(ratio) >= 0.005 else "about as long"
    how = f"Its answers are {longer} ({number(before, 0)} → {number(after, 0)} {unit})"
    equal = model.at_equal_length
    if equal is None:
        return f"{how}; how much of the difference that explains cannot be estimated from these rows."
    at_equal = f"{signed(equal.difference, digits)}" + (
        f" ({shown_interval(equal.interval, digits)})" if equal.interval else ""
    )
    return f"Only longer? {_answer(model, ratio)} {how}; at equal length the difference is {at_equal}."


def _answer(model: ModelFigures, ratio: float) -> str:
    """Whether the gain is one of length only."""
    if direction(model) <= 0 or model.paired is None or model.at_equal_length is None:
        return "There is no gain to explain."
    whole, equal = model.paired.difference, model.at_equal_length
    after = sign(equal.interval)
    if after > 0 and whole:
        share = equal.difference / whole
        return f"No: {percent(share)} of the gain is left at equal length." if share < 0.995 else "No."
    if after < 0:
        return "Yes: at equal length it is worse."
    return "It may be: at equal length no gain is shown." if ratio > 0 else "No, but at equal length no gain is shown."


def _others(signs: list[int]) -> str:
    """How the rest compare, in one sentence."""
    words = {1: "better", 0: "not shown to differ", -1: "worse"}
    found = [(signs.count(one), word) for one, word in words.items() if one in signs]
    if len(found) < 2:
        subject = "the other model is" if len(signs) == 1 else f"the other {len(signs)} models are"
        return f"Against the baseline, {subject} {found[0][1]}." if signs else ""
    (count, word), *others = found
    verb = "is" if count == 1 else "are"
    rest = [f"{many} {'is' if many == 1 else 'are'} {how}" for many, how in others]
    first = f"{count} of the other {len(signs)} models {verb} {word}"
    return f"Against the baseline, {', '.join([first, *rest[:-1]])} and {rest[-1]}."


def _second_opinion(table: Table, best: int, first: Table, agreement: tuple[Agreed, ...]) -> str:
    """What another reward model says of the best, and how much of the gain it alone, or the first alone, sees."""
    model, digits = table.models[best], decimals(table)
    if model.paired is None or model.paired.difference is None:
        return f"{table.key} did not score {model.name}."
    word = {1: "agrees that it is better", 0: "shows no difference", -1: "says that it is worse"}[direction(model)]
    inside = f" ({shown_interval(model.paired.interval, digits)})" if model.paired.interval else ""
    both = next(
        (one for one in agreement if one.name == model.name and set(one.reward_models) == {first.key, table.key}), None
    )
    same = f"; the two prefer the same answer on {percent(both.figures.same_sign)} of the rows" if both else ""
    return f"The reward model {table.key} {word}: {signed(model.paired.difference, digits)}{inside}{same}."


def _lengths_only(table: Table) -> Verdict:
    """Where nothing was scored."""
    unit = length_unit(*table.models)
    known = [f"{model.name} {number(getattr(model, unit), 0)}" for model in table.models] if unit else []
    sentences = (f"Mean {unit} of an answer: {', '.join(known)}.",) if known else ()
    return Verdict("No rewards: only lengths are compared, so there is no winner", sentences, 1)
