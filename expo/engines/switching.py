"""A live engine's switch to another α, proved: what is asked of it, and what counts as the same answers.

A reload can leave old state behind: packed copies of weights, tied heads, buffers, cached prompts. So an engine that
was switched to θ(α) is asked what an engine that was started with it is asked: what follows some prompts, and the hash
of each tensor that it holds (`held.py`). Hashes see what answers hide in their rounding; answers see what is no tensor.
`verdicts.py` knows what a proof is good for and keeps it, `expo.verbs.sweep.switch` makes one.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from expo.config import GenerateConfig
from expo.engines import Probed
from expo.engines.torch_tools import own_dtype, visible_gpus
from expo.errors import EnvironmentFailure
from expo.files import write_atomic

if TYPE_CHECKING:
    from expo.engines.held import Held  # imports torch

PROMPTS = 4
PROMPT_TOKENS = 144
"""More than a usual block of vLLM's prefix cache: 128 tokens on a CPU, 16 on a GPU."""
BEYOND_BLOCK = 16
"""Tokens of a prompt after a larger block."""
NEW_TOKENS = 8
"""Generated after each prompt; the log probability of each depends on every row of the head."""
BATCH = 32
"""Answers whose time is taken, where that is asked."""

BOUNDS = {"float32": 1e-3, "float16": 2.0**-7, "bfloat16": 2.0**-4}
"""Dtype → how far log probabilities may differ on a GPU, in nats: a rounding step of a logit between 8 and 16 (float32:
as multiplied in TF32). The same kernels give the same bits; which kernels are taken may be measured at each start."""


def probe_prompts(
    ids: Sequence[int], context_length: int, block_tokens: int = 0, seed: int = 0
) -> tuple[list[tuple[int, ...]], int]:
    """Prompts of random tokens, and how many to generate after each.

    Args:
        ids: What they are drawn from: all tokens of text that the model has vectors for.
        context_length: The longest prompt and answer together; where it is too short for a prompt to go on after a
            block of the prefix cache, no row does, either.
        block_tokens: Of the prefix cache; 0 where there is none.
        seed: Of the draws.
    """
    length = max(1, min(max(PROMPT_TOKENS, block_tokens + BEYOND_BLOCK), context_length - 1))
    chance = random.Random(seed)
    prompts = [tuple(chance.choices(ids, k=length)) for _ in range(PROMPTS)]
    return prompts, max(1, min(NEW_TOKENS, context_length - length))


def bound_of(config: GenerateConfig, model: Path) -> float:
    """How far log probabilities of one model in two engines may differ, in nats; 0 on a CPU, where they are equal."""
    if config.device == "cpu" or not visible_gpus():
        return 0.0
    return BOUNDS.get(own_dtype(model) if config.dtype == "auto" else config.dtype, BOUNDS["bfloat16"])


def rounding_of(config: GenerateConfig, model: Path) -> float:
    """How far log probabilities may differ where θ(α) is loaded in one engine and not in the other, in nats.

    One is rounded to the checkpoint's data type before it runs in the engine's.
    """
    stored = own_dtype(model)
    runs_in = stored if config.dtype == "auto" else config.dtype
    return max(BOUNDS.get(dtype, BOUNDS["bfloat16"]) for dtype in (stored, runs_in))


def difference(one: Sequence[Probed], other: Sequence[Probed], bound: float) -> str | None:
    """The first difference between two engines' answers to the same prompts, in words; None where there is none.

    Within a bound rounding may choose between two tokens that are as likely; what follows them is not compared.

    Args:
        one: Of one engine.
        other: Of the other.
        bound: How far log probabilities may differ, in nats; 0 asks for equal ones, and for equal tokens.
    """
    if len(one) != len(other):
        return f"{len(one)} answers instead of {len(other)}"
    for number, (left, right) in enumerate(zip(one, other, strict=True), 1):
        if len(left.token_ids) != len(right.token_ids):
            return f"{len(left.token_ids)} tokens after prompt {number} instead of {len(right.token_ids)}"
        pairs = zip(left.token_ids, right.token_ids, left.log_probs, right.log_probs, strict=True)
        for place, (token, other_token, log_prob, other_log_prob) in enumerate(pairs, 1):
            apart = 0.0 if log_prob == other_log_prob else abs(log_prob - other_log_prob)
            if token != other_token:
                if bound and apart <= bound:
                    break
                return f"token {place} after prompt {number} is {token} instead of {other_token}"
            if not apart <= bound:
                return f"the log probability of token {place} after prompt {number} differs by {apart:.2g}"
    return None


def is_finite(answers: Sequence[Probed]) -> bool:
    """Whether every token has a probability; a θ(α) far from both models may overflow."""
    return all(math.isfinite(log_prob) for answer in answers for log_prob in answer.log_probs)


@dataclass(frozen=True)
class Reply:
    """What a process that was asked has to say of its engine."""

    answers: list[Probed]
    held: list[Held]
    """What each of the engine's processes holds; empty where it cannot be told."""
    pid: int
    """The process that replies."""
    opened: bool
    """Whether the engine was started for this job; else it was there, and was given other weights."""
    fills_block: bool
    """Whether prompts went on after a block of the prefix cache, or there is none."""
    ready_seconds: float
    """From the job until the engine had the job's weights."""
    probe_seconds: float
    batch_seconds: float | None = None
    """What a batch of `BATCH` answers took; None where that was not asked."""

    def write(self, file: Path) -> None:
        """Hand it to the process that asked.

        Raises:
            EnvironmentFailure: Writing failed.
        """
        write_atomic(file, json.dumps(asdict(self)), fsync=False)

    @classmethod
    def read(cls, file: Path) -> Self:
        """What `write` wrote.

        Raises:
            EnvironmentFailure: There is nothing.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise EnvironmentFailure(f"an engine left no answers: {error}") from error
        answers = [Probed(tuple(one["token_ids"]), tuple(one["log_probs"])) for one in content.pop("answers")]
        return cls(answers=answers, **content)
