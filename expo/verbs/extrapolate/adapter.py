"""`--as-adapter`: θ(α) as a LoRA adapter to SFT. Its plan, its config, the files beside it, and what is checked."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from expo.checkpoint.folder import ADAPTER_CONFIG, Location, is_adapter, read_json
from expo.checkpoint.side_files import CODE, CONFIGS, side_files
from expo.errors import InputError
from expo.output.approximation import approximation, said
from expo.output.manifest import Origin, delta_figures, figures_in
from expo.output.writer import ShardRecord
from expo.theta.adapter.folders import is_another_base
from expo.theta.adapter.scaled import scaled_config
from expo.theta.adapter.tensors import Adapter
from expo.theta.decide_ranked import RankedPlan
from expo.theta.decide_scaled import ScaledPlan, plan_scaled
from expo.theta.pair_checks import check_change
from expo.theta.plan import PairPlan

REWARD_HEADS = (".score.weight", ".classifier.weight")
"""The only tensors that vLLM takes in an adapter beside LoRA factors."""

EXPERTS = ".experts."
"""In the names of modules that PEFT fuses with transformers 5, with lora_alpha for all, whatever alpha_pattern says."""

NOTED_ERROR = 0.01
"""From this share of ‖θ_dpo − θ_sft‖ on, what an adapter lacks is warned of."""

log = logging.getLogger(__name__)


def require_kind(dpo: Location, rank: int | None) -> None:
    """Refuse a DPO model that is a whole checkpoint without `--rank`, or an adapter with it.

    Raises:
        InputError: It is.
    """
    if not is_adapter(dpo.path) and rank is None:
        raise InputError(
            f"--as-adapter scales the LoRA adapter that --dpo is, and {dpo.label} is a whole checkpoint: give --rank R "
            "for the adapter of rank R that comes closest to it, or leave out --as-adapter"
        )
    if is_adapter(dpo.path) and rank is not None:
        raise InputError(f"{dpo.label} is an adapter already, and keeps its own rank: leave out --rank")


def adapter_plan(merged: PairPlan, dpo: Location) -> ScaledPlan:
    """The plan of the adapter that makes of SFT what `merged` is the plan of; a warning says who reads it otherwise.

    Raises:
        InputError: The adapter cannot be scaled.
    """
    plan = plan_scaled(merged)
    whole = [name for name in plan.of.whole if not name.endswith(REWARD_HEADS)]
    if whole:
        log.warning(
            "%s has %d tensors that are no LoRA factors (%s …): the output is for PEFT, and vLLM does not take it",
            dpo.label,
            len(whole),
            whole[0],
        )
    patterned = {name for match in merged.matches for name in match.names}
    experts = [module for module, name in plan.of.modules.items() if EXPERTS in module and name in patterned]
    if experts:
        log.warning(
            "%d experts have an α of their own (%s …): where PEFT fuses experts, it gives them lora_alpha instead",
            len(experts),
            experts[0],
        )
    return plan


def adapter_files(dpo: Location) -> dict[str, Path]:
    """The files beside the adapter's weights: tokenizer, chat template, licence; name in the output → file."""
    left = () if is_adapter(dpo.path) else (*CONFIGS, *CODE)
    files = (file for file in side_files(dpo.path) if not any(fnmatch.fnmatch(file.name, one) for one in left))
    return {str(file): dpo.path / file for file in files}


def ranked_config(origin: Origin, plan: RankedPlan, alpha: float) -> str:
    """The text of adapter_config.json of an adapter of a given rank at one α."""
    settings = plan.lora_settings
    given = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.sft.hub_id or origin.config.sft,
        "revision": origin.sft.revision,
        "r": plan.rank,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "target_modules": plan.target_modules,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    return json.dumps(scaled_config(given, settings, plan.alphas_of(alpha), alpha), indent=2, ensure_ascii=False) + "\n"


def adapter_config(origin: Origin, plan: ScaledPlan, alpha: float) -> str:
    """The text of adapter_config.json at one α; where nothing changes, the given adapter's."""
    file = plan.of.path / ADAPTER_CONFIG
    given = read_json(file)
    content = scaled_config(given, plan.of.settings, plan.alphas_of(alpha), alpha)
    trained_on = given.get("base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on.strip() or is_another_base(trained_on, origin.sft):
        content |= {
            "base_model_name_or_path": origin.sft.hub_id or origin.config.sft,
            "revision": origin.sft.revision,
        }
    return file.read_bytes().decode() if content == given else json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def check_factors(plan: ScaledPlan, changed: Sequence[Mapping[str, ShardRecord]]) -> None:
    """See that the factors are finite, and that the adapter changes anything, as is seen where they are multiplied.

    Args:
        plan: The plan.
        changed: What was written at each α but 0.

    Raises:
        InputError: They are not, or it changes nothing.
    """
    finite, moves = _look(plan.of)
    if not finite and not plan.settings.allow_nonfinite:
        raise InputError(
            f"the LoRA factors of {plan.of.path.name} contain NaN or infinity; --allow-nonfinite writes them anyway"
        )
    if changed and not moves:
        check_change(delta_figures(changed[0])["norm"], None)


def _look(adapter: Adapter) -> tuple[bool, bool]:
    """Whether every factor is finite, and whether the product of any pair may be other than zero."""
    from safetensors import safe_open

    from expo.theta.norms import is_finite

    finite, moves = True, False
    with safe_open(adapter.shards[0].file, "pt") as file:
        for pair in adapter.low_rank.values():
            factors = [file.get_tensor(side.name).double() for side in (pair.left, pair.right)]
            finite = finite and all(map(is_finite, factors))
            moves = moves or all(bool(factor.any()) for factor in factors)
    return finite, moves


def check_approximation(records: Mapping[str, ShardRecord]) -> None:
    """See that the pair is one, and that factors have some of its change; say how much.

    Raises:
        InputError: Nothing differs, or nothing that can have factors.
    """
    change, figures = delta_figures(records), figures_in(records)
    check_change(change["norm"], change["relative"])
    found = approximation(figures)
    if not any(row["norm"] for row in found["modules"].values()):
        raise InputError("SFT and DPO differ in no layer that gets LoRA factors: leave out --as-adapter and --rank")
    log.log(logging.WARNING if found["relative_error"] >= NOTED_ERROR else logging.INFO, "%s", said(found))
