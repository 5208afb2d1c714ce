"""The plan of a race, pure: its rules, and the order of a task's prompts, fixed before the first answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import xxhash

from expo.config import SweepConfig
from expo.errors import InputError
from expo.files import Row, json_text
from expo.stats.resampling import MIN_CLUSTERS
from expo.tasks import Prompt
from expo.verbs.sweep.order import Asked, Order, put_in_order
from expo.verbs.sweep.race import LEAST, Rules, least_questions

SLICES = 10
"""How many slices a race has, and how many prompts one of them has at least, unless it is told otherwise."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RacePlan:
    """What is fixed before the first answer."""

    alphas: tuple[float, ...]
    """The candidates that are given, and 0."""
    rules: Rules
    order: Order
    seed: int
    judges: tuple[str, ...]
    """The reward models, the one that decides first."""

    @property
    def settings(self) -> Row:
        """As plain data: a race that is continued must have the same."""
        asked = xxhash.xxh3_64_hexdigest(json_text([self.order.race, self.order.confirmation]).encode())
        return {
            "alphas": list(self.alphas),
            **asdict(self.rules),
            "reward_models": list(self.judges),
            "seed": self.seed,
            "order_xxh3": asked,
        }

    @property
    def first_ids(self) -> tuple[str, ...]:
        """The prompts of the first slice."""
        return self.order.in_race(self.rules.first_slice())


def plan_race(config: SweepConfig, prompts: Sequence[Prompt], judges: Sequence[str]) -> RacePlan:
    """The rules and the order of a race.

    Args:
        config: The settings.
        prompts: The task's, after `--limit`.
        judges: The reward models.

    Raises:
        InputError: They are too few.
    """
    asked = [Asked(one.id, json_text(one.asked(one.turns - 1)), one.subset) for one in prompts]
    order = put_in_order(asked, seed=config.seed, confirm=config.confirm)
    race, aside = len(order.race), len(order.confirmation)
    alphas = tuple(alpha for alpha in config.alphas if alpha >= 0)
    rules = Rules(
        questions=race,
        confirmation=aside,
        slice=min(config.slice or max(SLICES, race // SLICES), race),
        confidence=config.confidence,
        indifference=config.indifference,
        refine=config.refine,
    )
    _require_enough(rules, config.confirm)
    if aside < MIN_CLUSTERS:
        log.warning("only %d prompts are set aside, so only a large gain can be confirmed; raise --limit", aside)
    return RacePlan(alphas, rules, order, config.seed, tuple(judges))


def _require_enough(rules: Rules, confirm: float) -> None:
    """Refuse a race that could not end within half of the grid, or not confirm what it finds."""
    least, asked = least_questions(confirm), rules.questions + rules.confirmation
    if not rules.is_enough:
        raise InputError(
            f"{asked} different prompts are too few for a race with --confirm {confirm:g}: it needs {least}, "
            f"{LEAST} of them for a first slice and {LEAST} to confirm what it finds; raise --limit, or use --search "
            "grid"
        )
