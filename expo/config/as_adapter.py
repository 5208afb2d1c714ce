"""What `--as-adapter` cannot be combined with: settings of whole checkpoints, of which a LoRA adapter has no use."""

from __future__ import annotations

from expo.settings import flag, require

_SMALL = "writes one small file"
_TYPES = "keeps the types of the adapter's tensors"

USUAL: dict[str, tuple[tuple[object, ...], str]] = {
    "checkpoint": (((),), "takes a pair, not yet a training run's checkpoints"),
    "rule": ((None, "linear"), "scales LoRA factors, which is the rule linear alone"),
    "dtype": (("auto",), _TYPES),
    "max_shard_size": (("keep",), _SMALL),
    "stream_sft": ((False,), "reads SFT from its files"),
    "data_parallel": ((None, 1), _SMALL),
    "ray": ((None,), _SMALL),
    "part": ((None,), _SMALL),
    "join": ((None,), _SMALL),
}
"""Setting → its values that go with `--as-adapter`, and what the option does instead of the others."""


def require_alone(config: object) -> None:
    """Check that no setting of whole checkpoints is given beside `--as-adapter`.

    Raises:
        InputError: One is; the message names it.
    """
    for name, (usual, what) in USUAL.items():
        require(getattr(config, name) in usual, f"--as-adapter {what}: leave out {flag(name)}")
