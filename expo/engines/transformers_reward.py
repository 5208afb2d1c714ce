"""Reward models with transformers: the raw logit, as the model gives it for the row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers.modeling_layers import GenericForSequenceClassification

from expo.engines import ScorerSetup
from expo.engines.coverage import is_token
from expo.engines.reward_loading import load_reward_model
from expo.engines.torch_tools import find_device, out_of_memory_hint
from expo.errors import InputError


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
        self._model, _, self._alone = load_reward_model(setup, self._device)
        self._name = setup.model.name

    def score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The raw logit of each row; padding does not affect it."""
        if self._alone and len(rows) > 1:
            return [self.score([row])[0] for row in rows]
        width = max(map(len, rows))
        with (
            torch.inference_mode(),
            out_of_memory_hint("a smaller --batch-tokens"),
            _PadId(self._model, rows) as pad_id,
        ):
            ids = [list(row) + [pad_id] * (width - len(row)) for row in rows]
            mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
            logits = self._model(
                input_ids=torch.tensor(ids, device=self._device),  # (batch, width)
                attention_mask=torch.tensor(mask, device=self._device),
            ).logits  # (batch, 1)
        if logits.shape[-1] != 1:
            raise InputError(f"{self._name} gives {logits.shape[-1]} numbers for a row; a reward model gives one")
        rewards: list[float] = logits[:, 0].float().tolist()
        return rewards

    def load(self, setup: ScorerSetup) -> None:
        """Go on with other settings; none of them is the model's."""

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def versions(self) -> dict[str, str]:
        """The versions of transformers and torch."""
        return {name: version(name) for name in ("transformers", "torch")}


class _PadId:
    """The padding id of one batch.

    A causal model takes the reward at the last token that is not the padding id of its config, of its text model's
    config if it has one. Where that is a token, it is used, so that a row's reward is the same alone and padded. Where
    there is none, or it is no token, such as -1, a single row is read at its last token: then the batch is padded with
    an id that no row ends with.
    """

    def __init__(self, model: Any, rows: Sequence[Sequence[int]]) -> None:  # noqa: ANN401 - a transformers model
        config = model.config
        self._config = config.get_text_config() if isinstance(model, GenericForSequenceClassification) else config
        self._configured: Any = getattr(self._config, "pad_token_id", None)
        self._is_token = is_token(self._configured, self._config)
        ends = {row[-1] for row in rows}
        self._pad_id = next(id for id in range(len(ends) + 1) if id not in ends)

    def __enter__(self) -> int:
        if self._is_token:
            return int(self._configured)
        self._config.pad_token_id = self._pad_id
        return self._pad_id

    def __exit__(self, *_: object) -> None:
        self._config.pad_token_id = self._configured
