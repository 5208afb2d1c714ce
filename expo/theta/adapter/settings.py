"""The content of adapter_config.json: ranks and scalings by module, as PEFT reads them; only plain LoRA is accepted.

To accept another initialisation that does not change the base, add it to `PLAIN_INITS`; another setting that a merge
can ignore, to `NEUTRAL_SETTINGS`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from expo.checkpoint.folder import read_json
from expo.errors import InputError

Number = TypeVar("Number", int, float)

REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of its own (lora_bias)",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
"""Settings that make an adapter something other than scaling·B·A."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations, besides true and false, that do not change the base's weights. PiSSA, OLoRA, CorDA, LoRA-GA and
LoftQ subtract a part of them: such an adapter does not belong on the SFT checkpoint."""

NEUTRAL_SETTINGS = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
        *("lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
        *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
        *("task_type", "use_rslora"),
    )
)
"""Settings that are used here, or that describe how an adapter was trained and not what it is."""

MERGE_FIRST = "merge it into its base with peft's merge_and_unload and give the merged checkpoint as --dpo"

MAX_ALPHA = 1e30
"""lora_alpha is below it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What an adapter's config says about its weights."""

    rank: int
    alpha: float
    """PEFT's lora_alpha; not ExPO's α."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Regular expressions of module names with their own rank."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    """The scaling is alpha/√rank instead of alpha/rank."""
    fan_in_fan_out: bool = False
    """The base stores weights as [in, out]."""
    tied: bool = False
    """Head and embedding were trained as one."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that were trained whole, as ends of names."""

    def trains(self, module: str) -> bool:
        """Whether a module was trained whole, by PEFT's rule; other whole tensors are copies of the base's."""
        return module.endswith(self.modules_to_save)

    def rank_of(self, module: str) -> int:
        """The rank a module's factors should have."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """A module's lora_alpha."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor before a module's B·A."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _by_pattern(table: Mapping[str, Number], module: str, default: Number) -> Number:
    """PEFT's rule: the first pattern that matches the whole name, or the end of it from the start of a part."""
    matching = (value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)


def read_settings(file: Path) -> Settings:
    """Read and check adapter_config.json.

    Raises:
        InputError: It is damaged, or not the config of a plain LoRA.
    """
    config = read_json(file)
    _require_plain(file, config)
    unknown = sorted(key for key, value in config.items() if value and key not in NEUTRAL_SETTINGS)
    if unknown:
        log.warning("%s sets %s, which expo does not know and ignores", file, ", ".join(unknown))
    return Settings(
        rank=_rank(file, "r", config.get("r")),
        alpha=_alpha(file, "lora_alpha", config.get("lora_alpha")),
        rank_pattern=_pattern(file, "rank_pattern", config, _rank),
        alpha_pattern=_pattern(file, "alpha_pattern", config, _alpha),
        rank_stabilised=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        tied=bool(config.get("ensure_weight_tying")),
        modules_to_save=tuple(name for name in config.get("modules_to_save") or () if isinstance(name, str) and name),
    )


def _require_plain(file: Path, config: dict[str, Any]) -> None:
    adapter, kind, init = file.parent.name, config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise InputError(f"the adapter {adapter} is of type {kind}, not LORA; {MERGE_FIRST}")
    used = [name for key, name in REFUSED_SETTINGS.items() if config.get(key)]
    if used:
        raise InputError(f"the adapter {adapter} is not a plain LoRA: it uses {' and '.join(used)}; {MERGE_FIRST}")
    if not isinstance(init, bool) and init not in PLAIN_INITS:
        raise InputError(
            f"the adapter {adapter} was made with init_lora_weights {init!r}, which may have changed the base's "
            f"weights; {MERGE_FIRST}"
        )


def _rank(file: Path, key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputError(f"{file}: {key} is {value!r}, not a positive whole number")
    return value


def _alpha(file: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_ALPHA:
        raise InputError(f"{file}: {key} is {value!r}, not a number")
    return float(value)


def _pattern(
    file: Path, key: str, config: dict[str, Any], check: Callable[[Path, str, object], Number]
) -> dict[str, Number]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise InputError(f"{file}: {key} is {table!r}, not a mapping of module names")
    for pattern in table:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{file}: {key} names {pattern!r}, which is not a regular expression: {error}") from error
    return {pattern: check(file, f"{key}[{pattern!r}]", value) for pattern, value in table.items()}
