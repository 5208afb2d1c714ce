"""Logit space with transformers: DPO generates, SFT reads along, and each token is drawn from both.

At every step log π = log π_dpo + α(log π_dpo − log π_sft) up to a constant (decoding-time realignment, arXiv
2402.02992); θ(α) is the same line, drawn between weights. A processor, before all others, has SFT read the token that
was drawn last, with a cache of its own, and combines what both say of the next one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from expo.config.sweep import SFT_ALPHA
from expo.engines import GeneratorSetup
from expo.engines.transformers_theta import load_theta
from expo.theta.pair import ThetaPlan


def combined(dpo: Tensor, sft: Tensor, alpha: float) -> Tensor:
    """The distribution of log π_dpo + α(log π_dpo − log π_sft), as the logarithm of each token's probability.

    What DPO gives no probability keeps none, whatever α; what SFT gives none has none for α < 0, which is the limit.
    For α > 0 the limit is infinite: the token is weighed as if SFT gave it as little as the least likely token that it
    does give a probability; and so it is for α < 0, where the two have no token in common. From the log-ratios the one
    that α raises most is subtracted first, so that no result is NaN or +∞, however large α.

    Args:
        dpo: Logits of DPO, (batch, vocabulary), float32.
        sft: Logits of SFT, likewise.
        alpha: The α.

    Returns:
        (batch, vocabulary), −∞ where a token has no probability.
    """
    log_dpo, log_sft = dpo.log_softmax(-1), sft.log_softmax(-1)  # (batch, vocabulary)
    never, unknown = log_dpo == -torch.inf, log_sft == -torch.inf
    least = log_sft.masked_fill(unknown, torch.inf).amin(-1, keepdim=True)  # (batch, 1)
    ratio = log_dpo - torch.where(unknown, least, log_sft)
    masked = never | unknown if alpha < 0 else never
    masked = torch.where(masked.all(-1, keepdim=True), never, masked)
    if alpha < 0:
        most = ratio.masked_fill(masked, torch.inf).amin(-1, keepdim=True)  # (batch, 1)
    else:
        most = ratio.masked_fill(masked, -torch.inf).amax(-1, keepdim=True)
    return (log_dpo + alpha * (ratio - most)).masked_fill(masked, -torch.inf).log_softmax(-1)


class ReadsAlong(LogitsProcessor):
    """Replaces DPO's scores by those of both models; SFT reads what was not read yet. Made for one batch.

    Args:
        sft: SFT, whose tokens are DPO's.
        mask: The attention mask of the left-padded prompts, (batch, prompt).
        alpha: The α.
    """

    def __init__(self, sft: Any, mask: Tensor, alpha: float) -> None:  # noqa: ANN401 - a transformers model
        self._sft = sft
        self._mask = mask
        self._alpha = alpha
        self._cache: Any = None
        self._takes = inspect.signature(sft.forward).parameters.keys()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of both, (batch, vocabulary)."""
        return combined(scores.float(), self._logits(input_ids).to(scores.device), self._alpha)

    def _logits(self, input_ids: Tensor) -> Tensor:
        """SFT's logits of the next token, (batch, vocabulary), float32.

        Rows that have ended go on with padding, as in `generate`; nobody looks at what follows it.
        """
        new = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones((len(self._mask), new))], dim=1)  # (batch, so far)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        unread = input_ids.shape[1] if self._cache is None else 1  # a model without a cache reads all of it again
        given = {
            "input_ids": input_ids[:, -unread:],
            "attention_mask": mask,
            "position_ids": positions[:, -unread:],
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self._sft(**{name: value for name, value in given.items() if name in self._takes})
        self._cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits[:, -1].float()
        return logits


class Sides:
    """The models of a pair, DPO as θ(0) and SFT as θ(−1): loaded when they are first needed, and kept.

    Args:
        device: Where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[float, Any] = {}

    def of(self, setup: GeneratorSetup, theta: ThetaPlan) -> tuple[Any, Any]:
        """The model that generates at this α, and the one that reads along; None where one answers by itself.

        At α = 0 this is DPO and at −1 SFT, whatever else is in memory.

        Raises:
            InputError: A model does not load.
            EnvironmentFailure: Reading failed.
        """
        alpha = theta.config.alpha
        if alpha in (0.0, SFT_ALPHA):
            return self._side(setup, theta, alpha), None
        return self._side(setup, theta, 0.0), self._side(setup, theta, SFT_ALPHA)

    def _side(self, setup: GeneratorSetup, theta: ThetaPlan, alpha: float) -> Any:  # noqa: ANN401 - as above
        if alpha not in self._loaded:
            model, _ = load_theta(setup, theta.at(alpha), self._device)
            self._loaded[alpha] = model.eval()
        return self._loaded[alpha]

    @property
    def models(self) -> list[Any]:
        """Those in memory."""
        return list(self._loaded.values())
