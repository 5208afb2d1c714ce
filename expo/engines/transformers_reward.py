"""Reward models with transformers: the raw logit, as the model gives it for the row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from expo.engines import ScorerSetup
from expo.engines.torch_tools import find_device, loading, out_of_memory_hint
from expo.errors import InputError


class TransformersScorer:
    """See `expo.engines.Scorer`.

    Args:
        setup: What to start.

    Raises:
        InputError: The model cannot be loaded, or is not a reward model with one label.
        EnvironmentFailure: There is not enough memory.
    """

    def __init__(self, setup: ScorerSetup) -> None:
        self._device = find_device(setup.config.device, prefer_gpu=True)
        with loading(setup.model.name):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                setup.model,
                dtype=setup.config.dtype,
                trust_remote_code=setup.config.trust_remote_code,
                device_map=str(self._device),
                output_loading_info=True,
            )
        untrained = sorted(info["missing_keys"])
        if untrained:
            raise InputError(f"{setup.model.name} has no trained score head ({untrained[0]} is not in its weights)")
        if model.config.num_labels != 1:
            raise InputError(f"{setup.model.name} has {model.config.num_labels} labels; a reward model has one")
        self._model: Any = model.eval()

    def score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The raw logit of each row; padding does not affect it."""
        width = max(map(len, rows))
        with torch.inference_mode(), out_of_memory_hint("a smaller --batch-tokens"), self._padded_with(rows) as pad_id:
            ids = [list(row) + [pad_id] * (width - len(row)) for row in rows]
            mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
            logits = self._model(
                input_ids=torch.tensor(ids, device=self._device),  # (batch, width)
                attention_mask=torch.tensor(mask, device=self._device),
            ).logits  # (batch, 1)
        rewards: list[float] = logits[:, 0].float().tolist()
        return rewards

    def _padded_with(self, rows: Sequence[Sequence[int]]) -> _PadId:
        return _PadId(self._model.config, rows)

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

    The model takes the reward at the last token that is not `config.pad_token_id`. Where the config has that id,
    it is used, so that a row's reward is the same alone and padded. Where it has none, a single row is read at
    its last token: then the batch is padded with an id that is in none of its rows.
    """

    def __init__(self, config: Any, rows: Sequence[Sequence[int]]) -> None:  # noqa: ANN401 - a transformers config
        self._config = config
        self._configured = config.pad_token_id
        used = set().union(*rows)
        self._pad_id = next(id for id in range(len(used) + 1) if id not in used)

    def __enter__(self) -> int:
        if self._configured is not None:
            return int(self._configured)
        self._config.pad_token_id = self._pad_id
        return self._pad_id

    def __exit__(self, *_: object) -> None:
        self._config.pad_token_id = self._configured
