"""Which way a run goes: all rows in this process, one part of them, several processes, or parts that are joined."""

from __future__ import annotations

from expo.config import GenerateConfig
from expo.generate import join, loop, workers
from expo.generate.loop import Generated


def run(config: GenerateConfig) -> Generated:
    """Generate every row that is not there yet.

    Raises:
        InputError: The settings or inputs are at fault.
        EnvironmentFailure: The engine, the disk or the network failed; the same call goes on with the rest.
    """
    if config.join is not None:
        return join.run(config)
    if config.data_parallel > 1:
        return workers.run(config)
    return loop.run(config)
