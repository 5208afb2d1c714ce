"""What an engine answers and holds at two α, switched and started cold, and with a part of the old α left behind.

As a program: `python switches.py ENGINE PAIR…`, for engines that need a process of their own; prints JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expo.config import GenerateConfig
from expo.engines.switching import probe_prompts
from expo.errors import EnvironmentFailure, InputError
from expo.theta.moves import kind_of
from expo.theta.tensors import Theta
from expo.verbs.generate import GenerateJob, plan

FIRST, SECOND = 0.5, 4.5
ROTARY = {"transformers": "rotary_emb.inv_freq", "vllm": "rotary_emb.cos_sin_cache"}
"""A buffer of each engine that no checkpoint has."""
NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
PROJECTION = "model.layers.1.self_attn.o_proj.weight"
WITHHELD = (NORM, EMBEDDING, PROJECTION)
DTYPES = {"llama": "float32"}
"""Of the engine, where not the weights' own: float32 weights are packed on every CPU, bfloat16 only on some."""


@functools.cache
def job(engine: str, pair: Path, alpha: float, **settings: Any) -> GenerateJob:
    """A job of one prompt that leaves the probe room for a whole block."""
    task = pair / "prompt.jsonl"
    task.write_text(json.dumps({"prompt": " ".join(["w1"] * 150)}) + "\n")
    sides = {"sft": str(pair / "sft"), "dpo": str(pair / "dpo"), "alpha": alpha}
    fixed = {"task": str(task), "output_dir": str(pair), "engine": engine, "max_tokens": 8, "device": "cpu"}
    if engine == "vllm":
        del fixed["device"]
    return plan(GenerateConfig(**{**fixed, **sides, **settings}))


@contextmanager
def made_by(tensor: Callable[[Theta, str], torch.Tensor]) -> Iterator[None]:
    """θ(α)'s tensors come from this function."""
    own, Theta.tensor = Theta.tensor, tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        Theta.tensor = own  # type: ignore[method-assign]


@contextmanager
def withheld(name: str) -> Iterator[None]:
    """θ(α) lacks this tensor."""
    own = Theta.sorted_by
    Theta.sorted_by = lambda theta, key: (pair for pair in own(theta, key) if pair[0] != name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Theta.sorted_by = own  # type: ignore[method-assign]


def observe(engine: str, pair: Path) -> dict[str, Any]:
    """Probes of one pair: cold at both α, switched there and back, each kind of tensor left at the old α, or nudged."""
    dtype = DTYPES.get(pair.name, "bfloat16")
    first, second = (job(engine, pair, alpha, dtype=dtype) for alpha in (FIRST, SECOND))
    assert first.model.tokenizer is not None
    prompts, new_tokens = probe_prompts(first.model.tokenizer.text_ids, first.setup.context_length)  # as on a CPU

    def probed() -> Any:
        answers = [dataclasses.astuple(one) for one in live.probe(prompts, new_tokens)]
        return {"answers": answers, "held": live.held()}

    def switched() -> Any:
        """The engine at the second α, whatever it is at."""
        live._weights = None
        live.load(second.setup)
        return probed()

    live: Any = second.open_engine()
    found: dict[str, Any] = {"prompts": prompts, "cold": probed()}
    live.close()
    gc.collect()
    live = first.open_engine()
    found |= {"first": probed(), "switched": switched()}
    live.load(first.setup)
    found["back"] = probed()
    whole, again = Theta.tensor, []
    with made_by(lambda theta, name: (again.append(name), whole(theta, name))[1]):
        live.load(job.__wrapped__(engine, pair, FIRST, dtype=dtype).setup)  # planned anew, as for each job of a process
    found["loaded again"] = again
    assert first.setup.theta is not None
    with Theta(first.setup.theta.pair) as theta:
        old = dict(theta)
    found["frozen"] = {}
    for kind in sorted({kind_of(name) for name in old}):
        with made_by(lambda theta, name: old[name].clone() if kind_of(name) == kind else whole(theta, name)):  # noqa: B023
            found["frozen"][kind] = switched()
    found["switched again"] = switched()
    found["nudged"] = {end: _nudged(live, end, probed) for end in ("model.norm.weight", ROTARY[engine])}
    if engine == "vllm":
        found |= _left_out(live, lambda: (live.load(first.setup), probed()), switched)
    live.close()
    return found


def _nudged(live: Any, end: str, probed: Callable[[], Any]) -> Any:
    """What is seen while the first value of a parameter or buffer, whose name ends so, is one step of rounding off."""

    def nudge(model: torch.nn.Module, by: int = 1) -> str:
        named = [*model.named_parameters(), *model.named_buffers()]
        name, tensor = next((name, tensor) for name, tensor in named if name.endswith(end))
        with torch.inference_mode():
            tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).view(-1)[0] += by
        return name

    each = live._llm.apply_model if hasattr(live, "_llm") else lambda nudge: [nudge(live._model)]
    [name] = each(nudge)
    found = {"name": name, **probed()}
    each(functools.partial(nudge, by=-1))
    return found


def _left_out(live: Any, go_back: Callable[[], Any], switched: Callable[[], Any]) -> dict[str, Any]:
    """What is seen of vLLM without the parts of a switch that are expo's own; the last may end the engine."""
    from expo.engines import vllm_loader

    found, whole = {}, Theta.tensor
    reset = live._llm.reset_prefix_cache
    go_back()
    live._llm.reset_prefix_cache = lambda **_: True
    found["cache not reset"] = switched()
    live._llm.reset_prefix_cache = reset
    buffer = torch.empty(1 << 20, dtype=torch.uint8)

    def in_one_buffer(theta: Theta, name: str) -> torch.Tensor:
        values = whole(theta, name)
        place = buffer[: values.nbytes].view(values.dtype).view(values.shape)
        return place.copy_(values)

    with made_by(in_one_buffer):
        found["one buffer for all"] = switched()
    found["lacking"] = {name: _lacking(name, go_back, switched) for name in WITHHELD}
    mends = {"head not packed": ("_packed_heads", lambda _: []), "experts not packed": ("_unpack_experts", lambda _: 0)}
    for name, (function, without) in mends.items():
        go_back()
        own = getattr(vllm_loader, function)
        setattr(vllm_loader, function, without)
        try:
            found[name] = switched()
        except EnvironmentFailure as error:
            found[name] = str(error)
        finally:
            setattr(vllm_loader, function, own)
    if live._llm is not None:
        go_back()
        try:
            with withheld(WITHHELD[0]):
                switched()
        except InputError as error:
            found["refused"] = {"reason": str(error), "closed": live._llm is None}
    return found


def _lacking(name: str, go_back: Callable[[], Any], switched: Callable[[], Any]) -> list[str]:
    """The parameters of which it is seen that a reload without this tensor gave them nothing."""
    from expo.engines import vllm_loader

    seen: list[str] = []
    own = vllm_loader._require_whole
    go_back()
    vllm_loader._require_whole = lambda model: seen.extend(vllm_loader._without_weights(model))
    try:
        with withheld(name):
            switched()
    finally:
        vllm_loader._require_whole = own
    return seen


def main() -> None:
    engine, *pairs = sys.argv[1:]
    print(json.dumps({Path(pair).name: observe(engine, Path(pair)) for pair in pairs}))


if __name__ == "__main__":
    main()
