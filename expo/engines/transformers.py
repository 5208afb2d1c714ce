"""Generation with transformers: the embedded default where vLLM cannot run.

Rows are generated in left-padded batches that are a pure function of all rows of the run; a batch that was
interrupted is redone whole. Sampling noise depends on the seed, the row and the sample only. Penalties act as
vLLM's do: on generated tokens, before temperature, top-k and top-p.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expo.checks import find_device
from expo.config import GenerateConfig
from expo.engines import Completion, GeneratorSetup, Key, Request, token_batches
from expo.engines.torch_tools import loading, out_of_memory_hint
from expo.engines.transformers_theta import load_theta

LOWEST_TEMPERATURE = 0.01
"""Of sampling; vLLM samples with it where it is given a lower one."""


class PenaltyProcessor(LogitsProcessor):
    """Presence and frequency penalties over the generated tokens only, as vLLM applies them.

    logits −= frequency · count + presence · (count > 0)

    Args:
        prompt_length: Columns of the padded prompt, which do not count.
        presence: Presence penalty.
        frequency: Frequency penalty.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Penalized scores, (batch, vocabulary)."""
        generated = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores)  # (batch, vocabulary)
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class RowTemperatures(LogitsProcessor):
    """Divides each row's scores by the row's own temperature, or by vLLM's lowest: scores must stay finite.

    Args:
        temperatures: One per row, above 0.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
        self._temperatures = torch.tensor(temperatures).clamp(min=LOWEST_TEMPERATURE).unsqueeze(1)  # (batch, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Scores over temperature, (batch, vocabulary)."""
        return scores / self._temperatures.to(scores)


