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


_OF_SFT = "makes an adapter to SFT, which has no place for what DPO alone has"

USUAL_RANKED: dict[str, tuple[tuple[object, ...], str]] = {
    **{name: entry for name, entry in USUAL.items() if name not in ("dtype", "rule")},
    "rule": ((None, "linear"), "approximates θ_dpo − θ_sft, which the rule linear alone scales"),
    "missing": (("error",), _OF_SFT),
    "vocab": (("error",), _OF_SFT),
    "allow_nonfinite": ((False,), "approximates numbers, and neither NaN nor infinity"),
}
"""The same with `--rank`."""


def require_alone(config: object, *, ranked: bool) -> None:
    """Check that no setting of whole checkpoints is given beside `--as-adapter`.

    Args:
        config: The settings.
        ranked: Whether `--rank` is given.

    Raises:
        InputError: One is; the message names it.
    """
    given = "--rank" if ranked else "--as-adapter"
    for name, (usual, what) in (USUAL_RANKED if ranked else USUAL).items():
        require(getattr(config, name) in usual, f"{given} {what}: leave out {flag(name)}")


def require_rank(rank: int | None, *, as_adapter: bool) -> None:
    """Check `--rank`.

    Raises:
        InputError: It is not positive, or without `--as-adapter`.
    """
    require(rank is None or rank > 0, f"--rank must be positive, not {rank}")
    require(rank is None or as_adapter, "--rank is for an adapter: give --as-adapter, too, or leave out --rank")
