"""Reward models with transformers: the raw logit, as the model gives it for the row without padding.

The body runs in the run's data type and the head in float32. Rows are padded to batches, longest first; a batch that
does not fit into memory is cut in halves.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from expo.engines import ScorerSetup
from expo.engines.batches import tight_batches
from expo.engines.coverage import is_token
from expo.engines.reward_classes import READ_PADDING, attends_forwards, class_of_last, moves_positions, padding_table
from expo.engines.reward_loading import load_reward_model
from expo.engines.torch_tools import find_device, is_out_of_memory, out_of_memory_hint
from expo.errors import InputError

CPU_BATCH_TOKENS = 2048
"""On a CPU larger batches are slower: what a layer makes of them no longer stays in the caches."""

log = logging.getLogger(__name__)


class TransformersScorer:
    """See `expo.engines.Scorer`.

    Args:
        setup: What to start.

    Raises:
        InputError: The model cannot be loaded, or its weights are not all there.
        EnvironmentFailure: There is not enough memory.
    """

    def __init__(self, setup: ScorerSetup) -> None:
        self._device = find_device(setup.config.device, prefer_gpu=True)
        self._name = setup.model.name
        loaded = load_reward_model(setup, self._device)
        self._model: Any = loaded.model
        reads_last = not loaded.own_code and class_of_last(type(self._model).__name__)
        self._head = _Float32Head(self._model, reads_last=reads_last, is_known=not loaded.own_code)
        self._pad_id = _padding_id(self._model, reads_last=reads_last)
        # What lies to the right of a row is not seen by one that attends backwards: it needs no mask.
        self._masks = not reads_last or attends_forwards(self._model.config)
        self._alone = loaded.own_code or _must_be_alone(self._model.config)
        self._budget = setup.config.batch_tokens
        self._ahead = 0
        if self._device.type == "cpu":
            self._budget = min(self._budget, CPU_BATCH_TOKENS)
        else:
            self._ahead = 1  # the next batch is on its way while the device works on this one

    def score(self, rows: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, float]]]:
        """Yield rewards batch by batch, longest rows first; padding does not affect them."""
        lengths = [len(row) for row in rows]
        todo = deque(self._batches(lengths, range(len(rows))))
        under_way: deque[tuple[list[int], Tensor]] = deque()
        while todo or under_way:
            if todo and (logits := self._try(rows, todo[0])) is not None:
                under_way.append((todo.popleft(), logits))
            elif todo:
                self._budget = max(1, len(todo[0]) * lengths[todo[0][0]] // 2)
                log.warning("out of memory: continuing with batches of at most %d tokens", self._budget)
                todo = deque(self._batches(lengths, sorted(number for batch in todo for number in batch)))
            while len(under_way) > (self._ahead if todo else 0):
                numbers, logits = under_way.popleft()
                yield list(zip(numbers, logits[:, 0].float().tolist(), strict=True))

    def _batches(self, lengths: Sequence[int], numbers: Sequence[int]) -> list[list[int]]:
        budget = 1 if self._alone else self._budget
        batches = tight_batches([lengths[number] for number in numbers], budget)
        return [[numbers[place] for place in batch] for batch in batches]

    def _try(self, rows: Sequence[Sequence[int]], numbers: list[int]) -> Tensor | None:
        """The logits of a batch, (rows, 1); None where memory does not suffice and a smaller one may do.

        Raises:
            EnvironmentFailure: It is a single row.
        """
        with out_of_memory_hint("--dtype bfloat16, or a smaller --max-length,"):
            try:
                return self._logits([rows[number] for number in numbers])
            except (RuntimeError, MemoryError) as error:
                if len(numbers) == 1 or not is_out_of_memory(error):
                    raise
        if self._device.type == "cuda":  # here the error, which holds on to the batch's tensors, is gone
            torch.cuda.empty_cache()
        return None

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        ids = [[*row, *[self._pad_id] * (width - len(row))] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])  # (batch,)
        self._head.reads(self._sent(lengths - 1))
        with torch.inference_mode():
            logits: Tensor = self._model(
                input_ids=self._sent(torch.tensor(ids)),  # (batch, width)
                attention_mask=self._sent(_mask(lengths, width)) if self._masks else None,
            ).logits  # (batch, 1)
        if logits.shape[-1] != 1:
            raise InputError(f"{self._name} gives {logits.shape[-1]} numbers for a row; a reward model gives one")
        return logits

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; to a GPU it travels beside the work of the batch before."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def load(self, setup: ScorerSetup) -> None:
        """Go on with other settings; none of them is the model's."""

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def versions(self) -> dict[str, str]:
        """The versions of transformers and torch."""
        return {name: version(name) for name in ("transformers", "torch")}


def _mask(lengths: Tensor, width: int) -> Tensor:
    """1 at tokens and 0 at padding, (batch, width)."""
    return (torch.arange(width) < lengths.unsqueeze(1)).long()


def _must_be_alone(config: Any) -> bool:  # noqa: ANN401 - a transformers config
    """Whether a row's reward moves with the rows beside it: batches of encoder-decoders must have EOS equally often."""
    return bool(config.is_encoder_decoder) or config.model_type in READ_PADDING or moves_positions(config)


def _padding_id(model: Any, *, reads_last: bool) -> int:  # noqa: ANN401 - a transformers model
    """The id that batches are padded with; a class that reads one position refuses batches without one in its config.

    The position is said to the head, so that it does not matter which id it is.
    """
    table = padding_table(model.config, type(model).__name__)
    configured = getattr(table, "pad_token_id", None)
    if isinstance(configured, int) and is_token(configured, table):
        return configured
    if reads_last:
        table.pad_token_id = 0
    return 0


class _Float32Head:
    """Has what follows a model's body computed in float32, at the one position of each row that is read.

    Args:
        model: A transformers classifier.
        reads_last: Whether its head is applied to all positions, of which one per row is taken.
        is_known: Whether its code is transformers' own; what others wrote is left as it is.
    """

    def __init__(self, model: Any, *, reads_last: bool, is_known: bool) -> None:  # noqa: ANN401 - as above
        self._last = torch.empty(0)
        self._width = 0
        if not is_known:
            return
        body = getattr(model, "base_model", model)
        parts = [part for part in model.children() if not any(one is body for one in part.modules())]
        if parts and reads_last:
            parts[0].register_forward_pre_hook(self._taken)
            parts[-1].register_forward_hook(self._spread)
        for part in parts:
            part.float().register_forward_pre_hook(_widened)

    def reads(self, positions: Tensor) -> None:
        """Say what is read of the next batch.

        Args:
            positions: The position of each row, (batch,).
        """
        self._last = positions

    def _taken(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the head is given: the hidden state that is read, (batch, 1, hidden)."""
        (hidden,) = inputs  # (batch, width, hidden)
        self._width = hidden.shape[1]
        last = self._last.to(hidden.device)
        return (hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1),)

    def _spread(self, _: nn.Module, inputs: object, logits: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """The reward at every position, as the class takes one of them, (batch, width, 1)."""
        return logits.expand(-1, self._width, -1)


def _widened(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Its inputs in float32."""
    return tuple(one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs)
