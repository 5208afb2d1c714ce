"""What is asked of the pair before anything is generated: whether its sides differ, and whether ExPO suits it."""

from __future__ import annotations

import logging

from expo.config import InspectConfig, SweepConfig
from expo.errors import InputError
from expo.output.findings import Inspection
from expo.verbs import inspect
from expo.verbs.sweep.plan import find_model

log = logging.getLogger(__name__)


def is_one_model(config: SweepConfig) -> bool:
    """Whether both sides of the pair are one folder."""
    return find_model(config.sft).path.resolve() == find_model(config.dpo).path.resolve()


def inspect_pair(config: SweepConfig) -> Inspection:
    """Compare the sides of the pair.

    Raises:
        InputError: No α will improve it, as far as norms can tell, and `--any-pair` is not given.
    """
    found = inspect.run(
        InspectConfig(
            sft=config.sft,
            dpo=config.dpo,
            checkpoint=config.checkpoint,
            rule=config.rule,
            allow_pickle=config.allow_pickle,
        )
    )
    log.info("pair: %s: %s", found.suits, found.verdict)
    if (run := found.trajectory) is not None:
        log.log(logging.INFO if run.is_straight else logging.WARNING, "trajectory: %s", run.verdict)
    if found.suits == "suspect" and not config.any_pair:
        raise InputError(
            f"{found.dpo} does not suit ExPO with {found.sft}: {found.verdict}; --any-pair sweeps the pair anyway"
        )
    return found
