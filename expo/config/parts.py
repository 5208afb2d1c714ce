"""The settings of a run on several machines, or in parts: one part by itself, all in processes, or joining them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from expo.parts import MAX_PARTS, read_part
from expo.settings import Setting, require, require_text


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the engines of a sweep run."""

    HEADING = "Parallel runs"

    data_parallel: Annotated[
        int | None,
        Setting(
            "With --ray, the number of engines that answer. [default: as many as the cluster has room for]",
            metavar="N",
        ),
    ] = None
    ray: Annotated[
        str | None,
        Setting(
            "Run the engines on the machines of a Ray cluster; auto takes the one that this machine belongs to.",
            metavar="auto|ADDRESS",
        ),
    ] = None

    def _require_cluster_settings(self) -> None:
        """Check these settings."""
        _require_count("--data-parallel", self.data_parallel)
        _require_address(self.ray)
        require(
            self.data_parallel is None or self.ray is not None,
            "--data-parallel of a sweep needs --ray; to make this machine a cluster: ray start --head",
        )


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """How the work is divided: rows, or the files of a checkpoint."""

    HEADING = "Parallel runs"

    data_parallel: Annotated[
        int | None,
        Setting(
            "Number of processes that share the work, each with GPUs of its own. [default: 1; with --ray, as many as "
            "the cluster has room for]",
            metavar="N",
        ),
    ] = None
    ray: Annotated[
        str | None,
        Setting(
            "Run these processes on the machines of a Ray cluster; auto takes the one that this machine belongs to.",
            metavar="auto|ADDRESS",
        ),
    ] = None
    part: Annotated[
        str | None,
        Setting(
            "Do only part i of N, counted from 0; slurm takes i and N from the array job, slurm/N only i.",
            metavar="i/N|slurm[/N]",
        ),
    ] = None
    join: Annotated[
        int | None,
        Setting(
            "Check that all N parts are finished and join them; with --dry-run, say which are and which are not.",
            metavar="N",
        ),
    ] = None

    def _require_one_way(self) -> None:
        """Check these settings, and refuse those that each say how a run is divided, given together."""
        processes = {"--data-parallel": self.data_parallel not in (None, 1), "--ray": self.ray is not None}
        alone = {"--part": self.part is not None, "--join": self.join is not None}
        given = [name for name, is_given in {**alone, **processes}.items() if is_given]
        maker = next((name for name in reversed(given) if name in processes), None)
        by_itself = f"{maker} makes and joins the parts itself" if maker else "join once all parts are finished"
        one_way = len(given) < 2 or not any(alone.values())
        require(one_way, f"{' and '.join(given)} cannot be combined: {by_itself}")
        _require_count("--data-parallel", self.data_parallel)
        _require_count("--join", self.join)
        _require_address(self.ray)
        if self.part is not None:
            object.__setattr__(self, "part", str(read_part(self.part, os.environ)))

    @property
    def processes(self) -> int:
        """How many processes share the work on this machine."""
        return self.data_parallel or 1

    @property
    def makes_parts(self) -> bool:
        """Whether this run makes the parts and joins them."""
        return self.processes > 1 or self.ray is not None


def _require_count(flag: str, count: int | None) -> None:
    require(count is None or 1 <= count <= MAX_PARTS, f"{flag} must be 1 to {MAX_PARTS} parts, not {count}")


def _require_address(ray: str | None) -> None:
    require_text("--ray", ray)
    require(ray is None or bool(ray.strip()), "--ray is empty; give auto, or the cluster's address")
