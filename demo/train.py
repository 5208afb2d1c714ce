"""Trains the demo trio from scratch: an SFT model, the DPO model grown from it, a reward model.

`train_trio` writes ordinary Hugging Face checkpoints (bfloat16 safetensors, a tokenizer with a chat
template) and held-out prompts. The models are tiny Llamas for the task in `task.py`; the losses
are the real ones: cross-entropy on the answer, the Bradley–Terry loss, and the DPO loss against
the frozen SFT model. DPO stops early on purpose, as it did for the partly trained models of Zheng
et al. (ACL 2025), so that extrapolation has room.

What an answer is worth is no business of this module: see `task.py`. To change the models, edit
`LLAMA`; to change a run, edit its `Schedule`.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from . import task

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SYSTEM, USER, ASSISTANT = "<system>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
}
DPO_BETA = 0.1
HELD_OUT_PROMPTS = 128

Say = Callable[[str], None]
"""Takes one line of progress."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """One training run."""

    name: str
    steps: int
    batch_size: int
    """Answers a step, or pairs of answers."""
    learning_rate: float
    """The peak, reached after a tenth of the steps; the rate then falls to a tenth of it."""

    @property
    def examples(self) -> int:
        """How many answers, or pairs, the run sees."""
        return self.steps * self.batch_size

    def rate(self, step: int) -> float:
        """Returns the learning rate at `step` (from 0) as a share of the peak."""
        warm_up = max(1, self.steps // 10)
        fallen = (step - warm_up) / (self.steps - warm_up)
        return min((step + 1) / warm_up, 1 - 0.9 * fallen)


SFT = Schedule("sft", steps=160, batch_size=40, learning_rate=4e-3)
REWARD = Schedule("rm", steps=150, batch_size=20, learning_rate=3e-3)
DPO = Schedule("dpo", steps=40, batch_size=48, learning_rate=8e-5)


class Example(NamedTuple):
    """One conversation as token ids; the answer and its EOS begin at `answer_start`."""

    ids: list[int]
    answer_start: int


class Batch(NamedTuple):
    """Conversations padded on the right to the longest."""

    ids: Tensor  # [B, T] int64
    attention: Tensor  # [B, T] int64, 0 on padding
    in_answer: Tensor  # [B, T] bool, True on the answer and its EOS


def train_trio(folder: Path, seed: int = 0, say: Say | None = None) -> None:
    """Trains the three models; writes `sft`, `dpo`, `rm` and `prompts.jsonl` into `folder`.

    Takes well under a minute on two CPU cores. One seed gives the same weights again on the same
    machine.

    Args:
        folder: Made where missing; the files of an earlier run are overwritten.
        seed: Fixes the data and the initial weights.
        say: Called with a line of progress now and then.
    """
    say = say or _say_nothing
    tokenizer = build_tokenizer()
    sft = train_sft(tokenizer, seed, say)
    reward = train_reward(sft, tokenizer, seed, say)
    dpo = train_dpo(sft, tokenizer, seed, say)
    for name, model in {"sft": sft, "dpo": dpo, "rm": reward}.items():
        save(model.bfloat16(), tokenizer, folder / name)
    write_prompts(folder / "prompts.jsonl", seed)
    say(f"wrote sft, dpo, rm and prompts.jsonl to {folder}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words; its chat template puts one BOS first."""
    tokens = (PAD, BOS, EOS, UNKNOWN, SYSTEM, USER, ASSISTANT, *task.vocabulary())
    ids = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # untyped upstream
    return wrap(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LLAMA["max_position_embeddings"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the configuration that all three models share."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig.from_dict({**LLAMA, **special, "vocab_size": len(tokenizer)})


def train_sft(tokenizer: PreTrainedTokenizerFast, seed: int, say: Say) -> LlamaForCausalLM:
    """Trains a language model on ordinary answers, by cross-entropy on the answer alone."""
    rng = random.Random(f"sft {seed}")
    prompts = task.prompts(SFT.examples, seed)
    turns = [(prompt, task.write_answer(prompt, rng)) for prompt in prompts]
    model = _initialised(LlamaForCausalLM, llama_config(tokenizer), seed)

    def loss(batch: Batch) -> Tensor:
        return -answer_logprobs(model, batch).sum() / batch.in_answer.sum()

    return fit(model, map(loss, _answer_batches(tokenizer, turns, SFT.batch_size)), SFT, say)


def train_reward(
    sft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, say: Say
) -> LlamaForSequenceClassification:
    """Trains a reward model, grown from the body of `sft`, by the Bradley–Terry loss.

    It sees careful and broken answers beside ordinary ones, so that it can judge what models
    write when they are pushed beyond their training.
    """
    config = llama_config(tokenizer)
    config.num_labels = 1
    model = _initialised(LlamaForSequenceClassification, config, seed)
    model.model.load_state_dict(sft.model.state_dict())
    writers = (task.ORDINARY, task.CAREFUL, task.RAMBLING, task.MUMBLING)
    pairs = task.pairs(REWARD.examples, seed, writers)

    def loss(batch: Batch) -> Tensor:
        rewards = model(batch.ids, attention_mask=batch.attention).logits[:, 0]  # [2B]
        chosen, rejected = rewards.chunk(2)
        return -functional.logsigmoid(chosen - rejected).mean()

    return fit(model, map(loss, _pair_batches(tokenizer, pairs, REWARD.batch_size)), REWARD, say)


def train_dpo(sft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, say: Say) -> LlamaForCausalLM:
    """Trains a copy of `sft` by DPO, with `sft` as the reference, and stops early."""
    model = copy.deepcopy(sft)
    pairs = task.pairs(DPO.examples, seed + 1)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            reference = answer_logprobs(sft, batch)
        chosen, rejected = (answer_logprobs(model, batch) - reference).chunk(2)
        return -functional.logsigmoid(DPO_BETA * (chosen - rejected)).mean()

    return fit(model, map(loss, _pair_batches(tokenizer, pairs, DPO.batch_size)), DPO, say)


def fit(model: Model, losses: Iterator[Tensor], schedule: Schedule, say: Say) -> Model:
    """Takes one AdamW step on each loss.

    `losses` must be lazy: each is computed when it is asked for, with the weights of that moment.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate)
    model.train()
    for step, loss in enumerate(losses, start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 50 == 0 or step == schedule.steps:
            say(f"{schedule.name}: step {step} of {schedule.steps}, loss {loss.item():.3f}")
    return model.eval()


def answer_logprobs(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Returns the log-probability of each answer, its EOS included: [B] float32."""
    logits = model(batch.ids, attention_mask=batch.attention).logits  # [B, T, V]
    logprobs = logits[:, :-1].log_softmax(-1)
    taken: Tensor = logprobs.gather(-1, batch.ids[:, 1:, None])[:, :, 0]  # [B, T-1]
    return (taken * batch.in_answer[:, 1:]).sum(-1)


def encode(tokenizer: PreTrainedTokenizerFast, turns: Sequence[tuple[str, str]]) -> list[Example]:
    """Puts (prompt, answer) turns through the chat template."""
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    conversations = [_conversation(prompt, answer) for prompt, answer in turns]
    rows: Any = tokenizer.apply_chat_template(conversations, return_dict=False)
    return [Example(ids, ids.index(assistant) + 1) for ids in rows]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pads `examples` on the right into one batch."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids = torch.full(shape, pad_id)
    attention = torch.zeros(shape, dtype=torch.int64)
    in_answer = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        attention[row, :length] = 1
        in_answer[row, example.answer_start : length] = True
    return Batch(ids, attention, in_answer)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `model` and its tokenizer as one checkpoint."""
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, seed: int) -> None:
    """Writes held-out prompts to `path`, one JSON object `{"prompt": …}` a line."""
    prompts = task.prompts(HELD_OUT_PROMPTS, seed, held_out=True)
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Trains the trio into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Train the demo trio: sft, dpo and rm.")
    parser.add_argument("folder", type=Path, help="where the checkpoints go")
    parser.add_argument("--seed", type=int, default=0, help="fixes data and weights (default: 0)")
    arguments = parser.parse_args()
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:5.1f} s  {line}", file=sys.stderr)

    train_trio(arguments.folder, arguments.seed, say)


def _say_nothing(line: str) -> None:
    """Drops a line of progress."""


def _initialised(kind: Callable[[LlamaConfig], Model], config: LlamaConfig, seed: int) -> Model:
    """Makes a model under a seeded generator and leaves the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def _answer_batches(tokenizer: PreTrainedTokenizerFast, turns: Sequence[tuple[str, str]], size: int) -> Iterator[Batch]:
    """Yields batches of `size` answers, in order."""
    examples = encode(tokenizer, turns)
    for start in range(0, len(turns), size):
        yield collate(examples[start : start + size], tokenizer.pad_token_id)


def _pair_batches(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[task.Pair], size: int) -> Iterator[Batch]:
    """Yields batches of `size` pairs: the chosen answers, then the rejected ones, [2·size, T]."""
    chosen = encode(tokenizer, [(pair.prompt, pair.chosen) for pair in pairs])
    rejected = encode(tokenizer, [(pair.prompt, pair.rejected) for pair in pairs])
    for start in range(0, len(pairs), size):
        rows = slice(start, start + size)
        yield collate(chosen[rows] + rejected[rows], tokenizer.pad_token_id)


def _conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    """Returns one turn as chat messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silences transformers' progress bars, and restores what was set before."""
    switch: dict[bool, Callable[[], None]] = {
        True: logging.enable_progress_bar,
        False: logging.disable_progress_bar,
    }
    were_on = logging.is_progress_bar_enabled()
    switch[False]()
    try:
        yield
    finally:
        switch[were_on]()


if __name__ == "__main__":
    main()
