"""What a process that runs verbs has in its environment."""

from __future__ import annotations

import os

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin make an engine on a CPU ten times slower
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""What torch and the hub's library read while they are loaded; existing values are kept."""


def set_environment(**further: str) -> None:
    """Set these variables, and `ENVIRONMENT`, where they are not set; before torch is loaded, if they are to count."""
    for name, value in {**ENVIRONMENT, **further}.items():
        os.environ.setdefault(name, value)
