"""A pair measured: figures against float64, what does not match, faults, the picture, and the program."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    entry,
    environment,
    mounted,
    random_pair,
    raw_safetensors,
    read_checkpoint_tensors,
    run_expo,
    tree,
    write_checkpoint,
)
from made_inputs import on_real_inputs_too
from PIL import Image
from torch import Tensor

from expo.cli import program as cli
from expo.config import ExtrapolateConfig, InspectConfig
from expo.errors import EnvironmentFailure, InputError
from expo.output.findings import Inspection
from expo.theta.sources import SourceFiles
from expo.verbs import extrapolate, inspect as verb

SHAPES = {
    "model.embed_tokens.weight": (300, 70),
    "model.layers.0.mlp.up_proj.weight": (3, 300_001),
    "model.layers.0.norm.weight": (70,),
    "model.layers.1.mlp.up_proj.weight": (5, 7),
    "model.layers.1.norm.weight": (),
    "model.layers.1.empty": (0, 3),
}
"""The largest is two pieces of 16-bit values, the second one short."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config(**values: object) -> dict[str, str]:
    return {"config.json": json.dumps(values)}


def inspect(
    tmp_path: Path,
    sft: dict[str, Tensor],
    dpo: dict[str, Tensor],
    *,
    shards: tuple[int, int] = (1, 1),
    files: tuple[dict[str, str] | None, dict[str, str] | None] = (None, None),
    **settings: object,
) -> Inspection:
    write_checkpoint(tmp_path / "sft", sft, shards=shards[0], files=files[0])
    write_checkpoint(tmp_path / "dpo", dpo, shards=shards[1], files=files[1])
    return again(tmp_path, **settings)


def again(tmp_path: Path, **settings: object) -> Inspection:
    return verb.run(InspectConfig(sft=str(tmp_path / "sft"), dpo=str(tmp_path / "dpo"), **settings))


def exact(sft: Tensor, dpo: Tensor) -> tuple[float, float]:
    """‖Δ‖/‖θ_sft‖ and 1 − cos in float64."""
    s, d = (side.double().numpy().ravel() for side in (sft, dpo))
    units = s / np.linalg.norm(s) - d / np.linalg.norm(d)
    return float(np.linalg.norm(d - s) / np.linalg.norm(s)), float(units @ units) / 2


# --- figures ------------------------------------------------------------------------------------------------------

PAIRS = [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("float32", "bfloat16")]


