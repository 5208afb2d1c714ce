"""The config of an adapter whose change is scaled: lora_alpha times 1 + α, for all modules or for each its own.

A pattern of alpha_pattern is matched as PEFT does it, and vLLM after it (`settings._by_pattern`). `^` before a module's
whole name makes it match that module alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from expo.errors import InputError
from expo.theta.adapter.settings import MAX_ALPHA, Settings


def scaled_config(
    config: Mapping[str, Any], settings: Settings, alphas: Mapping[str, float], alpha: float
) -> dict[str, Any]:
    """The content of adapter_config.json with every module's scaling multiplied by 1 + α.

    Where one α holds for all, the patterns stay as they are, with other values. Otherwise every module whose value is
    not the default is named, so that no order of the patterns matters.

    Args:
        config: The content so far.
        settings: The same, as it was read.
        alphas: Every module that has factors → its α.
        alpha: The α of all others.

    Raises:
        InputError: A value is too large.
    """
    default = _times(settings.alpha, 1 + alpha)
    if all(own == alpha for own in alphas.values()):
        pattern = {key: _times(value, 1 + alpha) for key, value in settings.alpha_pattern.items()}
    else:
        values = {module: _times(settings.alpha_of(module), 1 + own) for module, own in alphas.items()}
        pattern = {f"^{re.escape(module)}": value for module, value in values.items() if value != default}
    return {
        **config,
        "lora_alpha": default,
        **({"alpha_pattern": pattern} if pattern or settings.alpha_pattern else {}),
    }


def _times(lora_alpha: float, factor: float) -> int | float:
    """The product, as a whole number where it is one, as it mostly was before."""
    value = lora_alpha * factor
    if not abs(value) < MAX_ALPHA:
        raise InputError(f"lora_alpha {lora_alpha:g} times 1 + α, {factor:g}, is too large for an adapter")
    return int(value) if value.is_integer() else value
