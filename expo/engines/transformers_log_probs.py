"""Log-probabilities of answers with transformers: the body once per batch, the head a few positions at a time.

The head gives a number per token of the vocabulary at each position, which is more memory than all else. So the body's
hidden states are kept, and the model's own forward is run on slices of them, with a stand-in for the body: whatever a
model does to its logits after the head (soft caps, scales) is done. The head is in float32.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast

from expo.engines import GeneratorSetup
from expo.engines.coverage import require_trained
from expo.engines.log_probs import Answered, LogProbSetup, Side
from expo.engines.torch_tools import find_device, is_out_of_memory, loading, out_of_memory_hint
from expo.engines.transformers_theta import Places, load_theta, replace_theta

LOGITS_AT_ONCE = 1 << 25
"""Numbers that the head gives at once: 128 MiB in float32, 262 positions of a vocabulary of 128,000."""

log = logging.getLogger(__name__)


class TransformersLogProbs:
    """See `expo.engines.log_probs.LogProbs`.

    Args:
        setup: What to start; a model is loaded when it is first asked.

    Raises:
        EnvironmentFailure: The device cannot be used.
    """

    def __init__(self, setup: LogProbSetup) -> None:
        self._device = find_device(setup.config.device, prefer_gpu=True)
        self._setup = setup
        self._folder: Path | None = None
        self._reader: _Reader | None = None

    def log_probs(self, side: Side, rows: Sequence[Answered]) -> list[float]:
        """The sum over each row's answer; padding is on the right, where no token of a causal model sees it.

        Raises:
            InputError: transformers cannot load the model, or its weights are not all there.
            EnvironmentFailure: There is not enough memory.
        """
        folder = getattr(self._setup, side)
        if self._reader is None or self._folder != folder:
            self.close()
            self._folder, self._reader = folder, _Reader(self._load(folder), self._device)
        return self._reader.sums(rows, "--dtype bfloat16, or a smaller --max-length,")

    def _load(self, folder: Path) -> Any:  # noqa: ANN401 - a transformers model
        config = self._setup.config
        with loading(folder.name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
                device_map=str(self._device),
                output_loading_info=True,
            )
        model, info = loaded
        require_trained(folder.name, model, info, "score")
        return model

    def load(self, setup: LogProbSetup) -> None:
        """Go on with other settings; none of them is the models'."""
        self._setup = setup

    def close(self) -> None:
        """Let go of the model that is in memory, before another one is loaded."""
        left = None if self._reader is None else weakref.ref(self._reader.model)
        self._folder = self._reader = None
        _let_go(left, self._device)

    def versions(self) -> dict[str, str]:
        """The versions of transformers and torch."""
        return _versions()


class TransformersThetaLogProbs:
    """See `expo.engines.log_probs.ThetaLogProbs`.

    Args:
        setup: What to start.

    Raises:
        InputError: transformers cannot load the model, or its weights are not all there.
        EnvironmentFailure: There is not enough memory, or the device cannot be used.
    """

    def __init__(self, setup: GeneratorSetup) -> None:
        self._device = find_device(setup.config.device, prefer_gpu=True)
        self._weights = setup.weights()
        self._reader: _Reader | None = None
        self._places: Places | None = None
        self._load_anew(setup)

    def _load_anew(self, setup: GeneratorSetup) -> None:
        assert setup.theta is not None
        with loading(setup.name):
            model, self._places = load_theta(setup, setup.theta, self._device)
        self._reader = _Reader(model, self._device)

    def log_probs(self, rows: Sequence[Answered]) -> list[float]:
        """The sum over each row's answer.

        Raises:
            EnvironmentFailure: There is not enough memory.
        """
        assert self._reader is not None
        return self._reader.sums(rows, "--dtype bfloat16, or a smaller --batch-tokens,")

    def load(self, setup: GeneratorSetup) -> None:
        """Go on with another θ(α), copied to its places or loaded anew.

        An engine whose weights could not be replaced is closed: some tensors may be the new ones.
        """
        weights = setup.weights()
        if weights == self._weights:
            return
        try:
            if self._places is not None and setup.theta is not None and replace_theta(setup.theta, self._places):
                assert self._reader is not None
                self._reader.take_head()
            else:
                self.close()
                self._load_anew(setup)
        except BaseException:
            self.close()
            raise
        self._weights = weights

    def close(self) -> None:
        """Let go of the model."""
        left = None if self._reader is None else weakref.ref(self._reader.model)
        self._reader = self._places = None
        _let_go(left, self._device)

    def versions(self) -> dict[str, str]:
        """The versions of transformers and torch."""
        return _versions()


