"""Decide what happens to every tensor of an adapter that is to be θ(α) when it is applied to SFT: `plan_scaled`.

ΔW = scaling·B·A becomes (1 + α)·ΔW by its scaling alone, which is in the adapter's config, so that A and B are copied.
A tensor that the adapter stores whole is extrapolated from the one of SFT whose place it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from expo.checkpoint.folder import TensorInfo
from expo.errors import InputError
from expo.theta.adapter.names import tied_heads
from expo.theta.adapter.tensors import ADAPTER_WEIGHTS, PREFIX, Adapter, own_name
from expo.theta.plan import AdapterPlan, PairPlan, Segment, TensorPlan, keep_layout

SAVE_AGAIN = "load it with peft and save it again with save_pretrained"
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class ScaledPlan(AdapterPlan):
    """The plan of an adapter's one file; what is said of tensors is said of the model that it makes of SFT."""

    merged: PairPlan | None = None
    """The plan of that model."""

    @property
    def copied(self) -> tuple[int, float]:
        """As of the model."""
        return self._model.copied

    def tensor_counts(self) -> dict[str, int]:
        """As of the model."""
        return self._model.tensor_counts()

    @property
    def of(self) -> Adapter:
        """The adapter that is scaled."""
        assert self.adapter is not None
        return self.adapter

    def alphas_of(self, alpha: float) -> dict[str, float]:
        """The α of every module that has factors, by the adapter's names, where `alpha` is that of the output."""
        own = _own_alphas(self)
        return {module: own.get(_home(self, name), alpha) for module, name in self.of.modules.items()}

    @property
    def _model(self) -> PairPlan:
        assert self.merged is not None
        return self.merged


def plan_scaled(merged: PairPlan) -> ScaledPlan:
    """Decide what happens to every tensor of the adapter's file.

    Args:
        merged: The plan of the model that the adapter is to make of SFT.

    Raises:
        InputError: The adapter cannot be scaled.
    """
    adapter = merged.adapter
    assert adapter is not None
    _require_pefts_names(adapter)
    _require_scalable_rows(adapter)
    (shard,) = adapter.shards
    tensors = {info.name: _plan_tensor(info, merged, adapter) for info in shard.tensors}
    return ScaledPlan(
        merged.sft,
        merged.dpo,
        merged.settings,
        keep_layout([replace(shard, output_name=ADAPTER_WEIGHTS)], tensors),
        matches=merged.matches,
        vocabulary=merged.vocabulary,
        adapter=adapter,
        merged=merged,
    )


def _require_pefts_names(adapter: Adapter) -> None:
    """Refuse names that are read here and not by PEFT, which ignores such tensors."""
    (shard,) = adapter.shards
    for tensor in shard.tensors:
        is_factor = ".lora_" in tensor.name
        if tensor.name != PREFIX + own_name(shard.file, tensor) or (is_factor and not tensor.name.endswith(_FACTORS)):
            raise InputError(
                f"--as-adapter copies the tensors of {adapter.path.name}, and PEFT does not read one of the name "
                f"{tensor.name}: {SAVE_AGAIN}"
            )


def _require_scalable_rows(adapter: Adapter) -> None:
    """Refuse factors of an embedding with rows of its own, which are θ_dpo's, while one scaling is for all rows."""
    name = next((name for name in adapter.resized if name in adapter.low_rank), None)
    if name is not None:
        raise InputError(
            f"--as-adapter cannot scale {name}, of which the adapter {adapter.path.name} has another number of rows: "
            "write the merged checkpoint instead, without --as-adapter"
        )


def _plan_tensor(info: TensorInfo, merged: PairPlan, adapter: Adapter) -> TensorPlan:
    """A tensor as it is stored, or extrapolated from SFT's."""
    count = len(merged.settings.alphas)
    name = adapter.whole.get(info.name)
    home = None if name is None else _home(merged, name)
    if home is None or home in _excluded(merged):
        segments = [Segment("copy", info, None, (0.0,) * count, info.dtype, 0, info.nbytes)]
        return TensorPlan(info.name, info.dtype, info.shape, info.nbytes, tuple(segments))
    own = _own_alphas(merged).get(home)
    alphas = merged.settings.alphas if own is None else (own,) * count
    sft = merged.dpo.tensors[home]
    if home not in adapter.resized:
        segments = [Segment("extrapolate", info, sft, alphas, info.dtype, 0, info.nbytes)]
    else:
        common = min(adapter.resized[home])
        both, rest = info.rows(0, common), info.rows(common, info.shape[0])
        segments = [
            Segment("extrapolate", both, sft.rows(0, common), alphas, info.dtype, 0, both.nbytes),
            Segment("copy", rest, None, (0.0,) * count, info.dtype, both.nbytes, rest.nbytes),
        ]
    return TensorPlan(info.name, info.dtype, info.shape, info.nbytes, tuple(segments))


def _home(plan: PairPlan, name: str) -> str:
    """The tensor of the model by whose name an adapter's tensor is extrapolated: of a tied head its embedding."""
    if name in plan.dpo.tensors:
        return name
    return next((embedding for head, embedding in tied_heads(plan.dpo) if head == name), name)


def _own_alphas(plan: PairPlan) -> dict[str, float]:
    """Tensors with an α of their own."""
    return {name: match.alpha for match in plan.matches for name in match.names}


def _excluded(plan: PairPlan) -> set[str]:
    return {name for match in plan.matches if match.flag == "--exclude" for name in match.names}
