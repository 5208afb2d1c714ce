"""CONTRIBUTING's "Add a rule", carried out: a rule of one function works for everything that makes θ(α)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from adapters import CASES
from clipped_rule import CLIPPED, LIMIT
from helpers import DTYPES, Pair, as_bytes, round_to, stopped_in_shard, tree, without_clock, write
from safetensors.torch import load_file
from torch import Tensor

from expo.cli import program as cli
from expo.config import GenerateConfig, ThetaConfig
from expo.errors import InputError
from expo.theta import stream
from expo.theta.pair import plan_theta
from expo.theta.rules import RULES
from expo.theta.tensors import Theta
from expo.verbs import generate

ADDED = {"clipped": "clipped_rule:CLIPPED"}


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setitem(RULES, *next(iter(ADDED.items())))


def exact(sft: Tensor, dpo: Tensor, alpha: float) -> np.ndarray:
    """θ(α) in float64."""
    s, d = sft.double().numpy(), dpo.double().numpy()
    return d + alpha * np.clip(d - s, -LIMIT, LIMIT)


# --- checkpoints --------------------------------------------------------------------------------------------------

ALPHAS = (0.0, 0.3, -1.0, 8.0)


@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")], ids=str)
def test_a_pair_against_float64(tmp_path: Path, types: tuple[str, str]) -> None:
    sides = helpers.random_pair({"big": (3, 300_001), "odd": (7, 11), "one": (1,)}, torch.float32)
    sft, dpo = ({n: t.to(DTYPES[of]) for n, t in side.items()} for side, of in zip(sides, types, strict=True))
    pair = helpers.write_checkpoint(tmp_path / "sft", sft), helpers.write_checkpoint(tmp_path / "dpo", dpo, shards=2)
    for written in write(pair, tmp_path / "{alpha}", *ALPHAS, rule="clipped"):
        for name, out in helpers.read_checkpoint_tensors(written.path).items():
            right = exact(sft[name], dpo[name], written.alpha)
            bound = 2.0**-22 * (np.abs(right) + abs(written.alpha))
            assert (round_to(right - bound, out.dtype) <= out.double().numpy()).all()
            assert (out.double().numpy() <= round_to(right + bound, out.dtype)).all()
            if written.alpha == 0:
                assert as_bytes(out) == as_bytes(dpo[name])


@pytest.mark.filterwarnings("ignore")  # PEFT's, of unusual choices
@pytest.mark.parametrize("case", ["plain", "saved modules", "fan-in fan-out"])
def test_an_adapter_against_float64(made, tmp_path: Path, case: str) -> None:
    pair = made(CASES[case], torch.float32)
    sft, right = load_file(pair[0] / "model.safetensors"), made.merged(pair)
    for written in write(pair, tmp_path / "{alpha}", *ALPHAS, rule="clipped"):
        found = helpers.read_checkpoint_tensors(written.path)
        for name, out in found.items():
            np.testing.assert_allclose(out.numpy(), exact(sft[name], right[name], written.alpha), atol=3e-6)
    assert any((right[name] - side).abs().max() > 2 * LIMIT for name, side in sft.items()), "the limit is met"


def test_alphas_in_one_pass_and_workers_change_nothing(
    pair: Pair, made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CPU_PIECE_BYTES", 160)
    for name, sides in (("pair", pair), ("adapter", made(CASES["plain"], torch.bfloat16))):
        write(sides, tmp_path / name / "{alpha}", 0.3, 8.0, rule="clipped", workers=3)
        for alpha in ("0.3", "8.0"):
            write(sides, tmp_path / name / f"alone-{alpha}", float(alpha), rule="clipped", workers=1)
            several, alone = (without_clock(tree(tmp_path / name / folder)) for folder in (alpha, f"alone-{alpha}"))
            assert several == alone


def test_resumed_equals_uninterrupted(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "whole", rule="clipped")
    with stopped_in_shard(1):
        write(pair, tmp_path / "out", rule="clipped")
    assert not (tmp_path / "out" / "config.json").exists()
    write(pair, tmp_path / "out", rule="clipped")
    assert without_clock(tree(tmp_path / "out")) == without_clock(tree(tmp_path / "whole"))


def test_a_result_that_is_not_finite_is_found_without_a_bound(tmp_path: Path) -> None:
    sft, dpo = {"w": torch.zeros(9, dtype=torch.float16)}, {"w": torch.full((9,), 65504.0, dtype=torch.float16)}
    pair = helpers.write_checkpoint(tmp_path / "sft", sft), helpers.write_checkpoint(tmp_path / "dpo", dpo)
    with pytest.raises(InputError, match="tensor w contains NaN or infinity"):
        write(pair, tmp_path / "out", 1e6, rule="clipped")


# --- what is said of it -------------------------------------------------------------------------------------------


def test_card_and_manifest_name_it_and_a_rerun_is_complete(pair: Pair, tmp_path: Path, expo) -> None:
    arguments = ("--alpha", 0.5, "--output", tmp_path / "out", "--rule", "clipped")
    assert json.loads(expo(pair, *arguments, "--dry-run", "--json").stdout)["rule"] == "clipped"
    assert expo(pair, *arguments).code == 0
    manifest, card = json.loads((tmp_path / "out/expo.json").read_text()), (tmp_path / "out/README.md").read_text()
    assert (manifest["rule"], manifest["formula"]) == ("clipped", CLIPPED.formula)
    assert manifest["fingerprint"]["rule"] == manifest["config"]["rule"] == "clipped"
    assert f"{CLIPPED.formula}, with α = 0.5" in card
    assert "--rule clipped" in card
    assert json.loads(expo(pair, *arguments, "--json").stdout)["outputs"][0]["status"] == "already complete"
    refused = expo(pair, *arguments[:-2])
    assert refused.code == 2
    assert "was made with a different rule" in refused.stderr


def test_outputs_of_the_linear_rule_are_as_before_there_were_others(pair: Pair, tmp_path: Path) -> None:
    write(pair, tmp_path / "out")
    manifest, card = json.loads((tmp_path / "out/expo.json").read_text()), (tmp_path / "out/README.md").read_text()
    assert "rule" not in manifest["fingerprint"]
    assert manifest["rule"] == "linear"
    assert "\nθ(α) = θ_dpo + α (θ_dpo − θ_sft), with α = 0.5\n" in card
    with pytest.raises(InputError, match="made with a different rule"):
        write(pair, tmp_path / "out", rule="clipped")


def test_an_unknown_rule_is_refused_with_the_known_ones(pair: Pair, tmp_path: Path, expo) -> None:
    result = expo(pair, "--alpha", 0.5, "--output", tmp_path / "out", "--rule", "cliped")
    assert (result.code, result.stdout) == (2, "")
    assert "--rule must be one of linear, clipped, not 'cliped'" in result.stderr


def test_help_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["extrapolate", "--help"]) == 0
    assert "linear|relex" in capsys.readouterr().out
    script = f"from expo.theta.rules import RULES; RULES |= {ADDED}; from expo.cli.program import main; main()"
    assert "linear|clipped|relex" in helpers.run_python(script, "extrapolate", "--help").stdout


# --- engines ------------------------------------------------------------------------------------------------------


def test_theta_in_memory_is_what_is_written(llama_pair: Pair, tmp_path: Path) -> None:
    write(llama_pair, tmp_path / "written", 8.0, rule="clipped")
    made = plan_theta(ThetaConfig(sft=str(llama_pair[0]), dpo=str(llama_pair[1]), alpha=8.0, rule="clipped"))
    with Theta(made.pair) as theta:
        found = {name: as_bytes(tensor) for name, tensor in theta}
    expected = helpers.read_checkpoint_tensors(tmp_path / "written")
    assert found == {name: as_bytes(tensor) for name, tensor in expected.items()}


def test_transformers_answers_as_on_the_written_checkpoint(llama_pair: Pair, tmp_path: Path) -> None:
    task = tmp_path / "questions.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"w{row} w{2 * row}"}) + "\n" for row in range(6)))

    def rows(**source: Any) -> bytes:
        common = {"engine": "transformers", "device": "cpu", "max_tokens": 9, "output_dir": str(tmp_path)}
        return generate.run(GenerateConfig(task=str(task), **common, **source)).output.read_bytes()

    of_pair = {"sft": str(llama_pair[0]), "dpo": str(llama_pair[1]), "alpha": 8.0}
    write(llama_pair, tmp_path / "written", 8.0, rule="clipped")
    expected = rows(model=str(tmp_path / "written"))
    assert rows(**of_pair, rule="clipped") == expected != rows(**of_pair, name="linear")
    assert (
        json.loads((tmp_path / "outputs_questions/dpo-ExPO-a8.0.meta.json").read_text())["config"]["rule"] == "clipped"
    )
    with pytest.raises(InputError, match="made with a different rule"):
        rows(**of_pair)


VLLM = f"""
import json, sys
from contextlib import closing
from expo.config import GenerateConfig
from expo.verbs.generate import plan
from expo.rows import EngineKeeper
from expo.theta.rules import RULES

