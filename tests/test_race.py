"""The order in which a race asks, and the race itself: laws over made rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from expo.verbs.sweep.order import Asked, put_in_order, set_aside
from expo.verbs.sweep.race import (
    ALIKE,
    HALF,
    LEAST,
    NO_ROWS,
    NONE_LEFT,
    ONE_LEFT,
    Answered,
    Ask,
    Course,
    Rules,
    least_questions,
    race,
)

# --- the order ------------------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=40).map(
    lambda rows: [Asked(f"id{number}", question, subset) for number, (question, subset) in enumerate(rows)]
)


@settings(deadline=None, max_examples=60)
@given(PROMPTS, st.integers(0, 5), st.floats(0, 1), st.randoms())
def test_an_order_has_each_prompt_once_whatever_the_order_in_the_file(prompts, seed, confirm, random):
    order = put_in_order(prompts, seed=seed, confirm=confirm)
    assert sorted(order.in_race(len(order.race)) + order.to_confirm) == sorted(one.id for one in prompts)
    questions = len({one.question for one in prompts})
    assert len(order.confirmation) == round(confirm * questions)
    assert len(order.confirmation) + len(order.race) == questions
    question_of = {one.id: one.question for one in prompts}
    assert all(len({question_of[name] for name in ids}) == 1 for ids in (*order.confirmation, *order.race))
    shuffled = list(prompts)
    random.shuffle(shuffled)
    assert put_in_order(shuffled, seed=seed, confirm=confirm) == order


@pytest.mark.parametrize("sizes", [[9], [50, 50], [90, 5, 5], [1] * 20, [100, *[1] * 30], [7, 20, 33, 2]])
def test_every_beginning_has_its_share_of_each_subset(sizes: list[int]) -> None:
    prompts = [Asked(f"{part}-{one}", (part, one), str(part)) for part, size in enumerate(sizes) for one in range(size)]
    order = put_in_order(prompts, seed=4, confirm=0.3)
    subset_of = {one.id: int(one.subset or 0) for one in prompts}
    asked: Counter[int] = Counter()
    for place, (name,) in enumerate((*order.confirmation, *order.race), start=1):
        asked[subset_of[name]] += 1
        shares = [place * size / len(prompts) for size in sizes]
        assert all(abs(asked[part] - share) <= 1 for part, share in enumerate(shares))


def test_another_seed_is_another_order() -> None:
    prompts = [Asked(str(number), number, None) for number in range(50)]
    assert len({put_in_order(prompts, seed=seed, confirm=0.3).race for seed in range(10)}) == 10


# --- running a race -------------------------------------------------------------------------------------------------

ALPHAS = (0.5, 1.0, 2.0, 4.0)


@dataclass
class World:
    """Rewards that are all there, by the seed of their noise; and what was asked."""

    mean: Callable[[float], float]
    questions: int = 70
    samples: int = 1
    seed: int = 0
    length: Callable[[float], float] = lambda _: 50.0
    ending: Callable[[float], float] = lambda _: 1.0
    noise: float = 1.0
    asked: list[Ask] = field(default_factory=list)

    @property
    def clusters(self) -> np.ndarray:
        return np.repeat(np.arange(self.questions), self.samples)

    def answers(self, alpha: float, questions: int) -> Answered:
        rng = np.random.default_rng([self.seed, int(1000 * alpha)])
        rows, asked = self.questions * self.samples, questions * self.samples
        rewards = self.mean(alpha) + self.noise * rng.normal(size=rows)
        ended = (rng.random(rows) < self.ending(alpha)).astype(float)
        return Answered(rewards[:asked], np.full(asked, self.length(alpha)), ended[:asked])

    def send(self, ask: Ask) -> Mapping[float, Answered]:
        self.asked.append(ask)
        return {alpha: self.answers(alpha, ask.questions) for alpha in ask.alphas}

    def run(self, rules: Rules, alphas: Sequence[float] = ALPHAS) -> Course:
        return finished(rules, alphas, self.clusters, self.send)


def finished(
    rules: Rules, alphas: Sequence[float], clusters: np.ndarray, send: Callable[[Ask], Mapping[float, Answered]]
) -> Course:
    """A race, with the answers of `send`."""
    running = race(rules, alphas, clusters)
    ask = next(running)
    while True:
        try:
            ask = running.send(send(ask))
        except StopIteration as end:
            return end.value


RULES = Rules(70, 30, 10, confidence=0.95, indifference=0.05, refine=False, resamples=999)
REFINE = replace(RULES, refine=True)
WORLDS: dict[str, Callable[[float], float]] = {
    "flat": lambda _: 0.0,
    "rising": lambda alpha: 0.3 * alpha,
    "falling": lambda alpha: -0.3 * alpha,
    "cliff": lambda alpha: 0.5 * alpha if alpha < 3 else -3.0,
    "0 is worst": lambda alpha: 2.0 * (alpha > 0),
}
every_world = pytest.mark.parametrize("world", WORLDS)
either_way = pytest.mark.parametrize("rules", [RULES, REFINE], ids=["given", "refined"])


@every_world
@either_way
def test_laws_of_a_race(world: str, rules: Rules) -> None:
    for seed in range(4):
        here = World(WORLDS[world], seed=seed, length=lambda alpha: 40 + 20 * alpha, samples=1 + seed % 2)
        course = here.run(rules)
        assert repr(World(**{**vars(here), "asked": []}).run(rules)) == repr(course)
        assert sum(look.error for look in course.looks) <= 0.05 + 1e-9
        assert all(0.0 in look.left for look in course.looks)
        assert [look.questions for look in course.looks] == [ask.questions for ask in here.asked]
        assert [look.ends is None for look in course.looks] == [True] * (len(course.looks) - 1) + [False]
        for before, after in zip(course.looks, course.looks[1:], strict=False):
            assert set(after.means) == {*before.left, *before.added}
            assert before.questions < after.questions <= rules.questions
        assert all(one.p <= look.error for look in course.looks for one in look.dropped)
        assert set(course.ranking) <= set(course.last.left) - {0.0}
        assert spent(here, course, rules) <= 0.5 * grid(here, rules)


def spent(here: World, course: Course, rules: Rules) -> float:
    """Tokens of the race and of what would confirm any of the α in its ranking."""
    answered = {alpha: ask.questions for ask in here.asked for alpha in ask.alphas}
    race_tokens = sum(here.length(alpha) * count for alpha, count in answered.items())
    costs = [here.length(alpha) + here.length(0.0) for alpha in course.ranking]
    return race_tokens + max(costs, default=0.0) * rules.confirmation


def grid(here: World, rules: Rules) -> float:
    return sum(here.length(alpha) for alpha in (0.0, *ALPHAS)) * (rules.questions + rules.confirmation)


@every_world
def test_a_race_knows_only_what_it_asked_for(world: str) -> None:
    """What was answered, by itself, gives the course again: so does what a race that was interrupted has left."""
    here = World(WORLDS[world], seed=7)
    course = here.run(REFINE)
    answered = {alpha: ask.questions for ask in here.asked for alpha in ask.alphas}
    rows = {alpha: here.answers(alpha, count) for alpha, count in answered.items()}

    def kept(ask: Ask) -> Mapping[float, Answered]:
        assert all(answered[alpha] >= ask.questions for alpha in ask.alphas)
        return {
            alpha: Answered(*(values[: ask.questions] for values in vars(rows[alpha]).values())) for alpha in ask.alphas
        }

    assert repr(finished(REFINE, ALPHAS, here.clusters, kept)) == repr(course)


# --- why it ends ----------------------------------------------------------------------------------------------------


def test_what_is_much_worse_is_dropped_for_what_it_is_worse_than() -> None:
    course = World(lambda alpha: -3.0 if alpha >= 2 else 0.3 * alpha).run(RULES)
    first = course.looks[0]
    assert {one.alpha for one in first.dropped} == {2.0, 4.0}
    assert course.dropped == {2.0: 10, 4.0: 10}
    assert all(one.behind in (0.0, 0.5, 1.0) and one.lead.difference > 0 for one in first.dropped)


def test_with_a_huge_indifference_the_first_look_is_the_last() -> None:
    course = World(WORLDS["flat"]).run(replace(RULES, indifference=100.0))
    assert (len(course.looks), course.last.ends) == (1, ALIKE)


def test_what_cannot_be_told_apart_ends_at_half_of_the_grid() -> None:
    assert World(WORLDS["flat"]).run(replace(RULES, indifference=0.0)).last.ends == HALF


@pytest.mark.parametrize(
    ("mean", "ends"), [(lambda a: 5.0 * (a == 2), ONE_LEFT), (lambda a: -5.0 * (a > 0), NONE_LEFT)]
)
def test_it_ends_when_one_or_none_is_left(mean: Callable[[float], float], ends: str) -> None:
    course = World(mean).run(RULES)
    assert (len(course.looks), course.last.ends) == (1, ends)
    assert course.ranking == ((2.0,) if ends == ONE_LEFT else ())


# --- further α ------------------------------------------------------------------------------------------------------


def test_refined_a_race_that_begins_far_out_finds_what_lies_between() -> None:
    here = World(lambda alpha: 1.0 - abs(alpha - 1.25), noise=0.5)
    course = here.run(REFINE, (2.5, 8.0))
    assert course.ranking[0] == 1.25
    added = {alpha: look.questions for look in course.looks for alpha in look.added}
    assert 1.25 in added
    for alpha, questions in added.items():
        first = next(ask for ask in here.asked if alpha in ask.alphas)
        assert first.questions > questions


def test_refined_a_race_goes_beyond_the_largest_unless_answers_stop_ending() -> None:
    rising = World(lambda alpha: 0.5 * alpha, samples=2)
    assert 8.0 in rising.run(REFINE).alphas
    rambling = replace(rising, ending=lambda alpha: 1.0 if alpha < 4 else 0.3, asked=[])
    assert max(rambling.run(REFINE).alphas) == 4.0


# --- what is not as it should be ------------------------------------------------------------------------------------


def without(world: World, names: Sequence[float], field_name: str, share: float = 1.0) -> Callable[[Ask], Mapping]:
    """The world's answers, some α's without this share of a field's values."""

    def send(ask: Ask) -> Mapping[float, Answered]:
        answers = dict(world.send(ask))
        for alpha in names:
            if alpha in answers:
                values = getattr(answers[alpha], field_name).copy()
                values[np.random.default_rng(1).random(len(values)) < share] = np.nan
                answers[alpha] = replace(answers[alpha], **{field_name: values})
        return answers

    return send


