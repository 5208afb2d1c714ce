"""Which charts a page has, and what they are drawn from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from expo.config.logit_space import LOGITS, Space
from expo.output import charts
from expo.output.charts import Change, Estimate, Series, colour_of
from expo.output.course import Track, race_course
from expo.output.curves import OF_RACE, Confirmed, alpha_curve
from expo.output.races import ConfirmationRecord, RaceRecord
from expo.output.sweeps import SweepRecord
from expo.verbs.compare.curve import curve_points, length_unit, on_curve, spaces_of
from expo.verbs.compare.figures import Comparison, Measured, Paired, Table
from expo.verbs.report.aligned import Aligned, Numbers
from expo.verbs.report.race import OF_ALL
from expo.verbs.report.text import escaped, visible
from expo.verbs.report.verdict import INTERVAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_ALPHAS = 3
"""Of which there is a curve."""


COURSE = "race"
"""The name of the chart of a race, which stands in a section of its own."""


@dataclass(frozen=True)
class Chart:
    """A chart of the page, which is a file too."""

    name: str
    """Of its files."""
    title: str
    says: str
    """How to read it."""
    figure: Figure

    @property
    def svg(self) -> str:
        """For the page."""
        return charts.for_page(self.figure, escaped(f"{self.title}. {self.says}"), self.name)


def charts_of(aligned: Aligned, comparison: Comparison, sweep: SweepRecord | None = None) -> list[Chart]:
    """Draw every chart that the runs have the figures for, those that say most first.

    Args:
        aligned: The runs.
        comparison: What compare found.
        sweep: What the sweep says whose runs these are.
    """
    found: list[Chart | None] = []
    with charts.style():
        for place, table in enumerate(comparison.tables):
            if table.key is None:
                continue
            ending = "" if place == 0 else f"-{place + 1}"
            of = f" ({table.key})" if len(comparison.tables) > 1 else ""
            found += [
                *(_alpha_curve(table, space, ending, of, sweep) for space in spaces_of(table)),
                _differences(table, ending, of),
                _distributions(aligned, table.key, ending, of),
                _by_length(aligned, table.key, ending, of),
                _subsets(table, ending, of),
            ]
        found.append(_finish_reasons(aligned))
        drawn = [chart for chart in found if chart is not None]
        if sweep is None or sweep.race is None:
            return drawn
        drawn = [replace(chart, says=f"{chart.says} {OF_ALL}") for chart in drawn]
        course = _course(sweep.race, comparison.tables[0])
    return drawn if course is None else [*drawn[:1], course, *drawn[1:]]


def _label(aligned: Aligned, run: int) -> str:
    return visible(aligned.runs[run].name)


def _estimate(figure: Paired | Measured | None) -> Estimate | None:
    if figure is None or figure.difference is None:
        return None
    return Estimate(figure.difference, *(figure.interval or ()))


def _differences(table: Table, ending: str, of: str) -> Chart | None:
    changes = [
        Change(visible(model.name), colour_of(place), whole, _estimate(model.at_equal_length))
        for place, model in enumerate(table.models)
        if place and (whole := _estimate(model.paired))
    ]
    if not changes:
        return None
    says = f"Lines are {INTERVAL} intervals; a line that does not cross 0 shows a difference."
    figure = charts.differences(changes, visible(table.baseline.name))
    return Chart(f"differences{ending}", f"Difference in reward{of}", says, figure)


def _alpha_curve(table: Table, space: Space, ending: str, of: str, sweep: SweepRecord | None) -> Chart | None:
    points = curve_points(table, space)
    if len({point.alpha for point in points}) < (MIN_ALPHAS if sweep is None else 2):
        return None
    race = None if sweep is None else sweep.race
    figure = alpha_curve(
        points,
        unit=length_unit(*on_curve(table, space)) or "characters",
        chosen=None if sweep is None or ending else sweep.best_alpha,
        rejected=() if sweep is None or ending else sweep.rejected_gains,
        dropped=() if race is None else race.dropped,
        confirmed=None if race is None or ending else _confirmed(race.confirmation),
        of="" if race is None else OF_RACE,
        last_step=None if sweep is None else sweep.last_step,
    )
    says = (
        f"The band is the {INTERVAL} interval of the difference from the baseline, around the baseline's mean; below "
        "are mean length and the share of answers that end by themselves."
    )
    if race is not None and race.confirmation is not None and not ending:
        says += " Beside it is the result of the confirmation's prompts alone, on the same mean."
    name, where = ("alpha-logits", " in logit space") if space == LOGITS else ("alpha", "")
    return Chart(f"{name}{ending}", f"Reward and length against α{where}{of}", says, figure)


def _confirmed(found: ConfirmationRecord | None) -> Confirmed | None:
    if found is None or found.difference is None:
        return None
    estimate = Estimate(found.difference, *(found.interval or ()))
    return Confirmed(found.alpha, estimate, found.level, found.prompts)


def _course(race: RaceRecord, table: Table) -> Chart | None:
    """The race as it went; None of a single look, or where no look says how α = 0 did."""
    if len(race.looks) < 2:
        return None
    tracks = tracks_of(race, table)
    if not tracks:
        return None
    found = "" if race.candidate is None else f" The thick line is α = {race.candidate:g}, which the race found."
    says = (
        "Of the race's prompts alone: at each look the mean reward of each α in the race minus that of α = 0, over the "
        "rows that all of them share. A line that ends in a cross was dropped there; one that begins later was added "
        f"by --refine.{found}"
    )
    by = f", by {table.key}" if table.key else ""
    return Chart(COURSE, f"The race{by}", says, race_course(tracks))


def tracks_of(race: RaceRecord, table: Table) -> list[Track]:
    """The way of each α above 0, in the colours of the table."""
    places = {model.alpha: place for place, model in enumerate(table.models)}
    found = list[Track]()
    for alpha in sorted({alpha for look in race.looks for alpha in look.means if alpha}):
        looks = [look for look in race.looks if alpha in look.means and 0.0 in look.means]
        if looks:
            found.append(
                Track(
                    alpha,
                    colour_of(places.get(alpha, len(places) + len(found))),
                    [look.prompts for look in looks],
                    [look.means[alpha] - look.means[0.0] for look in looks],
                    dropped=alpha in race.dropped,
                    emphasised=alpha == race.candidate,
                )
            )
    return found


def _distributions(aligned: Aligned, model: str, ending: str, of: str) -> Chart | None:
    series = [
        Series(_label(aligned, run), colour_of(run), known)
        for run in range(len(aligned.runs))
        if (known := [value for value in aligned.shared_rewards(model, run) if value is not None])
    ]
    if not series:
        return None
    says = "The grey outline in each is the first model's."
    return Chart(f"rewards{ending}", f"Distribution of rewards{of}", says, charts.distributions(series))


def _by_length(aligned: Aligned, model: str, ending: str, of: str) -> Chart | None:
    series = []
    for run in range(len(aligned.runs)):
        pairs = _both(aligned.shared_rewards(model, run), aligned.lengths(run))
        if pairs:
            series.append(Series(_label(aligned, run), colour_of(run), *zip(*pairs, strict=True)))
    if not series:
        return None
    says = "Each point is a tenth of a model's answers, from the shortest to the longest."
    return Chart(f"length{ending}", f"Reward against length{of}", says, charts.reward_by_length(series, aligned.unit))


def _both(first: Numbers, second: Numbers) -> list[tuple[float, float]]:
    pairs = zip(first, second, strict=True)
    return [(one, other) for one, other in pairs if one is not None and other is not None]


def _finish_reasons(aligned: Aligned) -> Chart | None:
    counts = {
        _label(aligned, run): Counter(filter(None, aligned.finish_reasons(run))) for run in range(len(aligned.runs))
    }
    known = {name: found for name, found in counts.items() if found}
    if not known:
        return None
    says = "stop: the answer ended by itself; length: it was cut at the token limit."
    return Chart("finish-reasons", "How answers ended", says, charts.finish_reasons(known))


def _subsets(table: Table, ending: str, of: str) -> Chart | None:
    names = dict.fromkeys(name for model in table.others for name in model.subsets)
    found = {
        visible(name): [
            Change(visible(model.name), colour_of(place), whole)
            for place, model in enumerate(table.models)
            if place and (whole := _estimate(model.subsets.get(name)))
        ]
        for name in names
    }
    if len(found) < 2 or not all(found.values()):
        return None
    says = f"Difference from the baseline within each subset, with {INTERVAL} intervals."
    return Chart(f"subsets{ending}", f"Subsets{of}", says, charts.subset_differences(found))
