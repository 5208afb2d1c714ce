"""A transformers model whose weights are θ(α), made tensor by tensor while it loads.

transformers reads a tensor's values when it is about to use them, and casts and fuses them like those of a file; there
is never a second model in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from expo.engines import GeneratorSetup
from expo.engines.coverage import require_trained
from expo.errors import ExpoError
from expo.theta.pair import ThetaPlan
from expo.theta.tensors import Theta


class _Slice:
    """A tensor of θ(α) with the interface of one in a safetensors file: computed when it is indexed.

    Args:
        theta: The open θ(α).
        name: The tensor's name.
        failed: Collects the errors; transformers turns those that its threads raise into reports of its own.
    """

    def __init__(self, theta: Theta, name: str, failed: list[ExpoError]) -> None:
        self._theta = theta
        self._name = name
        self._failed = failed
        self.dtype = theta.dtype(name)

    def is_floating_point(self) -> bool:
        """Whether it is cast to the model's dtype."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: object) -> Tensor:
        try:
            return self._theta.tensor(self._name)[index]  # type: ignore[index]
        except ExpoError as error:
            self._failed.append(error)
            raise


def load_theta(setup: GeneratorSetup, plan: ThetaPlan, device: torch.device) -> Any:  # noqa: ANN401 - a transformers model
    """The model whose weights are θ(α), as `from_pretrained` loads a checkpoint of it.

    Args:
        setup: What to start; the model's folder has the config and the code.
        plan: The θ(α).
        device: Where the model goes.

    Raises:
        InputError: A value is not finite, or sides that must be equal are not.
        EnvironmentFailure: Reading failed.
    """
    trust = setup.config.trust_remote_code
    config = AutoConfig.from_pretrained(setup.model, trust_remote_code=trust)
    with torch.device("meta"):  # a model without weights, only to find its class and that one's config
        empty: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)  # type: ignore[no-untyped-call]
    failed: list[ExpoError] = []
    with Theta(plan.pair) as theta:
        slices = {name: _Slice(theta, name, failed) for name in theta.names}
        try:
            model, info = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=slices,
                dtype=setup.config.dtype,
                device_map=str(device),
                output_loading_info=True,
            )
        except Exception:
            if failed:
                raise failed[0] from None
            raise
        if failed:
            raise failed[0]
        theta.check_change()
    require_trained(setup.name, model, info)
    return model
