"""`--tensor-parallel 2` with the real vLLM, on a CPU: bare vLLM's answers, and no worker left behind.

What answers is a θ(α) that each of the two ranks makes while it loads; bare vLLM has the written checkpoint.
"""

from __future__ import annotations

import json
import shutil
import signal

import helpers
import pytest
from safetensors.torch import save_file
from sizes import sized
from test_orphans import wait_until_gone

SCRIPT = """
import json, os, signal, sys
import psutil
from expo.cli import program as cli
from expo.engines import vllm as backend

started = []

class Known(backend.VllmGenerator):
    def __init__(self, setup):
        super().__init__(setup)
        started.append(self)

    def close(self):
        pass  # it answers once more, below

def main():
    from vllm import TokensPrompt
    backend.VllmGenerator, seen = Known, []
    Known.generate = lambda self, requests, done, own=Known.generate: seen.extend(requests) or own(self, requests, done)
    code = cli.run(sys.argv[2:])
    prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in seen]
    setup = started[0]._setup
    params = [backend._params(setup, one.temperature, one.seed, one.max_tokens) for one in seen]
    held = started[0].held()
    written = {"load_format": "auto", "model_loader_extra_config": {}}
    started[0]._llm.collective_rpc("update_config", args=({"load_config": written},))
    started[0]._llm.collective_rpc("reload_weights", kwargs={"weights_path": sys.argv[1]})
    started[0]._llm.reset_prefix_cache()
    bare = started[0]._llm.generate(prompts, params, use_tqdm=False)
    size = started[0]._llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    lengths = [len(answer.outputs[0].token_ids) for answer in bare]
    texts = started[0]._llm.get_tokenizer().batch_decode(
        [answer.outputs[0].token_ids for answer in bare], skip_special_tokens=True
    )
    workers = [child.pid for child in psutil.Process().children(recursive=True)]
    told = {"code": code, "size": size, "texts": texts, "lengths": lengths, "workers": workers, "held": held}
    print(json.dumps(told), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main()
"""

FORKS = """
import multiprocessing
from vllm.v1.executor import multiproc_executor
multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
"""
"""Workers are forked; in the full check those of the first test are started as vLLM starts them, and import it."""
FORKED = f"""{FORKS}
from expo.cli.program import main
main()
"""
"""The program, with workers that are forked."""


@pytest.mark.vllm
@pytest.mark.slow
def test_two_workers_answer_as_bare_vllm_and_end_with_a_killed_run(trained, alpaca_data, run_warm, plugin, tmp_path):
    pair = trained / "tiny-sft", trained / "tiny-dpo"
    helpers.write(pair, tmp_path / "written", 1.5)
    script = tmp_path / "run.py"
    script.write_text(sized(ci=FORKS, full="") + SCRIPT)
    dataset = alpaca_data / "alpaca_eval" / "zephyr-7b-dpo-full.json"
    arguments = ["generate", "alpaca", "--dataset", dataset, "--engine", "vllm"]
    arguments += ["--sft", pair[0], "--dpo", pair[1], "--alpha", 1.5, "--name", "theta"]
    arguments += ["--tensor-parallel", 2, "--limit", 12, "--max-tokens", 24, "--output-dir", tmp_path]
    done = run_warm(script, tmp_path / "written", *arguments, env=plugin)
    assert done.code == -signal.SIGKILL, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["code"], told["size"]) == (0, 2)
    rows = json.loads((tmp_path / "outputs_alpaca" / "theta.json").read_text())
    meta = json.loads((tmp_path / "outputs_alpaca" / "theta.meta.json").read_text())
    assert [row["output"] for row in rows] == told["texts"]
    assert meta["per_row"]["length"] == told["lengths"]
    assert len(told["workers"]) >= 2
    one, other = told["held"]  # each rank's part of the weights
    assert one.keys() == other.keys() != set()
    assert {one[name] == other[name] for name in one} == {True, False}
    for worker in told["workers"]:
        wait_until_gone(worker)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_pair_that_the_workers_refuse_is_one_line_and_exit_code_2(trained, run_warm, plugin, tmp_path):
    tensors = helpers.read_checkpoint_tensors(trained / "tiny-sft")
    tensors["model.norm.weight"][3] = float("nan")
    sft = shutil.copytree(trained / "tiny-sft", tmp_path / "sft")
    (sft / "model.safetensors").unlink()
    save_file(tensors, sft / "model.safetensors")
    (tmp_path / "q.jsonl").write_text('{"prompt": "hello"}')
    arguments = ["--sft", sft, "--dpo", trained / "tiny-dpo", "--alpha", 1, "--tensor-parallel", 2]
    arguments += ["--engine", "vllm", "--output-dir", tmp_path]
    (tmp_path / "run.py").write_text(FORKED)
    result = run_warm(tmp_path / "run.py", "generate", tmp_path / "q.jsonl", *arguments, env=plugin)
    assert (result.code, result.stdout) == (2, "")
    assert "expo: error: the result for tensor model.norm.weight contains NaN" in result.stderr
    assert not (tmp_path / "outputs_q" / "tiny-dpo-ExPO-a1.0.jsonl").exists()
