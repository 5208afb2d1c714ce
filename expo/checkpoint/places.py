"""Where in a model a tensor belongs, from the structure of its name: its layer and its module.

No table of models: the first number in a name is the layer, further numbers (experts and the like) are pooled, and
the weight and the bias of a module belong together.

    model.layers.12.self_attn.q_proj.weight        → layer 12, self_attn.q_proj
    model.layers.0.mlp.experts.7.w1.weight         → layer 0, mlp.experts.*.w1
    model.embed_tokens.weight                      → no layer, embed_tokens
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

PARAMETERS = ("weight", "bias")
"""What torch calls the parameters of its own modules."""
NUMBER = re.compile(r"[0-9]{1,6}")


class Place(NamedTuple):
    """Where a tensor belongs."""

    layer: int | None
    """None outside the layers, as for embeddings and heads."""
    module: str


class _Path(NamedTuple):
    """A tensor's name, taken apart."""

    stack: str
    """What comes before the layer's number, such as `model.layers`; without a number the whole path."""
    layer: int | None
    rest: str
    """What comes after it."""


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of every tensor of a model.

    Modules of the largest stack of layers are named within it; those of further stacks, such as a vision tower's,
    keep the stack's name: `visual.blocks.*.attn.qkv`.
    """
    paths = {name: _take_apart(name) for name in names}
    main = _largest(paths.values())
    return {name: Place(path.layer, _module(path, main)) for name, path in paths.items()}


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """The tensors in the largest stack of layers, and the layer of each."""
    paths = {name: _take_apart(name) for name in names}
    main = _largest(paths.values())
    return {name: path.layer for name, path in paths.items() if path.layer is not None and path.stack == main}


def _largest(paths: Iterable[_Path]) -> str:
    """The stack that has the most tensors."""
    sizes = Counter(path.stack for path in paths if path.layer is not None)
    return max(sorted(sizes), key=sizes.__getitem__, default="")


def _take_apart(name: str) -> _Path:
    words = name.split(".")
    if len(words) > 1 and words[-1] in PARAMETERS:
        words.pop()
    at = next((at for at, word in enumerate(words) if NUMBER.fullmatch(word)), None)
    if at is None:
        return _Path(".".join(words), None, "")
    rest = ["*" if NUMBER.fullmatch(word) else word for word in words[at + 1 :]]
    return _Path(".".join(words[:at]), int(words[at]), ".".join(rest))


def _module(path: _Path, main: str) -> str:
    if path.layer is not None and path.stack == main and path.rest:
        return path.rest
    outer = main.rpartition(".")[0]
    stack = path.stack.removeprefix(f"{outer}.") if outer else path.stack
    if path.layer is None:
        return stack
    return ".".join(word for word in (stack, "*", path.rest) if word)
