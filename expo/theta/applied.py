"""θ(α) of a LoRA pair as an adapter that an engine applies to SFT while it answers: whether it can be, and its folder.

ΔW = scaling·B·A becomes (1 + α)·ΔW by the scaling in the adapter's config, so that all α share one file of weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.folder import ADAPTER_CONFIG, read_json
from expo.errors import InputError
from expo.theta.adapter.scaled import scaled_config
from expo.theta.adapter.tensors import ADAPTER_WEIGHTS
from expo.theta.decide_scaled import plan_scaled
from expo.theta.plan import PairPlan


@dataclass(frozen=True)
class Applied:
    """θ(α) as an adapter."""

    folder: Path
    """The adapter's."""
    rank: int
    """The largest of its factors."""
    room: int
    """How many α the engine has room for in one batch."""

    @property
    def place(self) -> tuple[int, int]:
        """What an engine must have been started with."""
        return self.rank, self.room


def why_not_applied(plan: PairPlan) -> str | None:
    """Why no engine can apply a pair's θ(α) as an adapter, in a clause; None where nothing is known against it."""
    if plan.adapter is None:
        return "DPO is a whole checkpoint, not a LoRA adapter"
    if plan.adapter.whole:
        return f"its adapter has tensors that are no LoRA factors ({next(iter(plan.adapter.whole))} …)"
    try:
        plan_scaled(plan)
    except InputError as error:
        return str(error)
    return None


def rank_of(plan: PairPlan) -> int:
    """The largest rank of the factors of an adapter that can be applied."""
    assert plan.adapter is not None
    return max(pair.ranks[0] for pair in plan.adapter.low_rank.values())


def write_applied(plan: PairPlan, alpha: float, folder: Path) -> None:
    """Fill an empty folder with the adapter that makes θ(α) of SFT: a config, and a link to the given one's weights.

    Args:
        plan: The plan of θ(α), of which `why_not_applied` knows nothing.
        alpha: The α; at −1 the adapter changes nothing.
        folder: It is there.

    Raises:
        InputError: A scaling is too large.
    """
    scaled = plan_scaled(plan)
    given = read_json(scaled.of.path / ADAPTER_CONFIG)
    config = scaled_config(given, scaled.of.settings, scaled.alphas_of(alpha), alpha)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / ADAPTER_WEIGHTS).symlink_to(scaled.of.shards[0].file.resolve())
