"""What answers: a checkpoint, or the θ(α) that an engine makes of a pair while it loads."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.folder import CONFIG_FILE, PARTIAL_FOLDER, read_config, source_fingerprint
from expo.checkpoint.hub import Location, locate, refuse_inside
from expo.config import GenerateConfig, ThetaConfig
from expo.durable import Row
from expo.errors import InputError
from expo.theta.adapter.folders import is_adapter
from expo.theta.pair import ThetaPlan, plan_theta
from expo.theta.rules import DEFAULT_RULE

RESULT_RULES = ("rule", "alpha_for", "exclude", "missing", "vocab", "allow_nonfinite")
"""The settings that change θ(α)."""


@dataclass(frozen=True)
class Source:
    """What answers."""

    folder: Path
    """Where its config, tokenizer and code are, and its weights unless it is a θ(α)."""
    name: str
    """What its outputs are called."""
    fingerprint: Row
    record: Row
    """What the meta file says of it."""
    theta: ThetaPlan | None = None


def describe_theta(theta: ThetaPlan) -> Row:
    """A θ(α) as plain data."""
    return {
        "sft": str(theta.sft.path),
        "dpo": str(theta.dpo.path),
        "alpha": theta.config.alpha,
        "rule": theta.config.rule,
        "tensors": theta.pair.tensor_counts(),
    }


def find_source(config: GenerateConfig) -> Source:
    """Find what answers and plan its weights; nothing is read of them but their headers.

    Raises:
        InputError: It is not there, cannot answer, or the pair does not fit together.
        EnvironmentFailure: The hub cannot be reached.
    """
    if config.theta is not None:
        return _theta_source(config.theta, Path(config.output_dir))
    location = locate(config.model or "")
    if is_adapter(location.path) and not (location.path / CONFIG_FILE).is_file():
        raise InputError(
            f"--model {location.label} is an adapter: give it as --dpo, the model it was trained on as --sft, and "
            "--alpha 0"
        )
    require_generator(location.path)
    refuse_inside(Path(config.output_dir), location, flag="--output-dir")
    return Source(location.path, location.name, {"model": source_fingerprint(location)}, {"model": _record(location)})


def _theta_source(config: ThetaConfig, output: Path) -> Source:
    theta = plan_theta(config)
    for location in (theta.sft, theta.dpo):
        require_generator(location.path)
    refuse_inside(output, theta.sft, theta.dpo, flag="--output-dir")
    folder = _linked(theta) if is_adapter(theta.dpo.path) else theta.dpo.path
    sides = {"sft": theta.sft, "dpo": theta.dpo}
    fingerprint = {
        **{side: source_fingerprint(location) for side, location in sides.items()},
        "alpha": config.alpha,
        **{name: plain(getattr(config, name)) for name in RESULT_RULES},
    }
    if config.rule == DEFAULT_RULE:  # absent: outputs finished before there were others
        del fingerprint["rule"]
    record = {**{side: _record(location) for side, location in sides.items()}, "alpha": config.alpha}
    return Source(folder, theta.name, fingerprint, record, theta)


def plain(value: object) -> object:
    """A setting as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _record(location: Location) -> Row:
    return {"name": location.label, "revision": location.revision}


def _linked(theta: ThetaPlan) -> Path:
    """A folder of links to the side files, which are SFT's and the adapter's; it lives as long as the plan."""
    folder = Path(tempfile.mkdtemp(prefix="expo-"))
    weakref.finalize(theta, shutil.rmtree, folder, ignore_errors=True)
    for name, file in theta.side_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file.resolve())
    return folder


def require_generator(path: Path) -> None:
    """Refuse a model folder that cannot answer: one expo has not finished writing, or a reward model.

    Raises:
        InputError: It is one of these.
    """
    for architecture in read_config(path).get("architectures") or []:
        if str(architecture).endswith("ForSequenceClassification"):
            raise InputError(f"{path.name} is a {architecture}: it scores and cannot generate")
    if (path / PARTIAL_FOLDER).exists():
        raise InputError(f"{path} is an unfinished output of expo: run the command that makes it again")
