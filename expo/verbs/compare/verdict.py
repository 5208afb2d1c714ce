"""A comparison in plain words: who wins, by how much, and whether it is only longer."""

from __future__ import annotations

from expo.stats.means import Interval
from expo.stats.resampling import LEVEL, RESAMPLES
from expo.verbs.compare.figures import Agreed, Comparison, Measured, ModelFigures, Table

SIGNIFICANT = 1 - LEVEL
"""The p below which a difference is called one."""


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence or two for each model and reward model, and one for each two reward models about a model."""
    several = len(comparison.tables) > 1
    return [
        *(
            (f"By {table.reward_model}: " if several else "") + verdict(table, one)
            for table in comparison.tables
            for one in table.others
        ),
        *(_agreement(one, comparison.baseline) for one in comparison.agreement if one.figures.gains),
    ]


def _agreement(agreed: Agreed, baseline: str) -> str:
    """Whether two reward models prefer the same model, and how often the same answer."""
    one, other = agreed.reward_models
    preferred = [
        agreed.name if gain.difference > 0 else baseline if gain.difference < 0 else "neither"
        for gain in agreed.figures.gains or ()
    ]
    if preferred[0] == preferred[1]:
        first = f"{one} and {other} both prefer {preferred[0]}"
    else:
        first = f"Of {agreed.name} and {baseline}, {one} prefers {preferred[0]} and {other} {preferred[1]}"
    return f"{first}; they prefer the same answer on {agreed.figures.same_sign or 0:.1%} of {agreed.figures.n} rows."


def verdict(table: Table, model: ModelFigures) -> str:
    """Who wins, by how much, and whether it is only longer."""
    baseline, paired = table.baseline.name, model.paired
    if paired is None or paired.difference is None:
        nothing = f"There are no rewards to compare {model.name} with {baseline}."
        return " ".join(filter(None, [nothing, _length(model)]))
    seen = f"{paired.difference:+.3g}{within(paired.interval)}, {shown_p(paired.p)}"
    if model.standardized_difference is not None:
        seen = f"{seen}; {model.standardized_difference:+.2f} standard deviations of {baseline}'s rewards"
    verb = "is not distinguishable from"
    if is_significant(model):
        verb = "beats" if paired.difference > 0 else "loses to"
    share = "" if paired.win_rate is None else f"; it wins {paired.win_rate:.1%} of {paired.n} rows"
    first = f"{model.name} {verb} {baseline} ({seen}){share}."
    return " ".join(filter(None, [first, _length(model), _at_equal_length(model)]))


def is_significant(model: ModelFigures) -> bool:
    """Whether its p says that it differs from the baseline."""
    return model.paired is not None and model.paired.p is not None and model.paired.p < SIGNIFICANT


def _length(model: ModelFigures) -> str:
    longer = model.longer
    if longer is None:
        return ""
    if not excludes_zero(longer.interval):
        return "Its answers are about as long."
    more = "longer" if longer.difference > 0 else "shorter"
    return f"Its answers are {abs(longer.difference):.0f} characters {more}."


def _at_equal_length(model: ModelFigures) -> str:
    """Whether length explains the difference, where there is one and length goes with it."""
    paired, equal, longer = model.paired, model.at_equal_length, model.longer
    if equal is None or paired is None or paired.difference is None or longer is None:
        return ""
    figure = _figure_at_equal_length(equal)
    together = excludes_zero(longer.interval) and (longer.difference > 0) is (paired.difference > 0)
    if not is_significant(model) or not together:
        return f"A{figure[1:]}."
    word = "longer" if longer.difference > 0 else "shorter"
    if not excludes_zero(equal.interval):
        return f"Length alone may explain it: {figure}."
    same = (equal.difference > 0) is (paired.difference > 0)
    return f"It is {'not only' if same else 'only'} {word}: {figure}."


def only_longer(model: ModelFigures) -> tuple[str, str] | None:
    """Whether a gain may be one of length alone, each judged by this model's own intervals.

    A line through the differences of reward and length can be misled where rewards bend, as where they rise with length
    and fall again: a gain at equal length has to be there by a parabola, too.

    Returns:
        In words, and the figure behind them; None where answers are not longer, or it is a gain at equal length too.
    """
    line, bend, longer = model.at_equal_length, model.at_equal_length_curved, model.longer
    if longer is None or longer.difference <= 0 or not excludes_zero(longer.interval):
        return None
    if line is None or bend is None:
        return "length alone may explain it", "no rows say what the difference is at equal length"
    if not is_above_zero(line.interval):
        says = "only length explains it" if excludes_zero(line.interval) else "length alone may explain it"
        return says, _figure_at_equal_length(line)
    if not is_above_zero(bend.interval):
        return "length alone may explain it", f"{_figure_at_equal_length(bend)} where reward may bend with length"
    return None


def _figure_at_equal_length(equal: Measured) -> str:
    return f"at equal length the difference is {equal.difference:+.3g}{within(equal.interval)}"


def is_above_zero(interval: Interval | None) -> bool:
    """Whether an interval shows a gain."""
    return interval is not None and interval[0] > 0


def excludes_zero(interval: Interval | None) -> bool:
    """Whether an interval lies on one side of 0."""
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def within(interval: Interval | None) -> str:
    """An interval behind its figure."""
    return "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"


def shown_p(p: float | None) -> str:
    """A p as a reader wants it."""
    if p is None:
        return "no p"
    return f"p = {p:.4f}" if p > 1 / (RESAMPLES + 1) else f"p ≤ {1 / (RESAMPLES + 1):.4f}"
