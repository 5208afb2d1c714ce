"""Which engine scores: as `--engine` says, or the one that made what is there already."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from expo.config import ScoreConfig
from expo.engines import SCORERS, EngineSpec, find_engine, require_fitting
from expo.engines.reward_models import RewardModel
from expo.engines.torch_tools import own_dtype
from expo.files import Row
from expo.parts import FILE_NAME
from expo.rows.files import RowFiles
from expo.settings import ANY, Fingerprint, absent_values, recorded

HEAD_DTYPE = "float32"
"""The data type of the head, with any engine."""

log = logging.getLogger(__name__)


def choose_engine(config: ScoreConfig, found: RewardModel, files: RowFiles) -> tuple[str, EngineSpec, ScoreConfig]:
    """The engine, what is known of it, and the settings with those resolved that hang on the machine.

    Rewards of two engines differ in their last bits, so `auto` goes on with the engine of the output that is there.

    Args:
        config: The settings.
        found: The reward model.
        files: The output's files.

    Raises:
        InputError: There is no such engine, it does not run the model, or a setting is not one of its.
    """
    name = config.engine
    if name == "auto" and not config.overwrite:
        made_with = next((row["engine"] for row in _recorded(files) if row.get("engine") in SCORERS), None)
        if made_with is not None:
            log.info("engine: %s (%s was made with it)", made_with, files.final)
            name = made_with
    engine, spec = find_engine(SCORERS, name, config, found.body, found.why_not)
    require_fitting(SCORERS, config, engine)
    return engine, spec, spec.call("settle", config, found.body) or config


def _recorded(files: RowFiles) -> Iterator[Row]:
    """What the output and its parts say they are made from."""
    if (whole := files.look().fingerprint) is not None:
        yield whole
    names = sorted(path.name for path in files.parts_folder.iterdir()) if files.parts_folder.is_dir() else []
    for stem in dict.fromkeys(found[1] for found in map(FILE_NAME.fullmatch, names) if found):
        if (part := files.part(stem).look().fingerprint) is not None:
            yield part


def reward_fingerprint(made_from: Row, config: ScoreConfig, found: RewardModel) -> Fingerprint:
    """Everything that changes a reward.

    Args:
        made_from: What is scored with which model and engine.
        config: The settings, resolved.
        found: The reward model.

    Returns:
        What `made_from` has, the settings, and the head's data type, which was the model's own before it was recorded,
        and is where the model runs code that it brings along.
        How rows are batched, which changes no reward any more, equals whatever an older output has.
    """
    run_dtype = own_dtype(found.body) if config.dtype == "auto" else config.dtype
    head_dtype = run_dtype if found.runs_own_code(trust_remote_code=config.trust_remote_code) else HEAD_DTYPE
    return Fingerprint(
        {**made_from, **recorded(config, "rows"), "head_dtype": head_dtype},
        {
            **absent_values(config, "rows"),
            **dict.fromkeys(absent_values(config, "batches"), ANY),
            "head_dtype": run_dtype,
        },
    )