RULES |= {ADDED}

def ask(keeper, **source):
    decoding = {{"dtype": "float32", "temperature": 0.0, "max_tokens": 8}}
    work = plan(GenerateConfig(task=sys.argv[1], engine="vllm", **decoding, **source))
    answers = keeper.engine_for(work).generate(work.requests, set())
    return {{one.request.id: list(one.token_ids) for rows in answers for one in rows}}

def main():
    with closing(EngineKeeper()) as keeper:
        print(json.dumps([ask(keeper, **source) for source in map(json.loads, sys.argv[2:])]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.full  # that vLLM holds what is written is in CI with the linear rule, and a further rule with transformers
def test_vllm_answers_as_on_the_written_checkpoint(trained: Path, tmp_path: Path, run_warm: helpers.Run) -> None:
    sft, dpo = trained / "tiny-sft", trained / "tiny-dpo"
    write((sft, dpo), tmp_path / "written", 8.0, rule="clipped")
    prompts = json.loads((trained / "held_out_prompts.json").read_text())
    (tmp_path / "long.json").write_text(json.dumps([{"prompt": prompt} for prompt in prompts[:6]]))
    (tmp_path / "script.py").write_text(VLLM)
    sources = [
        {"model": str(tmp_path / "written")},
        {"sft": str(sft), "dpo": str(dpo), "alpha": 8.0, "rule": "clipped"},
        {"sft": str(sft), "dpo": str(dpo), "alpha": 8.0},
    ]
    done = run_warm(tmp_path / "script.py", tmp_path / "long.json", *map(json.dumps, sources))
    assert done.code == 0, done.stderr[-5000:]
    written, clipped, linear = json.loads(done.stdout.splitlines()[-1])
    assert clipped == written
    assert linear != written, "the rule matters to these answers"