@pytest.mark.parametrize("dtypes", [*PAIRS, ("bfloat16", "float16")], ids="-".join)
def test_figures_are_those_of_float64(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    sft, dpo = random_pair(SHAPES, torch.float32)
    sft, dpo = ({n: t.to(DTYPES[d]) for n, t in side.items()} for side, d in zip((sft, dpo), dtypes, strict=True))
    found = inspect(tmp_path, sft, dpo, shards=(2, 3))
    tolerance = 5e-4 if dtypes == ("bfloat16", "bfloat16") else 1e-5
    assert [one.name for one in found.tensors] != list(SHAPES), "in DPO's order, which has three shards"
    assert {one.name for one in found.tensors} == set(SHAPES)
    for one in found.tensors:
        if dpo[one.name].numel():
            relative, distance = exact(sft[one.name], dpo[one.name])
            assert one.figures.relative == pytest.approx(relative, rel=tolerance)
            assert one.figures.one_minus_cosine == pytest.approx(distance, rel=10 * tolerance, abs=1e-7)
    everything = [torch.cat([side[name].double().ravel() for name in SHAPES]) for side in (sft, dpo)]
    relative, distance = exact(*everything)
    assert found.total.relative == pytest.approx(relative, rel=tolerance)
    assert found.total.one_minus_cosine == pytest.approx(distance, rel=10 * tolerance)
    assert (found.total.tensors, found.total.identical, found.suits) == (6, 1, "likely")


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_small_angles_are_told(tmp_path: Path, step: float) -> None:
    sft = {"w": torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))}
    dpo = {"w": sft["w"] + step * torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))}
    figures = inspect(tmp_path, sft, dpo).total
    assert figures.one_minus_cosine == pytest.approx(exact(sft["w"], dpo["w"])[1], rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_pair_with_itself_is_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    sft, _ = random_pair(SHAPES, dtype)
    found = inspect(tmp_path, sft, sft, shards=(1, 2))
    assert (found.suits, found.total.relative, found.total.identical) == ("identical", 0.0, len(SHAPES))


def test_one_changed_value_is_a_change(tmp_path: Path) -> None:
    sft, _ = random_pair(SHAPES)
    dpo = {name: tensor.clone() for name, tensor in sft.items()}
    dpo["model.layers.0.mlp.up_proj.weight"][2, -1] += 0.5
    found = inspect(tmp_path, sft, dpo)
    assert (found.suits, found.total.identical) == ("likely", len(SHAPES) - 1)


def test_the_total_is_the_one_in_the_manifest(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    sft, dpo = map(str, pair)
    extrapolate.run(ExtrapolateConfig(sft=sft, dpo=dpo, alpha=(0.5,), output=str(tmp_path / "out")))
    figures = verb.run(InspectConfig(sft=sft, dpo=dpo)).total.describe()
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())["delta"]
    assert [figures[name] for name in ("relative", "delta_norm", "sft_norm")] == pytest.approx(
        [manifest[name] for name in ("relative", "norm", "sft_norm")], rel=1e-12
    )


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    first = inspect(tmp_path, *random_pair(SHAPES), workers=1)
    assert again(tmp_path, workers=5).describe() == first.describe()


@on_real_inputs_too
def test_the_trained_pair_looks_as_it_should(trained: Path) -> None:
    found = verb.run(InspectConfig(sft=str(trained / "tiny-sft"), dpo=str(trained / "tiny-dpo")))
    assert found.suits == "likely"
    layers = json.loads((trained / "tiny-sft" / "config.json").read_text())["num_hidden_layers"]
    tensors = read_checkpoint_tensors(trained / "tiny-sft")
    assert (list(found.layers), found.total.tensors) == (list(range(layers)), len(tensors))
    assert found.total.identical == 0
    assert "self_attn.q_proj" in {module.name for module in found.modules}
    assert 0.001 < (found.total.relative or 0) < 0.1


def test_unrelated_models_are_suspect(tmp_path: Path) -> None:
    found = inspect(tmp_path, random_pair(SHAPES, seed=0)[0], random_pair(SHAPES, seed=1)[0])
    assert found.suits == "suspect"
    assert found.total.relative == pytest.approx(2**0.5, rel=0.01)
    assert found.total.one_minus_cosine == pytest.approx(1, abs=0.01)


# --- what does not match ------------------------------------------------------------------------------------------


def test_what_does_not_match_is_named_and_the_rest_measured(tmp_path: Path) -> None:
    sft, dpo = random_pair(
        {"same": (4,), "shape": (2, 3), "type": (4,), "both": (4,), "only_sft": (2,), "only_dpo": (3,)}
    )
    sft["shape"], sft["type"] = sft["shape"].T.contiguous(), torch.zeros(4, dtype=torch.int32)
    sft["both"] = torch.zeros(5, dtype=torch.int32)
    del sft["only_dpo"], dpo["only_sft"]
    data = inspect(tmp_path, sft, dpo).describe()
    assert data["suits"] == "mismatched"
    assert (data["only_in_sft"], data["only_in_dpo"]) == (["only_sft"], ["only_dpo"])
    assert data["shapes"] == [
        {"name": "both", "sft": [5], "dpo": [4]}, {"name": "shape", "sft": [3, 2], "dpo": [2, 3]},
    ]  # fmt: skip
    assert data["dtypes"] == [{"name": "type", "sft": "I32", "dpo": "BF16"}]
    assert data["verdict"].startswith("5 tensors do not match")
    assert [one["name"] for one in data["tensors"]] == ["same"]
    assert data["total"]["relative"] == pytest.approx(exact(sft["same"], dpo["same"])[0])


def test_models_with_nothing_in_common(tmp_path: Path) -> None:
    found = inspect(tmp_path, {"a": torch.ones(3)}, {"b": torch.ones(3)}, output=str(tmp_path / "x.png"))
    assert (found.suits, found.total.tensors, found.total.relative) == ("mismatched", 0, None)
    assert (tmp_path / "x.png").exists()


def test_eight_bit_floats_are_named(tmp_path: Path) -> None:
    for side in ("sft", "dpo"):
        raw_safetensors(tmp_path / side / "model.safetensors", {"w": entry("F8_E4M3", [4], 0, 4)}, bytes(4))
    assert again(tmp_path).describe()["dtypes"] == [{"name": "w", "sft": "F8_E4M3", "dpo": "F8_E4M3"}]


@pytest.mark.parametrize("where", [None, 0, 15, 16, 99])
def test_integers_are_compared_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int | None) -> None:
    monkeypatch.setattr(verb, "COMPARED_BYTES", 16)
    sft, dpo = random_pair({"w": (4,)})
    sft["ids"], dpo["ids"] = (torch.arange(100, dtype=torch.uint8) for _ in range(2))
    sft["mask"] = dpo["mask"] = torch.tensor([True, False])
    if where is not None:
        dpo["ids"][where] += 1
    found = inspect(tmp_path, sft, dpo)
    assert found.unequal == (() if where is None else ("ids",))
    assert found.suits == ("likely" if where is None else "mismatched")
    assert found.total.tensors == 1, "integers have no norm"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shape", [(7,), (3, 300_001)])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, value: float, side: int, shape: tuple[int, ...]) -> None:
    pair = random_pair({"bad": shape, "good": (70, 3)})
    pair[side]["bad"].view(-1)[-1] = value
    found = inspect(tmp_path, *pair)
    assert (found.nonfinite, found.suits) == (("bad",), "suspect")
    assert found.total.relative == pytest.approx(exact(pair[0]["good"], pair[1]["good"])[0], rel=1e-4)
    assert "bad" in found.text()
    bad = next(one for one in found.describe()["tensors"] if one["name"] == "bad")
    assert (bad["relative"], bad["one_minus_cosine"], bad["delta_norm"]) == (None, None, None)


