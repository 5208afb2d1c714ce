"""θ(α) tensor by tensor: bit for bit what `expo extrapolate` writes, refused where that is refused."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import CASES
from helpers import as_bytes, random_pair, read_checkpoint_tensors, write, write_checkpoint
from hypothesis import HealthCheck, given, settings, strategies as st
from sizes import sized
from torch import Tensor

from expo.config import ThetaConfig
from expo.errors import InputError
from expo.theta import stream
from expo.theta.pair import plan_theta
from expo.theta.tensors import Theta

Tensors = dict[str, Tensor]

TIES = {"config.json": '{"tie_word_embeddings": true}'}
SIZED = [{"config.json": f'{{"vocab_size": {size}}}'} for size in (5, 8)]
SHAPES = {"model.embed_tokens.weight": (40, 8), "layers.0.mlp": (9, 31), "norm": (8,), "scalar": (), "empty": (0, 3)}


def theta_of(pair: tuple[Path, Path], alpha: float = 0.5, **rules: object) -> Theta:
    return Theta(plan_theta(ThetaConfig(sft=str(pair[0]), dpo=str(pair[1]), alpha=alpha, **rules)).pair)


def contents(tensors: Tensors) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (values.dtype, values.shape, as_bytes(values)) for name, values in tensors.items()}


def check(pair: tuple[Path, Path], folder: Path, alpha: float = 0.5, **rules: object) -> Tensors:
    """Compare what is streamed, in order and by name, with what is written."""
    write(pair, folder, alpha, **rules)
    written = contents(read_checkpoint_tensors(folder))
    with theta_of(pair, alpha, **rules) as theta:
        streamed = dict(theta)
        assert contents(streamed) == written
        assert contents({name: theta.tensor(name) for name in sorted(written, reverse=True)}) == written
    return streamed


def write_bin(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


# --- laws ---------------------------------------------------------------------------------------------------------


def mixed() -> tuple[Tensors, Tensors]:
    """Every floating-point type, on both sides, and what is copied."""
    sft, dpo = random_pair(SHAPES, torch.float32)
    for side, order in ((sft, 1), (dpo, -1)):
        types = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bfloat16][::order]
        side.update({name: values.to(dtype) for (name, values), dtype in zip(side.items(), types, strict=True)})
        side |= {"i64": torch.arange(7), "mask": torch.tensor([True, False]), "u8": torch.arange(300).to(torch.uint8)}
    return sft, dpo


def pair_of(tmp_path: Path, case: str) -> tuple[tuple[Path, Path], dict[str, object]]:
    sft, dpo = random_pair(SHAPES)
    if case == "mixed types":
        sft, dpo = mixed()
    if case == "head of SFT only":
        return _written(tmp_path, {**sft, "lm_head.weight": sft["model.embed_tokens.weight"].clone()}, dpo, TIES), {}
    if case == "head of DPO only":
        return _written(tmp_path, sft, {**dpo, "lm_head.weight": dpo["model.embed_tokens.weight"].clone()}, TIES), {}
    if case == "common vocabulary":
        sft, dpo = (side | {"wte.weight": torch.randn(size, 4)} for side, size in ((sft, 5), (dpo, 8)))
        pair = (
            write_checkpoint(tmp_path / "sft", sft, files=SIZED[0]),
            write_checkpoint(tmp_path / "dpo", dpo, files=SIZED[1]),
        )
        return pair, {"vocab": "common"}
    if case == ".bin":
        return (write_bin(tmp_path / "sft", sft), write_bin(tmp_path / "dpo", dpo)), {"allow_pickle": True}
    if case == "rules":
        rules = {"alpha_for": ("mlp=2.5",), "exclude": ("^norm$",), "missing": "copy-dpo"}
        return _written(tmp_path, sft, {**dpo, "more": torch.randn(3)}), rules
    if case == "not finite":
        dpo["norm"][2] = torch.inf
        return _written(tmp_path, sft, dpo), {"allow_nonfinite": True}
    return _written(tmp_path, sft, dpo), {}


def _written(tmp_path: Path, sft: Tensors, dpo: Tensors, files: dict[str, str] | None = None) -> tuple[Path, Path]:
    return (
        write_checkpoint(tmp_path / "sft", sft, files=files),
        write_checkpoint(tmp_path / "dpo", dpo, shards=3, files=files),
    )


CASES_OF_PAIRS = ("plain", "mixed types", "head of SFT only", "head of DPO only", "common vocabulary", ".bin", "rules")


@pytest.mark.parametrize("case", [*CASES_OF_PAIRS, "not finite"])
def test_what_is_streamed_is_what_is_written(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CPU_PIECE_BYTES", 160)  # many pieces per tensor
    pair, rules = pair_of(tmp_path, case)
    check(pair, tmp_path / "out", **rules)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "saved modules", "embedding", "fan-in fan-out", "trained biases"])
def test_an_adapter_is_streamed_as_it_is_written(
    tmp_path: Path, made: Callable[..., tuple[Path, Path]], case: str
) -> None:
    check(made(CASES[case], torch.bfloat16), tmp_path / "out", 1.5)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pair_and_any_alpha(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    alpha = data.draw(st.floats(-4, 4))
    folder = tmp_path_factory.mktemp("any")
    sft, dpo = random_pair({"w": (3, 5), **{f"t{number}": shape for number, shape in enumerate(shapes)}}, dtype)
    check(_written(folder, sft, {**dpo, "w": dpo["w"] + 1}), folder / "out", alpha)


def test_alpha_0_is_dpo(tmp_path: Path) -> None:
    pair, _ = pair_of(tmp_path, "plain")
    with theta_of(pair, 0.0) as theta:
        assert contents(dict(theta)) == contents(read_checkpoint_tensors(pair[1]))


def test_threads_get_the_tensors_they_ask_for(tmp_path: Path) -> None:
    pair, _ = pair_of(tmp_path, "plain")
    with theta_of(pair) as theta:
        expected = contents(dict(theta))
        found: list[Tensors] = []
        names = list(theta.names) * 8
        threads = [
            threading.Thread(target=lambda: found.extend({name: theta.tensor(name)} for name in names))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 * len(names)
    for one in found:
        assert contents(one).items() <= expected.items()


def test_tensors_are_apart_and_may_be_changed(tmp_path: Path) -> None:
    pair, _ = pair_of(tmp_path, "plain")
    with theta_of(pair) as theta:
        first = theta.tensor("layers.0.mlp")
        before = as_bytes(first)
        first.zero_()
        assert as_bytes(theta.tensor("layers.0.mlp")) == before


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "device"])
def test_what_the_engine_has_set_changes_nothing(tmp_path: Path, around: Callable[..., object]) -> None:
    pair, _ = pair_of(tmp_path, "plain")
    with theta_of(pair) as theta:
        expected = contents(dict(theta))
    with around(), theta_of(pair) as theta:  # type: ignore[attr-defined]
        found = dict(theta)
    assert contents(found) == expected


def test_nothing_of_the_model_is_kept(tmp_path: Path) -> None:
    """The memory of a tensor that the engine has let go is free."""
    plan = _written(tmp_path, *random_pair({f"t{number}": (64, 1024) for number in range(sized(ci=6, full=40))}))
    with theta_of(plan) as theta:
        before = _tensors_alive()
        for _, values in theta:
            assert any(one is values for one in _tensors_alive())
            del values
        kept = {id(one) for one in before}
        assert [one.shape for one in _tensors_alive() if id(one) not in kept and one.shape == (64, 1024)] == []


def test_at_most_one_tensor_is_computed_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = pair_of(tmp_path, "plain")
    computed: list[str] = []
    compute = Theta.tensor

    def tensor(theta: Theta, name: str) -> torch.Tensor:
        computed.append(name)
        return compute(theta, name)

    monkeypatch.setattr(Theta, "tensor", tensor)
    with theta_of(pair) as theta:
        for taken, _ in enumerate(theta, start=1):
            assert taken <= len(computed) <= taken + 1
        assert tuple(computed) == theta.names


def test_a_caller_may_leave_early(tmp_path: Path) -> None:
    pair, _ = pair_of(tmp_path, "plain")
    with theta_of(pair) as theta:
        expected = contents(dict(theta))
        tensors = iter(theta)
        next(tensors)
        tensors.close()  # type: ignore[attr-defined]
        assert contents(dict(theta)) == expected


def _tensors_alive() -> list[torch.Tensor]:
    return [one for one in gc.get_objects() if type(one) is torch.Tensor]


# --- refusals -----------------------------------------------------------------------------------------------------


def break_values(sft: Tensors, dpo: Tensors) -> None:
    dpo["norm"][1] = torch.nan


def break_integers(sft: Tensors, dpo: Tensors) -> None:
    sft["count"], dpo["count"] = torch.tensor([1]), torch.tensor([2])


def break_change(sft: Tensors, dpo: Tensors) -> None:
    dpo.update({name: values.clone() for name, values in sft.items()})


def break_head(sft: Tensors, dpo: Tensors) -> None:
    dpo["lm_head.weight"] = dpo["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_values, "tensor norm contains NaN or infinity"),
        (break_integers, "tensor count differs between SFT and DPO"),
        (break_change, "SFT and DPO have the same weights"),
        (break_head, "the head lm_head.weight is stored on one side only"),
    ],
)
def test_what_extrapolate_refuses_is_refused(
    tmp_path: Path, spoil: Callable[[Tensors, Tensors], None], message: str
) -> None:
    sft, dpo = random_pair(SHAPES)
    spoil(sft, dpo)
    pair = _written(tmp_path, sft, dpo, TIES)
    with pytest.raises(InputError, match=message):
        write(pair, tmp_path / "out")
    with pytest.raises(InputError, match=message), theta_of(pair) as theta:
        list(theta)


def test_a_type_that_torch_does_not_have_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    from helpers import entry, raw_safetensors

    for side in ("sft", "dpo"):
        header = {"a": entry("F4", [4], 0, 2), "b": entry("BF16", [1], 2, 4)}
        raw_safetensors(tmp_path / side / "model.safetensors", header, b"\1\2\0\0")
        (tmp_path / side / "config.json").write_text("{}")
    with pytest.raises(InputError, match="a has type F4, which torch does not support"):
        theta_of((tmp_path / "sft", tmp_path / "dpo"), exclude=("a",))
