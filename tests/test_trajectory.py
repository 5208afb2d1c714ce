"""`expo extrapolate --checkpoint`: a training run's checkpoints to a later step, against a float64 SVD in memory."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from adapters import CASES, merged_by_peft, save_adapter, save_base
from helpers import (
    DTYPES,
    Killed,
    Result,
    read_checkpoint_tensors,
    stopped_in_shard,
    tree,
    without_clock,
    write_checkpoint,
)
from hub_server import FakeHub, read_folder
from peft import LoraConfig
from test_partners import fuse
from torch import Tensor

from expo.cli import program as cli
from expo.config import ExtrapolateConfig, GenerateConfig, InspectConfig, ThetaConfig
from expo.errors import InputError
from expo.output.findings import Inspection
from expo.parts import all_parts
from expo.theta import stream
from expo.theta.pair import plan_theta
from expo.theta.tensors import Theta
from expo.theta.trajectory.fit import LINE_RULES, fit, quality
from expo.verbs import extrapolate, generate, inspect

STEPS = (50, 100, 300)
TARGETS = (300, 1000, 2500)
SHAPES = {"model.layers.0.mlp.down_proj.weight": (65, 33), "model.norm.weight": (33,), "odd": (7, 3, 5), "one": ()}
RULES = sorted(LINE_RULES)


@dataclass(frozen=True)
class Run:
    """A training run's checkpoints."""

    start: Path
    steps: dict[float, Path]

    @property
    def settings(self) -> dict[str, Any]:
        given = [f"{step:g}={folder}" for step, folder in self.steps.items()]
        return {"sft": str(self.start), "checkpoint": tuple(reversed(given))}  # in whatever order

    def words(self) -> list[str]:
        given = [word for one in self.settings["checkpoint"] for word in ("--checkpoint", one)]
        return ["extrapolate", "--sft", str(self.start), *given, "--no-fsync"]


def states(
    dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES, steps: Sequence[float] = STEPS
) -> dict[float, dict[str, Tensor]]:
    """Weights at step 0 and the others: along a line, and beside it."""
    generator = torch.Generator().manual_seed(0)

    def random() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    start, direction = random(), random()
    found = {0: start}
    for step in steps:
        noise = random()
        found[step] = {name: start[name] + 2e-4 * step * direction[name] + 0.01 * noise[name] for name in shapes}
    return {step: {name: values.to(dtype) for name, values in state.items()} for step, state in found.items()}


def save(folder: Path, tensors: dict[float, dict[str, Tensor]], shards: Sequence[int] = (1, 2, 3, 2)) -> Run:
    """Each step in its folder, dealt out to other numbers of files."""
    cut = {step: shards[number % len(shards)] for number, step in enumerate(tensors)}
    written = {step: write_checkpoint(folder / f"step_{step}", one, shards=cut[step]) for step, one in tensors.items()}
    start = written.pop(0)
    return Run(start, written)


def follow(run: Run, output: Path, *targets: float, **settings: Any) -> extrapolate.Extrapolated:
    defaults = {"target_step": targets or (1000,), "output": str(output), "fsync": False}
    return extrapolate.run(ExtrapolateConfig(**{**run.settings, **defaults, **settings}))


def lines(tensors: dict[float, np.ndarray], target: float, rule: str) -> tuple[np.ndarray, float, float]:
    """θ(T), explained variance and R² in float64: all changes in memory, and numpy's SVD of them."""
    steps = np.array([step for step in tensors if step], float)
    start = tensors[0].astype(float).ravel()
    changes = np.stack([tensors[step].astype(float).ravel() - start for step in steps])
    if rule == "linear":
        slope = steps @ changes / (steps @ steps)
        size = np.linalg.norm(slope)
        direction = slope / size if size else slope
        along = changes @ direction
        fitted = size * steps
        value = start + target * slope
    else:
        direction = np.linalg.svd(changes, full_matrices=False)[2][0] if changes.any() else np.zeros_like(start)
        along = changes @ direction
        line = np.polyfit(steps, along, 1)
        fitted = np.polyval(line, steps)
        value = start + np.polyval(line, target) * direction
    explained = (along @ along) / (changes**2).sum() if changes.any() else None
    spread = ((along - along.mean()) ** 2).sum()
    r2 = 1 - ((along - fitted) ** 2).sum() / spread if spread else None
    return value.reshape(tensors[0].shape), explained, r2


