"""What a sweep leaves in its folder beside the rows: the names of the files, and what its record says.

`expo sweep` writes them, and `expo report` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expo.config.course import shown_step, step_of
from expo.errors import InputError
from expo.files import Row, read_json, shown
from expo.output.races import RaceRecord, number, read_race

RECORD = "sweep.json"
PICTURE = "sweep.png"
MODULES = "modules.json"
"""In the place of `RECORD`, of a search over modules, whose outputs have no single α."""


@dataclass(frozen=True)
class SweepRecord:
    """What sweep.json says."""

    content: Row
    """All of it, as it is in the file."""
    alphas: tuple[float, ...]
    """In its order."""
    names: Mapping[float, str]
    """α → the name of its output, where it is said."""
    task: str | None
    best_alpha: float | None
    """The one that was chosen, 0 where none was; None where there is no choice yet."""
    verdict: str | None
    notes: tuple[str, ...]
    rejected: Mapping[float, str]
    """α → why it was not chosen, of those that gain and do not pass, or were dropped."""
    race: RaceRecord | None = None
    """How the race went, where the sweep is one."""
    last_step: float | None = None
    """Of the last checkpoint, where the sweep is of a training run's steps: α = 0."""

    def shown(self, alpha: float) -> str:
        """An α for a sentence, with the step that it stands for."""
        if self.last_step is None:
            return f"{alpha:g}"
        return f"{alpha:.4g} (step {shown_step(step_of(alpha, self.last_step))})"

    @property
    def rejected_gains(self) -> Mapping[float, str]:
        """Those of `rejected` that were not dropped in a race."""
        dropped = self.race.dropped if self.race else {}
        return {alpha: why for alpha, why in self.rejected.items() if alpha not in dropped}


def is_sweep(folder: Path) -> bool:
    """Whether a sweep wrote to this folder."""
    return (folder / RECORD).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """Read the record of a sweep.

    Raises:
        InputError: It is damaged, or lists no α, or chose one that it does not list.
    """
    record = read_json(folder / RECORD)
    listed = record.get("alphas")
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    alphas = {alpha: one for one in entries if (alpha := number(one.get("alpha"))) is not None}
    if not alphas:
        raise InputError(
            f"{folder / RECORD} lists no alphas ({shown(listed)}), so that expo sweep did not write it: move it away"
        )
    best, verdict, notes, task = (record.get(key) for key in ("best_alpha", "verdict", "notes", "task"))
    if best is not None and number(best) not in alphas:
        raise InputError(f"{folder / RECORD} chose an α that it does not list: {shown(best)}")
    return SweepRecord(
        content=record,
        alphas=tuple(alphas),
        names={alpha: name for alpha, one in alphas.items() if isinstance(name := one.get("name"), str)},
        task=task if isinstance(task, str) else None,
        best_alpha=number(best),
        verdict=verdict if isinstance(verdict, str) and verdict else None,
        notes=tuple(filter(lambda note: isinstance(note, str), notes)) if isinstance(notes, list) else (),
        rejected={alpha: why for alpha, one in alphas.items() if isinstance(why := one.get("rejected"), str)},
        race=read_race(record),
        last_step=number(alphas.get(0.0, {}).get("target_step")),
    )
