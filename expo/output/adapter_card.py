"""The model card (README.md) of an adapter that is θ(α) when it is applied to SFT."""

from __future__ import annotations

from typing import Any

from expo.checkpoint.folder import Location
from expo.output.card import PAPER, licence


def adapter_card(
    *, title: str, alpha: float, formula: str, sft: Location, dpo: Location, command: str, figures: dict[str, Any]
) -> str:
    """Write the card.

    Args:
        title: The adapter's name.
        alpha: α.
        formula: The rule's formula of θ(α).
        sft: The SFT model, which it is applied to.
        dpo: The adapter that it is made of, whose licence is carried over; SFT's where it has none.
        command: The command that makes it.
        figures: Name → value, shown in a table.

    Returns:
        Markdown with a YAML front matter: `base_model` sft where that is on the hub, tags, licence.
    """
    import yaml  # as `output/card.py`

    data = {
        **({"base_model": [sft.hub_id], "base_model_relation": "adapter"} if sft.hub_id else {}),
        "library_name": "peft",
        **(licence(dpo.path) or licence(sft.path)),
        "tags": ["lora", "expo", "model-extrapolation", "alignment"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}
---

# {title}

This LoRA adapter was made by model extrapolation ([ExPO]({PAPER})) from the adapter θ_dpo, without further training.
Applied to θ_sft it is the model

{formula}, with α = {alpha!r}

Its LoRA factors are those of θ_dpo, and their scaling (`lora_alpha`) is 1 + α times as large; modules with an α of
their own are in `alpha_pattern`.

| | model | revision |
| --- | --- | --- |
| θ_dpo | {dpo.label}, a LoRA adapter on θ_sft | {dpo.revision or "local"} |
| θ_sft | {sft.label} | {sft.revision or "local"} |

| figure | value |
| --- | --- |
{rows}

Made with:

```sh
{command}
```
"""