def expected(
    tensors: dict[float, dict[str, Tensor]], name: str, target: float, rule: str
) -> tuple[np.ndarray, float, float]:
    return lines({step: state[name].double().numpy() for step, state in tensors.items()}, target, rule)


def require_close(found: Tensor, right: np.ndarray, dtype: torch.dtype) -> None:
    """Within one rounding of the right value, and what float32 arithmetic loses."""
    values = found.double().numpy()
    size = np.abs(right).max() if right.size else 0.0
    loss = 2e-6 if dtype != torch.float64 else 1e-12
    step = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 2 * (1 + 1e-3)
    assert (np.abs(values - right) <= loss * size + step * np.abs(right)).all()


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The program, in this process."""

    def run(*words: object) -> Result:
        code = cli.run(list(map(str, words)))
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


# --- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "float64"])
def test_every_tensor_is_on_the_line_of_a_float64_svd(tmp_path: Path, dtype: torch.dtype, rule: str) -> None:
    tensors = states(dtype)
    made = follow(save(tmp_path, tensors), tmp_path / "out", *TARGETS, rule=rule)
    for target, one in zip(TARGETS, made, strict=True):
        assert one.path == tmp_path / "out" / f"step-{target}"
        found = read_checkpoint_tensors(one.path)
        said = json.loads((one.path / "expo.json").read_text())["trajectory"]
        assert (said["rule"], said["steps"], said["target_step"]) == (rule, list(STEPS), target)
        for name in SHAPES:
            right, explained, r2 = expected(tensors, name, target, rule)
            assert found[name].dtype == dtype
            require_close(found[name], right, dtype)
            assert said["tensors"][name]["explained_variance"] == pytest.approx(explained, rel=1e-5)
            assert said["tensors"][name]["r2"] == pytest.approx(r2, rel=1e-4)


def test_the_figures_of_all_tensors_are_those_of_their_sums(tmp_path: Path) -> None:
    tensors = states()
    (made,) = follow(save(tmp_path, tensors), tmp_path / "out")
    said = json.loads((made.path / "expo.json").read_text())["trajectory"]
    size = explained = residual = spread = 0.0
    for name in SHAPES:
        changes = np.stack([(tensors[step][name] - tensors[0][name]).double().numpy().ravel() for step in STEPS])
        along = changes @ np.linalg.svd(changes, full_matrices=False)[2][0]
        size, explained = size + (changes**2).sum(), explained + along @ along
        fitted = np.polyval(np.polyfit(STEPS, along, 1), STEPS)
        residual, spread = residual + ((along - fitted) ** 2).sum(), spread + ((along - along.mean()) ** 2).sum()
    assert said["explained_variance"] == pytest.approx(explained / size, rel=1e-5)
    assert said["r2"] == pytest.approx(1 - residual / spread, rel=1e-4)


@pytest.mark.parametrize("count", [2, 7])
def test_any_number_of_steps(tmp_path: Path, count: int) -> None:
    steps = tuple(10 * (number + 1) ** 2 for number in range(count))
    tensors = states(steps=steps)
    (made,) = follow(save(tmp_path, tensors), tmp_path / "out", 5000)
    for name, found in read_checkpoint_tensors(made.path).items():
        require_close(found, expected(tensors, name, 5000, "relex")[0], torch.float32)


def test_a_tensor_larger_than_pieces_and_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = states(shapes={f"w{number}": (301, 70) for number in range(6)})
    run = save(tmp_path, tensors)
    (whole,) = follow(run, tmp_path / "whole")
    monkeypatch.setattr(stream, "COURSE_BYTES", {"cpu": 5 * 4096})
    monkeypatch.setattr(stream, "WINDOW_BYTES", 100_000)
    (made,) = follow(run, tmp_path / "out", workers=3)
    for name, found in read_checkpoint_tensors(made.path).items():
        require_close(found, expected(tensors, name, 1000, "relex")[0], torch.float32)
        torch.testing.assert_close(found, read_checkpoint_tensors(whole.path)[name], rtol=0, atol=1e-6)


MEASURE = """
import re, sys
from pathlib import Path
from expo.config import ExtrapolateConfig
from expo.verbs.extrapolate import run