@pytest.mark.parametrize("stored_in", [0, 1])
@pytest.mark.parametrize("fault", [None, "value", "rows"])
def test_a_head_on_one_side_is_its_embedding(tmp_path: Path, stored_in: int, fault: str | None) -> None:
    sides = random_pair({EMBEDDING: (30, 7)})
    head = sides[stored_in][EMBEDDING].clone()
    sides[stored_in][HEAD] = head[:20].contiguous() if fault == "rows" else head
    if fault == "value":
        head[29, 6] += 1
    found = inspect(tmp_path, *sides, files=(config(tie_word_embeddings=True),) * 2)
    assert found.untied == (() if fault is None else (HEAD,))
    assert found.suits == ("likely" if fault is None else "mismatched")
    assert found.describe()["tied_heads"] == [{"name": HEAD, "equal": fault is None}]
    assert not found.overlap.only_sft
    assert not found.overlap.only_dpo


def test_a_missing_head_of_a_model_that_does_not_tie_is_named(tmp_path: Path) -> None:
    sft, dpo = random_pair({EMBEDDING: (30, 7)})
    dpo[HEAD] = dpo[EMBEDDING].clone()
    found = inspect(tmp_path, sft, dpo, files=(config(tie_word_embeddings=False),) * 2)
    assert (found.overlap.only_dpo, found.suits) == ((HEAD,), "mismatched")


