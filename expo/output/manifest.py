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
from typing import TYPE_CHECKING

from expo import __version__
from expo.arguments import shown
from expo.checkpoint.folder import Location
from expo.config import ExtrapolateConfig
from expo.config.course import plain, shown_step, step_of
from expo.files import Row
from expo.output.adapter_card import adapter_card
from expo.output.approximation import Figures, approximation, card_figures
from expo.output.card import model_card
from expo.output.writer import Checksums, ShardRecord
from expo.settings import changing, recorded
from expo.theta.names import theta_name
from expo.theta.plan import PairPlan
from expo.theta.rules import find_rule

if TYPE_CHECKING:
    from expo.theta.trajectory.fit import Fit


@dataclass(frozen=True)
class Origin:
    """What the outputs of one run are made from."""

    config: ExtrapolateConfig
    sft: Location
    earlier: tuple[Location, ...]
    """The checkpoints of a training run but the last, which is `dpo`."""
    dpo: Location
    pair: PairPlan
    weights: Checksums | None
    """With --verify: side → file name → checksum of the sources' weights."""

    @property
    def sources(self) -> dict[str, Location]:
        """All models, by what they are."""
        steps = {
            f"step {shown_step(step)}": one for (step, _), one in zip(self.config.course, self.earlier, strict=False)
        }
        return {"sft": self.sft, "dpo": self.dpo, **steps}


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


def _formula(origin: Origin) -> str:
    course = origin.pair.settings.course
    if course is None:
        return find_rule(origin.config.rule_name).formula
    from expo.theta.trajectory.fit import LINE_RULES

    return LINE_RULES[course.rule].formula


def fits_in(records: Mapping[str, ShardRecord]) -> dict[str, Fit]:
    """The line of every tensor of a training run that moves, by name; none for a pair."""
    rows = {name: row for record in records.values() for name, row in record.fits.items()}
    if not rows:
        return {}
    from expo.theta.trajectory.fit import read_fits  # imports numpy

    return read_fits(rows)


def figures_in(records: Mapping[str, ShardRecord]) -> Figures:
    """What an adapter of a given rank has of each tensor; none for other outputs."""
    return {name: row for record in records.values() for name, row in record.approximation.items()}


def _trajectory(origin: Origin, alpha: float, records: Mapping[str, ShardRecord]) -> Row:
    """Which line θ(T) lies on, and how well it describes the run; empty for a pair."""
    course = origin.pair.settings.course
    if course is None:
        return {}
    from expo.theta.trajectory.fit import describe

    found = {"rule": course.rule, "steps": [*map(plain, course.steps)], "target_step": course.step_of(alpha)}
    return {"trajectory": {**found, **describe(fits_in(records))}}