peaks = []
for name in ("small", "large"):
    root = Path(sys.argv[1]) / name
    steps = [f"{step}={root / f'step_{step}'}" for step in (50, 100, 300)]
    settings = {"sft": str(root / "step_0"), "checkpoint": tuple(steps), "target_step": (1000.0,)}
    run(ExtrapolateConfig(**settings, output=str(root / "out"), fsync=False))
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model_nor_its_largest_tensor(tmp_path: Path) -> None:
    for name, numel in (("small", 15_000_000), ("large", 60_000_000)):
        for number, step in enumerate((0, *STEPS)):
            values = torch.full((numel,), 1 + number / 64, dtype=torch.bfloat16)
            write_checkpoint(tmp_path / name / f"step_{step}", {"w": values})
    done = helpers.run_python(MEASURE, tmp_path)
    assert done.code == 0, done.stderr
    assert float(done.stdout) < 16


@pytest.mark.parametrize("rule", RULES)
def test_steps_whose_weights_are_fused_or_of_another_type(tmp_path: Path, rule: str) -> None:
    """The first step has q, k and v by themselves, the second fused, the last gate and up only, in float32."""
    shapes = {f"model.layers.0.self_attn.{one}_proj.weight": (rows, 8) for one, rows in (("q", 12), ("k", 4), ("v", 4))}
    shapes |= {f"model.layers.0.mlp.{one}_proj.weight": (10, 8) for one in ("gate", "up")}
    tensors = states(torch.bfloat16, shapes)
    stored = {**tensors, 100: fuse(tensors[100]), 300: fuse(tensors[300])}
    stored[300] = {name: values.float() for name, values in stored[300].items()}
    (made,) = follow(save(tmp_path, stored), tmp_path / "out", rule=rule)
    found = read_checkpoint_tensors(made.path)
    whole = {step: fuse(state) for step, state in tensors.items()}
    assert {name: values.shape for name, values in found.items()} == {n: v.shape for n, v in stored[300].items()}
    for name, values in found.items():
        assert values.dtype == torch.float32
        require_close(values, expected(whole, name, 1000, rule)[0], torch.float32)


def test_what_does_not_change_stays_and_buffers_are_the_last_steps(tmp_path: Path) -> None:
    tensors = states()
    for step, state in tensors.items():
        state |= {"still": torch.ones(40), "empty": torch.empty(0, 3), "ids": torch.arange(5)}
        state["odd"] = tensors[0]["odd"] if step < 300 else state["odd"]  # moves at the last step alone
    (made,) = follow(save(tmp_path, tensors), tmp_path / "out")
    found = read_checkpoint_tensors(made.path)
    for name in ("still", "empty", "ids"):
        assert torch.equal(found[name], tensors[300][name])
    require_close(found["odd"], expected(tensors, "odd", 1000, "relex")[0], torch.float32)
    said = json.loads((made.path / "expo.json").read_text())["trajectory"]["tensors"]
    assert said["still"]["explained_variance"] is None
    assert said["still"]["r2"] is None


def test_tensors_with_an_alpha_of_their_own_go_to_that_step_and_excluded_ones_are_the_last_steps(
    tmp_path: Path,
) -> None:
    tensors = states()
    (made,) = follow(
        save(tmp_path, tensors), tmp_path / "out", exclude=("odd",), alpha_for=(r"norm=1.5",), dtype="float32"
    )
    found = read_checkpoint_tensors(made.path)
    assert torch.equal(found["odd"], tensors[300]["odd"])
    require_close(found["model.norm.weight"], expected(tensors, "model.norm.weight", 750, "relex")[0], torch.float32)


# --- what it has in common with a pair ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [100, 1000])
def test_one_checkpoint_is_the_pair_byte_for_byte(tmp_path: Path, target: float) -> None:
    run = save(tmp_path, states(torch.bfloat16, steps=(400,)))
    (made,) = follow(run, tmp_path / "out", target)
    (pair,) = helpers.write((run.start, run.steps[400]), tmp_path / "pair", (target - 400) / 400)
    weights = {
        name: content for name, content in tree(made.path).items() if name.endswith((".safetensors", ".index.json"))
    }
    assert weights == {name: tree(pair.path)[name] for name in weights}
    assert len(weights) == 3
    assert made.target_step == target
    assert pair.target_step is None


