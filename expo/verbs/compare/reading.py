"""Runs from their files: answers and rewards brought together, and rows given the keys by which runs are paired.

Rewards belong to answers by id, sample and turn; those of a file of bare numbers, as the paper's code writes it, by
their order. Runs of which one has rewards alone are paired by these names too, if they answer the same prompts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from expo.errors import InputError
from expo.verbs.compare.answers import Answer, Answers, Names, load_questions, read_answers
from expo.verbs.compare.finding import Source, find_sources, task_called
from expo.verbs.compare.rewards import Rewards, read_rewards
from expo.verbs.compare.run import RowKey, Run, RunRow, Scoring

log = logging.getLogger(__name__)


def read_runs(
    words: Sequence[str], *, task: str | None = None, output_dir: str = ".", dataset: str | None = None
) -> list[Run]:
    """The runs that these words mean, in their order.

    Args:
        words: Names, output files or reward files.
        task: Their task, as given to `expo generate`; None: the folders or the files say it.
        output_dir: Where the folders of names lie.
        dataset: The questions of a task whose output files hold only answers.

    Raises:
        InputError: A file is missing or damaged, or does not belong to the others; a run is there twice; the runs
            belong to different tasks.
    """
    return read_sources(find_sources(words, task=task, output_dir=output_dir), dataset)


def read_sources(sources: Sequence[Source], dataset: str | None = None) -> list[Run]:
    """The runs in these files, of one task.

    Raises:
        InputError: A file is damaged, or does not belong to the others.
    """
    if not sources:
        return []
    task = task_called(sources[0].task)
    prompts = load_questions(task, dataset) if task.by_id and any(source.outputs for source in sources) else None
    read = []
    for source in sources:
        rewards = [read_rewards(file) for file in source.rewards]
        if source.outputs is None:
            read.append(_of_rewards(source, rewards))
        else:
            read.append(_of_answers(source, read_answers(source.outputs, task, prompts), rewards))
    has_outputs = all(source.outputs for source in sources)
    return [one.run for one in (_paired_by_question(read) if has_outputs else _paired_by_name(read))]


@dataclass(frozen=True)
class _Read:
    """A run, and what pairing by names needs."""

    source: Source
    run: Run
    names: tuple[Names, ...]
    prompts_sha256: str | None


def _of_answers(source: Source, answers: Answers, rewards: Sequence[Rewards]) -> _Read:
    names = tuple(one.names for one in answers.rows)
    values: dict[str, tuple[float | None, ...]] = {}
    scorings: dict[str, Scoring] = {}
    for one in rewards:
        places = _rated(one, answers, names, source)
        if places is None or _is_repeated(one, values):
            continue
        values[one.reward_model], scorings[one.reward_model] = _placed(one, places, answers.rows)
    run = Run(source.name, source.task, _rows(answers.rows), values, answers.alpha, scorings, answers.space)
    return _Read(source, run, names, answers.prompts_sha256)


def _is_repeated(rewards: Rewards, values: Collection[str]) -> bool:
    """Whether the run has rewards of this reward model already."""
    if rewards.reward_model in values:
        log.warning("%s is ignored: another file has the rewards by %s", rewards.path, rewards.reward_model)
    return rewards.reward_model in values


def _rows(answers: Sequence[Answer]) -> tuple[RunRow, ...]:
    """The rows, with the how-manieth answer to its question as each one's sample."""
    seen: Counter[tuple[str, int]] = Counter()
    rows = []
    for one in answers:
        place = (one.asked, one.names.turn)
        rows.append(
            RunRow(
                key=RowKey(one.asked, seen[place], one.names.turn),
                id=one.names.id,
                prompt=one.turns[-1][1] if one.turns else "",
                context=one.turns[:-1],
                output=one.text,
                subset=one.subset,
                tokens=one.tokens,
                finish_reason="error" if one.why else one.finish_reason,
            )
        )
        seen[place] += 1
    return tuple(rows)


def _rated(rewards: Rewards, answers: Answers, names: Sequence[Names], source: Source) -> Sequence[int] | None:
    """The number of the answer that each reward belongs to; answers may have become more since.

    The hash of what was scored says which answers they are: those of the rewards' names, or, of older files, the first.

    Returns:
        None where they are another run's: a file elsewhere may have its name from one.

    Raises:
        InputError: The answers have changed since.
    """
    if rewards.outputs_sha256 is None or answers.conversations is None:
        return _places(rewards, names, source)
    for places in (_named_places(rewards, names), range(min(len(rewards.values), len(names)))):
        if places is not None and answers.sha256(sorted(places)) == rewards.outputs_sha256:
            return places
    if not source.foreign:
        raise InputError(
            f"{rewards.path} does not score the answers that are now in {source.outputs}: run `expo score` again, or "
            "move one of them away"
        )
    log.warning("%s is ignored: it does not score the answers in %s", rewards.path, source.outputs)
    return None


def _places(rewards: Rewards, names: Sequence[Names], source: Source) -> Sequence[int]:
    """The number of the answer that each reward belongs to.

    Raises:
        InputError: Neither names nor numbers agree.
    """
    if (places := _named_places(rewards, names)) is not None:
        return places
    if len(rewards.values) == len(names):
        return range(len(names))
    raise InputError(
        f"{rewards.path} has {len(rewards.values)} rewards, and {source.outputs} has {len(names)} answers: "
        "they do not belong together"
    )


