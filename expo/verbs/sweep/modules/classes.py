"""Which tensors have an α together, by their names: attention and MLP in thirds of the depth, embeddings, norms, rest.

Every tensor is in one class, and each class has a pattern for `--alpha-for` that matches its tensors and no others.
To know another name of a module, add it to `ATTENTION` or `MLP`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from expo.checkpoint.places import NUMBER, PARAMETERS, layers_of
from expo.checkpoint.tied import has_row_per_token
from expo.verbs.sweep.vector import NORMS

ATTENTION = re.compile(r"attn|attention")
MLP = re.compile(r"mlp|ffn|feed_forward|moe|experts|^fc[0-9]$")
NORM = re.compile(r"norm|^ln(?:_|[0-9]|$)")
THIRDS = ("first", "middle", "last")
EMBEDDINGS, REST = "embeddings", "rest"

GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": tuple(f"attention.{third}" for third in THIRDS),
    "mlp": tuple(f"mlp.{third}" for third in THIRDS),
    EMBEDDINGS: (EMBEDDINGS,),
    **{third: (f"attention.{third}", f"mlp.{third}") for third in THIRDS},
}
"""What the search visits, in this order: group → classes."""


def classes(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Class → its tensors, of those names; without empty ones.

    Args:
        names: The tensors that move with α. Thirds are of the layers that they are in.
    """
    given = list(names)
    layers = layers_of(given)
    depth = sorted(set(layers.values()))
    third = {layer: THIRDS[int((place + 0.5) * 3 / len(depth))] for place, layer in enumerate(depth)}
    found: dict[str, list[str]] = {}
    for name in given:
        kind = _kind(name, in_layer=name in layers)
        label = f"{kind}.{third[layers[name]]}" if kind in ("attention", "mlp") else kind
        found.setdefault(label, []).append(name)
    return {label: tuple(found[label]) for label in sorted(found)}


def groups(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group → those of its classes that there are, for groups that differ."""
    there, found = set(labels), dict[str, tuple[str, ...]]()
    for group, wanted in GROUPS.items():
        own = tuple(label for label in wanted if label in there)
        if own and own not in found.values():
            found[group] = own
    return found


def _kind(name: str, *, in_layer: bool) -> str:
    words = name.split(".")
    words = words[:-1] if len(words) > 1 and words[-1] in PARAMETERS else words
    if NORM.search(words[-1]):
        return NORMS
    if in_layer:
        for word in words:
            for kind, pattern in (("attention", ATTENTION), ("mlp", MLP)):
                if pattern.search(word):
                    return kind
    return EMBEDDINGS if has_row_per_token(name) else REST


# --- patterns ---------------------------------------------------------------------------------------------------------


def patterns(divided: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Class → a pattern that matches the names of its tensors, and of no other class.

    Args:
        divided: As `classes` has it.
    """
    every = [name for names in divided.values() for name in names]
    return {label: next(_exact(label, names, every)) for label, names in divided.items()}


def _exact(label: str, own: Sequence[str], every: Sequence[str]) -> Iterator[str]:
    """The patterns that select exactly these names, the shortest kind first."""
    wanted = set(own)
    for pattern in _candidates(label, own, every):
        search = re.compile(pattern).search
        if {name for name in every if search(name)} == wanted:
            yield pattern


def _candidates(label: str, own: Sequence[str], every: Sequence[str]) -> Iterator[str]:
    if label == NORMS:
        yield "norm"
    layers = layers_of(every)
    if all(name in layers for name in own):
        numbers = "|".join(map(str, sorted({layers[name] for name in own})))
        stack, _, _ = _cut(own[0])
        after = [_cut(name)[2] for name in own]
        heads = "|".join(sorted({re.escape(rest.split(".")[0]) for rest in after}))
        yield rf"^{re.escape(stack)}(?:{numbers})\.(?:{heads})\."
        rests = "|".join(sorted({_numbered(rest) for rest in after}))
        yield rf"^{re.escape(stack)}(?:{numbers})\.(?:{rests})$"
    kinds = "|".join(sorted({_numbered(name) for name in own}))
    yield f"^(?:{kinds})$"
    yield f"^(?:{'|'.join(map(re.escape, own))})$"


def _cut(name: str) -> tuple[str, str, str]:
    """What is before the layer's number, with its dot, the number, and what is behind it."""
    words = name.split(".")
    at = next(at for at, word in enumerate(words) if NUMBER.fullmatch(word))
    return "".join(f"{word}." for word in words[:at]), words[at], ".".join(words[at + 1 :])


def _numbered(name: str) -> str:
    """A pattern for a name with any number in the place of each."""
    return r"\.".join("[0-9]+" if NUMBER.fullmatch(word) else re.escape(word) for word in name.split("."))
