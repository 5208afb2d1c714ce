"""A transformers model whose weights are θ(α), made tensor by tensor while it loads, and those of another α later.

transformers reads a tensor's values when it is about to use them, and casts and fuses them like those of a file; there
is never a second model in memory. Where it took every tensor as it is, another α's tensors are copied to their places;
where it fused or permuted some, as it stacks experts, only loading anew knows what becomes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from expo.engines import GeneratorSetup
from expo.engines.coverage import require_trained
from expo.errors import ExpoError
from expo.theta.pair import ThetaPlan
from expo.theta.tensors import Theta

Places = dict[str, Tensor]
"""Tensor name → where its values lie in a model; those that are tied lie in one place."""

SAMPLES = 256
"""About how many values of a tensor are compared with what became of it; all of a smaller one."""


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
        self.taken: tuple[torch.Size, Tensor] | None = None
        """Shape and some values of what was asked for; None where nothing was."""

    def is_floating_point(self) -> bool:
        """Whether it is cast to the model's dtype."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: object) -> Tensor:
        try:
            values = self._theta.tensor(self._name)
            self.taken = values.shape, _sample(values).clone()
            return values[index]  # type: ignore[index]
        except ExpoError as error:
            self._failed.append(error)
            raise


def _sample(values: Tensor) -> Tensor:
    """Some values from all over a tensor, (at most 2 · SAMPLES,)."""
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)]


def load_theta(setup: GeneratorSetup, plan: ThetaPlan, device: torch.device) -> tuple[Any, Places | None]:
    """The model whose weights are θ(α), as `from_pretrained` loads a checkpoint of it.

    Args:
        setup: What to start; the model's folder has the config and the code.
        plan: The θ(α).
        device: Where the model goes.

    Returns:
        The model, and where `replace_theta` puts another θ(α) of the pair; None where the model must be loaded anew.

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
    return model, _places(model, slices)


def _places(model: Any, slices: Mapping[str, _Slice]) -> Places | None:  # noqa: ANN401 - a transformers model
    """Where each tensor lies that the model took; None if one is not there as it was given, or a parameter has none."""
    state, found = model.state_dict(), {}
    for name, one in slices.items():
        if one.taken is None:  # the model has no use for it
            continue
        place, (shape, sample) = state.get(name), one.taken
        if place is None or place.shape != shape or not torch.equal(_sample(place).cpu(), sample.to(place.dtype)):
            return None
        found[name] = place
    written = {place.data_ptr() for place in found.values()}
    return found if all(parameter.data_ptr() in written for parameter in model.parameters()) else None


def replace_theta(plan: ThetaPlan, places: Places) -> bool:
    """Put another θ(α) of the pair in the place of the one that was loaded: bit for bit what loading it anew gives.

    Returns:
        Whether it is there. If not, the model is no longer of use: tensors that it ties differ at this α.

    Raises:
        InputError: A value is not finite, or sides that must be equal are not; the model is no longer of use.
        EnvironmentFailure: Reading failed; the model is no longer of use.
    """
    written: set[int] = set()
    with Theta(plan.pair) as theta, torch.no_grad():
        for name, place in places.items():
            values = theta.tensor(name)
            if place.data_ptr() not in written:
                place.copy_(values)
                written.add(place.data_ptr())
            elif not torch.equal(place.cpu(), values.to(place.dtype)):
                return False
        theta.check_change()
    return True
