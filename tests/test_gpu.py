"""What only a machine with a GPU can show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from expo.config import ExtrapolateConfig, GenerateConfig, InspectConfig, ScoreConfig, SweepConfig
from expo.verbs import extrapolate as verb, generate, inspect, score, sweep

DEVICES = ("cpu", "cuda")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", helpers.DTYPES)
@pytest.mark.parametrize("alpha", [0.3, -1.0, 8.0])
def test_cuda_gives_what_the_cpu_gives(tmp_path, dtype, alpha):
    """Bit for bit, or within the law the CPU keeps (a fused multiply-add may round once less)."""
    sides = helpers.random_pair({"w": (4096, 1025), "b": (7,)}, helpers.DTYPES[dtype])
    sft, dpo = (helpers.write_checkpoint(tmp_path / name, side) for name, side in zip(("s", "d"), sides, strict=True))
    outputs = {}
    for device in ("cpu", "cuda"):
        settings = ExtrapolateConfig(
            sft=str(sft), dpo=str(dpo), alpha=(alpha,), device=device, output=str(tmp_path / device)
        )
        verb.run(settings)
        outputs[device] = helpers.read_checkpoint_tensors(tmp_path / device)
    for name, expected in outputs["cpu"].items():
        got = outputs["cuda"][name]
        if dtype == "float32":
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        else:
            helpers.share_off(sides[0][name], sides[1][name], alpha, got)


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_equal_infinities_and_parts_of_fused_weights(tmp_path, dtype):
    shapes = {f"model.layers.0.mlp.{name}_proj.weight": (1100, 2048) for name in ("gate", "up")}
    sft, dpo = helpers.random_pair({**shapes, "mask": (600_000,)}, helpers.DTYPES[dtype])
    for side in (sft, dpo):
        side["mask"][0], side["mask"][-1] = float("inf"), float("-inf")
    fused = {"model.layers.0.mlp.gate_up_proj.weight": torch.cat([dpo[name] for name in shapes]), "mask": dpo["mask"]}
    pair = helpers.write_checkpoint(tmp_path / "s", sft), helpers.write_checkpoint(tmp_path / "d", fused)
    for device in DEVICES:
        helpers.write(pair, tmp_path / device, 0.3, device=device)
    outputs = [helpers.read_checkpoint_tensors(tmp_path / device) for device in DEVICES]
    for name in fused:
        torch.testing.assert_close(outputs[1][name], outputs[0][name])


def test_device_memory_stays_small(tmp_path):
    """Half of what a run may take; the other half is for CUDA itself."""
    sides = helpers.random_pair({"w": (8192, 8192)})
    pair = tuple(helpers.write_checkpoint(tmp_path / name, side) for name, side in zip("sd", sides, strict=True))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    helpers.write(pair, tmp_path / "{alpha}", 0.3, 0.5, 1.0, device="cuda", workers=8)
    assert torch.cuda.max_memory_allocated() - before < 1 << 29
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_inspect_measures_what_the_cpu_measures(tmp_path, dtype):
    sides = helpers.random_pair({"w": (4096, 1025), "b": (7,)}, helpers.DTYPES[dtype])
    sft, dpo = (str(helpers.write_checkpoint(tmp_path / n, side)) for n, side in zip("sd", sides, strict=True))
    found = [inspect.run(InspectConfig(sft=sft, dpo=dpo, device=device)) for device in DEVICES]
    for one, other in zip(*(each.tensors for each in found), strict=True):
        for name in ("delta_squared", "sft_squared", "dpo_squared"):
            assert getattr(other.figures, name) == pytest.approx(getattr(one.figures, name), rel=2e-3)


# --- answers and rewards ------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path, trained: Path) -> Path:
    prompts = json.loads((trained / "held_out_prompts.json").read_text())[:16]
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return file


def answer(task: Path, name: str, **others: Any) -> tuple[list[str], dict[str, Any]]:
    """The answers of a run, and its meta."""
    fixed = {"engine": "transformers", "dtype": "float32", "max_tokens": 24, "batch_tokens": 4096}
    settings = {**fixed, "name": name, "output_dir": str(task.parent), **others}
    made = generate.run(GenerateConfig(task=str(task), **settings))
    rows = map(json.loads, made.output.read_text().splitlines())
    return [row["output"] for row in rows], json.loads(made.meta.read_text())


def test_answers_are_the_cpus_and_do_not_claim_to_be_repeatable(trained, task):
    model, greedy = str(trained / "tiny-dpo"), {"temperature": 0.0}
    (cpu, _), (gpu, meta) = (answer(task, device, model=model, device=device, **greedy) for device in DEVICES)
    assert not meta["repeatable"]
    # float32 sums are in another order: where two tokens are as likely as each other a row may go another way
    assert sum(one == other for one, other in zip(cpu, gpu, strict=True)) >= len(cpu) - 1
    sampled = [answer(task, f"sampled-{time}", model=model, device="cuda")[0] for time in range(2)]
    assert sampled[0] == sampled[1] != gpu


def test_theta_answers_as_the_written_checkpoint(trained, task, tmp_path):
    sides = trained / "tiny-sft", trained / "tiny-dpo"
    helpers.write(sides, tmp_path / "written", 0.5, device="cuda")
    settings = {"device": "cuda", "temperature": 0.0}
    written, _ = answer(task, "written", model=str(tmp_path / "written"), **settings)
    theta, _ = answer(task, "theta", sft=str(sides[0]), dpo=str(sides[1]), alpha=0.5, **settings)
    assert theta == written


def test_rewards_are_the_cpus(trained, task):
    answer(task, "mine", model=str(trained / "tiny-dpo"), device="cuda")
    fixed = {"task": str(task), "output_dir": str(task.parent), "reward_model": str(trained / "tiny-rm")}
    outputs = str(task.parent / "outputs_held_out" / "mine.jsonl")
    rewards = []
    for device in DEVICES:
        settings = {"name": device, "outputs": outputs, "device": device, "dtype": "float32"}
        scored = score.run(ScoreConfig(**fixed, **settings))
        rewards.append([json.loads(line) for line in scored.rewards.read_text().splitlines()])
    torch.testing.assert_close(*map(torch.tensor, rewards), rtol=1e-4, atol=1e-3)


def test_a_sweep_has_both_engines_on_the_gpu(trained, task, tmp_path):
    sides = {side: str(trained / f"tiny-{side}") for side in ("sft", "dpo")}
    settings = {
        "engine": "transformers",
        "dtype": "float32",
        "max_tokens": 24,
        "alpha": (0.5, 2.0),
        "output": str(tmp_path),
    }
    swept = sweep.run(SweepConfig(**sides, task=str(task), reward_model=(str(trained / "tiny-rm"),), **settings))
    assert swept.failed == 0
    assert [one["on"].startswith("GPU") for one in swept.record["engines"]] == [True, True]
    assert swept.record["switch"]["proved"], swept.record["switch"]
    alone, _ = answer(task, "alone", sft=sides["sft"], dpo=sides["dpo"], alpha=2.0, device="cuda", batch_tokens=16384)
    rows = (tmp_path / "outputs_held_out" / "tiny-dpo-ExPO-a2.0.jsonl").read_text().splitlines()
    assert [json.loads(row)["output"] for row in rows] == alone


@pytest.mark.vllm
def test_rewards_with_vllm_are_those_with_transformers(trained, task):
    """In float32, each engine on the GPU; `auto` takes vLLM there."""
    answer(task, "mine", model=str(trained / "tiny-dpo"), device="cuda")
    fixed = {"task": str(task), "output_dir": str(task.parent), "reward_model": str(trained / "tiny-rm")}
    outputs = str(task.parent / "outputs_held_out" / "mine.jsonl")
    rewards = []
    for engine in ("transformers", "auto"):
        scored = score.run(ScoreConfig(**fixed, name=engine, outputs=outputs, engine=engine, dtype="float32"))
        rewards.append([json.loads(line) for line in scored.rewards.read_text().splitlines()])
    assert json.loads(scored.meta.read_text())["engine"] == "vllm"
    torch.testing.assert_close(*map(torch.tensor, rewards), rtol=1e-4, atol=1e-3)
