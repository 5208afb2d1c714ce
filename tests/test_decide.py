"""What is decided from headers: patterns with an α of their own, tied heads, vocabularies of different size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import CPU, as_bytes, plan, random_pair, share_off, stream, tensors_of
from torch import Tensor

from expo.errors import InputError
from expo.theta.plan import PairPlan, PairSettings
from expo.theta.sources import SourceFiles
from expo.theta.stream import Combiner

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config(**values: object) -> dict[str, str]:
    return {"config.json": json.dumps(values)}


def result(pair: PairPlan) -> dict[str, Tensor]:
    return tensors_of(pair, stream(pair)[0])


# --- patterns -----------------------------------------------------------------------------------------------------


NAMES = ("layers.0.attn.weight", "layers.0.mlp.weight", "layers.1.attn.weight", "norm.weight")


def test_an_alpha_of_ones_own(tmp_path: Path) -> None:
    sft, dpo = random_pair(dict.fromkeys(NAMES, (64, 65)))
    rules = {"alpha_for": (("attn", 2.0), (r"layers\.0", 0.25)), "exclude": ("norm",), "alphas": (0.5, 1.0)}
    pair = plan(tmp_path, sft, dpo, **rules)
    for outputs, alpha in zip(stream(pair), (0.5, 1.0), strict=True):
        tensors = tensors_of(pair, outputs)
        used = dict(zip(NAMES, (2.0, 0.25, 2.0, 0.0), strict=True))
        for name in NAMES[:3]:
            share_off(sft[name], dpo[name], used[name], tensors[name])
        assert as_bytes(tensors["norm.weight"]) == as_bytes(dpo["norm.weight"])
        assert alpha not in used.values()
    assert [(match.pattern, match.names) for match in pair.matches] == [
        ("norm", NAMES[3:]),
        ("attn", (NAMES[0], NAMES[2])),
        (r"layers\.0", (NAMES[1],)),
    ]


def test_a_tensor_with_an_alpha_of_its_own_is_the_same_as_with_that_alpha_for_all(tmp_path: Path) -> None:
    sft, dpo = random_pair(dict.fromkeys(NAMES, (31, 7)))
    own = result(plan(tmp_path / "own", sft, dpo, alpha_for=((".", 0.7),)))
    everywhere = result(plan(tmp_path / "all", sft, dpo, alphas=(0.7,)))
    assert {name: as_bytes(tensor) for name, tensor in own.items()} == {
        name: as_bytes(tensor) for name, tensor in everywhere.items()
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"exclude": ("nothing",)}, r"--exclude 'nothing' matches no tensor$"),
        ({"alpha_for": (("nothing", 1.0),)}, r"--alpha-for 'nothing' matches no tensor$"),
        (
            {"alpha_for": (("attn", 1.0), (r"0\.attn", 2.0))},
            r"--alpha-for '0\\\.attn' matches no tensor beyond those of earlier patterns",
        ),
        (
            {"exclude": ("norm",), "alpha_for": (("norm", 1.0),)},
            r"--alpha-for 'norm' matches no tensor beyond those of earlier",
        ),
    ],
)
def test_a_pattern_that_takes_nothing_is_an_error(tmp_path: Path, rules: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tmp_path, *random_pair(dict.fromkeys(NAMES, (3,))), **rules)


# --- tied heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, None])
@pytest.mark.parametrize("stores", ["sft", "dpo"])
def test_a_head_stored_on_one_side_is_the_embedding(tmp_path: Path, stores: str, flag: bool | None) -> None:
    sft, dpo = random_pair({EMBEDDING: (300, 70), "norm": (5,)})
    side = {"sft": sft, "dpo": dpo}[stores]
    side[HEAD] = side[EMBEDDING].clone()
    files = config() if flag is None else config(tie_word_embeddings=flag)
    pair = plan(tmp_path, sft, dpo, files=files)
    assert pair.dropped == ()
    tensors = result(pair)
    assert tensors.keys() == dpo.keys()
    for name in tensors:
        share_off(sft[EMBEDDING] if name == HEAD else sft[name], dpo[name], 0.5, tensors[name])
    check_equal(pair)


def check_equal(pair: PairPlan) -> None:
    with SourceFiles(pair.sft, pair.dpo) as sources:
        Combiner(sources, PairSettings(alphas=()), CPU, 2).run([(segment, 0) for segment in pair.equal], [])


@pytest.mark.parametrize("stores", ["sft", "dpo"])
def test_a_head_that_is_not_its_embedding_is_refused(tmp_path: Path, stores: str) -> None:
    sft, dpo = random_pair({EMBEDDING: (300, 70)})
    side = {"sft": sft, "dpo": dpo}[stores]
    side[HEAD] = side[EMBEDDING].clone()
    side[HEAD][299, 69] += 1
    pair = plan(tmp_path, sft, dpo, files=config(tie_word_embeddings=True))
    with pytest.raises(InputError, match=f"the head {HEAD} is stored on one side only, where it differs from"):
        check_equal(pair)


@pytest.mark.parametrize("stores", ["sft", "dpo"])
def test_a_head_of_another_size_than_its_embedding_is_refused(tmp_path: Path, stores: str) -> None:
    sft, dpo = random_pair({EMBEDDING: (300, 70)})
    side = {"sft": sft, "dpo": dpo}[stores]
    side[HEAD] = side[EMBEDDING][:299].clone()
    with pytest.raises(InputError, match=f"that differ in size from their tied embedding: {HEAD}"):
        plan(tmp_path, sft, dpo, files=config(tie_word_embeddings=True))


def test_an_excluded_head_is_dpos_whatever_it_holds(tmp_path: Path) -> None:
    sft, dpo = random_pair({EMBEDDING: (300, 70)})
    dpo[HEAD] = dpo[EMBEDDING] + 1
    pair = plan(tmp_path, sft, dpo, exclude=("lm_head",))
    assert pair.equal == ()
    assert as_bytes(result(pair)[HEAD]) == as_bytes(dpo[HEAD])


def test_a_model_that_does_not_tie_must_have_its_head(tmp_path: Path) -> None:
    sft, dpo = random_pair({EMBEDDING: (30, 7)})
    dpo[HEAD] = dpo[EMBEDDING].clone()
    with pytest.raises(InputError, match=f"missing in SFT .*: {HEAD}"):
        plan(tmp_path, sft, dpo, files=config(tie_word_embeddings=False))
    with pytest.raises(InputError, match=f"missing in SFT .*: {HEAD}"):
        plan(tmp_path / "nested", sft, dpo, files=config(text_config={"tie_word_embeddings": False}))


# --- vocabularies -------------------------------------------------------------------------------------------------


def sized(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (rows, 70), HEAD: (rows, 70), "model.norm.weight": (70,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("sft_rows", "dpo_rows"), [(300, 303), (303, 300)])
def test_common_rows_are_extrapolated(tmp_path: Path, sft_rows: int, dpo_rows: int, nested: bool) -> None:
    sft, dpo = sized(sft_rows, 1), sized(dpo_rows, 2)
    files = [{"vocab_size": rows, "tie_word_embeddings": False} for rows in (sft_rows, dpo_rows)]
    files = [config(**({"text_config": values} if nested else values)) for values in files]
    with pytest.raises(InputError, match=r"the vocabularies differ in size: pass --vocab common .* \[30[03], 70\] ≠"):
        plan(tmp_path / "error", sft, dpo, files=files)
    pair = plan(tmp_path / "common", sft, dpo, files=files, common_vocabulary=True, dtype="float32")
    tensors = result(pair)
    for name, tensor in tensors.items():
        assert tensor.shape == dpo[name].shape
        assert tensor.dtype == torch.float32
        common = min(len(sft[name]), len(dpo[name]))
        share_off(sft[name][:common], dpo[name][:common], 0.5, tensor[:common])
        assert torch.equal(tensor[common:], dpo[name][common:].float())
    assert pair.vocabulary is not None
    assert (pair.vocabulary.sft, pair.vocabulary.dpo, pair.vocabulary.common) == (sft_rows, dpo_rows, 300)


@pytest.mark.parametrize("shapes", [((300, 70), (303, 71)), ((300,), (303, 1)), ((70, 300), (70, 303))])
def test_other_differences_are_not_the_vocabularys(tmp_path: Path, shapes: tuple[tuple[int, ...], ...]) -> None:
    sides = [{EMBEDDING: torch.zeros(shape)} for shape in shapes]
    files = [config(vocab_size=rows) for rows in (300, 303)]
    with pytest.raises(InputError, match="shapes differ"):
        plan(tmp_path, *sides, files=files, common_vocabulary=True)


def test_equal_vocabularies_need_nothing(tmp_path: Path) -> None:
    pair = plan(tmp_path, sized(300, 1), sized(300, 2), files=config(vocab_size=300), common_vocabulary=True)
    assert pair.vocabulary is None


# --- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 100, 250, 10_000])
@pytest.mark.parametrize("shards", [1, 3])
def test_resharding_changes_nothing_but_the_files(tmp_path: Path, shards: int, limit: int) -> None:
    sft, dpo = random_pair({f"t{number}": (number + 1, 11) for number in range(6)})
    kept = plan(tmp_path / "kept", sft, dpo, shards=(1, shards))
    moved = plan(tmp_path / "moved", sft, dpo, shards=(1, shards), max_shard_bytes=limit)
    assert {n: as_bytes(t) for n, t in result(kept).items()} == {n: as_bytes(t) for n, t in result(moved).items()}
    for shard in moved.shards:
        size = sum(tensor.nbytes for tensor in shard.tensors)
        assert size <= limit or len(shard.tensors) == 1
        assert len(shard.header) % 8 == 0
    names = [shard.name for shard in moved.shards]
    count = len(names)
    expected = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert names == (expected if count > 1 else ["model.safetensors"])
    assert moved.is_single_file == (count == 1)
