"""Runs compared, pure: runs in, figures out.

The first run is the baseline. Each reward model that scored all runs gives a table of its own. `pairing.py` says which
rows are paired, `figures.py` what a comparison consists of, `expo/stats/` how figures are computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from expo.stats.agreement import agreement
from expo.stats.means import Floats, Interval, Whole, cluster_sums, clustered_mean_and_standard_error
from expo.stats.paired import at_zero, standardized_difference, win_rate
from expo.stats.resampling import LEVEL, bootstrap_intervals, sign_flip_p, student_intervals
from expo.verbs.compare.figures import Agreed, Comparison, Flip, Measured, ModelFigures, Paired, Table
from expo.verbs.compare.pairing import NOT_ASKED, LeftOut, Pairing, common_reward_models, counted, pair
from expo.verbs.compare.run import Run, RunRow

FLIPS = 10
"""How many rows that a model wins by the most are named, and as many that it loses."""
ENDED = {"stop": 1.0, "length": 0.0}
"""Finish reason → whether the answer came to its end; another, or none, does not say."""

Mask = NDArray[np.bool_]


def compare(
    runs: Sequence[Run],
    *,
    intersect: bool = False,
    flips: int = FLIPS,
    apart: Collection[str] = (),
    level: float = LEVEL,
) -> Comparison:
    """Compare runs with the first of them.

    Args:
        runs: Two or more runs of one task, the baseline first.
        intersect: Use only the rows that all runs have, where their prompts differ.
        flips: How many of the rows that a model wins, and loses, by the most to name.
        apart: Names of runs that are each compared alone: intervals and p of the others do not allow for them.
        level: The coverage of intervals.

    Raises:
        InputError: The runs have different rows, or rewards of different reward models.
    """
    pairing = pair(runs, intersect=intersect)
    reward_models, notes = common_reward_models(runs)
    tables = [_table(_Scores(pairing, model, frozenset(apart), level), flips) for model in (reward_models or (None,))]
    two = combinations(reward_models, 2)
    agreed = [_agreed(pairing, number, models) for models in two for number in range(1, len(runs))]
    return Comparison(
        task=runs[0].task,
        baseline=runs[0].name,
        n=len(pairing.keys),
        prompts=int(pairing.clusters.max()) + 1,
        tables=tuple(tables),
        agreement=tuple(agreed),
        notes=(*notes, *(note for table in tables for note in _notes(table))),
        apart=tuple(run.name for run in runs[1:] if run.name in apart),
    )


@dataclass(frozen=True)
class _Scores:
    """The paired rows as one reward model sees them, or their lengths where there is none."""

    pairing: Pairing
    model: str | None
    apart: frozenset[str] = frozenset()
    level: float = LEVEL

    @property
    def others(self) -> range:
        """The numbers of the runs that are compared with the first."""
        return range(1, len(self.pairing.runs))

    @property
    def families(self) -> list[list[int]]:
        """The runs that are compared with the first: those whose figures are simultaneous, and each one apart."""
        names = [run.name for run in self.pairing.runs]
        together = [run for run in self.others if names[run] not in self.apart]
        return [*([together] if together else []), *([run] for run in self.others if run not in together)]

    @property
    def clusters(self) -> Whole:
        """(n,): the number of each row's prompt."""
        return self.pairing.clusters

    @cached_property
    def rows(self) -> list[list[RunRow]]:
        """Each run's rows."""
        return [self.pairing.rows(run) for run in range(len(self.pairing.runs))]

    @cached_property
    def rewards(self) -> list[Floats]:
        """For each run: (n,), NaN for a row without a reward; with no reward model 0 where there is an answer."""
        if self.model is not None:
            return [self.pairing.rewards(run, self.model) for run in range(len(self.rows))]
        return [np.array([np.nan if row.finish_reason == "error" else 0.0 for row in rows]) for rows in self.rows]

    @cached_property
    def characters(self) -> list[Floats]:
        """For each run: (n,), the lengths of its answers; NaN where they are not known."""
        return [_lengths([None if row.output is None else len(row.output) for row in rows]) for rows in self.rows]

    @cached_property
    def tokens(self) -> list[Floats]:
        """For each run: (n,), its generated tokens; NaN where they are not known."""
        return [_lengths([row.tokens for row in rows]) for rows in self.rows]

    @cached_property
    def ended(self) -> list[Floats]:
        """For each run: (n,), 1 for an answer that ended and 0 for one that was cut; NaN where it is not known."""
        return [np.array([ENDED.get(row.finish_reason or "", np.nan) for row in rows]) for rows in self.rows]

    def known(self, run: int) -> Mask:
        """(n,): the rows of a run that can be in figures."""
        return np.isfinite(self.rewards[run])

    def both(self, run: int) -> Mask:
        """(n,): the rows in which a run can be paired with the baseline."""
        return self.known(0) & self.known(run)