def _course(origin: Origin, alpha: float) -> Row:
    """A training run's settings; empty for a pair."""
    config = origin.config
    if config.last_step is None:
        return {"rule": config.rule_name}
    names = [
        f"{shown_step(step)}={model if one.hub_id else one.name}"
        for (step, model), one in zip(config.course, (*origin.earlier, origin.dpo), strict=True)
    ]
    return {"rule": config.rule_name, "checkpoint": names, "target_step": step_of(alpha, config.last_step)}


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
    is_scaled = origin.config.as_adapter and origin.config.rank is None
    content = {
        "command": "extrapolate",
        "versions": {"expo": __version__, "torch": version("torch"), "python": platform.python_version()},
        "config": {
            **_source_names(origin),
            "alpha": alpha,
            **recorded(origin.config, "weights"),
            **_course(origin, alpha),
        },
        "alpha": alpha,
        "rule": origin.config.rule_name,
        "formula": _formula(origin),
        "fingerprint": fingerprint,
        "sources": {
            side: {
                "name": location.label,
                "revision": location.revision,
                **({"xxh3": origin.weights[side]} if origin.weights else {}),
            }
            for side, location in origin.sources.items()
        },
        **({"dequantized": origin.pair.dequantized} if origin.pair.dequantized else {}),
        "tensors": origin.pair.tensor_counts(),
        **vocabulary_rows(origin.pair),
        **({} if origin.pair.adapter is None else {"lora": origin.pair.adapter.describe()}),
        **({} if is_scaled else {"delta": delta_figures(records)}),
        **({"approximation": approximation(found)} if (found := figures_in(records)) else {}),
        **_trajectory(origin, alpha, records),
        "bytes": origin.pair.nbytes,
        "shards": {name: {"bytes": record.nbytes, "xxh3": record.xxh3} for name, record in sorted(records.items())},
        "files": files,
        "clock": times,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def card(origin: Origin, alpha: float, records: Mapping[str, ShardRecord]) -> str:
    """The text of the model card."""
    if origin.config.as_adapter:
        return _adapter_card(origin, alpha, records)
    counts, relative = origin.pair.tensor_counts(), delta_figures(records)["relative"]
    return model_card(
        title=theta_name(origin.dpo.name, alpha, origin.config.last_step),
        alpha=alpha,
        formula=_formula(origin),
        sft=origin.sft,
        dpo=origin.dpo,
        command=_command(origin, alpha),
        is_adapter=origin.pair.adapter is not None,
        steps={side: one for side, one in origin.sources.items() if side.startswith("step")},
        target_step=None if origin.config.last_step is None else step_of(alpha, origin.config.last_step),
        figures={
            "rule": origin.config.rule_name,
            "tensors extrapolated": counts["extrapolated"] + counts.get("merged", 0),
            "‖θ_dpo − θ_sft‖ / ‖θ_sft‖ of these": "not finite" if relative is None else f"{relative:.5f}",
            "tensors copied from θ_dpo": counts["copied"] + counts["equal"],
        },
    )


def _adapter_card(origin: Origin, alpha: float, records: Mapping[str, ShardRecord]) -> str:
    adapter = origin.pair.adapter
    return adapter_card(
        title=theta_name(origin.dpo.name, alpha) + "-adapter",
        alpha=alpha,
        formula=_formula(origin),
        sft=origin.sft,
        dpo=origin.dpo,
        command=_command(origin, alpha),
        rank=origin.config.rank,
        figures=card_figures(approximation(figures_in(records)))
        if adapter is None
        else {"modules with LoRA factors": len(adapter.modules), "tensors stored whole": len(adapter.whole)},
    )


def _command(origin: Origin, alpha: float) -> str:
    """The command that reproduces this output from the same revisions, whatever else the run wrote.

    A folder is spelled as it was given where that is a path below the working folder, from which the command can then
    be run again; else by its name, since a published card should not show where files lie on a machine.
    """
    names = (*changing(ExtrapolateConfig, "weights"), "allow_pickle")
    config, last = origin.config, origin.config.last_step
    given = ((origin.sft, config.sft), *zip(origin.earlier, (model for _, model in config.course), strict=False))
    sft, *earlier, dpo = (
        f"{one.hub_id}@{one.revision}" if one.hub_id else _below(text) or one.name
        for one, text in (*given, (origin.dpo, config.dpo))
    )
    settings = {name: getattr(config, name) for name in names}
    if last is not None:
        steps = [shown_step(step) for step, _ in config.course]
        settings["checkpoint"] = tuple(f"{step}={model}" for step, model in zip(steps, (*earlier, dpo), strict=True))
        settings["target_step"] = (step_of(alpha, last),)
    return shown("extrapolate", ExtrapolateConfig(sft=sft, dpo=dpo, alpha=(alpha,), **settings))


def _below(path: str | Path | None) -> str | None:
    """The path, if it is relative and stays below the working folder."""
    plain = Path(os.path.normpath(path)) if path else Path()
    inside = plain.parts and not plain.is_absolute() and plain.parts[0] not in ("..", "~")
    return plain.as_posix() if inside else None