def _named_places(rewards: Rewards, names: Sequence[Names]) -> Sequence[int] | None:
    """The number of the answer that each reward belongs to by its name; None where one has none that is known."""
    place_of = {name: number for number, name in enumerate(names)}
    if rewards.names is None or not all(name in place_of for name in rewards.names):
        return None
    return [place_of[name] for name in rewards.names]


def _placed(
    rewards: Rewards, places: Sequence[int], answers: Sequence[Answer]
) -> tuple[tuple[float | None, ...], Scoring]:
    """The rewards in the answers' order; rows that were not scored have none."""
    values: list[float | None] = [None] * len(answers)
    for place, value in zip(places, rewards.values, strict=True):
        values[place] = value
    old = rewards.scoring
    reasons = {number: one.why for number, one in enumerate(answers) if one.why}
    reasons |= dict.fromkeys(set(range(len(answers))).difference(places), f"{rewards.path.name} does not score it")
    reasons |= {places[number]: why for number, why in old.reasons.items() if number < len(places)}
    return tuple(values), replace(old, reasons=reasons, truncated=frozenset(places[one] for one in old.truncated))


def _of_rewards(source: Source, rewards: Sequence[Rewards]) -> _Read:
    """A run whose outputs are not there."""
    first = rewards[0]
    if first.names is None:
        raise InputError(
            f"nothing says which prompt a line of {first.path} belongs to: put the outputs of {source.name} into "
            f"outputs_{source.task}/, or score them with `expo score`"
        )
    blank = [Answer(name, "", (), "", None, None, None, None) for name in first.names]
    values: dict[str, tuple[float | None, ...]] = {}
    scorings: dict[str, Scoring] = {}
    for one in rewards:
        if one.names is None or set(one.names) - set(first.names):
            raise InputError(f"{one.path} scores different rows from {first.path}: move one of them away")
        values[one.reward_model], scorings[one.reward_model] = _placed(one, _places(one, first.names, source), blank)
    rows = tuple(RunRow(RowKey(*name), name.id, "", (), None, None, None, None) for name in first.names)
    run = Run(source.name, source.task, rows, values, None, scorings)
    return _Read(source, run, first.names, first.prompts_sha256)


def _paired_by_question(read: Sequence[_Read]) -> list[_Read]:
    """Runs whose answers to a question are numbered alike, also where one run has only some of them.

    Rows of a task may ask the same. A run that answers fewer of these has the numbers of the run with the most, where
    both name the rows alike; otherwise any of the answers may stand for another.
    """
    asked = [_by_question(one) for one in read]
    most: dict[tuple[str, int], Sequence[Names]] = {}
    for questions in asked:
        for place, names in questions.items():
            if len(names) > len(most.get(place, ())):
                most[place] = names
    return [
        replace(one, run=replace(one.run, rows=_numbered(one, questions, most)))
        for one, questions in zip(read, asked, strict=True)
    ]


def _by_question(read: _Read) -> dict[tuple[str, int], list[Names]]:
    """What was asked, and the turn → the names of the rows that answer it."""
    found: dict[tuple[str, int], list[Names]] = {}
    for row, name in zip(read.run.rows, read.names, strict=True):
        found.setdefault((row.key.prompt, row.key.turn), []).append(name)
    return found


def _numbered(
    read: _Read, own: Mapping[tuple[str, int], Sequence[Names]], most: Mapping[tuple[str, int], Sequence[Names]]
) -> tuple[RunRow, ...]:
    fewer = {place for place, names in own.items() if len(names) < len(most[place]) and {*names} <= {*most[place]}}
    if not fewer:
        return read.run.rows
    rows = []
    for row, name in zip(read.run.rows, read.names, strict=True):
        place = (row.key.prompt, row.key.turn)
        key = row.key._replace(sample=most[place].index(name)) if place in fewer else row.key
        rows.append(replace(row, key=key))
    return tuple(rows)


def _paired_by_name(read: Sequence[_Read]) -> list[_Read]:
    """Runs whose rows have their names as keys, which mean the same prompts in all of them.

    Raises:
        InputError: They answer different prompts, or it is not known.
    """
    for one in read:
        if one.prompts_sha256 is None or one.prompts_sha256 != read[0].prompts_sha256:
            without = next(each for each in read if each.source.outputs is None)
            pair = f"{read[0].run.name} and {one.run.name}" if one is not read[0] else one.run.name
            what = "do not answer the same prompts" if one.prompts_sha256 else "do not say which prompts they answer"
            raise InputError(
                f"the files of {pair} {what}, and without the outputs of {without.run.name} their rows cannot be "
                f"paired: put outputs_{without.source.task}/{without.run.name} back beside its rewards"
            )
    return [replace(one, run=replace(one.run, rows=_renamed(one.run.rows, one.names))) for one in read]


def _renamed(rows: Sequence[RunRow], names: Sequence[Names]) -> tuple[RunRow, ...]:
    return tuple(replace(row, key=RowKey(*name)) for row, name in zip(rows, names, strict=True))
