"""A choice of α in one to three sentences: which α, which others score higher and why not they, how the curve goes.

`unpassed` groups rejected α by what they do not pass; the figures behind that are in their `Rejection`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from expo.config.course import shown_step, step_of
from expo.verbs.compare.verdict import excludes_zero, is_significant, shown_p, within
from expo.verbs.sweep.confirm import Confirmation
from expo.verbs.sweep.figures import AlphaFigures, Raced, Rejection
from expo.verbs.sweep.race import Look

Shown: TypeAlias = Callable[[float], str]
"""An α for a sentence."""

NOT_CONFIRMED = "not confirmed"
"""The mark of a candidate whose one test is not passed."""


def verdict(alphas: Sequence[AlphaFigures], best: AlphaFigures | None, shown: Shown) -> str:
    """The choice in words.

    Args:
        alphas: All of them, in order of α.
        best: The one that is chosen; None for α = 0.
        shown: How an α is written.
    """
    candidates = [one for one in alphas if one.alpha > 0]
    tested = [one for one in candidates if one.gains and is_shown(one)]
    if best is not None:
        first = f"α = {shown(best.alpha)} is best: {_gain(best)}."
        higher = [one for one in tested if (one.ranked_by or 0.0) > (best.ranked_by or 0.0) and one.rejections]
        second = (
            f"{_alphas(higher, shown)} {_verb(higher, 'score')} higher but {_verb(higher, 'be')} rejected: "
            f"{unpassed(higher, shown)}."
            if higher
            else ""
        )
    else:
        first, second = _none(candidates, tested, shown), ""
    return " ".join(filter(None, [first, second, _shape(alphas, tested, shown)]))


def race_verdict(raced: Raced, shown: Shown) -> str:
    """What a race chose, in words; every figure with the prompts it is from.

    Args:
        raced: The race and its confirmation.
        shown: How an α is written.
    """
    rules, last = raced.plan.rules, raced.course.last
    out = sorted(raced.course.dropped)
    race = f"The race asked {last.questions:,} of its {rules.questions:,} prompts"
    race += f" and dropped {_joined(out, shown)}" if out else ""
    race += f"; it ended because {last.ends}."
    found = raced.confirmation
    if found is None or raced.candidate is None:
        if raced.passed_over:
            each = "; ".join(f"{_joined([alpha], shown)}: {why[0].says}" for alpha, why in raced.passed_over.items())
            return f"No α is chosen: every α ahead of α = 0 on the race's prompts is passed over ({each}). {race}"
        return (
            "No α is chosen: none of those left is ahead of α = 0 on the race's prompts (the paper's N/A), so there is "
            f"none to confirm. {race}"
        )
    alpha = shown(raced.candidate)
    figures = f"{found.difference:+.3g}{within(found.interval)} over DPO" if found.rows else "no row has a reward"
    on = f"on the {found.questions:,} prompts set aside to confirm it (90 % interval, one-sided {shown_p(found.p)})"
    if raced.best_alpha:
        return f"α = {alpha} is best: {figures} {on}. {race}"
    why = " and ".join(reason.says for reason in raced.rejections)
    return f"No α is chosen: α = {alpha}, which the race found, is rejected: {why}. It has {figures} {on}. {race}"


def not_confirmed(found: Confirmation) -> Rejection:
    """That a candidate is not better than α = 0 by the one test of it."""
    figure = f"{found.difference:+.3g}{within(found.interval)}, one-sided {shown_p(found.p)}"
    return Rejection(NOT_CONFIRMED, "its gain is not confirmed", figure if found.rows else "no row has a reward")


def told_look(look: Look, shown: Shown) -> str:
    """What a look saw, for a terminal."""
    said = [f"look {look.number}, after {look.questions:,} prompts of the race: α = {shown(look.leader)} leads"]
    said += [
        f"α = {shown(one.alpha)} is dropped, {one.lead.standardized:.2f} sd below α = {shown(one.behind)} "
        f"({shown_p(one.p)})"
        for one in look.dropped
    ]
    said += [f"{_joined([alpha], shown)} is dropped: too few of its answers have a reward" for alpha in look.unscored]
    said += [f"{_joined(look.added, shown)} {'are' if len(look.added) > 1 else 'is'} added"] if look.added else []
    said += [f"the race ends: {look.ends}"] if look.ends else []
    return "; ".join(said)


def _joined(alphas: Sequence[float], shown: Shown) -> str:
    *head, last = map(shown, alphas)
    return f"α = {', '.join(head)} and {last}" if head else f"α = {last}"


def shown_alpha(alpha: float) -> str:
    """An α for a sentence: 0.3, 2, -1."""
    return repr(alpha).removesuffix(".0")


def shown_for(last_step: float | None) -> Shown:
    """How the α of a sweep are written: those of a training run with the steps that they stand for.

    Args:
        last_step: Of the run's last checkpoint, which is α = 0; None for a pair.
    """
    return shown_alpha if last_step is None else partial(_with_step, last_step)


def _with_step(last_step: float, alpha: float) -> str:
    return f"{alpha:.4g} (step {shown_step(step_of(alpha, last_step))})"


def is_shown(one: AlphaFigures) -> bool:
    """Whether its difference from α = 0 is significant, by interval and p."""
    paired = one.figures.paired
    return paired is not None and excludes_zero(paired.interval) and is_significant(one.figures)


def unpassed(rejected: Iterable[AlphaFigures], shown: Shown) -> str:
    """What these α do not pass, those with the same in one: "length alone may explain it (α = 1 and 2)"."""
    by_reason: dict[str, list[AlphaFigures]] = {}
    for one in rejected:
        by_reason.setdefault(" and ".join(reason.says for reason in one.rejections), []).append(one)
    if len(by_reason) == 1:
        return next(iter(by_reason))
    return ", ".join(f"{reason} ({_alphas(some, shown)})" for reason, some in by_reason.items())


def _gain(one: AlphaFigures) -> str:
    paired = one.figures.paired
    if paired is None or paired.difference is None:
        return "no difference is known"
    won = "" if paired.win_rate is None else f"; it wins {paired.win_rate:.1%} of {paired.n:,} rows"
    return f"{paired.difference:+.3g}{within(paired.interval)} over DPO ({shown_p(paired.p)}){won}"


def _none(candidates: Sequence[AlphaFigures], tested: Sequence[AlphaFigures], shown: Shown) -> str:
    """Why no α is chosen."""
    if not candidates:
        return "No α above 0 was tried."
    if tested:
        if any(one.passes for one in tested):
            return "No α is chosen: no row has a reward for every α, so they cannot be ranked."
        return (
            f"No α is chosen, though {_alphas(tested, shown)} {_verb(tested, 'score')} significantly higher than DPO: "
            f"{unpassed(tested, shown)}."
        )
    gaining = [one for one in candidates if one.gains]
    first = "No α is significantly better than α = 0 (the paper's N/A)"
    if not gaining:
        return f"{first}: none that was tried scores higher."
    most = max(gaining, key=lambda one: (one.difference or 0.0, -one.alpha))
    return f"{first}: α = {shown(most.alpha)} gains most, {_gain(most)}."


def _shape(alphas: Sequence[AlphaFigures], tested: Sequence[AlphaFigures], shown: Shown) -> str:
    """Whether the curve may still rise at its end, or where it falls."""
    curve = [one for one in alphas if one.ranked_by is not None]
    if len(curve) < 2:
        return ""
    peak = max(curve, key=lambda one: (one.ranked_by or 0.0, -one.alpha))
    if peak is curve[-1]:
        if any(reason for reason in peak.rejections if peak in tested):
            return ""
        return (
            f"The highest α tried, {shown(peak.alpha)}, has the highest mean: the curve may still rise; try larger α."
        )
    lost = [one for one in curve if one.alpha > peak.alpha and not one.gains and is_shown(one)]
    fallen = f"{_alphas(lost, shown)} {_verb(lost, 'be')} significantly worse than DPO" if lost else ""
    if peak in tested:
        return f"The mean is highest at α = {shown(peak.alpha)} and falls beyond it{'; ' * bool(lost)}{fallen}."
    return f"{fallen}." if lost else ""


def _alphas(some: Sequence[AlphaFigures], shown: Shown) -> str:
    return _joined([one.alpha for one in some], shown)


def _verb(some: Sequence[AlphaFigures], verb: str) -> str:
    """A verb for one α or for several."""
    if verb == "be":
        return "are" if len(some) > 1 else "is"
    return verb if len(some) > 1 else f"{verb}s"