def test_several_targets_in_one_pass_are_those_of_separate_ones(tmp_path: Path) -> None:
    run = save(tmp_path, states(torch.bfloat16, {**SHAPES, "large": (300, 301)}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream, "MAX_OUTPUT_BYTES", 1 << 17)  # as with very many: smaller pieces
        together = follow(run, tmp_path / "together", *TARGETS)
    for target, one in zip(TARGETS, together, strict=True):
        (alone,) = follow(run, tmp_path / f"alone-{target}", target)
        assert without_clock(tree(one.path)) == without_clock(tree(alone.path))


def test_parts_are_joined_to_what_one_run_writes(tmp_path: Path) -> None:
    run = save(tmp_path, states())
    whole = follow(run, tmp_path / "whole", *TARGETS)
    for part in all_parts(2):
        follow(run, tmp_path / "joined", *TARGETS, part=str(part))
    joined = follow(run, tmp_path / "joined", *TARGETS, join=2)
    for one, other in zip(whole, joined, strict=True):
        assert without_clock(tree(one.path)) == without_clock(tree(other.path))


def test_a_stopped_run_goes_on_and_keeps_the_fits(tmp_path: Path) -> None:
    run = save(tmp_path, states())
    (whole,) = follow(run, tmp_path / "whole")
    with stopped_in_shard(1):
        follow(run, tmp_path / "out")
    (staged,) = (tmp_path / "out" / ".expo-partial").glob("*00001*.partial")
    before = staged.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("expo.verbs.extrapolate.write.complete", _killed)
        with pytest.raises(Killed):
            follow(run, tmp_path / "out")
    assert staged.stat().st_mtime_ns == before
    (made,) = follow(run, tmp_path / "out")
    assert without_clock(tree(made.path)) == without_clock(tree(whole.path))
    assert follow(run, tmp_path / "out")[0].status == "already complete"


def _killed(*_: object) -> None:
    raise Killed


def test_another_checkpoint_step_or_rule_is_another_output(tmp_path: Path) -> None:
    run = save(tmp_path, states())
    follow(run, tmp_path / "out")
    for other in (
        {"rule": "linear"},
        {"target_step": (900,)},
        {"checkpoint": tuple(run.settings["checkpoint"])[:2]},
        {"checkpoint": tuple(one.replace("50=", "60=") for one in run.settings["checkpoint"])},
    ):
        with pytest.raises(InputError, match="made with a different"):
            follow(run, tmp_path / "out", **other)
    write_checkpoint(run.steps[50], states()[0], shards=2)
    with pytest.raises(InputError, match="made with a different"):
        follow(run, tmp_path / "out")


def test_verify_finds_a_step_that_changed_unseen(tmp_path: Path) -> None:
    run = save(tmp_path, states(), shards=(1,))
    (made,) = follow(run, tmp_path / "out", verify=True)
    sources = json.loads((made.path / "expo.json").read_text())["sources"]
    assert sources.keys() == {"sft", "dpo", "step 50", "step 100"}
    assert all(len(one["xxh3"]) == 1 for one in sources.values())
    assert follow(run, tmp_path / "out", verify=True)[0].status == "already complete"
    file = run.steps[50] / "model.safetensors"
    content, times = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match="different weights of step 50"):
        follow(run, tmp_path / "out", verify=True)


# --- adapters of one run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "patterns, rank-stabilised", "saved modules", "trained biases", "embedding"])
@pytest.mark.parametrize("rule", RULES)
def test_adapters_of_one_run_are_merged_and_followed(tmp_path: Path, case: str, rule: str) -> None:
    make, config = CASES[case]
    base = save_base(make, torch.float32, tmp_path / "base")
    steps = {}
    for number, step in enumerate(STEPS):
        folder = save_adapter(base, tmp_path / f"adapter_{step}", LoraConfig(r=4, lora_alpha=6, **config))
        file = folder / "adapter_model.safetensors"
        factors = read_checkpoint_tensors(folder)
        moved = {name: values * (1 + number) ** 0.5 + 0.01 * number for name, values in factors.items()}
        helpers.save_file(moved, file, {"format": "pt"})
        steps[step] = folder
    (made,) = follow(Run(base, steps), tmp_path / "out", rule=rule)
    merged = {0: read_checkpoint_tensors(base), **{step: merged_by_peft(base, one) for step, one in steps.items()}}
    changed = 0
    for name, found in read_checkpoint_tensors(made.path).items():
        right, explained, _ = expected(merged, name, 1000, rule)
        changed += explained is not None
        require_close(found, right, torch.float32)
    assert changed > 2


