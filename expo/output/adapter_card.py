"""The model card (README.md) of an adapter that is θ(α) when it is applied to SFT."""

from __future__ import annotations

from typing import Any

from expo.checkpoint.folder import Location
from expo.output.card import PAPER, licence


def adapter_card(
    *,
    title: str,
    alpha: float,
    formula: str,
    sft: Location,
    dpo: Location,
    command: str,
    figures: dict[str, Any],
    rank: int | None = None,
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
        rank: Where θ_dpo is a whole checkpoint, that of its approximation.

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
    is_approximate = rank is not None
    made_from = "the checkpoint" if is_approximate else "the adapter"
    made_of = (
        f"Its LoRA factors are the best approximation of rank {rank} of θ_dpo − θ_sft, layer by layer, and the same\n"
        "for every α; `lora_alpha` is 1 + α times the rank. Norms, biases, embeddings and the head stay those of θ_sft."
        if is_approximate
        else "Its LoRA factors are those of θ_dpo, and their scaling (`lora_alpha`) is 1 + α times as large; modules "
        "with an α of\ntheir own are in `alpha_pattern`."
    )
    kind = "" if is_approximate else ", a LoRA adapter on θ_sft"
    return f"""---
{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}
---

# {title}

This LoRA adapter was made by model extrapolation ([ExPO]({PAPER})) from {made_from} θ_dpo, without further training.
Applied to θ_sft it is {"close to " if is_approximate else ""}the model

{formula}, with α = {alpha!r}

{made_of}

| | model | revision |
| --- | --- | --- |
| θ_dpo | {dpo.label}{kind} | {dpo.revision or "local"} |
| θ_sft | {sft.label} | {sft.revision or "local"} |

| figure | value |
| --- | --- |
{rows}

Made with:

```sh
{command}
```
"""
