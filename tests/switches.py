"""What an engine answers at two α, switched and started cold, and with a part of the old α left behind each time.

As a program: `python switches.py ENGINE PAIR…`, for engines that need a process of their own; prints JSON.
"""

from __future__ import annotations

import copy
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
from expo.errors import EnvironmentFailure
from expo.generate import GenerateJob, plan
from expo.theta.moves import kind_of
from expo.theta.tensors import Theta

FIRST, SECOND = 0.5, 4.5
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


def observe(engine: str, pair: Path) -> dict[str, Any]:
    """Probes of one pair: cold at both α, switched there and back, and each kind of tensor left at the old α."""
    dtype = DTYPES.get(pair.name, "bfloat16")
    first, second = (job(engine, pair, alpha, dtype=dtype) for alpha in (FIRST, SECOND))
    assert first.model.tokenizer is not None
    prompts, new_tokens = probe_prompts(first.model.tokenizer.text_ids, first.setup.context_length)

    def probed() -> Any:
        return [dataclasses.astuple(one) for one in live.probe(prompts, new_tokens)]

    def switched() -> Any:
        """The engine at the second α, whatever it is at."""
        live.load(dataclasses.replace(second.setup, theta=copy.copy(second.setup.theta)))
        return probed()

    live: Any = second.open_engine()
    found: dict[str, Any] = {"prompts": prompts, "cold": probed()}
    live.close()
    gc.collect()
    live = first.open_engine()
    found |= {"first": probed(), "switched": switched()}
    live.load(first.setup)
    found["back"] = probed()
    assert first.setup.theta is not None
    with Theta(first.setup.theta.pair) as theta:
        old = dict(theta)
    whole = Theta.tensor
    found["frozen"] = {}
    for kind in sorted({kind_of(name) for name in old}):
        with made_by(lambda theta, name: old[name].clone() if kind_of(name) == kind else whole(theta, name)):  # noqa: B023
            found["frozen"][kind] = switched()
    found["switched again"] = switched()
    if engine == "vllm":
        found |= _left_out(live, lambda: (live.load(first.setup), probed()), switched)
    live.close()
    return found


def _left_out(live: Any, go_back: Callable[[], Any], switched: Callable[[], Any]) -> dict[str, Any]:
    """What is seen of vLLM without the parts of a switch that are expo's own; the last may end the engine."""
    from expo.engines import vllm_loader

    found, whole = {}, Theta.tensor
    reset = live._llm.reset_prefix_cache
    go_back()
    live._llm.reset_prefix_cache = lambda: True
    found["cache not reset"] = switched()
    live._llm.reset_prefix_cache = reset
    buffer = torch.empty(1 << 20, dtype=torch.uint8)

    def in_one_buffer(theta: Theta, name: str) -> torch.Tensor:
        values = whole(theta, name)
        place = buffer[: values.nbytes].view(values.dtype).view(values.shape)
        return place.copy_(values)

    with made_by(in_one_buffer):
        found["one buffer for all"] = switched()
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
    return found


def main() -> None:
    engine, *pairs = sys.argv[1:]
    print(json.dumps({Path(pair).name: observe(engine, Path(pair)) for pair in pairs}))


if __name__ == "__main__":
    main()
