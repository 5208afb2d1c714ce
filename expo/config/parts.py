"""The settings of a run in parts: one part by itself, all of them in processes, or joining what they made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from expo.parts import MAX_PARTS, read_part
from expo.settings import Setting, require


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """How the work is divided: rows, or the files of a checkpoint."""

    HEADING = "Parallel runs"

    data_parallel: Annotated[
        int, Setting("Number of processes that share the work, each with GPUs of its own.", metavar="N")
    ] = 1
    part: Annotated[
        str | None,
        Setting(
            "Do only part i of N, counted from 0; slurm takes i and N from the array job.",
            metavar="i/N|slurm",
        ),
    ] = None
    join: Annotated[int | None, Setting("Check that all N parts are finished and join them.", metavar="N")] = None

    def _require_one_way(self) -> None:
        """Check these settings, and refuse those that each say how a run is divided, given together."""
        given = [
            *(["--part"] if self.part is not None else []),
            *(["--join"] if self.join is not None else []),
            *(["--data-parallel"] if self.data_parallel != 1 else []),
        ]
        by_itself = (
            "--data-parallel makes and joins the parts itself"
            if "--data-parallel" in given
            else "join once all parts are finished"
        )
        require(len(given) < 2, f"{' and '.join(given)} cannot be combined: {by_itself}")
        for flag_given, count in (("--data-parallel", self.data_parallel), ("--join", self.join)):
            known = count is None or 1 <= count <= MAX_PARTS
            require(known, f"{flag_given} must be 1 to {MAX_PARTS} parts, not {count}")
        if self.part is not None:
            object.__setattr__(self, "part", str(read_part(self.part, os.environ)))