def test_adapters_that_are_not_of_one_run_are_refused(tmp_path: Path) -> None:
    make, _ = CASES["plain"]
    base = save_base(make, torch.float32, tmp_path / "base")
    kinds = {50: {"target_modules": ["q_proj"]}, 100: {"target_modules": ["q_proj", "v_proj"]}}
    steps = {step: save_adapter(base, tmp_path / f"a{step}", LoraConfig(r=2, **kind)) for step, kind in kinds.items()}
    with pytest.raises(InputError, match="a50 and a100 are not of one training run: tensors that only one of"):
        follow(Run(base, steps), tmp_path / "out")
    full = write_checkpoint(tmp_path / "full", read_checkpoint_tensors(base))
    with pytest.raises(InputError, match="some of the checkpoints are adapters and others are not"):
        follow(Run(base, {**steps, 300: full}), tmp_path / "out")


# --- inspect --------------------------------------------------------------------------------------------------------


def look(run: Run, **settings: Any) -> Inspection:
    return inspect.run(InspectConfig(**{**run.settings, **settings}))


@pytest.mark.parametrize("rule", RULES)
def test_inspect_finds_what_extrapolate_records(tmp_path: Path, rule: str) -> None:
    run = save(tmp_path, states(torch.bfloat16))
    (made,) = follow(run, tmp_path / "out", rule=rule)
    recorded = json.loads((made.path / "expo.json").read_text())["trajectory"]
    found = look(run, rule=rule)
    described = json.loads(json.dumps(found.describe()))
    assert described["trajectory"]["tensors"] == recorded["tensors"]
    for name in ("rule", "steps", "explained_variance", "r2"):
        assert described["trajectory"][name] == recorded[name]
    pair = inspect.run(InspectConfig(sft=str(run.start), dpo=str(run.steps[300]))).describe()
    assert {name: value for name, value in found.describe().items() if name != "trajectory"} == pair


def test_a_modules_way_is_that_of_its_tensors_side_by_side(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (9, 5) for layer in range(3)} | {"lm_head.weight": (7, 5)}
    tensors = states(torch.float64, shapes)
    found = look(save(tmp_path, tensors)).trajectory
    assert found is not None
    ways = {way.name: way for way in (*found.modules, found.total)}
    assert list(ways) == ["mlp.up_proj", "lm_head", "total"]
    for name, way in ways.items():
        own = [one for one in shapes if name in (*one.split("."), "total") or name in one]
        on_line = []
        for one in own:
            changes = np.stack([(tensors[step][one] - tensors[0][one]).numpy().ravel() for step in STEPS])
            direction = np.linalg.svd(changes, full_matrices=False)[2][0]
            on_line.append(np.outer(changes @ direction, direction))
        side_by_side = np.concatenate(on_line, axis=1)
        last = side_by_side[-1]
        assert way.reached == pytest.approx(side_by_side @ last / (last @ last), rel=1e-9)
        assert way.reached[-1] == pytest.approx(1.0)
        assert way.fitted == pytest.approx(np.polyfit(STEPS, side_by_side @ last / (last @ last), 1), rel=1e-6)
        assert way.tensors == len(own)
    assert sum(way.share for way in found.modules) == pytest.approx(1.0)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_of_the_way_is_replaced_only_by_one_of_the_same_weights(tmp_path: Path, suffix: str) -> None:
    run = save(tmp_path, states())
    file = tmp_path / f"way.{suffix}"
    assert look(run, output=str(file)).picture == file
    first = file.read_bytes()
    look(run, output=str(file))
    assert file.read_bytes() == first
    write_checkpoint(run.steps[50], states()[0], shards=2)
    with pytest.raises(InputError, match="drawn from other weights"):
        look(run, output=str(file))


