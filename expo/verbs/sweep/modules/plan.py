"""The plan of a search over modules: the plan of its first race, and the classes of tensors that move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expo.config import ExtrapolateConfig, SweepConfig
from expo.errors import InputError
from expo.files import Row, read_json
from expo.output.sweeps import MODULES
from expo.settings import require_same
from expo.verbs.sweep.modules.classes import classes, groups, patterns
from expo.verbs.sweep.modules.search import DIGITS, FACTORS, most_rows
from expo.verbs.sweep.pair import is_one_model
from expo.verbs.sweep.plan import SweepPlan, plan as plan_sweep, theta_of
from expo.verbs.sweep.race_plan import RacePlan
from expo.verbs.sweep.record import made_from, plain
from expo.verbs.sweep.vector import NORMS, Vector

MOVES = ("extrapolate", "merge")
"""What happens to tensors that move with α."""


@dataclass(frozen=True)
class ModulesPlan:
    """Everything that is fixed before the first answer."""

    sweep: SweepPlan
    classes: Mapping[str, tuple[str, ...]]
    """Class → its tensors."""

    @property
    def race(self) -> RacePlan:
        """The first race, the order of the prompts, and which are set aside."""
        assert self.sweep.race is not None
        return self.sweep.race

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """What is visited: group → its classes."""
        return groups(self.classes)

    @property
    def norms(self) -> bool:
        """Whether there are norms that move."""
        return NORMS in self.classes

    @property
    def record(self) -> Path:
        """What the search says."""
        return self.sweep.folder / MODULES

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has ended it."""
        return self.record.is_file() and read_json(self.record).get("verdict") is not None

    @property
    def settings(self) -> Row:
        """As plain data: a search that is continued must have the same."""
        settings = {**self.race.settings, "factors": FACTORS, "digits": DIGITS, "patterns": dict(self.sweep.patterns)}
        return {**settings, "groups": self.groups}

    @property
    def most_rows(self) -> int:
        """How many answers it asks for at most, if all are equally long."""
        rules = self.race.rules
        questions = most_rows(rules, len(self.race.alphas), self.groups, norms=self.norms)
        return math.ceil(questions * self.sweep.rows / (rules.questions + rules.confirmation))

    def extrapolating(self, vector: Vector) -> ExtrapolateConfig:
        """The settings of `expo extrapolate` that write a vector."""
        config, job = self.sweep.config, self.sweep.job_of(vector)
        own = vector.settings(self.sweep.patterns)
        changes: dict[str, Any] = {"alpha_for": own["alpha_for"], "exclude": (*config.exclude, *own["exclude"])}
        folder = self.sweep.folder / "checkpoints" / job.name
        settings = {**config.theta_settings(vector.alpha), **changes, "alpha": (vector.alpha,), "output": str(folder)}
        return ExtrapolateConfig(**settings)

    def describe(self) -> Row:
        """The plan as plain data."""
        steps = [*([NORMS] if self.norms else []), *self.groups]
        return {
            **self.sweep.describe(),
            "modules": {
                "races": f"one over α, then {len(steps)} from the α that it finds: {', '.join(steps)}",
                "factors": ", ".join(f"{factor:g}" for factor in FACTORS),
                "tensors": {label: len(names) for label, names in self.classes.items()},
            },
        }


def plan(config: SweepConfig) -> ModulesPlan:
    """Decide everything that can be decided before an answer is there; nothing is written.

    Raises:
        InputError: The pair, the task, the reward model or a setting is at fault, or the folder has another search.
        EnvironmentFailure: The hub cannot be reached.
    """
    if is_one_model(config):
        raise InputError("SFT and DPO are the same files: every θ is DPO, so there is nothing to search for")
    sweep = plan_sweep(config)
    divided = _classes(sweep)
    if not groups(divided):
        raise InputError(
            f"{theta_of(sweep.first).dpo.label} has no attention, MLP or embeddings that move with α, by the names of "
            "its tensors, so there is nothing to search for"
        )
    found = ModulesPlan(replace(sweep, patterns=patterns(divided)), divided)
    _require_same_search(found)
    return found


def _classes(sweep: SweepPlan) -> dict[str, tuple[str, ...]]:
    """The tensors that move with α and that no pattern of the settings has, by class."""
    pair = theta_of(sweep.job_of(max(sweep.config.alphas))).pair
    fixed = {name for match in pair.matches for name in match.names}
    tensors = (tensor for shard in pair.shards for tensor in shard.tensors)
    moving = (one.name for one in tensors if any(segment.action in MOVES for segment in one.segments))
    return classes(name for name in moving if name not in fixed)


def _require_same_search(job: ModulesPlan) -> None:
    """Refuse to go on with a search that was begun with others rules, `--overwrite` or not: its rows have been seen.

    Raises:
        InputError: It was, or it is of other models or prompts, and `--overwrite` is not given.
    """
    if not job.record.is_file():
        return
    there, ours = read_json(job.record), made_from(job.sweep.fingerprint)
    fingerprint, settings = there.get("fingerprint"), there.get("settings")
    if not isinstance(fingerprint, dict) or not isinstance(settings, dict):
        raise InputError(f"{job.record} exists and expo sweep did not write it: move it away")
    if ours != fingerprint:
        if not job.sweep.config.overwrite:
            require_same(job.record, fingerprint, ours)
        return
    differing = [name for name, value in plain(job.settings).items() if settings.get(name) != value]
    if differing:
        raise InputError(
            f"{job.record} is of a search with different rules ({', '.join(differing)}), which are fixed before its "
            "first answer: give the same ones to continue it, or another --output to start a new one"
        )