class _Reader:
    """A loaded model, read for log-probabilities.

    Args:
        model: A causal model of transformers.
        device: Where it is.
    """

    def __init__(self, model: Any, device: torch.device) -> None:  # noqa: ANN401 - a transformers model
        self.model = model.eval()
        self._device = device
        self._body = getattr(model, model.base_model_prefix)
        self._no_ids = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._head = model.get_output_embeddings()
        self._own_head = dict(self._head.named_parameters(recurse=False))
        self._at_once = max(1, LOGITS_AT_ONCE // self._head.weight.shape[0])
        self.take_head()

    def take_head(self) -> None:
        """Give the model a head in float32 with the values that its own head has now; its own, where it was tied."""
        for name, parameter in self._own_head.items():
            setattr(self._head, name, nn.Parameter(parameter.detach().float(), requires_grad=False))

    def sums(self, rows: Sequence[Answered], hint: str) -> list[float]:
        """Σ log π over each row's answer.

        Args:
            rows: One batch, of any lengths.
            hint: What to try where memory does not suffice.

        Raises:
            EnvironmentFailure: Memory does not suffice for one row.
        """
        with torch.inference_mode(), out_of_memory_hint(hint):
            return self._batch(rows)

    def _batch(self, rows: Sequence[Answered]) -> list[float]:
        """The sums of a batch, which is cut in halves where memory does not suffice."""
        try:
            return self._sums(rows)
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        log.warning("out of memory: continuing with batches of half the size")  # here the error's tensors are gone
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return [*self._batch(rows[:middle]), *self._batch(rows[middle:])]

    def _sums(self, rows: Sequence[Answered]) -> list[float]:
        width = max(len(row.token_ids) for row in rows)
        ids = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in rows])  # (batch, width)
        mask = torch.tensor([[1] * len(row.token_ids) + [0] * (width - len(row.token_ids)) for row in rows])
        given = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
        hidden = self._body(**given, use_cache=False)[0]  # (batch, width, hidden size)
        sums = []
        for number, row in enumerate(rows):
            first, end = max(row.start, 1), len(row.token_ids)  # nothing foretells the first id
            targets = ids[number, first:end].to(hidden.device)  # (answer,)
            sums.append(self._answer(hidden[number, first - 1 : end - 1], targets))
        return sums

    def _answer(self, hidden: Tensor, targets: Tensor) -> float:
        """Σ log softmax of one answer.

        Args:
            hidden: The body's states at the positions before its tokens, (answer, hidden size).
            targets: Its tokens, (answer,).
        """
        total = 0.0
        for states, wanted in zip(torch.split(hidden, self._at_once), torch.split(targets, self._at_once), strict=True):
            logits = self._logits(states)  # (positions, vocabulary), float32
            chosen = logits.gather(1, wanted.unsqueeze(1)).squeeze(1)  # (positions,)
            total += float((chosen - logits.logsumexp(1)).double().sum())
        return total

    def _logits(self, states: Tensor) -> Tensor:
        """What the model makes of its body's states, (positions, hidden size) → (positions, vocabulary)."""
        name = self.model.base_model_prefix
        setattr(self.model, name, _Given(states.float().unsqueeze(0)))
        try:
            logits: Tensor = self.model(input_ids=self._no_ids, use_cache=False).logits[0].float()
        finally:
            setattr(self.model, name, self._body)
        return logits


def _let_go(left: weakref.ref[Any] | None, device: torch.device) -> None:
    """Free the memory of a model to which nothing but itself refers."""
    if left is not None and left() is not None:
        gc.collect()  # something in it refers back to it
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "torch")}


class _Output(MoeModelOutputWithPast):
    """A body's output of which only the states are there."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands for a body: whatever it is given, its states are these.

    Args:
        states: (batch, positions, hidden size).
    """

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self._states = states

    def forward(self, *_: object, **__: object) -> _Output:
        """The states."""
        return _Output(last_hidden_state=self._states)  # type: ignore[arg-type]  # torch has no such class