def _lengths(values: Sequence[int | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


# --- a table --------------------------------------------------------------------------------------------------------


def _table(scores: _Scores, flips: int) -> Table:
    runs = scores.pairing.runs
    scoring = runs[0].scorings.get(scores.model) if scores.model is not None else None
    models = [_own(scores, 0, scores.known(0)), *(_own(scores, run, scores.both(run)) for run in scores.others)]
    models[1:] = [_with_endings(scores, run, _with_lengths(scores, run, models[run])) for run in scores.others]
    if scores.model is not None:
        whole = _paired(scores, np.ones(len(scores.clusters), dtype=bool))
        subsets = {name: _paired(scores, rows) for name, rows in _subsets(scores).items()}
        for run in scores.others:
            parts = {name: figures[run - 1] for name, figures in subsets.items()}
            models[run] = replace(_with_rewards(scores, run, models[run], whole[run - 1], flips), subsets=parts)
    return Table(
        reward_model=scoring.model if scoring else scores.model,
        revision=scoring.revision if scoring else None,
        key=scores.model,
        models=tuple(models),
        left_out=(*scores.pairing.left_out, *_left_out(scores)),
    )


def _own(scores: _Scores, run: int, rows: Mask) -> ModelFigures:
    """A run's own figures over these rows."""
    of = scores.pairing.runs[run]
    scoring = of.scorings.get(scores.model) if scores.model is not None else None
    cut = np.isin(scores.pairing.numbers[run][rows], sorted(scoring.truncated)) if scoring else rows[:0]
    mean, error = clustered_mean_and_standard_error(scores.rewards[run][rows], scores.clusters[rows])
    ended = scores.ended[run][rows]
    return ModelFigures(
        name=of.name,
        n=int(rows.sum()),
        mean=None if scores.model is None else mean,
        standard_error=None if scores.model is None else error,
        tokens=_average(scores.tokens[run][rows]),
        characters=_average(scores.characters[run][rows]),
        truncated=int(cut.sum()),
        alpha=of.alpha,
        space=of.space,
        finish_reasons=Counter(sorted(row.finish_reason for row in scores.rows[run] if row.finish_reason)),
        ended=_average(ended[np.isfinite(ended)]),
    )


def _average(lengths: Floats) -> float | None:
    return float(lengths.mean()) if len(lengths) and np.isfinite(lengths).all() else None


def _with_lengths(scores: _Scores, run: int, figures: ModelFigures) -> ModelFigures:
    """With how much longer its answers are."""
    rows = scores.both(run)
    longer = (scores.characters[run] - scores.characters[0])[rows]
    if not np.isfinite(longer).all():
        return figures
    return replace(figures, longer=_measured(longer, scores.clusters[rows], scores.level))


def _with_endings(scores: _Scores, run: int, figures: ModelFigures) -> ModelFigures:
    """With how much larger its share of answers is that end, over the rows of which that is known on both sides."""
    difference = scores.ended[run] - scores.ended[0]
    rows = scores.both(run) & np.isfinite(difference)
    return replace(figures, ends_more=_measured(difference[rows], scores.clusters[rows], scores.level))


def _measured(differences: Floats, clusters: Whole, level: float) -> Measured | None:
    """The mean of paired differences, with Student's interval for this model alone; None where there are none."""
    if not len(differences):
        return None
    sums = cluster_sums([(differences, clusters)], int(clusters.max()) + 1)
    return Measured(float(differences.mean()), student_intervals(sums, level=level)[0])


def _with_rewards(scores: _Scores, run: int, figures: ModelFigures, paired: Paired, flips: int) -> ModelFigures:
    """With what pairs of rewards say."""
    rows = scores.both(run)
    differences, clusters = (scores.rewards[run] - scores.rewards[0])[rows], scores.clusters[rows]
    longer = (scores.characters[run] - scores.characters[0])[rows]
    known = bool(np.isfinite(longer).all())
    line, bend = (
        at_zero(differences, longer, clusters, level=scores.level, curved=one) if known else None
        for one in (False, True)
    )
    standardized = None
    if paired.difference is not None:
        standardized = standardized_difference(paired.difference, scores.rewards[0][rows])
    return replace(
        figures,
        paired=paired,
        standardized_difference=standardized,
        at_equal_length=None if line is None else Measured(line.intercept, line.interval),
        at_equal_length_curved=None if bend is None else Measured(bend.intercept, bend.interval),
        flips=_flips(differences, [row for row, used in zip(scores.rows[0], rows, strict=True) if used], flips),
    )


def _paired(scores: _Scores, among: Mask) -> list[Paired]:
    """The paired figures of each other run over some of the rows."""
    _, clusters = np.unique(scores.clusters[among], return_inverse=True)
    masks = [scores.both(run)[among] for run in scores.others]
    pairs = [(scores.rewards[run][among][mask], scores.rewards[0][among][mask]) for run, mask in _each(scores, masks)]
    columns = [(own - base, clusters[mask]) for (own, base), mask in zip(pairs, masks, strict=True)]
    found: dict[int, tuple[Interval | None, float | None]] = {}
    for family in scores.families:
        sums = cluster_sums([columns[run - 1] for run in family], int(clusters.max()) + 1)
        intervals = bootstrap_intervals(sums, level=scores.level)
        found |= dict(zip(family, zip(intervals, sign_flip_p(sums), strict=True), strict=True))
    figures = []
    for run, (own, base), (differences, of) in zip(scores.others, pairs, columns, strict=True):
        interval, p = found[run]
        rate, rate_interval = win_rate(differences, of, level=scores.level)
        some = len(own) > 0
        figures.append(
            Paired(
                n=len(own),
                mean=float(own.mean()) if some else None,
                baseline_mean=float(base.mean()) if some else None,
                difference=float(differences.mean()) if some else None,
                interval=interval,
                p=p,
                win_rate=rate,
                win_rate_interval=rate_interval,
            )
        )
    return figures


def _each(scores: _Scores, masks: Sequence[Mask]) -> zip[tuple[int, Mask]]:
    return zip(scores.others, masks, strict=True)


def _subsets(scores: _Scores) -> dict[str, Mask]:
    """The rows of each subset, as the first run that knows it says; none where there is only one."""
    names = [next((row.subset for row in rows if row.subset), None) for rows in zip(*scores.rows, strict=True)]
    known = sorted({name for name in names if name is not None})
    return {one: np.array([name == one for name in names]) for one in known} if len(known) > 1 else {}


def _flips(differences: Floats, rows: Sequence[RunRow], count: int) -> tuple[Flip, ...]:
    """The rows won and lost by the most, in the order of the size of their difference."""
    order = np.argsort(differences, kind="stable")
    lost = [int(number) for number in order[:count] if differences[number] < 0]
    won = [int(number) for number in order[::-1][:count] if differences[number] > 0]
    chosen = sorted({*lost, *won}, key=lambda number: (-abs(differences[number]), number))
    return tuple(
        Flip(row.label, row.id, row.key.sample, row.key.turn, float(differences[number]))
        for number, row in ((number, rows[number]) for number in chosen)
    )


def _left_out(scores: _Scores) -> list[LeftOut]:
    """The rows without a reward, or without an answer, by run."""
    left = []
    for run, rows in enumerate(scores.rows):
        of = scores.pairing.runs[run]
        scoring = of.scorings.get(scores.model) if scores.model is not None else None
        places = np.flatnonzero(~scores.known(run))
        for place in places[np.argsort(scores.pairing.numbers[run][places])]:
            row, number = rows[int(place)], int(scores.pairing.numbers[run][place])
            otherwise = "generating it failed" if row.finish_reason == "error" else "it has no reward"
            reason = scoring.reasons.get(number, otherwise) if scoring else otherwise
            if reason == NOT_ASKED:
                continue
            left.append(LeftOut(row.id, row.key.sample, row.key.turn, of.name, reason))
    return left


def _notes(table: Table) -> list[str]:
    """What a reader must know of the rows."""
    by = f" by {table.key}" if table.key else ""
    notes = [
        f"{one.name}: {one.truncated} of {one.n} conversations were cut at the maximum length{by}"
        for one in table.models
        if one.truncated
    ]
    missing: dict[tuple[str, str], list[str]] = {}
    for row in table.left_out:
        missing.setdefault((row.run, row.reason), []).append(row.id)
    for (run, reason), ids in missing.items():
        more = f", … and {len(ids) - 3} more" if len(ids) > 3 else ""
        notes.append(f"left out{by}: {counted(len(ids))} of {run}: {reason} ({', '.join(ids[:3])}{more})")
    return notes


def _agreed(pairing: Pairing, run: int, models: tuple[str, str]) -> Agreed:
    differences = [pairing.rewards(run, model) - pairing.rewards(0, model) for model in models]
    both = np.isfinite(differences[0]) & np.isfinite(differences[1])
    figures = agreement(differences[0][both], differences[1][both])
    return Agreed(pairing.runs[run].name, models, figures)
