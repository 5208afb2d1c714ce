"""The plan of a pair, and the stream of θ(α) pieces against the same arithmetic in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    Memory,
    as_bytes,
    entry,
    plan,
    random_pair,
    raw_safetensors,
    share_off,
    stream,
    tensors_of,
    write_checkpoint,
)
from hypothesis import given, settings, strategies as st

from expo.checkpoint.folder import read_checkpoint
from expo.errors import EnvironmentFailure, InputError
from expo.theta import stream as streaming, workers
from expo.theta.decide import plan_pair
from expo.theta.plan import PairSettings
from expo.theta.rules.linear import combine
from expo.theta.sources import SourceFiles
from expo.theta.stream import Combiner

SHAPES = {"scalar": (), "empty": (0, 3), "one": (1,), "odd": (7, 11), "big": (3, 300_001)}
"""`big` is two pieces of 16-bit values, the second one short."""


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_streamed_equals_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    sft, dpo = random_pair(SHAPES, dtype)
    alphas = (0.3, -1.0, 0.0, 8.0)
    pair = plan(tmp_path, sft, dpo, shards=(2, 3), alphas=alphas)
    for alpha, shards in zip(alphas, stream(pair), strict=True):
        results = tensors_of(pair, shards)
        assert results.keys() == dpo.keys()
        for name, tensor in results.items():
            expected = combine(sft[name], dpo[name], alpha, torch.empty_like(dpo[name])) if alpha else dpo[name]
            assert as_bytes(tensor) == as_bytes(expected), (name, alpha)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=5),
    sft_dtype=st.sampled_from(list(DTYPES)),
    dpo_dtype=st.sampled_from(list(DTYPES)),
    out_dtype=st.sampled_from(["auto", *DTYPES]),
    alpha=st.floats(-5, 30),
    shards=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    piece_bytes=st.sampled_from([4, 12, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_any_shapes_types_and_layouts(
    shapes: list[tuple[int, ...]],
    sft_dtype: str,
    dpo_dtype: str,
    out_dtype: str,
    alpha: float,
    shards: tuple[int, int],
    piece_bytes: int,
    seed: int,
) -> None:
    named = {f"t{number}": shape for number, shape in enumerate(shapes)}
    sft, dpo = random_pair(named, torch.float32, seed)
    sft, dpo = ({n: t.to(DTYPES[d]) for n, t in side.items()} for side, d in ((sft, sft_dtype), (dpo, dpo_dtype)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CPU_PIECE_BYTES", piece_bytes)
        layouts = tuple(min(number, len(shapes)) for number in shards)
        pair = plan(Path(folder), sft, dpo, shards=layouts, alphas=(alpha,), dtype=out_dtype)
        results = tensors_of(pair, stream(pair, workers=1)[0])
    assert list(results) == sorted(results, key=list(results).index)
    for name, tensor in results.items():
        assert tensor.shape == dpo[name].shape
        if tensor.numel():
            assert tensor.dtype == DTYPES[dpo_dtype if out_dtype == "auto" else out_dtype]
            if alpha != 0:
                share_off(sft[name], dpo[name], alpha, tensor)


def test_pieces_cover_every_byte_once_in_order(tmp_path: Path) -> None:
    sft, dpo = random_pair(SHAPES, torch.bfloat16)
    mixed = {name: tensor.float() for name, tensor in sft.items()}
    pair = plan(tmp_path, mixed, dpo)
    (shard,) = pair.shards
    position = len(shard.header)
    for piece in workers.pieces(shard.segments(), 1 << 20):
        assert piece.offset == position
        assert 0 < piece.length <= (1 << 20) // 4, "the float32 side must fit too"
        position += 2 * piece.length
    assert position == shard.nbytes


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    pair = plan(tmp_path, *random_pair({"a": (1000, 1700), "b": (33,)}))
    assert stream(pair, workers=1) == stream(pair, workers=7)


def test_buffers_are_copied_and_must_be_equal(tmp_path: Path) -> None:
    buffers = {"ids": torch.arange(5), "mask": torch.tensor([True, False])}
    sft, dpo = random_pair({"w": (4,)})
    pair = plan(tmp_path / "equal", {**sft, **buffers}, {**dpo, **buffers})
    assert (pair.count("extrapolate"), pair.count("match")) == (1, 2)
    results = tensors_of(pair, stream(pair)[0])
    assert torch.equal(results["ids"], buffers["ids"])
    assert torch.equal(results["mask"], buffers["mask"])

    other = {**buffers, "ids": torch.arange(5).flip(0)}
    pair = plan(tmp_path / "different", {**sft, **other}, {**dpo, **buffers})
    with pytest.raises(InputError, match=r"I64 tensor ids differs .* --exclude '\^ids\$' copies it"):
        stream(pair)
    pair = plan(tmp_path / "excluded", {**sft, **other}, {**dpo, **buffers}, exclude=("^ids$",))
    assert torch.equal(tensors_of(pair, stream(pair)[0])["ids"], buffers["ids"])


def test_excluded_tensors_are_dpos_bytes_whatever_they_hold(tmp_path: Path) -> None:
    strange = torch.tensor([0x8000, 0x0001, 0x7FC1, 0x7F80, 0xFFFF, 0x807F], dtype=torch.uint16).view(torch.bfloat16)
    sft, dpo = random_pair({"w": (6,)})
    pair = plan(tmp_path, {**sft, "x": dpo["w"]}, {**dpo, "x": strange}, exclude=("^x$",))
    assert as_bytes(tensors_of(pair, stream(pair)[0])["x"]) == as_bytes(strange)


def test_missing_tensors_and_excluded_ones_need_no_partner(tmp_path: Path) -> None:
    sft, dpo = random_pair({"w": (6,), "head": (4,)})
    del sft["head"]
    for rules_ in ({"copy_missing": True}, {"exclude": ("head",)}):
        pair = plan(tmp_path / str(len(rules_)), sft, dpo, **rules_)
        assert as_bytes(tensors_of(pair, stream(pair)[0])["head"]) == as_bytes(dpo["head"])
    with pytest.raises(InputError, match="missing in SFT"):
        plan(tmp_path / "refused", sft, dpo)


def test_all_mismatches_come_in_one_message(tmp_path: Path) -> None:
    sft, dpo = random_pair({"same": (2,), "shape": (2, 3), "type": (4,), "only_dpo": (1,)})
    sft["shape"] = torch.zeros(3, 2, dtype=torch.bfloat16)
    sft["type"] = torch.zeros(4, dtype=torch.int32)
    sft["only_sft"] = sft.pop("only_dpo")
    with pytest.raises(InputError) as caught:
        plan(tmp_path, sft, dpo)
    message = str(caught.value)
    for part in (
        "1 of SFT (such as only_sft) and 1 of DPO (such as only_dpo)",
        "shape [3, 2] ≠ [2, 3]",
        "type I32, BF16",
    ):
        assert part in message
    assert "same " not in message.replace("the same", "")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    sft, dpo = random_pair({f"t{number}": (2,) for number in range(10)})
    with pytest.raises(InputError, match=r"missing in SFT .*: t1, t2, t3 and 6 more$"):
        plan(tmp_path, {"t0": sft["t0"]}, dpo)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"format": "int-quantized"}}, "unknown"),
        ({"quantization_config": "awq"}, "unknown"),
    ],
)
def test_quantized_checkpoints_are_refused_by_method(tmp_path: Path, config: dict[str, object], method: str) -> None:
    sft, dpo = random_pair({"w": (2,)})
    sides = [write_checkpoint(tmp_path / name, side) for name, side in (("sft", sft), ("dpo", dpo))]
    (sides[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"dpo is quantized \({method}\); extrapolate the unquantized"):
        plan_pair(*map(read_checkpoint, sides), PairSettings(alphas=(0.5,)))


@pytest.mark.parametrize("name", ["mlp.qweight", "mlp.weight.absmax", "mlp.SCB", "mlp.weight_scale_inv"])
def test_quantized_checkpoints_are_known_by_their_tensors(tmp_path: Path, name: str) -> None:
    sft, dpo = random_pair({"w": (2,), name: (2,)})
    with pytest.raises(InputError, match=rf"sft is quantized \(it contains {name}\)"):
        plan(tmp_path, sft, dpo)


def test_eight_bit_floats_are_no_numbers_to_extrapolate(tmp_path: Path) -> None:
    for side in ("sft", "dpo"):
        raw_safetensors(tmp_path / side / "model.safetensors", {"w": entry("F8_E4M3", [4], 0, 4)}, bytes(4))
    sides = [read_checkpoint(tmp_path / side) for side in ("sft", "dpo")]
    with pytest.raises(
        InputError, match=r"dtypes that cannot be combined \(--exclude copies tensors from DPO\): w F8_E4M3"
    ):
        plan_pair(*sides, PairSettings(alphas=(0.5,)))
    pair = plan_pair(*sides, PairSettings(alphas=(0.5,), exclude=("w",)))
    assert stream(pair)[0]["model.safetensors"] == (tmp_path / "dpo" / "model.safetensors").read_bytes()


def test_the_header_and_its_metadata_stay_dpos(tmp_path: Path) -> None:
    sft, dpo = random_pair({"w": (6,), "v": (4, 4)})
    write_checkpoint(tmp_path / "dpo", dpo, metadata={"format": "pt", "note": "kept"})
    write_checkpoint(tmp_path / "sft", sft)
    sides = [read_checkpoint(tmp_path / side) for side in ("sft", "dpo")]
    kept = plan_pair(*sides, PairSettings(alphas=(0.5,)))
    assert kept.shards[0].header == sides[1].shards[0].header
    wider = plan_pair(*sides, PairSettings(alphas=(0.5,), dtype="float32"))
    header = json.loads(wider.shards[0].header[8:])
    assert header.pop("__metadata__") == {"format": "pt", "note": "kept"}
    assert {item["dtype"] for item in header.values()} == {"F32"}
    assert len(wider.shards[0].header) % 8 == 0
    assert wider.nbytes == len(wider.shards[0].header) + 4 * 22


@pytest.mark.parametrize("action", ["copy", "extrapolate"])
def test_a_result_that_overflows_is_refused_or_written(tmp_path: Path, action: str) -> None:
    sft = {"w": torch.tensor([1.0, -60000.0])}
    dpo = {"w": torch.tensor([1.0, 60000.0 if action == "extrapolate" else 70000.0])}
    exclude = ("w",) if action == "copy" else ()
    pair = plan(tmp_path / "no", sft, dpo, dtype="float16", exclude=exclude)
    with pytest.raises(InputError, match=r"tensor w contains NaN or infinity .* too large for F16"):
        stream(pair)
    pair = plan(tmp_path / "yes", sft, dpo, dtype="float16", exclude=exclude, allow_nonfinite=True)
    assert tensors_of(pair, stream(pair)[0])["w"].tolist() == [1.0, float("inf")]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_norms_add_up_over_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    sft, dpo = random_pair({"big": (5, 600_001), "small": (70, 3), "ids": (5,)}, dtype)
    sft["ids"] = dpo["ids"] = torch.arange(5)
    pair = plan(tmp_path, sft, dpo, alphas=())
    with SourceFiles(pair.sft, pair.dpo) as sources:
        combiner = Combiner(sources, pair.settings, CPU, 2, exact_norms=True)
        told: list[int] = []
        found = combiner.run(pair.shards[0].segments(), [], told.append)
        assert sum(told) == sum(tensor.nbytes for tensor in pair.shards[0].tensors), "progress without sinks too"
    for name in ("big", "small"):
        s, d = (side[name].double() for side in (sft, dpo))
        expected = [float((side**2).sum()) for side in (d - s, s, d)]
        mine = streaming.total_norms(norms for segment, norms in found if segment.dpo.name == name)
        assert list(mine[:3]) == pytest.approx(expected, rel=2e-4 if dtype == torch.bfloat16 else 1e-5)


class Failing(Memory):
    """A sink that fails at its third piece."""

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        if number == 2:
            raise EnvironmentFailure("the disk is full")
        super().put(number, offset, data, done)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_sink_that_fails_ends_the_run(tmp_path: Path, workers: int) -> None:
    pair = plan(tmp_path, *random_pair({"w": (40, 1 << 18)}))
    with SourceFiles(pair.sft, pair.dpo) as sources:
        combiner = Combiner(sources, pair.settings, CPU, workers)
        with pytest.raises(EnvironmentFailure, match="the disk is full"):
            combiner.run(pair.shards[0].segments(), [Failing(pair.shards[0].nbytes)])


class Late(Memory):
    """A sink that keeps every piece back until no further buffer is to be had."""

    def __init__(self, nbytes: int, keep: int) -> None:
        super().__init__(nbytes)
        self.kept: list[Callable[[], None]] = []
        self.keep = keep

    def put(self, number: int, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        super().put(number, offset, data, lambda: self.kept.append(done))
        while len(self.kept) > self.keep:
            self.kept.pop()()


def test_sinks_may_keep_buffers(tmp_path: Path) -> None:
    pair = plan(tmp_path, *random_pair({"w": (40, 1 << 18)}))
    with SourceFiles(pair.sft, pair.dpo) as sources:
        sink = Late(pair.shards[0].nbytes, keep=3)
        Combiner(sources, pair.settings, CPU, 2).run(pair.shards[0].segments(), [sink])
    sink.check(pair.shards[0].nbytes - len(pair.shards[0].header))


def test_memory_is_bounded_whatever_the_number_of_alphas(tmp_path: Path) -> None:
    pair = plan(tmp_path, *random_pair({"w": (4, 1 << 18)}), alphas=tuple(float(a) for a in range(1, 201)))
    with SourceFiles(pair.sft, pair.dpo) as sources:
        combiner = Combiner(sources, pair.settings, CPU, 4)
        buffers = sum(len(out.buffers) for out in combiner._workers._outputs)
        assert buffers * combiner._piece_bytes <= streaming.MAX_OUTPUT_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, -1.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cuda_obeys_the_same_law(tmp_path: Path, dtype: torch.dtype, alpha: float) -> None:
    sft, dpo = random_pair(SHAPES, dtype)
    pair = plan(tmp_path, sft, dpo, alphas=(alpha,))
    for name, tensor in tensors_of(pair, stream(pair, device=torch.device("cuda"))[0]).items():
        if alpha == 0:
            assert as_bytes(tensor) == as_bytes(dpo[name])
        elif tensor.numel():
            share_off(sft[name], dpo[name], alpha, tensor)