def test_inspect_shows_a_table_of_the_steps(tmp_path: Path, program: Callable[..., Result]) -> None:
    run = save(tmp_path, states())
    words = run.words()[1:-1]  # without --no-fsync
    done = program("inspect", *words)
    assert done.code == 0
    assert "step 50  step 100  step 300  tensors" in done.stdout
    assert "trajectory: the lines explain 9" in done.stdout
    planned = json.loads(program("inspect", *words, "--dry-run", "--json").stdout)
    assert planned["checkpoints"] == [str(run.steps[step]) for step in STEPS]


def test_inspect_of_one_checkpoint_is_that_of_the_pair(tmp_path: Path) -> None:
    run = save(tmp_path, states(steps=(400,)))
    found = look(run)
    assert found.trajectory is None
    assert found.describe() == inspect.run(InspectConfig(sft=str(run.start), dpo=str(run.steps[400]))).describe()


def test_inspect_of_tensors_that_some_steps_lack(tmp_path: Path) -> None:
    tensors = states()
    for step in (0, 50, 300):
        tensors[step]["extra"] = torch.randn(5) + step
    found = look(save(tmp_path, tensors)).trajectory
    assert found is not None
    assert {one.name for one in found.tensors} == set(SHAPES)


def test_inspect_follows_adapters(tmp_path: Path) -> None:
    make, config = CASES["plain"]
    base = save_base(make, torch.float32, tmp_path / "base")
    steps = {}
    for number, step in enumerate((10, 20), start=1):
        steps[step] = save_adapter(base, tmp_path / f"a{step}", LoraConfig(r=2, lora_alpha=4 * number, **config))
    found = look(Run(base, steps)).trajectory
    assert found is not None
    assert found.total.quality.explained == pytest.approx(1.0)
    assert found.total.reached == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": ()}, "--dpo is missing"),
        ({"dpo": "x"}, "--dpo is the last --checkpoint"),
        ({"rule": "spline"}, "--rule must be one of relex, linear"),
        ({"checkpoint": ("1=a",), "rule": "relex"}, "--rule relex needs two or more"),
    ],
)
def test_what_inspect_refuses(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    run = save(tmp_path, states())
    with pytest.raises(InputError, match=message):
        look(run, **{**changed, **({"checkpoint": (f"1={run.start}",)} if changed.get("checkpoint") else {})})


# --- engines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_run(llama_pair: helpers.Pair, tmp_path: Path) -> Run:
    """The pair's DPO model as the last of two steps; the first is half way, and beside it."""
    start, last = llama_pair
    before, after = read_checkpoint_tensors(start), read_checkpoint_tensors(last)
    torch.manual_seed(0)
    middle = {
        name: (one.float().lerp(after[name].float(), 0.5) + 0.002 * torch.randn(one.shape)).to(one.dtype)
        for name, one in before.items()
    }
    files = {file.name: file.read_text() for file in last.glob("*.json") if "index" not in file.name}
    return Run(start, {20: write_checkpoint(tmp_path / "step_20", middle, files=files), 40: last})


def test_an_engine_loads_what_is_written(llama_run: Run, tmp_path: Path) -> None:
    (made,) = follow(llama_run, tmp_path / "out", 90)
    config = ThetaConfig(sft=str(llama_run.start), checkpoint=llama_run.settings["checkpoint"], target_step=90.0)
    planned = plan_theta(config)
    assert planned.name == "dpo-ExPO-t90"
    with Theta(planned.pair) as theta:
        found = {name: helpers.as_bytes(values) for name, values in theta}
        (lone, *_) = theta.names
        assert helpers.as_bytes(theta.tensor(lone)) == found[lone]
    assert found == {name: helpers.as_bytes(one) for name, one in read_checkpoint_tensors(made.path).items()}


def test_generate_answers_with_a_step_as_with_its_checkpoint(llama_run: Run, tmp_path: Path) -> None:
    task = tmp_path / "questions.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{number} w3"}) + "\n" for number in range(6)))
    shared = {
        "task": str(task),
        "output_dir": str(tmp_path),
        "engine": "transformers",
        "device": "cpu",
        "max_tokens": 9,
    }
    (made,) = follow(llama_run, tmp_path / "written", 90)
    theta = generate.run(GenerateConfig(**shared, **llama_run.settings, target_step=90.0))
    written = generate.run(GenerateConfig(**shared, model=str(made.path)))
    assert theta.output.name == "dpo-ExPO-t90.jsonl"
    assert theta.output.read_bytes() == written.output.read_bytes()
    meta = json.loads(theta.meta.read_text())
    assert meta["checkpoints"] == [
        {"step": 20, "name": "step_20", "revision": None},
        {"step": 40, "name": "dpo", "revision": None},
    ]
    assert (meta["target_step"], meta["config"]["target_step"]) == (90, 90.0)
    with pytest.raises(InputError, match="made with a different"):
        generate.run(GenerateConfig(**shared, **llama_run.settings, target_step=91.0, name="dpo-ExPO-t90"))


