"""The whole way on trained models: extrapolate, generate, score, and the demo's curve."""

from __future__ import annotations

import json

import helpers
import pytest
import torch
from made_inputs import on_real_inputs_too
from sizes import sized

from demo.run import check
from expo.config import ScoreConfig
from expo.verbs import score


@on_real_inputs_too
def test_logits_are_those_of_a_model_extrapolated_in_memory(trained, tmp_path, run_expo):
    from transformers import AutoModelForCausalLM

    sides = [trained / "tiny-sft", trained / "tiny-dpo"]
    done = run_expo("extrapolate", "--sft", sides[0], "--dpo", sides[1], "--alpha", 0.5, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    sft, dpo = (AutoModelForCausalLM.from_pretrained(side, dtype=torch.float64) for side in sides)
    with torch.no_grad():
        for s, d in zip(sft.parameters(), dpo.parameters(), strict=True):
            d.copy_((d + 0.5 * (d - s)).to(torch.bfloat16))  # float64, then one rounding to what the file holds
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.arange(1, dpo.config.vocab_size)[None]
    with torch.inference_mode():
        expected, logits = dpo(ids).logits, ours(ids).logits
    # the few weights beside a rounding boundary may lie one bfloat16 step off; without ExPO the gap is far larger
    assert (logits - expected).abs().max() < 2e-3
    plain = AutoModelForCausalLM.from_pretrained(sides[1], dtype=torch.float64)
    with torch.inference_mode():
        assert (plain(ids).logits - expected).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.vllm
def test_extrapolate_generate_score(trained, tmp_path, run_expo, run_warm):
    """θ(1) scores well above SFT on held-out prompts, by more than three standard errors.

    With vLLM, which auto takes here; the demo goes the same way with transformers.

    Two samples each: with one seed for every request, as in the paper, vLLM's rows share their random numbers.
    """
    prompts = json.loads((trained / "held_out_prompts.json").read_text())[:24]
    task = tmp_path / "held_out.jsonl"
    task.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sides = trained / "tiny-sft", trained / "tiny-dpo"
    helpers.write(sides, tmp_path / "one", 1)
    scored, settled = [], ["--max-tokens", 96, "--n", 2, "--dtype", "float32", "--output-dir", tmp_path, "--json"]
    for model in (trained / "tiny-sft", tmp_path / "one"):
        words = ("generate", task, "--model", model, *settled)
        made = run_warm("-m", "expo", *words) if scored else run_expo(*words, timeout=300)  # once from the beginning
        assert made.code == 0, made.stderr
        assert "engine: vllm" in made.stderr
        assert json.loads(made.stdout)["rows"] == 48  # one JSON object, none of vLLM's log
        meta = json.loads((tmp_path / "outputs_held_out" / f"{model.name}.meta.json").read_text())
        assert (meta["engine"], meta["repeatable"]) == ("vllm", True)
        assert meta["engine_step_seconds"] <= meta["generate_seconds"]
        made_by = {"task": str(task), "name": model.name, "output_dir": str(tmp_path)}
        scored.append(score.run(ScoreConfig(**made_by, reward_model=str(trained / "tiny-rm"), dtype="float32")))
    low, high = scored
    assert low.n == high.n == 48
    assert high.mean - low.mean > 3 * (low.standard_error**2 + high.standard_error**2) ** 0.5


DEMO = """
import shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from demo import run
from expo.rows import process
from forks import Fork

def train(folder):
    for name in ("sft", "dpo", "rm"):
        shutil.copytree(Path(trained) / f"tiny-{name}", folder / name)
    prompts = (Path(trained) / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(prompts[:int(count)]))

count, trained = sys.argv.pop(), sys.argv.pop()
run.train = train
process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
run.main()
"""
"""The demo, with forks for its processes, on a trio that its trainer made before, from fewer steps."""


@pytest.mark.slow
def test_the_demo_shows_the_curve(trained, tmp_path, run_forked):
    """It ends with an error of its own unless reward rises beyond α = 0 and falls again."""
    folder = tmp_path / "demo"
    (tmp_path / "run.py").write_text(DEMO)
    done = run_forked(tmp_path / "run.py", folder, trained, sized(ci=64, full=128))
    assert done.code == 0, done.stderr
    curve = {float(line.split()[0]): float(line.split()[1]) for line in done.stdout.splitlines() if "±" in line}
    record = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [*curve] == [one["alpha"] for one in record["alphas"]] == [-1, 0, 1, 2, 4, 8]
    assert curve[-1] < curve[0] < curve[record["best_alpha"]] > curve[8]
    assert record["verdict"] in " ".join(done.stdout.split())
    assert (folder / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = folder / "report.html"
    assert str(page) in done.stdout
    assert "Reward and length against α" in page.read_text()


@pytest.mark.parametrize(("chosen", "low", "last"), [(0.0, None, 0.5), (2.0, -0.1, 0.5), (2.0, 0.1, 2.1)])
def test_the_demo_fails_on_another_curve(chosen, low, last):
    """One where no α is chosen, none is surely better, or none is too large."""
    means = {0.0: (1.0, None), 2.0: (2.0, low), 8.0: (last, -1.0)}
    alphas = [
        {"alpha": alpha, "mean": mean, "standard_error": 0.1, "interval": None if end is None else [end, end + 1]}
        for alpha, (mean, end) in means.items()
    ]
    with pytest.raises(SystemExit, match="does not rise beyond α = 0 and fall again"):
        check({"best_alpha": chosen, "alphas": alphas})
