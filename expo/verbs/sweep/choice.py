"""Which α the finished rows of a sweep speak for, pure: runs in, a frozen `Choice` out.

`compare` computes every figure: each α paired with α = 0 by prompt and sample, intervals and p simultaneous over the
candidates, which are the α above 0. An α below 0 (−1 is SFT) is a reference: it has the same figures, but by
itself, so that it does not widen those of the candidates, and it is never chosen. `words.py` puts the choice into
sentences.

A candidate that gains has to pass every test of `_rejections`. The one with the highest mean reward among those that
pass is chosen, and α = 0 where none does. To add a test, add a `Rejection` there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from expo.errors import InputError
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.figures import Comparison, ModelFigures, Paired, Table
from expo.verbs.compare.pairing import with_rows_of
from expo.verbs.compare.run import RowKey, Run
from expo.verbs.compare.verdict import is_above_zero, is_significant, only_longer, shown_p, within
from expo.verbs.sweep.endings import ENDING_LOSS, ENDS_AT_LEAST
from expo.verbs.sweep.figures import AlphaFigures, Choice, Raced, Rejection
from expo.verbs.sweep.words import race_verdict, shown_for, verdict

OF_RACE = (
    "the figures of each α cover all prompts that it and α = 0 have answered, race + confirmation: the race used some "
    "of them to find its α, so only the confirmation is evidence for it"
)


def choose(runs: Sequence[Run], raced: Raced | None = None, last_step: float | None = None) -> Choice:
    """Compare the α of a sweep with α = 0, and choose one; or say what a race chose.

    Args:
        runs: One run per α, in any order, scored by the same reward models; the first reward model of α = 0's decides.
            Rows that α = 0 does not have are left out, and an α may lack rows that α = 0 has.
        raced: How the race of these α went, where they had one.
        last_step: Of a training run's last checkpoint, which is α = 0; None for a pair.

    Raises:
        InputError: There is no α = 0, or nothing else, or an α twice, or a run without rewards.
    """
    base, others = _in_order(runs)
    references = [run.name for run in others if _alpha(run) < 0]
    comparison = compare(
        [base, *(with_rows_of(base, run) for run in others)], intersect=True, flips=0, apart=references
    )
    key = comparison.tables[0].key
    if key is None:
        raise InputError(f"α cannot be compared without rewards: {comparison.notes[0]}")
    live = [run for run in others if _alpha(run) > 0 and _has_pairs(comparison, run)]
    if raced is not None:
        live = [run for run in live if _alpha(run) in raced.course.last.left]
    means, shared_rows = _means_over_shared_rows([base, *live], key)
    alphas = tuple(_judged(comparison, means))
    if raced is not None:
        return Choice(
            best_alpha=raced.best_alpha,
            verdict=race_verdict(raced, shown_for(last_step)),
            notes=(*comparison.notes, *_notes_on_answers(comparison), OF_RACE),
            comparison=comparison,
            alphas=tuple(raced.told(one) for one in alphas),
            shared_rows=shared_rows,
            raced=raced,
            last_step=last_step,
        )
    passing = [one for one in alphas if one.passes and one.ranked_by is not None]
    best = max(passing, key=lambda one: (one.ranked_by or 0.0, -one.alpha), default=None)
    return Choice(
        best_alpha=0.0 if best is None else best.alpha,
        verdict=verdict(alphas, best, shown_for(last_step)),
        notes=(*comparison.notes, *_notes_on_answers(comparison), *_notes_on_rows(comparison, shared_rows)),
        comparison=comparison,
        alphas=alphas,
        shared_rows=shared_rows,
        last_step=last_step,
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def _alpha(run: Run) -> float:
    """A run's α.

    Raises:
        InputError: It has none.
    """
    if run.alpha is None or not math.isfinite(run.alpha):
        raise InputError(f"{run.name} is of no α: {run.alpha}")
    return run.alpha


def _in_order(runs: Sequence[Run]) -> tuple[Run, list[Run]]:
    """The run of α = 0, and the others in order of α."""
    by_alpha = {_alpha(run): run for run in runs}
    if len(by_alpha) < len(runs):
        raise InputError(f"an α is there twice: {', '.join(run.name for run in runs)}")
    base = by_alpha.pop(0.0, None)
    if base is None or not by_alpha:
        raise InputError("a sweep compares α = 0 with others: " + ("no others are" if base else "it is not") + " there")
    return base, [by_alpha[alpha] for alpha in sorted(by_alpha)]


def _has_pairs(comparison: Comparison, run: Run) -> bool:
    return any(model.n > 0 for model in comparison.tables[0].others if model.alpha == run.alpha)


def _means_over_shared_rows(runs: Sequence[Run], key: str) -> tuple[Mapping[float, float], int]:
    """The mean reward of each α over the rows in which all of these runs have one, and how many rows that are."""
    rewards = [_rewards(run, key) for run in runs]
    shared = set.intersection(*(set(known) for known in rewards))
    if not shared:
        return {}, 0
    means = {_alpha(run): fmean(known[row] for row in shared) for run, known in zip(runs, rewards, strict=True)}
    return means, len(shared)


def _rewards(run: Run, key: str) -> dict[RowKey, float]:
    """The rewards of the rows that have one."""
    pairs = zip(run.rows, run.rewards[key], strict=True)
    return {row.key: reward for row, reward in pairs if reward is not None and math.isfinite(reward)}


# --- tests ----------------------------------------------------------------------------------------------------------


def _judged(comparison: Comparison, means: Mapping[float, float]) -> Iterator[AlphaFigures]:
    """Each α, in order, with the tests that it does not pass."""
    tables = comparison.tables
    models = sorted(zip(*(table.models for table in tables), strict=True), key=lambda of: of[0].alpha or 0.0)
    measurable = ends_measurably(comparison)
    for first, *further in models:
        seconds = list(zip(tables[1:], further, strict=True))
        candidate = first.alpha is not None and first.alpha > 0
        rejections = tuple(_rejections(first, seconds, measurable=measurable)) if candidate else ()
        alpha = first.alpha or 0.0
        yield AlphaFigures(alpha, first, tuple(further), means.get(alpha), rejections)


def ends_measurably(comparison: Comparison) -> bool:
    """Whether others can be judged by how many of their answers end."""
    return (comparison.tables[0].baseline.ended or 0.0) >= ENDS_AT_LEAST


def _rejections(
    model: ModelFigures, further: Sequence[tuple[Table, ModelFigures]], *, measurable: bool
) -> Iterator[Rejection]:
    """The tests that a candidate does not pass; one that does not gain is not tested.

    1. It is significantly better than α = 0: its interval lies above 0, and its p below 1 − level. Else nothing more
       is asked.
    2. It is not only longer: where its answers are, there is a gain at equal length too (`only_longer`).
    3. Every further reward model shows the gain, by its own interval (simultaneous over the candidates).
    4. Where it can be measured, its answers go on ending. The interval is Student's for this α alone, clustered by
       prompt: one that is simultaneous would be wider, and so overlook a loss the more α there are.
    """
    paired = model.paired
    if paired is None or paired.difference is None:
        yield Rejection("no rewards", "it cannot be compared", "no row has a reward for both it and α = 0")
        return
    if paired.difference <= 0:
        return
    if not (is_above_zero(paired.interval) and is_significant(model)):
        figure = f"{_shown(paired)}, {shown_p(paired.p)}"
        yield Rejection("not significant", "it is not significantly better than α = 0", figure)
        return
    yield from vetoes(model, further, measurable=measurable)


def vetoes(
    model: ModelFigures, further: Sequence[tuple[Table, ModelFigures]], *, measurable: bool
) -> Iterator[Rejection]:
    """The tests 2 to 4 that a model which gains does not pass."""
    longer = only_longer(model)
    if longer:
        yield Rejection("length", *longer)
    for table, second in further:
        other = second.paired
        if other is None or not is_above_zero(other.interval):
            yield Rejection("other reward", f"{table.key} does not see the gain", _shown(other))
    ends = model.ends_more
    if measurable and ends is not None and ends.interval is not None and ends.interval[1] < -ENDING_LOSS:
        low, high = (100 * end for end in ends.interval)
        figure = f"{100 * ends.difference:+.1f} [{low:+.1f}, {high:+.1f}] in 100"
        yield Rejection("endings", "fewer answers end", figure)


def doubts(
    model: ModelFigures, further: Sequence[tuple[Table, ModelFigures]], *, measurable: bool
) -> Iterator[Rejection]:
    """The tests 2 to 4 that a model is likely not to pass, by figures that need not be significant yet."""
    for veto in vetoes(model, (), measurable=measurable):
        equal = (model.at_equal_length, model.at_equal_length_curved)
        if veto.mark != "length" or any(one is None or one.difference <= 0 for one in equal):
            yield veto
    for table, second in further:
        paired = second.paired
        if paired is None or paired.difference is None or paired.difference <= 0:
            yield Rejection("other reward", f"{table.key} does not see the gain", _shown(paired))


def _shown(paired: Paired | None) -> str:
    if paired is None or paired.difference is None:
        return "no row has a reward for both"
    return f"{paired.difference:+.3g}{within(paired.interval)}"


def _notes_on_answers(comparison: Comparison) -> Iterator[str]:
    """What could not be judged."""
    first = comparison.tables[0]
    ended = first.baseline.ended
    if ended is None:
        yield "how answers ended is not known: no α is judged by whether its answers still end"
    elif ended < ENDS_AT_LEAST:
        yield (
            f"whether answers still end cannot be measured: only {100 * ended:.0f} % of α = 0's answers end within "
            "--max-tokens; raise --max-tokens"
        )
    if all(model.longer is None for model in first.others):
        yield "the lengths of the answers are not known: whether a gain comes from length alone is not judged"


def _notes_on_rows(comparison: Comparison, shared_rows: int) -> Iterator[str]:
    """Which rows α are ranked by where they are not all."""
    if shared_rows < comparison.n:
        yield (
            f"α are ranked by {shared_rows:,} of {comparison.n:,} rows, those with a reward for α = 0 and for every α "
            "above it"
        )