# --- the hub --------------------------------------------------------------------------------------------------------


def test_steps_are_branches_of_a_repository(tmp_path: Path, hub: FakeHub, expo_on_hub: Callable[..., Result]) -> None:
    run = save(tmp_path, states(torch.bfloat16), shards=(1,))
    hub.add("org/start", read_folder(run.start))
    model = hub.add("org/run", read_folder(run.steps[300]))
    for step in (50, 100):
        model.refs[f"step_{step}"] = model.commit(read_folder(run.steps[step]))
    model.refs["step_300"] = model.commit(read_folder(run.steps[300]))
    words = [word for step in STEPS for word in ("--checkpoint", f"{step}=org/run@step_{step}")]
    words = ["extrapolate", "--sft", "org/start", *words, "--target-step", "1000", "--output", str(tmp_path / "out")]
    done = expo_on_hub(*words, "--no-fsync")
    assert done.code == 0, done.stderr
    (made,) = follow(run, tmp_path / "local")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made.path / "model.safetensors").read_bytes()
    manifest = json.loads((tmp_path / "out" / "expo.json").read_text())
    assert manifest["config"]["checkpoint"] == [f"{step}=org/run@step_{step}" for step in STEPS]
    assert manifest["sources"]["step 50"] == {"name": "org/run", "revision": model.refs["step_50"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--checkpoint 50=org/run@{model.refs['step_50']}" in card


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": ("a",)}, r"--checkpoint must be STEP=MODEL, such as 100=runs/step_100, .* not 'a'"),
        ({"checkpoint": ("x=a",)}, "must be STEP=MODEL"),
        ({"checkpoint": ("100=",)}, "must be STEP=MODEL"),
        ({"checkpoint": ("0=a", "1=b")}, "with a step above 0"),
        ({"checkpoint": ("nan=a",)}, "with a step above 0"),
        ({"checkpoint": ("100=a", "1e2=b")}, "--checkpoint 100=… is given more than once"),
        ({"target_step": ()}, "--checkpoint needs --target-step"),
        ({"target_step": (0.0,)}, "--target-step must be above 0, not 0"),
        ({"target_step": (float("inf"),)}, "--target-step must be above 0, not inf"),
        ({"target_step": (500.0, 500.0)}, "--target-step 500.0 is given more than once"),
        ({"alpha": (0.3,)}, "--alpha and --target-step cannot be combined"),
        ({"dpo": "c"}, "--dpo is the last --checkpoint, b: leave out --dpo c"),
        ({"checkpoint": ()}, "--dpo is missing"),
        ({"checkpoint": (), "dpo": "b"}, "--target-step needs the training run's checkpoints"),
        ({"rule": "spline"}, "--rule must be one of relex, linear for a training run, not 'spline'"),
        ({"rule": "relex", "checkpoint": ("100=a",)}, "--rule relex needs two or more --checkpoint"),
        (
            {"rule": "relex", "checkpoint": (), "dpo": "b", "target_step": (), "alpha": (0.3,)},
            "--rule relex is for a training",
        ),
        ({"stream_sft": True}, "--stream-sft and several --checkpoint cannot be combined"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    given = {"sft": "s", "checkpoint": ("100=a", "200=b"), "target_step": (500.0,)}
    with pytest.raises(InputError, match=message):
        extrapolate.run(ExtrapolateConfig(**{**given, **changed}))


def test_checkpoints_that_do_not_match_are_refused(tmp_path: Path) -> None:
    tensors = states()
    run = save(tmp_path, {**tensors, 100: {**tensors[100], "odd": torch.ones(7, 3)}})
    with pytest.raises(InputError, match="odd"):
        follow(run, tmp_path / "out")
    again = Run(run.start, {50: run.steps[50], 100: run.steps[50], 300: run.steps[300]})
    with pytest.raises(InputError, match="are the same files"):
        follow(again, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_values_that_are_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = states()
    tensors[100]["odd"][0, 0, 0] = value
    run = save(tmp_path, tensors)
    with pytest.raises(InputError, match="tensor odd contains NaN or infinity at one of the steps"):
        follow(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (made,) = follow(run, tmp_path / "out", exclude=("^odd$",))
    assert torch.equal(read_checkpoint_tensors(made.path)["odd"], tensors[300]["odd"])


def test_a_target_that_overflows_the_type_is_refused(tmp_path: Path) -> None:
    run = save(tmp_path, states(torch.float16))
    with pytest.raises(InputError, match="contains NaN or infinity"):
        follow(run, tmp_path / "out", 1e9)


def test_the_program_says_how_well_the_lines_fit(
    tmp_path: Path, program: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = save(tmp_path, states())
    done = program(*run.words(), "--target-step", "900", "--output", tmp_path / "near")
    assert done.code == 0
    assert "the lines explain 9" in caplog.text
    assert "straight lines" not in caplog.text
    assert f"step 900: written: {tmp_path}/near\n" in caplog.text
    assert done.stdout == f"{tmp_path}/near\n"
    done = program(*run.words(), "--target-step", "9000", "--output", tmp_path / "far")
    assert "step 9000 is 30 times the last checkpoint's: the furthest that was published is 20 times" in caplog.text
    assert "not for DPO" in caplog.text


def test_a_run_that_wanders_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there_and_back = {0: 0.0, 50: 0.02, 100: -0.02, 300: 0.01}
    direction = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    run = save(tmp_path, {step: {"w": 1 + place * direction} for step, place in there_and_back.items()}, shards=(1,))
    with caplog.at_level(logging.INFO):
        follow(run, tmp_path / "out")
    assert "does not move along straight lines" in caplog.text


def test_two_checkpoints_say_that_any_two_lie_on_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        follow(save(tmp_path, states(steps=(50, 100))), tmp_path / "out")
    assert "any two checkpoints lie on a line" in caplog.text


def test_the_plan_and_the_cards_command(
    tmp_path: Path, program: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, states(), shards=(1,))
    monkeypatch.chdir(tmp_path)
    words = [word for step in STEPS for word in ("--checkpoint", f"{step}=step_{step}")]
    words = ["extrapolate", "--sft", "step_0", *words, "--target-step", "1000"]
    done = program(*words, "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert [one["step"] for one in found["checkpoints"]] == list(STEPS)
    assert found["outputs"] == [
        {"alpha": 7 / 3, "target_step": 1000, "path": "checkpoints/step_300-ExPO-t1000", "complete": False}
    ]
    assert program(*words).code == 0
    folder = tmp_path / "checkpoints" / "step_300-ExPO-t1000"
    card = (folder / "README.md").read_text()
    assert "# step_300-ExPO-t1000" in card
    assert "| step 50 | step_50 | local |" in card
    (command,) = [line for line in card.splitlines() if line.startswith("expo extrapolate")]
    again = program(*shlex.split(command)[1:], "--output", "again")
    assert again.code == 0, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# --- the arithmetic of a fit ----------------------------------------------------------------------------------------


def test_a_straight_run_is_followed_exactly() -> None:
    steps = np.array([10.0, 20.0, 50.0])
    gram = np.outer(steps, steps) * 0.25  # Δ_t = t g with ‖g‖ = 0.5
    for rule in LINE_RULES.values():
        found = fit(rule, gram, tuple(steps))
        assert np.dot(found.weights(400.0), steps) == pytest.approx(400.0)
        assert (quality([found]).explained, quality([found]).r2) == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_tensor_that_does_not_move_has_no_weights_and_no_figures() -> None:
    for rule in LINE_RULES.values():
        found = fit(rule, np.zeros((3, 3)), (1.0, 2.0, 3.0))
        assert found.weights(1000.0) == (0.0, 0.0, 0.0)
        assert (quality([found]).explained, quality([found]).r2) == (None, None)
