"""What a search over modules found, as tables of text and in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from expo.stats.means import Interval
from expo.verbs.compare.text import NOTHING, WIDTH, Grid, aligned, number, printable
from expo.verbs.compare.verdict import shown_p, within
from expo.verbs.sweep.confirm import LEVEL, Confirmation
from expo.verbs.sweep.modules.found import ENDS, Found
from expo.verbs.sweep.modules.search import Arm, Step
from expo.verbs.sweep.race import Look

HEAD = ("arm", "prompts", "mean reward", "difference", "")
EXPLORATORY = (
    "Exploratory: one round over the groups by one reward model. The races chose what they found, so only the prompts "
    "set aside are evidence, and only for what was tested on them."
)


def as_text(found: Found, command: str | None) -> str:
    """A table per step, the verdict, and the command."""
    grids = ["\n".join(aligned(_grid(step))) for step in found.steps]
    words = [textwrap.fill(printable(line), WIDTH) for line in (verdict(found), *_over_dpo(found), EXPLORATORY)]
    return "\n\n".join([*grids, *words, *([] if command is None else [command])])


def verdict(found: Found) -> str:
    """What was found, in a sentence or two."""
    if found.over_dpo is None:
        return "No α for all tensors is ahead of α = 0 on the prompts of the race, so there is none to begin with."
    one = f"{found.uniform} for all tensors"
    if found.tested is None:
        return f"Nothing better than {one} was found: no step's other arms were ahead on the prompts of its race."
    figures = _figures(found.tested)
    if found.is_shown:
        return f"{found.final} is better than {one}: {figures}."
    return f"It is not shown that {found.final} is better than {one}: {figures}."


def told(name: str, look: Look, arms: Mapping[float, Arm]) -> str:
    """What a look saw, for a terminal."""
    said = [f"{name}, look {look.number}, after {look.questions:,} prompts: {arms[look.leader].label} leads"]
    said += [
        f"{arms[one.alpha].label} is dropped, {one.lead.standardized:.2f} sd below {arms[one.behind].label} "
        f"({shown_p(one.p)})"
        for one in look.dropped
    ]
    said += [f"{arms[one].label} is dropped: too few of its answers have a reward" for one in look.unscored]
    said += [f"the race ends: {ENDS[look.ends]}"] if look.ends else []
    return "; ".join(said)


def _figures(found: Confirmation) -> str:
    level = f"{LEVEL:.0%}".replace("%", " %")
    if not found.rows:
        return "no row of the prompts set aside has a reward by both"
    return (
        f"{found.difference:+.3g}{within(found.interval)} on the {found.questions:,} prompts set aside to test it "
        f"({level} interval, one-sided {shown_p(found.p)})"
    )


def _over_dpo(found: Found) -> Iterator[str]:
    """How far both are above DPO, as figures."""
    if found.over_dpo:
        each = [f"{vector} {_measured(one.difference, one.interval)}" for vector, one in found.over_dpo.items()]
        yield f"Over DPO, on the prompts set aside, and not tested: {'; '.join(each)}."


def _measured(difference: float, interval: Interval | None) -> str:
    return f"{difference:+.3g}{within(interval)}"


def _grid(step: Step) -> Grid:
    title = f"{step.name}: {step.course.last.questions} prompts; {ENDS[step.course.last.ends or '']}"
    return Grid(title, HEAD, tuple(_row(step, number) for number in step.arms), ends_in_words=True)


def _row(step: Step, arm: float) -> tuple[str, ...]:
    """An arm at its last look."""
    look = next(look for look in reversed(step.course.looks) if arm in look.asked)
    mean = look.means.get(arm)
    away = NOTHING if mean is None or not arm else f"{mean - look.means[0.0]:+.3g}"
    mark = "goes on" if arm == step.taken else "dropped" if arm in step.course.dropped else ""
    return step.arms[arm].label, str(look.questions), number(mean), away, mark
