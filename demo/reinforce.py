"""Trains the demo's SFT model on by reinforcement learning with a verifiable reward, and keeps checkpoints of the run.

The policy gradient is REINFORCE with the mean reward of a prompt's other answers as the baseline, from answers of the
current policy alone: one step a batch, no clipping, no penalty for leaving θ_0. The reward is 1 where
`task.is_correct`, else 0. To change the run, edit `RUN`.

`RUN` and the reward were chosen by the curve of the run itself, before anything was extrapolated: of a few learning
rates and one fact or two, those with which the reward climbs all the way and is far from its end after a seventh of the
steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import task
from .train import ASSISTANT, USER, Batch, Say, answer_logprobs, save

MAX_TOKENS = 48
"""Of an answer; one that is longer is cut, and has no full stop."""


@dataclass(frozen=True)
class Run:
    """A run of reinforcement learning."""

    steps: int
    prompts: int
    """Per step."""
    samples: int
    """Answers per prompt, of which the baseline is made."""
    learning_rate: float
    """Of AdamW, reached after `warm_up` steps and constant from there."""
    warm_up: int
    keep_every: int
    """Steps between checkpoints."""
    held_out: int = 216
    """Prompts on which models are measured; all there are."""


RUN = Run(steps=1000, prompts=8, samples=8, learning_rate=3e-5, warm_up=20, keep_every=25)


class Answers(NamedTuple):
    """Sampled answers, and what they were worth."""

    batch: Batch
    rewards: Tensor  # [prompts, samples] float32


def train(
    sft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, run: Run, seed: int, say: Say
) -> dict[int, Path]:
    """Trains a copy of `sft`; writes θ_0 to `folder`/step-0 and the checkpoints beside it.

    Args:
        sft: θ_0, float32.
        tokenizer: Its tokenizer.
        folder: Made where missing; the files of an earlier run are overwritten.
        run: How to train.
        seed: Fixes the prompts and the samples.
        say: Called with a line of progress now and then.

    Returns:
        Step → the folder of its checkpoint.
    """
    policy = copy.deepcopy(sft)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / run.warm_up))
    generator = torch.Generator().manual_seed(seed)
    prompts = task.prompts(run.steps * run.prompts, seed)
    kept = {0: folder / "step-0"}
    save(policy, tokenizer, kept[0])
    recent: list[float] = []
    for step in range(1, run.steps + 1):
        asked = prompts[(step - 1) * run.prompts : step * run.prompts]
        answers = sample(policy, tokenizer, asked, run.samples, generator)
        optimizer.zero_grad()
        torch.autograd.backward(policy_loss(policy, answers))
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rates.step()
        recent.append(answers.rewards.mean().item())
        if step % run.keep_every == 0 or step == run.steps:
            kept[step] = folder / f"step-{step}"
            save(policy, tokenizer, kept[step])
        if step % 100 == 0 or step == run.steps:
            say(f"rl: step {step} of {run.steps}, mean reward of the last {len(recent)} steps {_mean(recent):.3f}")
            recent.clear()
    return kept


def policy_loss(policy: LlamaForCausalLM, answers: Answers) -> Tensor:
    """The loss whose gradient is that of the mean reward, up to its sign: −mean of (advantage · log-probability)."""
    own, count = answers.rewards, answers.rewards.shape[1]
    others = (own.sum(1, keepdim=True) - own) / (count - 1)
    advantages = (own - others).flatten()  # [prompts · samples]
    return -(advantages * answer_logprobs(policy, answers.batch)).mean()


def sample(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    samples: int,
    generator: torch.Generator | None,
) -> Answers:
    """Has each prompt answered `samples` times, at temperature 1, or by the likeliest words without a `generator`."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    ids, attention, start = _encode_prompts(tokenizer, asked)
    ended = torch.zeros(len(asked), dtype=torch.bool)
    answers: list[Tensor] = []
    masks: list[Tensor] = []
    cache = None
    with torch.no_grad():
        for _ in range(MAX_TOKENS):
            new = ids if cache is None else answers[-1][:, None]
            known = torch.cat([attention, *(mask[:, None] for mask in masks)], 1) if masks else attention
            out = policy(new, attention_mask=known, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            picked = _pick(out.logits[:, -1], generator)
            masks.append((~ended).long())
            answers.append(picked.masked_fill(ended, tokenizer.pad_token_id))
            ended = ended | (picked == tokenizer.eos_token_id)
            if ended.all():
                break
    written, in_answer = torch.stack(answers, 1), torch.stack(masks, 1)  # [B, T]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    rewards = torch.tensor([float(task.is_correct(prompt, text)) for prompt, text in zip(asked, texts, strict=True)])
    before = torch.zeros(len(asked), start, dtype=torch.bool)
    batch = Batch(
        torch.cat([ids, written], 1), torch.cat([attention, in_answer], 1), torch.cat([before, in_answer.bool()], 1)
    )
    return Answers(batch, rewards.view(len(prompts), samples))


def _encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
    """The prompts through the chat template, padded on the left: ids and mask [B, T], and T."""
    texts = [f"{tokenizer.bos_token}{USER} {prompt} {ASSISTANT}" for prompt in prompts]
    rows = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"], rows["input_ids"].shape[1]


def _pick(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """The next token of each row [B] from logits [B, V]."""
    if generator is None:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
