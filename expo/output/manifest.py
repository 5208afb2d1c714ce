"""The metadata of an output: expo.json and the model card, from the plan and the written shards."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from expo import __version__
from expo.arguments import shown
from expo.checkpoint.folder import Location
from expo.config import ExtrapolateConfig
from expo.files import Row
from expo.output.card import model_card
from expo.output.writer import Checksums, ShardRecord
from expo.settings import changing, recorded
from expo.theta.names import theta_name
from expo.theta.plan import PairPlan
from expo.theta.rules import find_rule


@dataclass(frozen=True)
class Origin:
    """What the outputs of one run are made from."""

    config: ExtrapolateConfig
    sft: Location
    dpo: Location
    pair: PairPlan
    weights: Checksums | None
    """With --verify: side → file name → checksum of the sources' weights."""


def delta_figures(records: Mapping[str, ShardRecord]) -> Row:
    """‖θ_dpo − θ_sft‖, ‖θ_sft‖ and their ratio over the extrapolated tensors; None where not finite.

    For large tensors these are estimates (`norms.sampled_norms`); `expo inspect` uses all weights.
    """
    # fsum, because a resumed run has the records in another order; null, because JSON has no NaN.
    delta = math.sqrt(math.fsum(record.delta_squared for record in records.values()))
    size = math.sqrt(math.fsum(record.sft_squared for record in records.values()))
    figures = {"norm": delta, "sft_norm": size, "relative": delta / size if size else 0.0}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def vocabulary_rows(pair: PairPlan) -> Row:
    """What happens to the rows of vocabularies of different sizes; empty if the sizes are equal."""
    if pair.vocabulary is None:
        return {}
    sft, dpo, common = pair.vocabulary.sft, pair.vocabulary.dpo, pair.vocabulary.common
    rows = {"sft": sft, "dpo": dpo, "rows_extrapolated": common}
    return {"vocabulary": rows | {"rows_copied_from_dpo": dpo - common, "rows_of_sft_dropped": sft - common}}


def _source_names(origin: Origin) -> Row:
    """The sources as given; for a path, its last part, since the rest means nothing to others."""
    config = origin.config
    return {
        "sft": config.sft if origin.sft.hub_id else origin.sft.name,
        "dpo": config.dpo if origin.dpo.hub_id else origin.dpo.name,
    }


def manifest(
    origin: Origin, alpha: float, fingerprint: Row, records: Mapping[str, ShardRecord], files: list[str], times: Row
) -> str:
    """The text of expo.json."""
    content = {
        "command": "extrapolate",
        "versions": {"expo": __version__, "torch": version("torch"), "python": platform.python_version()},
        "config": {**_source_names(origin), "alpha": alpha, **recorded(origin.config, "weights")},
        "alpha": alpha,
        "rule": origin.config.rule,
        "formula": find_rule(origin.config.rule).formula,
        "fingerprint": fingerprint,
        "sources": {
            side: {
                "name": location.label,
                "revision": location.revision,
                **({"xxh3": origin.weights[side]} if origin.weights else {}),
            }
            for side, location in (("sft", origin.sft), ("dpo", origin.dpo))
        },
        "tensors": origin.pair.tensor_counts(),
        **vocabulary_rows(origin.pair),
        **({} if origin.pair.adapter is None else {"lora": origin.pair.adapter.describe()}),
        "delta": delta_figures(records),
        "bytes": origin.pair.nbytes,
        "shards": {name: {"bytes": record.nbytes, "xxh3": record.xxh3} for name, record in sorted(records.items())},
        "files": files,
        "clock": times,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def card(origin: Origin, alpha: float, records: Mapping[str, ShardRecord]) -> str:
    """The text of the model card."""
    counts, relative = origin.pair.tensor_counts(), delta_figures(records)["relative"]
    return model_card(
        title=theta_name(origin.dpo.name, alpha),
        alpha=alpha,
        formula=find_rule(origin.config.rule).formula,
        sft=origin.sft,
        dpo=origin.dpo,
        command=_command(origin, alpha),
        is_adapter=origin.pair.adapter is not None,
        figures={
            "rule": origin.config.rule,
            "tensors extrapolated": counts["extrapolated"] + counts.get("merged", 0),
            "‖θ_dpo − θ_sft‖ / ‖θ_sft‖ of these": "not finite" if relative is None else f"{relative:.5f}",
            "tensors copied from θ_dpo": counts["copied"] + counts["equal"],
        },
    )


def _command(origin: Origin, alpha: float) -> str:
    """The command that reproduces this output from the same revisions, whatever else the run wrote.

    A folder is spelled as it was given where that is a path below the working folder, from which the command can then
    be run again; else by its name, since a published card should not show where files lie on a machine.
    """
    names = (*changing(ExtrapolateConfig, "weights"), "allow_pickle")
    given = ((origin.sft, origin.config.sft), (origin.dpo, origin.config.dpo))
    sft, dpo = (f"{one.hub_id}@{one.revision}" if one.hub_id else _below(text) or one.name for one, text in given)
    settings = {name: getattr(origin.config, name) for name in names}
    return shown("extrapolate", ExtrapolateConfig(sft=sft, dpo=dpo, alpha=(alpha,), **settings))


def _below(path: str | Path | None) -> str | None:
    """The path, if it is relative and stays below the working folder."""
    plain = Path(os.path.normpath(path)) if path else Path()
    inside = plain.parts and not plain.is_absolute() and plain.parts[0] not in ("..", "~")
    return plain.as_posix() if inside else None
