"""Where the engines of a sweep run, decided from sizes alone: GPUs, shares of their memory, side by side or not.

vLLM reserves most of a GPU by default, which leaves no room for a second engine; so each is given a share. Where the
models do not fit beside each other, all answers are generated first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def __str__(self) -> str:
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
    model, with the whole GPU.

    Args:
        policy: The policy.
        rewards: The reward models.
        gpus: The GPUs, as CUDA_VISIBLE_DEVICES names them.
        gpu_bytes: The memory of each.
    """
    work = [min(work, int(SMALL_SHARE * gpu_bytes)) for work in (POLICY_WORK_BYTES, REWARD_WORK_BYTES)]
    room = int(GPU_SHARE * gpu_bytes)
    apart = _apart(policy, rewards, gpus, room, work)
    if apart is not None:
        return apart
    own = gpus[: policy.tensor_parallel or (len(gpus) if policy.spreads else 1)]
    needed = [model.nbytes + work[1] for model in rewards]
    left = room - sum(needed)
    if policy.nbytes / len(own) + work[0] > left:
        places = [Place(tuple(own), policy.nbytes + work[0] * len(own))]
        return places + [Place(tuple(gpus[: _width(model)]), need, side_by_side=False)
                         for model, need in zip(rewards, needed, strict=True)]  # fmt: skip
    shared = [Place(tuple(gpus[:1]), need, _share(need, gpu_bytes)) for need in needed]
    return [Place(tuple(own), left * len(own), _share(left, gpu_bytes)), *shared]


def as_told(policy: Model, rewards: Sequence[Model], devices: Sequence[str], gpus: Sequence[str]) -> list[Place]:
    """The places where the settings name devices; engines on one GPU run one after the other.

    Args:
        policy: The policy.
        rewards: The reward models.
        devices: The `--device` of each, the policy's first.
        gpus: The GPUs, as CUDA_VISIBLE_DEVICES names them.
    """
    places: list[Place] = []
    for model, device in zip((policy, *rewards), devices, strict=True):
        kind, _, number = device.partition(":")
        own = () if kind == "cpu" else (gpus[int(number or 0)],)
        taken = {gpu for place in places for gpu in place.gpus}
        places.append(Place(own, model.nbytes + PROCESS_BYTES, side_by_side=not taken.intersection(own)))
    return places


def _apart(
    policy: Model, rewards: Sequence[Model], gpus: Sequence[str], room: int, work: Sequence[int]
) -> list[Place] | None:
    """Reward models on GPUs of their own; None where there are too few."""
    places: list[Place] = []
    free = list(gpus)
    for model in rewards:
        width = max(_width(model), -(-model.nbytes // max(room - work[1], 1)))
        if len(free) <= width:
            return None
        taken, free = free[-width:], free[:-width]
        places.append(Place(tuple(taken), model.nbytes + work[1] * width))
    width = policy.tensor_parallel or (1 << (len(free).bit_length() - 1) if policy.spreads else 1)
    if width > len(free) or policy.nbytes / width + work[0] > room:
        return None
    return [Place(tuple(free[:width]), policy.nbytes + work[0] * width), *places]


def _width(model: Model) -> int:
    return model.tensor_parallel or 1


def _share(nbytes: int, gpu_bytes: int) -> float:
    return round(nbytes / gpu_bytes, 3)
