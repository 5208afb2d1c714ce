"""The model card (README.md) of an extrapolated checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expo.checkpoint.folder import Location, read_card

PAPER = "https://arxiv.org/abs/2404.16792"
RELEX = "https://arxiv.org/abs/2605.21468"


def model_card(
    *,
    title: str,
    alpha: float,
    formula: str,
    sft: Location,
    dpo: Location,
    command: str,
    figures: dict[str, Any],
    is_adapter: bool = False,
    steps: Mapping[str, Location] = MappingProxyType({}),
    target_step: float | None = None,
) -> str:
    """Write the card.

    Args:
        title: The model's name.
        alpha: α.
        formula: The rule's formula of θ(α).
        sft: The SFT model.
        dpo: The DPO model, whose licence is carried over; SFT's for an adapter without one.
        command: The command that makes this checkpoint.
        figures: Name → value, shown in a table.
        is_adapter: Whether DPO is an adapter over SFT.
        steps: The checkpoints of a training run but the last, which is DPO, by what they are.
        target_step: The step it is extrapolated to.

    Returns:
        Markdown with a YAML front matter: `base_model` [dpo, sft] where both are on the hub, tags, licence.
    """
    import yaml  # huggingface_hub's `ModelCardData` writes the same, and takes a fifth of a second to import

    hub_ids = [location.hub_id for location in (dpo, sft) if location.hub_id]
    data = {
        **({"base_model": hub_ids} if hub_ids else {}),
        "library_name": "transformers",
        **(licence(dpo.path) or (licence(sft.path) if is_adapter else {})),
        "tags": ["merge", "expo", "model-extrapolation", "alignment"],
        **({"base_model_relation": "merge"} if hub_ids else {}),
    }
    kind, origin = "", f"Config, tokenizer and chat template are those of {dpo.label}."
    if is_adapter:
        kind = ", a LoRA adapter merged into θ_sft"
        origin = f"The config is that of {sft.label}; so are tokenizer and chat template where {dpo.label} has none."
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    made = f"model extrapolation ([ExPO]({PAPER})) from an SFT model and the aligned model trained\nfrom it"
    result = f"{formula}, with α = {alpha!r}"
    if target_step is not None:
        made = f"extrapolating a training run's checkpoints ([RELEX]({RELEX}))\nto step T = {target_step}"
        result = formula
    earlier = "".join(f"\n| {side} | {one.label} | {one.revision or 'local'} |" for side, one in steps.items())
    return f"""---
{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}
---

# {title}

This checkpoint was made by {made}, without further training:

{result}

| | model | revision |
| --- | --- | --- |
| θ_dpo | {dpo.label}{kind} | {dpo.revision or "local"} |
| θ_sft | {sft.label} | {sft.revision or "local"} |{earlier}

| figure | value |
| --- | --- |
{rows}

{origin} Made with:

```sh
{command}
```
"""


def licence(folder: Path) -> dict[str, Any]:
    """The licence entries of a model folder's card; empty if there are none."""
    entries = read_card(folder)
    found = {key: entries.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if value is not None}