def test_an_alpha_without_rewards_leaves_the_others_to_race() -> None:
    here = World(WORLDS["rising"])
    course = finished(RULES, ALPHAS, here.clusters, without(here, [2.0], "rewards"))
    assert course.looks[0].unscored == (2.0,)
    assert course.dropped[2.0] == 10
    assert course.ranking[0] == 4.0
    assert course.alphas == (0.0, *ALPHAS)


def test_some_rewards_that_are_missing_leave_the_rows_that_all_have() -> None:
    here = World(WORLDS["rising"])
    course = finished(RULES, ALPHAS, here.clusters, without(here, [0.5, 4.0], "rewards", 0.2))
    assert course.last.rows < course.last.questions
    assert course.ranking[0] == 4.0


def test_without_any_reward_a_race_ends() -> None:
    here = World(WORLDS["rising"])
    course = finished(RULES, ALPHAS, here.clusters, without(here, [0.0, *ALPHAS], "rewards"))
    assert (course.last.ends, course.ranking, len(course.looks)) == (NO_ROWS, (), 1)


@pytest.mark.parametrize("names", [[0.0, *ALPHAS], [2.0]], ids=["all", "one"])
def test_where_tokens_are_not_known_rows_are_counted(names: list[float]) -> None:
    here = World(WORLDS["flat"])
    course = finished(replace(RULES, indifference=0), ALPHAS, here.clusters, without(here, names, "tokens"))
    assert repr(course) == repr(World(WORLDS["flat"]).run(replace(RULES, indifference=0)))


