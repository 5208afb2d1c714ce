"""vLLM's `--load-format expo`: an engine whose weights are θ(α), computed tensor by tensor while it loads.

    python -m vllm.entrypoints.openai.api_server --model DPO --load-format expo
        --model-loader-extra-config '{"sft": "SFT", "alpha": 0.3}'

`config_files.LOADER_KEYS` lists the keys. vLLM finds `register` through the entry point group `vllm.general_plugins`,
in each of its processes. To change α, a live engine takes `collective_rpc("update_config", …)` with other keys for the
loader, `collective_rpc("reload_weights")` and `reset_prefix_cache()`. Each tensor-parallel rank reads both checkpoints.

Slow imports of expo wait until weights are loaded, since vLLM imports this module whatever it loads.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from expo.engines.refusals import LOAD_FORMAT, report_refusals

if TYPE_CHECKING:
    from torch import Tensor

    from expo.theta.pair import ThetaPlan
    from expo.theta.plan import PairPlan


class ThetaLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not type-checked
    """Loads θ(α) as vLLM's own loader loads a checkpoint.

    Args:
        load_config: vLLM's; its `model_loader_extra_config` specifies θ(α).
    """

    def __init__(self, load_config: Any) -> None:  # noqa: ANN401 - vllm.config.LoadConfig
        self._keys = load_config.model_loader_extra_config
        # The parent class refuses keys and formats that it does not know.
        super().__init__(dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config={}))

    def download_model(self, model_config: Any) -> None:  # noqa: ANN401 - vllm.config.ModelConfig
        """Download both checkpoints."""
        self._plan(model_config)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
        """Every tensor of θ(α), then the model's secondary weights; the first rank shows a progress bar.

        vLLM's reload keeps what it is given until a layer is whole: so each tensor has memory of its own, and those of
        a layer come one after the other, whatever the files' order.

        Raises:
            InputError: The keys or the pair are at fault, or a reload left parameters without weights.
            EnvironmentFailure: Reading failed.
        """
        from expo.files import natural
        from expo.progress import bytes_bar
        from expo.theta.tensors import Theta

        self.counter_before_loading_weights = time.perf_counter()
        _unpack_experts(model)
        with report_refusals():
            plan = self._plan(model_config).pair
            _require_plain_layers(model_config, plan)
            with Theta(plan) as theta, closing(bytes_bar(plan.nbytes, "θ(α)", shown=_is_first_rank())) as bar:
                for name, tensor in theta.sorted_by(natural):
                    bar.update(tensor.nbytes)
                    yield name, tensor
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)
        with report_refusals():
            _require_whole(model)
        for head in _packed_heads(model):
            _pack_again(head)

    def _plan(self, model_config: Any) -> ThetaPlan:  # noqa: ANN401 - vllm.config.ModelConfig
        from expo.config_files import theta_from
        from expo.theta.pair import plan_theta

        model, revision = str(model_config.model), model_config.revision
        at = f"@{revision}" if revision and not Path(model).is_dir() else ""
        return plan_theta(theta_from(self._keys, model + at))


def _require_plain_layers(model_config: Any, plan: PairPlan) -> None:  # noqa: ANN401 - vllm.config.ModelConfig
    """Refuse layers for quantized weights, which θ(α) of a quantized pair has no more.

    Raises:
        InputError: vLLM made some, as DPO's config.json asks for.
    """
    from expo.errors import InputError

    said = getattr(model_config.hf_config, "quantization_config", None)
    if plan.dpo.dequantized is not None and said:
        raise InputError(
            f"vLLM made layers for {plan.dpo.dequantized}, and θ(α) is in bfloat16: add --hf-overrides "
            "'{\"quantization_config\": null}'"
        )


def _is_first_rank() -> bool:
    from vllm.distributed import get_world_group

    return bool(get_world_group().rank == 0)


def _unpack_experts(model: Any) -> None:  # noqa: ANN401 - a torch module of vLLM's
    """Have experts padded and packed for a CPU again; vLLM's reload takes what it is given for packed.

    Their kernel is made anew, which takes the weights at the end of a load. On a GPU it stays: graphs hold on to it.
    """
    from vllm.platforms import current_platform

    for layer in model.modules() if current_platform.is_cpu() else ():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _require_whole(model: Any) -> None:  # noqa: ANN401 - a torch module of vLLM's
    """In a reload, refuse parameters that were given no weights: vLLM only warns, and goes on with the old ones.

    Raises:
        InputError: There are some.
    """
    from expo.errors import InputError, listed

    if lacking := listed("vLLM's reload left parameters with old weights", _without_weights(model)):
        raise InputError(f"{lacking[0]}; rerun the same command, which starts an engine with new ones")


def _without_weights(model: Any) -> list[str]:  # noqa: ANN401 - a torch module of vLLM's
    """The parameters that a reload was given no weights for so far; none at the first load.

    Left out are those that are tied to others, and the scales of attention, which checkpoints may lack.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    given: set[int] = set()
    lacking: dict[str, int | None] = {}
    for prefix, layer in model.named_modules():
        info = LAYERWISE_INFO.get(layer)
        if info is None or info.kernel_tensors is None:  # no reload, or the layer was given all it needs
            given.update(map(_storage, layer.parameters(recurse=False)))
        elif not is_deferred_attention_layer(layer):
            there = {name for name, _ in info.loaded_weights}
            for name in info.restore_metadata[0]:
                old = info.kernel_tensors[0].get(name)
                storage = None if old is None else _storage(old)
                if name not in there:
                    lacking[f"{prefix}.{name}"] = storage
                elif storage is not None:
                    given.add(storage)
    if not given:  # a model that collects all tensors before it takes any
        return []
    return [name for name, storage in lacking.items() if storage not in given]


def _storage(parameter: Tensor) -> int:
    """What two parameters that are tied have in common; a weight that was packed and removed is tied to none."""
    return parameter.untyped_storage().data_ptr() or id(parameter)


def _packed_heads(model: Any) -> list[Any]:  # noqa: ANN401 - a torch module of vLLM's
    """The heads that were given no weights and have a packed copy of old ones, as vLLM makes for a CPU.

    None at the first load. In a reload, weights that did not come are on torch's meta device until it ends.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    heads = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
    return [head for head in heads if hasattr(head, "cpu_linear") and head.weight.is_meta]


def _pack_again(head: Any) -> None:  # noqa: ANN401 - vLLM's ParallelLMHead
    """Repack a head's weights when it is next used: vLLM's reload forgets a head that is tied to the embedding."""

    def first(*arguments: Any) -> Any:  # noqa: ANN401
        head.quant_method.process_weights_after_loading(head)
        return head.cpu_linear(*arguments)

    head.cpu_linear = first


@functools.cache  # vLLM warns about a loader that is registered twice
def register() -> None:
    """Register the load format with vLLM in this process."""
    register_model_loader(LOAD_FORMAT)(ThetaLoader)
