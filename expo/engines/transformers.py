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

from expo.checkpoint.folder import is_adapter
from expo.config import GenerateConfig
from expo.engines import Completion, GeneratorSetup, Key, Probed, Request
from expo.engines.batches import token_batches
from expo.engines.coverage import is_token, require_trained
from expo.engines.held import Held, held_by
from expo.engines.torch_tools import find_device, loading, out_of_memory_hint
from expo.engines.transformers_logits import ReadsAlong, Sides
from expo.engines.transformers_theta import Places, load_theta, replace_theta

LOWEST_TEMPERATURE = 0.01
"""The lowest sampling temperature; vLLM raises lower ones to it."""


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
    """Divides each row's scores by the row's own temperature, at least vLLM's lowest, so that scores stay finite.

    Args:
        temperatures: One per row, above 0.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
        self._temperatures = torch.tensor(temperatures).clamp(min=LOWEST_TEMPERATURE).unsqueeze(1)  # (batch, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Scores over temperature, (batch, vocabulary)."""
        return scores / self._temperatures.to(scores)


class SomeRows(LogitsProcessor):
    """Processes some rows of a batch and leaves the others bitwise unchanged.

    Args:
        rows: The rows' numbers.
        processors: Made for these rows alone, in this order.
    """

    def __init__(self, rows: Sequence[int], processors: LogitsProcessorList) -> None:
        self._rows = torch.tensor(rows)
        self._processors: Any = processors  # its annotations demand tensor classes that no tensor has

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with these rows processed, (batch, vocabulary)."""
        rows = self._rows.to(scores.device)
        return scores.index_copy(0, rows, self._processors(input_ids[rows], scores[rows]))


class SeededChoice(LogitsProcessor):
    """Samples one token per row by inverse transform sampling with a number from the row's own generator.

    Only the chosen token keeps a finite score, so that greedy decoding takes it. A row's numbers do not depend on
    the other rows of the batch.

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
        limits: The maximum number of new tokens of each row.
    """

    def __init__(self, prompt_length: int, limits: Sequence[int]) -> None:
        self._prompt_length = prompt_length
        self._limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # noqa: ARG002 - the interface
        """Which rows are done, (batch,)."""
        done = input_ids.shape[1] - self._prompt_length >= self._limits
        return done.to(input_ids.device)


def sampling_noise(config: GenerateConfig, request: Request) -> Tensor:
    """One row's uniform numbers, (max_tokens,) float64 in [0, 1).

    With `--seed-mode row` they come from `--seed` and the row's key only; with `shared` all rows of a sample have the
    same ones, whose seed is `--seed` plus the sample's number.
    """
    seed = config.seed + request.sample
    if config.seed_mode == "row":
        row = f"{seed}:{request.sample}:{request.id}"
        digest = hashlib.sha256((f"turn {request.turn}:{row}" if request.turn else row).encode()).digest()
        seed = int.from_bytes(digest[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(request.max_tokens, dtype=torch.float64, generator=generator)


class TransformersGenerator:
    """See `expo.engines.Generator`.

    Args:
        setup: What to start.

    Raises:
        InputError: transformers cannot load the model.
        EnvironmentFailure: There is not enough memory.
    """

    block_tokens = 0
    """Nothing is kept of a prompt."""

    def __init__(self, setup: GeneratorSetup) -> None:
        self._device = find_device(setup.config.device, prefer_gpu=True)
        self.repeatable = self._device.type == "cpu"
        self.step_seconds = 0.0
        self._setup = setup
        self._weights = setup.weights()
        self._model: Any = None
        self._places: Places | None = None
        self._beside: Any = None  # in logit space, SFT
        self._sides = Sides(self._device)
        self._load_model()

    def _load_model(self) -> None:
        setup = self._setup
        with loading(setup.name):
            if setup.in_logit_space and setup.theta is not None:
                model, self._beside = self._sides.of(setup, setup.theta)
            else:
                model, self._places = _load(setup, self._device)
        self._model = model.eval()
        self._pad_id = setup.pad_id if is_token(setup.pad_id, model.config.get_text_config()) else 0
        # The model's own sampling defaults must not interfere: the processors below do everything.
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=list(setup.stop_ids) or None, pad_token_id=self._pad_id
        )

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with other settings, and with the weights of another θ(α), copied to their places or loaded anew.

        An engine whose weights could not be replaced is closed: some tensors may be the new ones. In logit space
        another α needs no other weights, but a model that was not needed yet.
        """
        theta, weights, self._setup = setup.theta, setup.weights(), setup
        if weights == self._weights:
            if setup.in_logit_space:
                self._load_model()
            return
        try:
            replaced = theta is not None and self._places is not None and replace_theta(theta, self._places)
        except BaseException:
            self.close()
            raise
        if not replaced:
            self.close()
            self._load_model()
        self._weights = weights

    def close(self) -> None:
        """Let go of the model, or both."""
        self._model = self._places = self._beside = None
        self._sides = Sides(self._device)

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
        ids, mask = self._padded([request.prompt_ids for request in batch])
        width = ids.shape[1]
        limits = [request.max_tokens for request in batch]
        with torch.inference_mode(), out_of_memory_hint("a smaller --batch-tokens"):
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(limits),
                logits_processor=LogitsProcessorList(
                    [*self._reading_along(mask), *_processors(self._setup.config, batch, width)]
                ),
                stopping_criteria=StoppingCriteriaList([RowLimits(width, limits)]),
            )
        rows = output[:, width:].tolist()
        return [self._completion(request, row) for request, row in zip(batch, rows, strict=True)]

    def _reading_along(self, mask: Tensor) -> LogitsProcessorList:
        """In logit space the processor that stands before all others; none where one model answers.

        Args:
            mask: The attention mask of the batch's prompts.
        """
        theta = self._setup.theta
        if self._beside is None or theta is None:
            return LogitsProcessorList()
        return LogitsProcessorList([ReadsAlong(self._beside, mask, theta.config.alpha)])

    def probe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Probed]:
        """What follows each prompt, made in one padded batch as rows are."""
        ids, mask = self._padded(prompts)
        own = self._model.generation_config
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, pad_token_id=self._pad_id, return_dict_in_generate=True, output_scores=True
        )
        try:
            with torch.inference_mode(), out_of_memory_hint("--dtype bfloat16"):
                made = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    logits_processor=self._reading_along(mask),
                )
        finally:
            self._model.generation_config = own
        tokens = made.sequences[:, ids.shape[1] :]  # (prompts, new_tokens)
        log_probs = torch.stack(made.scores, 1).float().log_softmax(-1)  # (prompts, new_tokens, vocabulary)
        chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return [Probed(tuple(row), tuple(seen)) for row, seen in zip(tokens.tolist(), chosen.tolist(), strict=True)]

    def held(self) -> list[Held]:
        """What the model holds, or in logit space both, as one process each."""
        return [held_by(model) for model in self._sides.models or [self._model]]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids with padding at the left and the attention mask, (rows, width) each."""
        width = max(map(len, rows))
        ids = [[self._pad_id] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)

    def _completion(self, request: Request, row: list[int]) -> Completion:
        row = row[: request.max_tokens]
        end = next((position for position, token in enumerate(row) if token in self._setup.stop_ids), None)
        if end is None:
            return Completion(request, tuple(row), "length")
        return Completion(request, tuple(row[: end + 1]), "stop")

    def versions(self) -> dict[str, str]:
        """The versions of transformers and torch."""
        return {name: version(name) for name in ("transformers", "torch")}


def _load(setup: GeneratorSetup, device: torch.device) -> tuple[Any, Places | None]:
    """The model, and where the tensors of a θ(α) lie in it."""
    if setup.theta is not None:
        return load_theta(setup, setup.theta, device)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        setup.model,
        dtype=setup.config.dtype,
        trust_remote_code=setup.config.trust_remote_code,
        device_map=str(device),
        output_loading_info=True,
    )
    model, info = loaded
    if not is_adapter(setup.model):  # of which transformers reports the adapter's tensors
        require_trained(setup.name, model, info)
    return model, None


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
    """The processors that choose the tokens of sampled rows."""
    processors = LogitsProcessorList([RowTemperatures([request.temperature for request in batch])])
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    noise = [sampling_noise(config, request) for request in batch]
    processors.append(SeededChoice(width, torch.nn.utils.rnn.pad_sequence(noise, batch_first=True)))
    return processors
