"""Who scores: the reward models of a run, found, and the names of their files.

The first writes `NAME.jsonl`, each further one `NAME@<short name>.jsonl`; the implicit reward comes last. A further one
keeps the files that it has, whatever is scored beside it later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expo.checkpoint.folder import Location, find_folder, source_fingerprint
from expo.checkpoint.hub import locate
from expo.config import ScoreConfig
from expo.engines.reward_models import recognise
from expo.errors import InputError
from expo.files import Row
from expo.rows.files import RowFiles, refuse_replacing
from expo.settings import require_name
from expo.tasks import Task
from expo.verbs.score.job import rows_file

MARK = "@"
"""Between an output's name and a reward model's."""
IMPLICIT = "implicit"
"""What the implicit reward is called there."""


@dataclass(frozen=True)
class ScoredBy:
    """A reward model, or the pair of an implicit reward, found."""

    number: int
    """Which of the run's."""
    location: Location
    """The reward model, or π_dpo."""
    sft: Location | None
    """Of an implicit reward: π_sft."""
    source: Row
    """What distinguishes its rows from another's."""
    name: str
    """The name of its files."""


def find_scorers(config: ScoreConfig, task: Task, only: int | None = None) -> list[ScoredBy]:
    """The run's reward models in order, the implicit reward last; or one of them.

    Raises:
        InputError: One does not exist, or is given twice.
    """
    models = config.reward_models
    names = [*map(called, models), *([Called((IMPLICIT,))] if config.implicit_reward else [])]
    folder = Path(config.output_dir) / f"rewards_{task.name}"
    scorers = []
    for number, name in enumerate(file_names(config.name, names)):
        if only in (None, number):
            location, sft, source = _find_pair(config) if number == len(models) else _find_reward_model(models[number])
            if number:
                source["output"] = config.name  # an output of another name may have files of this one
            scorers.append(ScoredBy(number, location, sft, source, _own_name(folder, config.name, source) or name))
    return scorers


def _find_reward_model(model: str) -> tuple[Location, None, Row]:
    location = find_folder(model) or locate(model)
    return location, None, {"reward_model": recognise(location).fingerprint}


def _find_pair(config: ScoreConfig) -> tuple[Location, Location, Row]:
    dpo, sft = (find_folder(model) or locate(model) for model in (config.dpo or "", config.sft or ""))
    pair = {side: source_fingerprint(location) for side, location in (("dpo", dpo), ("sft", sft))}
    return dpo, sft, {"implicit_reward": pair, "beta": config.beta}


def _own_name(folder: Path, name: str, source: Row) -> str | None:
    """The name of the files that a further reward model already has, whatever else was scored beside it then."""
    metas = folder.glob("*.meta.json") if "output" in source and folder.is_dir() else ()
    for meta in sorted(metas):
        stem = meta.name.removesuffix(".meta.json")
        if stem.startswith(f"{name}{MARK}"):
            found = RowFiles(folder / f"{stem}.jsonl", stem, "outputs_sha256").look().fingerprint or {}
            if all(found.get(key) == value for key, value in source.items()):
                return stem
    return None


def files_of(scorer: ScoredBy, outputs: Path, task: Task, config: ScoreConfig) -> RowFiles:
    """The files of a reward model.

    Raises:
        InputError: One is the outputs' file, or belongs to another output.
    """
    folder, name = Path(config.output_dir), scorer.name
    files = RowFiles(folder / f"rewards_{task.name}" / f"{name}.jsonl", name, "outputs_sha256")
    refuse_replacing(outputs, (files.final, files.meta, rows_file(files)))
    if scorer.number and (folder / f"outputs_{task.name}" / f"{name}{task.suffix}").exists():
        raise InputError(
            f"{files.final} is where the rewards of the output {name} belong, not those of {config.name} by a second "
            "reward model: rename one of the two outputs"
        )
    found = files.look().fingerprint
    if found is not None and found.get("output") != scorer.source.get("output"):
        of = f"of {found['output']}" if "output" in found else f"of an output {name}"
        raise InputError(f"{files.final} has the rewards {of}, not of {config.name}: move them away, or rename one")
    return files


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Called:
    """What a reward model can be called, more exactly at each step."""

    parts: tuple[str, ...]
    """Of its folder or hub id, the last one first: `("rm", "org")`."""
    revision: str = ""
    """On the hub."""

    def names(self) -> Iterator[str]:
        """`rm`, `org--rm`, …, and at last with the revision."""
        for count in range(1, len(self.parts) + 1):
            yield "--".join(reversed(self.parts[:count]))
        if self.revision:
            yield f"{self.parts[0]}{MARK}{self.revision.replace('/', '--')}"
            yield f"{'--'.join(reversed(self.parts))}{MARK}{self.revision.replace('/', '--')}"


def called(model: str) -> Called:
    """What a model is called, from the way the user names it; nothing is fetched."""
    folder = find_folder(model)
    if folder is not None:
        return Called(tuple(part for part in reversed(folder.path.resolve().parts) if part.strip("/")))
    hub_id, _, revision = model.partition("@")
    return Called(tuple(reversed(hub_id.split("/"))), revision or "main")


def file_names(name: str, models: Sequence[Called]) -> list[str]:
    """The names of the files of each reward model, in the order in which they are given.

    A name that two models share, in whatever case, is no name of either, if both have others.

    Args:
        name: The output's name.
        models: The first writes the files of that name.

    Raises:
        InputError: Two would write the same files, or a name is no file name.
    """
    spellings = [[one.casefold() for one in model.names()] for model in models]
    names = [name]
    for number, model in enumerate(models[1:], start=1):
        beside = [other for other in spellings if other is not spellings[number]]
        others = {one for other in beside for one in other if len(other) == 1 or len(spellings[number]) > 1}
        short = next((one for one in model.names() if one.casefold() not in others), None)
        if short is None:
            raise InputError(f"two reward models are called {'/'.join(reversed(model.parts))}: give each one once")
        names.append(f"{name}{MARK}{short}")
        require_name(names[-1])
    return names