def test_where_all_rewards_are_equal_none_is_better() -> None:
    course = World(WORLDS["flat"], noise=0.0).run(RULES)
    assert (course.last.ends, course.ranking, len(course.looks)) == (ALIKE, (), 1)


@pytest.mark.parametrize("confirm", [0.01, 0.1, 0.3, 0.45, 0.499])
def test_so_many_questions_and_more_are_enough(confirm: float) -> None:
    least = least_questions(confirm)
    for asked in range(least, least + 40):
        aside = set_aside(asked, confirm)
        rules = replace(RULES, questions=asked - aside, confirmation=aside)
        assert rules.is_enough, asked
        assert min(aside, rules.first_slice()) >= LEAST
    fewer = set_aside(least - 1, confirm)
    assert not replace(RULES, questions=least - 1 - fewer, confirmation=fewer).is_enough


@pytest.mark.parametrize("longest", [1.0, 10.0, 1000.0])
def test_the_first_slice_and_the_confirmation_take_half_at_most_whatever_answers_cost(longest: float) -> None:
    for asked in range(least_questions(0.3), 200, 7):
        aside = set_aside(asked, 0.3)
        rules = replace(RULES, questions=asked - aside, confirmation=aside, slice=asked)
        costs = np.array([1.0, 1.0, longest])
        taken = rules.first_slice() * costs.sum() + aside * (costs[0] + costs[-1])
        assert taken <= 0.5 * asked * costs.sum() * (1 + 1e-12)


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="3 questions are too few for a race of 2 α"):
        World(WORLDS["flat"], questions=3).run(Rules(3, 3, 10, 0.95, 0.05, refine=False), (1.0,))