class SomeRows(LogitsProcessor):
    """Processes some rows of a batch and leaves the others as they are, to the bit.

    Args:
        rows: The rows' numbers.
        processors: Made for these rows alone, in this order.
    """

    def __init__(self, rows: Sequence[int], processors: LogitsProcessorList) -> None:
        self._rows = torch.tensor(rows)
        self._processors: Any = processors  # its types ask for tensor classes that no tensor has

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with these rows processed, (batch, vocabulary)."""
        rows = self._rows.to(scores.device)
        return scores.index_copy(0, rows, self._processors(input_ids[rows], scores[rows]))


class SeededChoice(LogitsProcessor):
    """Samples one token per row by inverting the distribution at a number drawn from the row's own generator.

    Leaves the chosen token alone finite, so that greedy decoding takes it. A row's numbers do not depend on the
    rows beside it.

    Args:
        prompt_length: Columns of the padded prompt.
        noise: Uniform numbers in [0, 1), (batch, steps), float64.
    """

    def __init__(self, prompt_length: int, noise: Tensor) -> None:
        self._prompt_length = prompt_length
        self._noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for each row's token, −∞ for the others, (batch, vocabulary)."""
        step = input_ids.shape[1] - self._prompt_length
        mass = scores.double().softmax(-1).cumsum(-1)  # (batch, vocabulary)
        target = self._noise[:, step : step + 1].to(scores.device) * mass[:, -1:]
        chosen = torch.searchsorted(mass, target, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class RowLimits(StoppingCriteria):
    """Ends each row at its own number of new tokens.

    Args:
        prompt_length: Columns of the padded prompt.
        limits: Most new tokens of each row.
    """

    def __init__(self, prompt_length: int, limits: Sequence[int]) -> None:
        self._prompt_length = prompt_length
        self._limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # noqa: ARG002 - the interface
        """Which rows are done, (batch,)."""
        done = input_ids.shape[1] - self._prompt_length >= self._limits
        return done.to(input_ids.device)


def sampling_noise(seed: int, request: Request) -> Tensor:
    """One row's uniform numbers, (max_tokens,) float64 in [0, 1), from the seed and the row's key only."""
    row = f"{seed + request.sample}:{request.sample}:{request.id}"
    digest = hashlib.sha256((f"turn {request.turn}:{row}" if request.turn else row).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(request.max_tokens, dtype=torch.float64, generator=generator)


class TransformersGenerator:
    """See `expo.engines.Generator`.

    Args:
        setup: What to start.

    Raises:
        InputError: transformers cannot load the model.
        EnvironmentFailure: There is not enough memory.
    """

    def __init__(self, setup: GeneratorSetup) -> None:
        self._setup = setup
        self._device = find_device(setup.config.device, prefer_gpu=True)
        with loading(setup.name):
            model = _load(setup, self._device)
        self._model = model.eval()
        # The model's own sampling defaults must not leak in: everything is set by the processors below.
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=list(setup.stop_ids) or None, pad_token_id=setup.pad_id
        )
        self.repeatable = self._device.type == "cpu"
        self.step_seconds = 0.0

    def generate(self, requests: Sequence[Request], done: set[Key]) -> Iterator[list[Completion]]:
        """Yield rows batch by batch."""
        lengths = [len(request.prompt_ids) + request.max_tokens for request in requests]
        for numbers in token_batches(lengths, self._setup.config.batch_tokens):
            batch = [requests[number] for number in numbers]
            if all(request.key in done for request in batch):
                continue
            started = time.perf_counter()
            completions = self._generate_batch(batch)
            self.step_seconds += time.perf_counter() - started
            yield [completion for completion in completions if completion.request.key not in done]

    def _generate_batch(self, batch: list[Request]) -> list[Completion]:
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = [[self._setup.pad_id] * gap + list(row.prompt_ids) for gap, row in zip(padding, batch, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in padding]
        limits = [request.max_tokens for request in batch]
        with torch.inference_mode(), out_of_memory_hint("--batch-tokens"):
            output = self._model.generate(
                input_ids=torch.tensor(ids, device=self._device),  # (batch, width)
                attention_mask=torch.tensor(mask, device=self._device),
                max_new_tokens=max(limits),
                logits_processor=_processors(self._setup.config, batch, width),
                stopping_criteria=StoppingCriteriaList([RowLimits(width, limits)]),
            )
        rows = output[:, width:].tolist()
        return [self._completion(request, row) for request, row in zip(batch, rows, strict=True)]

    def _completion(self, request: Request, row: list[int]) -> Completion:
        row = row[: request.max_tokens]
        end = next((position for position, token in enumerate(row) if token in self._setup.stop_ids), None)
        if end is None:
            return Completion(request, tuple(row), "length")
        return Completion(request, tuple(row[: end + 1]), "stop")

    def versions(self) -> dict[str, str]:
        """The versions of transformers and torch."""
        return {name: version(name) for name in ("transformers", "torch")}


def _load(setup: GeneratorSetup, device: torch.device) -> Any:  # noqa: ANN401 - a transformers model
    if setup.theta is not None:
        return load_theta(setup, setup.theta, device)
    trust = setup.config.trust_remote_code
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=setup.config.dtype, trust_remote_code=trust, device_map=str(device)
    )
    return model


def _processors(config: GenerateConfig, batch: list[Request], width: int) -> LogitsProcessorList:
    """VLLM's order: penalties, (greedy ends here,) temperature, top-k, top-p; each row by its own temperature."""
    processors = LogitsProcessorList()
    if config.presence_penalty or config.frequency_penalty:
        processors.append(PenaltyProcessor(width, config.presence_penalty, config.frequency_penalty))
    sampled = [number for number, request in enumerate(batch) if request.temperature > 0]
    if len(sampled) == len(batch):
        processors.extend(_sampling(config, batch, width))
    elif sampled:
        processors.append(SomeRows(sampled, _sampling(config, [batch[number] for number in sampled], width)))
    return processors


def _sampling(config: GenerateConfig, batch: list[Request], width: int) -> LogitsProcessorList:
    """What chooses the tokens of sampled rows."""
    processors = LogitsProcessorList([RowTemperatures([request.temperature for request in batch])])
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    noise = [sampling_noise(config.seed, request) for request in batch]
    processors.append(SeededChoice(width, torch.nn.utils.rnn.pad_sequence(noise, batch_first=True)))
    return processors