@pytest.mark.parametrize("rows", [(30, 33), (33, 30)])
def test_common_rows_of_vocabularies_are_measured(tmp_path: Path, rows: tuple[int, int]) -> None:
    sft, dpo = random_pair({EMBEDDING: (33, 7), "model.norm.weight": (7,)})
    sft[EMBEDDING], dpo[EMBEDDING] = sft[EMBEDDING][: rows[0]].clone(), dpo[EMBEDDING][: rows[1]].clone()
    found = inspect(tmp_path, sft, dpo, files=tuple(config(vocab_size=count) for count in rows))
    relative, _ = exact(sft[EMBEDDING][:30], dpo[EMBEDDING][:30])
    assert found.tensors[0].figures.relative == pytest.approx(relative, rel=1e-5)
    assert found.suits == "likely"
    assert found.describe()["vocabulary"] == {"sft": rows[0], "dpo": rows[1], "compared": 30}
    assert f"vocabularies of {rows[0]} and {rows[1]} rows" in found.text()


def test_pickled_weights_are_read_where_allowed(tmp_path: Path) -> None:
    sft, dpo = random_pair({"w": (70, 3), "v": (7,)})
    expected = inspect(tmp_path, sft, dpo).describe()
    (tmp_path / "sft" / "model.safetensors").unlink()
    torch.save(sft, tmp_path / "sft" / "pytorch_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        again(tmp_path)
    assert again(tmp_path, allow_pickle=True).describe() == expected


# --- faults -------------------------------------------------------------------------------------------------------


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    sft, dpo = random_pair({"w": (2,)})
    with pytest.raises(InputError, match=r"dpo is quantized \(gptq\)"):
        inspect(tmp_path, sft, dpo, files=(None, config(quantization_config={"quant_method": "gptq"})))


def test_inputs_that_change_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft, dpo = random_pair(SHAPES)
    read = SourceFiles.read

    def touch(self: SourceFiles, file: Path, *args: object) -> None:
        read(self, file, *args)
        write_checkpoint(tmp_path / "sft", {**sft, "x": torch.ones(1)})

    monkeypatch.setattr(SourceFiles, "read", touch)
    with pytest.raises(InputError, match="sft changed while it was read; rerun the command"):
        inspect(tmp_path, sft, dpo, output=str(tmp_path / "x.png"))
    assert not list(tmp_path.glob("*x.png*"))


def test_a_failing_disk_leaves_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EnvironmentFailure("the disk is gone")

    monkeypatch.setattr(SourceFiles, "read", fail)
    with pytest.raises(EnvironmentFailure, match="the disk is gone"):
        inspect(tmp_path, *random_pair(SHAPES), output=str(tmp_path / "x.png"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dpo", "sft"]


def test_a_picture_without_a_place_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(SourceFiles, "read", fail)
    sft, dpo = random_pair(SHAPES)
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/new"):
        with pytest.raises(EnvironmentFailure, match=f"cannot write to .*/{folder}: .*; choose another --output"):
            inspect(tmp_path, sft, dpo, output=str(tmp_path / folder / "x.png"))
    refused = pytest.raises(EnvironmentFailure, match=r"cannot write to .*/disk; choose another --output")
    with mounted(tmp_path / "disk", "ro") as disk, refused:
        inspect(tmp_path, sft, dpo, output=str(disk / "x.png"))


# --- the picture --------------------------------------------------------------------------------------------------


def test_the_picture_is_written_whole_and_the_same_again(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "pair.PNG"
    found = inspect(tmp_path, *random_pair(SHAPES), output=str(picture))
    assert found.picture == picture
    content = picture.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert all(300 < side < 3000 for side in image.size)
    assert tree(picture.parent).keys() == {"pair.PNG"}
    again(tmp_path, output=str(picture))
    assert picture.read_bytes() == content


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_of_other_weights_is_replaced_when_told_so(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"pair{suffix}"
    inspect(tmp_path, *random_pair({"w": (4,)}), output=str(picture))
    content = picture.read_bytes()
    write_checkpoint(tmp_path / "sft", random_pair({"w": (4,)}, seed=1)[0])
    with pytest.raises(InputError, match="was drawn from other weights; --overwrite replaces it"):
        again(tmp_path, output=str(picture))
    assert picture.read_bytes() == content
    again(tmp_path, output=str(picture), overwrite=True)
    assert picture.read_bytes() != content


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_expo_did_not_write_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "holiday.png").write_bytes(b"\x89PNG by the sea")
    (tmp_path / "folder.png").mkdir()
    pair = random_pair({"w": (4,)})
    with pytest.raises(InputError, match=r"holiday\.png exists and expo did not write it: move it away"):
        inspect(tmp_path, *pair, output=str(tmp_path / "holiday.png"), overwrite=overwrite)
    with pytest.raises(InputError, match=r"folder\.png is a folder, not a file"):
        again(tmp_path, output=str(tmp_path / "folder.png"), overwrite=overwrite)
    assert (tmp_path / "holiday.png").read_bytes() == b"\x89PNG by the sea"


@pytest.mark.parametrize("folder", ["sft", "dpo/deeper", "link"])
def test_no_picture_inside_an_input(tmp_path: Path, folder: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "sft")
    with pytest.raises(InputError, match=r"the output .* is the input .* or lies inside it"):
        inspect(tmp_path, *random_pair({"w": (4,)}), output=str(tmp_path / folder / "x.png"))
    assert not list(tmp_path.rglob("*.png"))


# --- the program --------------------------------------------------------------------------------------------------


def sides(pair: tuple[Path, Path]) -> tuple[object, ...]:
    return ("inspect", "--sft", pair[0], "--dpo", pair[1])


def test_the_table_on_stdout_the_rest_on_stderr(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_expo(*sides(pair))
    lines = result.stdout.splitlines()
    assert (result.code, result.stderr) == (0, "expo: --output FILE.png plots ‖Δ‖ by layer and module\n")
    assert [line.split(" ")[0] for line in lines] == ["module", "a", "b", "norm", "total", "", "likely:"]
    drawn = run_expo(*sides(pair), "--output", tmp_path / "x.svg")
    assert (drawn.code, drawn.stdout) == (0, result.stdout)
    assert drawn.stderr == f"expo: picture: {tmp_path}/x.svg\n"


def test_json_is_one_object_and_a_suspect_pair_ends_in_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(tmp_path, random_pair(SHAPES, seed=0)[0], random_pair(SHAPES, seed=1)[0])
    code = cli.run([*map(str, sides((tmp_path / "sft", tmp_path / "dpo"))), "--json"])
    out, _ = capsys.readouterr()
    assert (code, len(out.splitlines())) == (0, 1)
    assert json.loads(out) == found.describe()
    assert found.suits == "suspect"


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["--dpo", "./no/such"], 2, "expo: error: no such directory: ./no/such"),
        (["--output", "x.jpeg"], 2, "expo: error: --output must be a picture (.png, .svg, .pdf), not 'x.jpeg'"),
        (["--workers", "0"], 2, "expo: error: --workers must be positive, not 0"),
        (
            ["--output", "/proc/no/x.png"],
            1,
            "expo: error: cannot write to /proc/no: No such file or directory; choose another --output",
        ),
    ],
)
def test_faults_are_one_line(
    pair: tuple[Path, Path], args: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*map(str, sides(pair)), *args]) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_dry_run_reads_headers_alone(pair: tuple[Path, Path]) -> None:
    script = (
        "import sys; from expo.cli.program import run; code = run(sys.argv[1:]);"
        "heavy = ('torch', 'matplotlib', 'huggingface_hub.hf_api');"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    before = tree(pair[0].parent)
    command = [sys.executable, "-c", script, *map(str, sides(pair)), "--dry-run", "--json", "--output", "x.png"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    plan = json.loads(done.stdout)
    assert plan["tensors"] == {"measured": 3, "compared": 0}
    assert (plan["mismatches"], plan["bytes"], plan["picture"]) == ({}, 2 * (128 + 15 + 8), "x.png")
    assert tree(pair[0].parent) == before


def test_a_recipe_knows_its_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(verb, "plan", lambda settings: seen.append(settings) or NotImplemented)
    with pytest.raises(AttributeError):
        cli.run(["inspect", "--recipe", "zephyr-7b-beta", "--dry-run"])
    assert (seen[0].sft, seen[0].dpo) == ("HuggingFaceH4/mistral-7b-sft-beta", "HuggingFaceH4/zephyr-7b-beta")
