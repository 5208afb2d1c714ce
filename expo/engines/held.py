"""What a live model holds: a hash of the bits of each of its tensors, made where they lie.

It sees what no answer shows: a tensor left behind whose own effect is smaller than the rounding of a GPU's kernels. It
does not see weights that an engine has packed outside of torch, as vLLM does on some CPUs; only answers tell of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn import Module, Parameter

Held: TypeAlias = dict[str, str]
"""Tensor name → its type, shape and hash, in one process."""

PACKED = "packed elsewhere"
"""In place of the hash of a parameter whose values were taken from it."""

PROMPTS_OWN = frozenset({"kv_cache"})
"""Attributes that hold what prompts left, not weights: vLLM's caches of keys and values."""

CHUNK_WORDS = 1 << 22
"""How many words of 8 bytes are mixed at once on a GPU: few enough to fit beside a model that fills it."""
SHOWN = 3
"""Names in a message."""

STEP = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shifts and factors of SplitMix64's finalizer (Steele, Lea and Flood 2014), and its step."""


def held_by(model: Module) -> Held:
    """Every tensor of a model: parameters, buffers, and what its modules derived from them and keep.

    Args:
        model: Of whatever engine. A parameter that two modules share is hashed under each of its names.
    """
    return {name: _described(tensor) for name, tensor in _tensors(model)}


def _tensors(model: Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if _is_derived(name, value)}
        for name, tensor in (module._parameters | module._buffers | own).items():
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _is_derived(name: str, value: object) -> bool:
    """Whether an attribute may be made of weights, such as MLA's absorbed projections; integers are working memory."""
    return isinstance(value, Tensor) and value.is_floating_point() and name not in PROMPTS_OWN


def _described(tensor: Tensor) -> str:
    if not tensor.numel():
        return PACKED if isinstance(tensor, Parameter) else "empty"
    if tensor.is_meta:
        return "on no device"
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} {bits_hash(tensor.detach())}"


def bits_hash(values: Tensor) -> str:
    """A hash of a tensor's bits in their order: of -0 another than of 0, and of no two arrangements of values the same.

    `torch.hash_tensor` is not one: an exclusive or, it is 0 for any even number of equal values.
    """
    flat = values.reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        return xxhash.xxh3_128_hexdigest(flat.numpy().data)
    return mixed_hash(flat)


def mixed_hash(flat: Tensor) -> str:
    """The same on a device, from which only a sum per chunk is fetched.

    Args:
        flat: Bytes, (n,) uint8.
    """
    words = torch.zeros(min(CHUNK_WORDS, -(-len(flat) // 8)), dtype=torch.int64, device=flat.device)
    places = torch.arange(len(words), device=flat.device) * _signed(STEP)
    sums = []
    for chunk in torch.split(flat, 8 * len(words)):
        words.zero_()
        words.view(torch.uint8)[: len(chunk)].copy_(chunk)
        sums.append(_mix_(words.add_(places)).sum())  # whatever the order of the sum, which wraps
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(torch.stack(sums).cpu().numpy()).data)


def _mix_(words: Tensor) -> Tensor:
    """A bijection of 64 bits, in place, after which the sum of many hangs on each bit of each."""
    for shift, factor in MIXING:
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << 64 - shift) - 1))  # torch's shift repeats the sign
        words.mul_(_signed(factor))
    return words


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def is_packed(held: Sequence[Held]) -> bool:
    """Whether some weights are not among what is known, so that only answers tell of them."""
    return any(what == PACKED for one in held for what in one.values())


def coarsest(held: Sequence[Held]) -> torch.dtype:
    """The type with the largest steps of rounding that an engine holds; float64 where it holds no numbers."""
    named = {getattr(torch, what.split(" ")[0], None) for one in held for what in one.values()}
    floats = [kind for kind in named if isinstance(kind, torch.dtype) and kind.is_floating_point]
    return max(floats, key=lambda kind: torch.finfo(kind).eps, default=torch.float64)


def differing(one: Sequence[Held], other: Sequence[Held]) -> str | None:
    """The names of the tensors that differ between two engines, the first ones spelled out; None where none does."""
    if len(one) != len(other):
        return f"{len(one)} processes instead of {len(other)}"
    names = {
        name: None
        for left, right in zip(one, other, strict=True)
        for name in (left | right)
        if left.get(name) != right.get(name)
    }
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more if names else None


class HeldExtension:
    """Mixed into vLLM's workers (`worker_extension_cls`), which each have a part of the model."""

    get_model: Any

    def expo_held(self) -> Held:
        """What this worker's part of the model holds."""
        return held_by(self.get_model())
