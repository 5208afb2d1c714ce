"""A live engine's switch to another α, proved: what is asked of it, and what counts as the same answers.

A reload can leave old state behind: packed copies of weights, tied heads, buffers, cached prompts. So an engine that
was switched to θ(α) is asked what an engine that was started with it is asked. `verdicts.py` knows what a proof is good
for and keeps it, `expo.sweep.switch` makes one.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from expo.config import GenerateConfig
from expo.engines import Probed
from expo.engines.torch_tools import own_dtype, visible_gpus
from expo.errors import EnvironmentFailure
from expo.files import write_atomic

PROMPTS = 4
PROMPT_TOKENS = 144
"""More than a block of vLLM's prefix cache: 128 tokens on a CPU, 16 on a GPU."""
NEW_TOKENS = 8
"""Generated after each prompt; the log probability of each depends on every row of the head."""

BOUNDS = {"float32": 1e-3, "float16": 2.0**-7, "bfloat16": 2.0**-4}
"""Dtype → how far log probabilities may differ on a GPU, in nats: a rounding step of a logit between 8 and 16 (float32:
as multiplied in TF32). The same kernels give the same bits; which kernels are taken may be measured at each start."""


def probe_prompts(ids: Sequence[int], context_length: int, seed: int = 0) -> tuple[list[tuple[int, ...]], int]:
    """Prompts of random tokens, and how many to generate after each.

    Args:
        ids: What they are drawn from: all tokens of text that the model has vectors for.
        context_length: The longest prompt and answer together; below 130 tokens no prompt, nor any row, fills a block
            of a CPU's prefix cache and goes on.
        seed: Of the draws.
    """
    length = max(1, min(PROMPT_TOKENS, context_length - 1))
    chance = random.Random(seed)
    prompts = [tuple(chance.choices(ids, k=length)) for _ in range(PROMPTS)]
    return prompts, max(1, min(NEW_TOKENS, context_length - length))


def bound_of(config: GenerateConfig, model: Path) -> float:
    """How far log probabilities of one model in two engines may differ, in nats; 0 on a CPU, where they are equal."""
    if config.device == "cpu" or not visible_gpus():
        return 0.0
    dtype = own_dtype(model) if config.dtype == "auto" else config.dtype
    return BOUNDS.get(dtype, BOUNDS["bfloat16"])


def difference(one: Sequence[Probed], other: Sequence[Probed], bound: float) -> str | None:
    """The first difference between two engines' answers to the same prompts, in words; None where there is none.

    Args:
        one: Of one engine.
        other: Of the other.
        bound: How far log probabilities may differ, in nats; 0 asks for equal ones.
    """
    if len(one) != len(other):
        return f"{len(one)} answers against {len(other)}"
    for number, (left, right) in enumerate(zip(one, other, strict=True), 1):
        if len(left.token_ids) != len(right.token_ids):
            return f"{len(left.token_ids)} tokens after prompt {number} against {len(right.token_ids)}"
        pairs = zip(left.token_ids, right.token_ids, left.log_probs, right.log_probs, strict=True)
        for place, (token, other_token, log_prob, other_log_prob) in enumerate(pairs, 1):
            if token != other_token:
                return f"token {place} after prompt {number} is {token} against {other_token}"
            if not (log_prob == other_log_prob or abs(log_prob - other_log_prob) <= bound):
                apart = abs(log_prob - other_log_prob)
                return f"the log probability of token {place} after prompt {number} differs by {apart:.2g}"
    return None


def is_finite(answers: Sequence[Probed]) -> bool:
    """Whether every token has a probability; a θ(α) far from both models may overflow."""
    return all(math.isfinite(log_prob) for answer in answers for log_prob in answer.log_probs)


def write_answers(file: Path, answers: Sequence[Probed], **seconds: float) -> None:
    """Hand answers to the process that asked for them, with what they took.

    Raises:
        EnvironmentFailure: Writing failed.
    """
    rows = [{"token_ids": answer.token_ids, "log_probs": answer.log_probs} for answer in answers]
    write_atomic(file, json.dumps({"answers": rows, "seconds": seconds}), fsync=False)


def read_answers(file: Path) -> tuple[list[Probed], dict[str, float]]:
    """What `write_answers` wrote.

    Raises:
        EnvironmentFailure: There is nothing.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentFailure(f"an engine left no answers: {error}") from error
    rows = content["answers"]
    return [Probed(tuple(row["token_ids"]), tuple(row["log_probs"])) for row in rows], content["seconds"]
