"""Where the engines of a sweep run, decided from sizes alone: GPUs, shares of their memory, side by side or not.

vLLM reserves most of a GPU by default, which leaves no room for a second engine; so each is given a share. Where the
models do not fit beside each other, all answers are generated first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expo.errors import InputError

GPU_SHARE = 0.9
"""Of a GPU's memory, what all engines on it may take together."""
REWARD_WORK_BYTES = 4 << 30
"""What a reward model needs beside its weights: activations of a batch, or a cache of some rows, and CUDA's own."""
POLICY_WORK_BYTES = 8 << 30
"""What a policy needs beside its weights at least: a cache that many rows fit into, and CUDA's own."""
SMALL_SHARE = 0.25
"""Of a GPU, what these two are at most, so that small models fit beside each other on small GPUs, too."""
PROCESS_BYTES = 2 << 30
"""What the process of an engine takes on a CPU beside the model: libraries, and a cache."""
HOST_SHARE = 0.8
"""Of the memory that is free, what engines on a CPU may take together."""


@dataclass(frozen=True)
class Place:
    """Where one engine runs."""

    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; none for a CPU."""
    nbytes: int
    """What it takes of memory, as far as the plan knows."""
    gpu_share: float | None = None
    """Its share of each GPU's memory, for an engine that reserves it; None: it may have its default."""
    side_by_side: bool = True
    """Whether it runs beside the policy; otherwise it is started when all answers are there."""
    on_cluster: bool = False
    """Whether the cluster finds it a machine when it starts."""

    def __str__(self) -> str:
        if self.on_cluster:
            return "the Ray cluster"
        where = "CPU" if not self.gpus else f"GPU {','.join(self.gpus)}"
        share = "" if self.gpu_share is None else f" ({self.gpu_share:.0%} of its memory)"
        return f"{where}{share}{'' if self.side_by_side else ', after the policy'}"


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded."""

    nbytes: int
    """Its weights, in the data type it runs in."""
    spreads: bool
    """Whether its engine can be spread over several GPUs, and reserves its memory."""
    tensor_parallel: int | None = None
    """The number of GPUs that the user gives it."""


def on_cpu(policy: Model, rewards: Sequence[Model], free_bytes: int) -> list[Place]:
    """The places of the policy and of each reward model on a CPU.

    Args:
        policy: The policy.
        rewards: The reward models.
        free_bytes: The memory that is free.
    """
    sizes = [model.nbytes + PROCESS_BYTES for model in (policy, *rewards)]
    fit = sum(sizes) <= HOST_SHARE * free_bytes
    return [Place((), size, side_by_side=fit or number == 0) for number, size in enumerate(sizes)]


def on_gpus(policy: Model, rewards: Sequence[Model], gpus: Sequence[str], gpu_bytes: int) -> list[Place]:
    """The places of the policy and of each reward model on GPUs of one kind.

    With several GPUs the reward models have the last ones to themselves where the policy fits on the others. On shared
    GPUs each engine has a share of the memory; where shares are too small, the policy runs first, then each reward
    model, with whole GPUs. vLLM spreads a model over 1, 2, 4, … GPUs, or over as many as the user says.

    Args:
        policy: The policy.
        rewards: The reward models.
        gpus: The GPUs, as CUDA_VISIBLE_DEVICES names them.
        gpu_bytes: The memory of each.

    Raises:
        InputError: The user gives an engine more GPUs than there are.
    """
    for flag, model in (("--tensor-parallel", policy), *(("--reward-tensor-parallel", model) for model in rewards)):
        _require_enough(flag, model, gpus)
    work = [min(work, int(SMALL_SHARE * gpu_bytes)) for work in (POLICY_WORK_BYTES, REWARD_WORK_BYTES)]
    room = int(GPU_SHARE * gpu_bytes)
    return (
        _apart(policy, rewards, gpus, room, work)
        or _shared(policy, rewards, gpus, gpu_bytes, work)
        or _in_turn(policy, rewards, gpus, room, work)
    )


def as_told(
    policy: Model, rewards: Sequence[Model], devices: Sequence[str], gpus: Sequence[str], gpu_bytes: int
) -> list[Place]:
    """The places where the settings name devices; engines on one GPU run one after the other.

    Args:
        policy: The policy.
        rewards: The reward models.
        devices: The `--device` of each, the policy's first. One that names no GPU has those that no other names.
        gpus: The GPUs, as CUDA_VISIBLE_DEVICES names them.
        gpu_bytes: The memory of each.

    Raises:
        InputError: There is no such GPU, or the user gives an engine more than there are.
    """
    flags = ["", *("reward-" for _ in rewards)]
    named = [_named(device, gpus, flag) for device, flag in zip(devices, flags, strict=True)]
    others = [gpu for gpu in gpus if gpu not in named] or list(gpus)
    places: list[Place] = []
    for model, device, gpu, flag in zip((policy, *rewards), devices, named, flags, strict=True):
        own: Sequence[str] = () if device == "cpu" else [gpu] if gpu is not None else others
        if own:
            _require_enough(f"--{flag}tensor-parallel", model, own)
            room = int(GPU_SHARE * gpu_bytes) - REWARD_WORK_BYTES
            own = own[: _width(model, room, len(own)) if flag else _most(model, len(own))]
        taken = {gpu for place in places for gpu in place.gpus}
        places.append(Place(tuple(own), model.nbytes + PROCESS_BYTES, side_by_side=not taken.intersection(own)))
    return places


def _named(device: str, gpus: Sequence[str], flag: str) -> str | None:
    """The GPU that a device names; None where it names none."""
    _, _, number = device.partition(":")
    if number and int(number) >= len(gpus):
        there = f"there is only cuda:0, {gpus[0]}" if len(gpus) == 1 else f"there are cuda:0 to cuda:{len(gpus) - 1}"
        raise InputError(f"--{flag}device {device}: {there}")
    return gpus[int(number)] if number else None


def _require_enough(flag: str, model: Model, gpus: Sequence[str]) -> None:
    """Refuse a number of GPUs that are not there."""
    if (model.tensor_parallel or 1) > len(gpus):
        there = "1 is" if len(gpus) == 1 else f"{len(gpus)} are"
        raise InputError(f"{flag} {model.tensor_parallel} needs {model.tensor_parallel} GPUs, and {there} available")


def _apart(
    policy: Model, rewards: Sequence[Model], gpus: Sequence[str], room: int, work: Sequence[int]
) -> list[Place] | None:
    """Reward models on GPUs of their own; None where there are too few."""
    places: list[Place] = []
    free = list(gpus)
    for model in rewards:
        width = _width(model, room - work[1], len(gpus))
        if len(free) <= width or not _fits(model, width, room - work[1]):
            return None
        taken, free = free[-width:], free[:-width]
        places.append(Place(tuple(taken), model.nbytes + work[1] * width))
    width = _most(policy, len(free))
    if width > len(free) or not _fits(policy, width, room - work[0]):
        return None
    return [Place(tuple(free[:width]), policy.nbytes + work[0] * width), *places]


def _shared(
    policy: Model, rewards: Sequence[Model], gpus: Sequence[str], gpu_bytes: int, work: Sequence[int]
) -> list[Place] | None:
    """All side by side, each with a share of its GPUs; None where shares are too small.

    The reward models are on the first GPUs, and the policy on all it can have.
    """
    own = gpus[: _most(policy, len(gpus))]
    widths = [model.tensor_parallel or 1 for model in rewards]
    needed = [model.nbytes // width + work[1] for model, width in zip(rewards, widths, strict=True)]
    left = int(GPU_SHARE * gpu_bytes) - sum(needed)
    if not _fits(policy, len(own), left - work[0]):
        return None
    shared = [
        Place(tuple(gpus[:width]), need * width, _share(need, gpu_bytes))
        for width, need in zip(widths, needed, strict=True)
    ]
    return [Place(tuple(own), left * len(own), _share(left, gpu_bytes)), *shared]


def _in_turn(
    policy: Model, rewards: Sequence[Model], gpus: Sequence[str], room: int, work: Sequence[int]
) -> list[Place]:
    """The policy first, then each reward model."""
    own = gpus[: _most(policy, len(gpus))]
    places = [Place(tuple(own), policy.nbytes + work[0] * len(own))]
    for model in rewards:
        width = _width(model, room - work[1], len(gpus))
        places.append(Place(tuple(gpus[:width]), model.nbytes + work[1] * width, side_by_side=False))
    return places


def _width(model: Model, room: int, most: int) -> int:
    """How many GPUs a model needs: what the user says, else the fewest that hold it, else all that can be used."""
    if model.tensor_parallel or not model.spreads:
        return model.tensor_parallel or 1
    width = 1
    while 2 * width <= most and not _fits(model, width, room):
        width *= 2
    return width


def _fits(model: Model, width: int, room: int) -> bool:
    """Whether its weights fit on so many GPUs, each with this room for them."""
    return model.nbytes / width <= room


def _most(model: Model, count: int) -> int:
    """How many of some GPUs a model can be spread over: what the user says, else the largest power of two."""
    return model.tensor_parallel or (1 << (count.bit_length() - 1) if model.spreads else 1)


def _share(nbytes: int, gpu_bytes: int) -> float:
    return round(nbytes / gpu_bytes, 3)
