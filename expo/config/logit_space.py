"""Where α acts: on weights, or in logit space, on what both models say while answers are decoded."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from expo.config.course import PAIR_RULE
from expo.config.pair import PairConfig
from expo.settings import changes_rows, flag, require, require_choice

Space: TypeAlias = Literal["weights", "logits"]
LOGITS: Literal["logits"] = "logits"

SpaceSetting: TypeAlias = Annotated[
    Space,
    changes_rows(
        "weights: the model has the weights θ(α); logits (exploratory, transformers only): SFT and DPO answer "
        "together, each token drawn from log π_dpo + α(log π_dpo − log π_sft), for about twice the time and memory.",
        absent="weights",
        needs="logits",
    ),
]

OF_WEIGHTS = ("alpha_for", "exclude", "missing", "vocab", "allow_nonfinite")
"""Settings of how tensors are combined."""


def require_space(config: PairConfig, space: Space) -> None:
    """Refuse settings of how weights are combined where none are.

    Args:
        config: A command's settings, with the rule settled.
        space: Where α acts.

    Raises:
        InputError: There is one.
    """
    require_choice("--space", space, Space)
    if space != LOGITS:
        return
    require(
        not config.checkpoint,
        "--space logits takes one --dpo: a training run's --checkpoint moves tensors along lines, and here no weights "
        "are combined",
    )
    require(
        config.rule_name == PAIR_RULE,
        f"--rule {config.rule_name} combines weights, and --space logits combines none: leave it out",
    )
    defaults = type(config)
    given = next((name for name in OF_WEIGHTS if getattr(config, name) != getattr(defaults, name)), None)
    require(
        given is None,
        f"{flag(given or '')} is about how weights are combined, and --space logits combines none: leave it out",
    )
