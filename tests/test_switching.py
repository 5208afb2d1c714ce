"""Another α in a live engine: it answers as an engine started there, and a probe sees whatever is left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapters import CASES
from conftest import _tokenizer
from switches import FIRST, SECOND, job, made_by, observe

from expo import generate
from expo.config import GenerateConfig, ThetaConfig
from expo.engines import Probed
from expo.engines.switching import difference, probe_prompts, read_answers, write_answers
from expo.engines.transformers import TransformersGenerator, _load
from expo.engines.verdicts import cache_folder, is_proved, keep_proof, proof_key
from expo.errors import EnvironmentFailure, InputError
from expo.files import natural
from expo.rows import EngineKeeper
from expo.rows.worker import Worker
from expo.sweep import switch
from expo.theta.moves import kind_of, moved_kinds
from expo.theta.pair import plan_theta
from expo.theta.tensors import Theta

HERE = Path(__file__).parent
MODELS = ("llama", "phi3", "qwen3_moe")
"""Split names, biases, a tied head; fused names, a head of its own; experts, whose size vLLM pads on a CPU."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model → a folder with a random tiny pair; every tensor moves by a few percent."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3MoeConfig

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    common = {**sizes, **heads, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}
    configs = {
        "llama": LlamaConfig(**common, attention_bias=True, tie_word_embeddings=True),
        "phi3": Phi3Config(**common, tie_word_embeddings=False),
        "qwen3_moe": Qwen3MoeConfig(**common, **experts, tie_word_embeddings=False),
    }
    folder = tmp_path_factory.mktemp("pairs")
    for name in MODELS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs[name], dtype=torch.bfloat16)
        for side, noise in (("sft", 0.1), ("dpo", 0.005)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(noise * torch.randn_like(parameter))
            model.save_pretrained(folder / name / side)
            _tokenizer().save_pretrained(folder / name / side)
    return {name: folder / name for name in MODELS}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("EXPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- engines ------------------------------------------------------------------------------------------------------


def seen(one: Any, other: Any) -> bool:
    """Whether two probes differ."""
    return difference([Probed(*row) for row in one], [Probed(*row) for row in other], 0.0) is not None


def check(found: dict[str, Any]) -> None:
    """The law, and that what is asked is fine enough to see one kind of tensor left behind."""
    assert min(map(len, found["prompts"])) > 128
    assert seen(found["first"], found["cold"])
    for name, like in (("switched", "cold"), ("switched again", "cold"), ("back", "first")):
        assert not seen(found[name], found[like]), name
    assert len(found["frozen"]) >= 9
    assert [kind for kind, answers in found["frozen"].items() if not seen(answers, found["cold"])] == []


@pytest.mark.parametrize("model", MODELS)
def test_a_transformers_engine_is_switched(pairs: dict[str, Path], model: str) -> None:
    check(observe("transformers", pairs[model]))


@pytest.fixture(scope="module")
def of_vllm(pairs: dict[str, Path], run_warm: helpers.Run) -> Any:
    """Model → what vLLM answered."""
    done = run_warm(HERE / "switches.py", "vllm", *pairs.values())
    assert done.code == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_vllm_engine_is_switched(of_vllm: Any, model: str) -> None:
    check(of_vllm[model])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "left_out"),
    [(model, "cache not reset") for model in MODELS]
    + [(model, "one buffer for all") for model in ("llama", "qwen3_moe")]  # no layer of phi3 has two tensors
    + [("llama", "head not packed"), ("qwen3_moe", "experts not packed")],
)
def test_what_a_switch_of_vllm_must_not_leave_out_is_seen(of_vllm: Any, model: str, left_out: str) -> None:
    answers = of_vllm[model][left_out]
    assert isinstance(answers, str) or seen(answers, of_vllm[model]["cold"])


# --- in place -----------------------------------------------------------------------------------------------------


def setup_at(pair: Path, alpha: float, **settings: Any) -> Any:
    return job("transformers", pair, alpha, **settings).setup


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_those_of_a_cold_load(pairs: dict[str, Path], model: str, dtype: str) -> None:
    engine = TransformersGenerator(setup_at(pairs[model], FIRST, dtype=dtype))
    before = engine._model
    engine.load(setup_at(pairs[model], SECOND, dtype=dtype))
    cold = _load(setup_at(pairs[model], SECOND, dtype=dtype), torch.device("cpu"))[0].state_dict()
    live = engine._model.state_dict()
    assert live.keys() == cold.keys()
    assert all(live[name].dtype == cold[name].dtype and torch.equal(live[name], cold[name]) for name in cold)
    assert (engine._model is before) == (model != "qwen3_moe")  # experts are stacked: loaded anew
    if model == "llama":
        assert live["lm_head.weight"].data_ptr() == live["model.embed_tokens.weight"].data_ptr()


def test_a_tied_head_that_is_stored_is_written_once_and_one_that_differs_is_loaded_anew(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    pair = Path(shutil.copytree(pairs["llama"], tmp_path / "pair"))
    for side in ("sft", "dpo"):
        tensors = helpers.read_checkpoint_tensors(pair / side)
        head = tensors["model.embed_tokens.weight"].clone()
        shutil.rmtree(pair / side / "model.safetensors", ignore_errors=True)
        helpers.save_file({**tensors, "lm_head.weight": head}, pair / side / "model.safetensors")
    engine = TransformersGenerator(setup_at(pair, FIRST))
    before = engine._model
    engine.load(setup_at(pair, SECOND))
    assert engine._model is before
    whole = Theta.tensor
    with made_by(lambda theta, name: whole(theta, name) + (name == "lm_head.weight")):
        engine.load(setup_at(pair, FIRST))
    assert engine._model is not before


def test_an_engine_that_was_half_written_is_closed(pairs: dict[str, Path]) -> None:
    engine = TransformersGenerator(setup_at(pairs["phi3"], FIRST))
    whole = Theta.tensor

    def failing(theta: Theta, name: str) -> torch.Tensor:
        if name == "model.norm.weight":
            raise EnvironmentFailure("the disk is gone")
        return whole(theta, name)

    with made_by(failing), pytest.raises(EnvironmentFailure, match="the disk is gone"):
        engine.load(setup_at(pairs["phi3"], SECOND))
    assert engine._model is None
    assert engine._places is None


def test_tensors_are_owned_and_those_of_a_layer_come_together(pairs: dict[str, Path]) -> None:
    plan = setup_at(pairs["qwen3_moe"], FIRST).theta
    with Theta(plan.pair) as theta:
        given = list(theta.sorted_by(natural))
        assert all(torch.equal(values, theta.tensor(name)) for name, values in given)
    assert len({values.untyped_storage().data_ptr() for _, values in given}) == len(given)
    layers = [name.split(".layers.")[1].split(".")[0] for name, _ in given if ".layers." in name]
    assert layers == sorted(layers, key=int)


# --- the probe ----------------------------------------------------------------------------------------------------


def test_prompts_fit_the_context_and_are_always_the_same() -> None:
    ids = range(100, 30_000)
    prompts, new_tokens = probe_prompts(ids, 4096)
    assert (prompts, new_tokens) == probe_prompts(ids, 4096)
    assert len({*prompts}) == 4
    assert {len(prompt) for prompt in prompts} == {144}
    assert {*prompts[0]} <= {*ids}
    for context in (2, 100, 130, 140, 150):
        prompts, new_tokens = probe_prompts(ids, context)
        assert len(prompts[0]) + new_tokens <= context
        assert new_tokens >= 1
        assert (len(prompts[0]) > 128) == (context >= 130)


@pytest.mark.parametrize(
    ("changed", "bound", "words"),
    [
        ({}, 0.0, None),
        ({"token_ids": (1, 3)}, 1.0, "token 2 after prompt 2 is 3 against 2"),
        ({"log_probs": (-1.0, -2.25)}, 0.0, "the log probability of token 2 after prompt 2 differs by 0.25"),
        ({"log_probs": (-1.0, -2.25)}, 0.25, None),
        ({"log_probs": (-1.0, math.nan)}, 1.0, "the log probability of token 2 after prompt 2 differs by nan"),
        ({"token_ids": (1,), "log_probs": (-1.0,)}, 0.0, "1 tokens after prompt 2 against 2"),
    ],
)
def test_a_difference_in_words(changed: dict[str, Any], bound: float, words: str | None) -> None:
    answers = [Probed((5,), (-0.5,)), Probed((1, 2), (-1.0, -2.0))]
    other = [answers[0], dataclasses.replace(answers[1], **changed)]
    assert difference(other, answers, bound) == words
    assert difference(answers[:1], answers, bound) == "1 answers against 2"


def test_answers_are_handed_on_exactly(tmp_path: Path) -> None:
    answers = [Probed((1, 2), (float(torch.tensor(0.1)), -math.inf))]
    write_answers(tmp_path / "a.json", answers, ready=1.5)
    assert read_answers(tmp_path / "a.json") == (answers, {"ready": 1.5})
    with pytest.raises(EnvironmentFailure, match="left no answers"):
        read_answers(tmp_path / "none.json")


def test_a_probe_makes_no_rows_and_leaves_the_engine_open(pairs: dict[str, Path], tmp_path: Path) -> None:
    work = dataclasses.replace(job("transformers", pairs["phi3"], FIRST), probe=tmp_path / "answers.json")
    keeper = EngineKeeper()
    result = generate.run(work.config, keeper, **work.worker_options())
    assert (result.status, result.rows, result.failed) == ("probed", 0, 0)
    assert not work.files.final.exists()
    assert keeper._engine is not None
    answers, seconds = read_answers(tmp_path / "answers.json")
    assert [len(one.token_ids) for one in answers] == [8] * 4
    assert seconds.keys() == {"ready", "probe"}
    assert dataclasses.replace(work, probe=None).worker_options() == {}


def test_what_runs_elsewhere_cannot_be_probed(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "hello"}\n')
    served = {"engine": "openai", "base_url": "http://localhost:1/v1", "model": "m"}
    config = GenerateConfig(task=str(tmp_path / "q.jsonl"), output_dir=str(tmp_path), **served)
    with pytest.raises(InputError, match="the openai engine does not run here"):
        generate.run(config, probe=str(tmp_path / "answers.json"))


# --- which kinds move ---------------------------------------------------------------------------------------------


def moved(pair: tuple[Path, Path], **rules: Any) -> frozenset[str]:
    return moved_kinds(plan_theta(ThetaConfig(sft=str(pair[0]), dpo=str(pair[1]), alpha=0.5, **rules)).pair)


def test_kinds_move_where_the_sides_differ(tmp_path: Path) -> None:
    shape = (64, 1024)  # too large to be compared whole
    sft = {f"layers.{layer}.{name}": torch.randn(shape) for layer in range(2) for name in ("q.weight", "k.weight")}
    sft |= {"experts.7.w1.weight": torch.randn(8, 8), "norm": torch.ones(4), "steps": torch.arange(3)}
    dpo = {name: values.clone() for name, values in sft.items()}
    dpo["layers.1.k.weight"][-1, -1] += 1
    dpo["experts.7.w1.weight"] += 1
    dpo["norm"] = dpo["norm"].to(torch.float16)  # the same values
    pair = helpers.write_checkpoint(tmp_path / "sft", sft), helpers.write_checkpoint(tmp_path / "dpo", dpo)
    assert moved(pair) == {"layers.*.k.weight", "experts.*.w1.weight"}
    assert moved(pair, exclude=("experts",)) == {"layers.*.k.weight"}
    assert moved(pair, alpha_for=(r"k\.weight=0.3",)) == {"experts.*.w1.weight"}


@pytest.mark.filterwarnings("ignore")
def test_kinds_that_an_adapter_touches_move(made: Callable[..., tuple[Path, Path]]) -> None:
    pair = made(CASES["plain"], torch.bfloat16)
    plan = plan_theta(ThetaConfig(sft=str(pair[0]), dpo=str(pair[1]), alpha=0.5)).pair
    assert plan.adapter is not None
    assert moved_kinds(plan) == {kind_of(name) for name in plan.adapter.low_rank}


# --- what is kept -------------------------------------------------------------------------------------------------


def test_a_proof_counts_for_its_key_and_no_kinds_beyond_its_own(pairs: dict[str, Path]) -> None:
    setup = setup_at(pairs["llama"], FIRST)
    key = proof_key("transformers", setup)
    assert key == proof_key("transformers", setup_at(pairs["llama"], SECOND))
    keep_proof(key, {"a", "b"})
    keep_proof(key, {"c"})
    assert is_proved(key, {"a"})
    assert is_proved(key, {"a", "b"})
    assert is_proved(key, {"c"})
    assert not is_proved(key, {"a", "c"})
    keep_proof(key, {"a", "b", "c"})
    assert json.loads(next(cache_folder().iterdir()).read_text())["moved"] == [["a", "b", "c"]]
    others = [proof_key("vllm", setup), proof_key("transformers", setup_at(pairs["phi3"], FIRST))]
    others += [proof_key("transformers", setup_at(pairs["llama"], FIRST, dtype="float16"))]
    others += [{**key, "versions": {**key["versions"], "torch": "0"}}, {**key, "hardware": ["another"]}]
    assert not any(is_proved(other, {"a"}) for other in others)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"moved": [["a"]]}', b'{"key": {}, "moved": 3}', b"\xff"])
def test_a_damaged_file_is_no_proof_and_no_error(content: bytes) -> None:
    key = {"engine": "e"}
    keep_proof(key, {"a"})
    (file,) = cache_folder().iterdir()
    file.write_bytes(content)
    assert not is_proved(key, {"a"})
    keep_proof(key, {"a"})
    assert is_proved(key, {"a"})


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file")
    keep_proof({"engine": "e"}, {"a"})
    assert not is_proved({"engine": "e"}, {"a"})


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "expo" / "switches"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "expo" / "switches"


# --- the proof ----------------------------------------------------------------------------------------------------


class Told:
    """In a worker's place: answers as it is told; no process.

    Args:
        answers: What it answers to the α that it is given, one after the other; an error ends it.
    """

    def __init__(self, answers: list[float | Exception]) -> None:
        self._answers = answers
        self.alphas: list[float] = []
        self.ended = False

    def take(self, work: Any) -> None:
        self._work = work
        self.alphas.append(work.config.alpha)

    def start(self) -> None:
        self._answer = self._answers.pop(0)
        if isinstance(self._answer, float):
            write_answers(self._work.probe, [Probed((1,), (self._answer,))], ready=1.0, probe=0.0)

    def outcome(self) -> int:
        return 0 if isinstance(self._answer, float) else self._answer.exit_code

    def last_error_line(self) -> str:
        return str(self._answer)

    def wait(self, seconds: float) -> None:
        pass

    def kill(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def end(self, seconds: float) -> None:
        self.ended = True


DEAD, REFUSED = EnvironmentFailure("it died"), InputError("it refuses")


def proved_by(pair: Path, *answers: list[float | Exception]) -> tuple[switch.Proof, list[Told]]:
    """The proof where processes, one after the other, answer so."""
    workers = [Told(list(one)) for one in answers]
    waiting = iter(workers)
    return switch.prove(lambda: next(waiting), job("transformers", pair, FIRST)), workers  # type: ignore[arg-type,return-value]


def test_a_switch_is_proved_once(pairs: dict[str, Path]) -> None:
    proof, (cold, live) = proved_by(pairs["phi3"], [-2.0], [-1.0, -2.0, -1.0])
    assert (proof.proved, proof.worker, proof.switch_seconds) == (True, live, 1.0)
    assert (cold.alphas, live.alphas) == ([SECOND], [FIRST, SECOND, FIRST])
    assert (cold.ended, live.ended) == (True, False)
    again, _ = proved_by(pairs["phi3"])
    assert (again.proved, again.worker) == (True, None)
    assert again.reason.startswith("proved before")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([[-2.0], [-1.0, -1.0, -1.0]], "an engine switched to α = 4.5 does not answer as one started there"),
        ([[-2.0], [-1.0, -2.0, -2.0]], "an engine switched back to α = 0.5 does not answer as before"),
        ([[-1.0], [-1.0, -1.0, -1.0]], "α = 0.5 and α = 4.5 give the same answers"),
        ([[-2.0], [-1.0, DEAD]], "switching from α = 0.5 to 4.5 and back fails: it died"),
        ([[math.nan], [math.nan]], "at α = 1.5 some log probabilities are no numbers"),
        ([[-2.0], [math.nan, -2.0, math.nan]], "at α = 0.5 some log probabilities are no numbers"),
    ],
)
def test_a_switch_that_is_not_proved_leaves_no_process_and_no_verdict(
    pairs: dict[str, Path], answers: list[list[float | Exception]], reason: str
) -> None:
    proof, workers = proved_by(pairs["phi3"], *answers)
    assert (proof.proved, proof.worker) == (False, None)
    assert proof.reason.startswith(reason)
    assert all(worker.ended for worker in workers)
    assert not cache_folder().exists()


def test_an_alpha_where_answers_are_no_numbers_is_followed_by_a_nearer_one(pairs: dict[str, Path]) -> None:
    proof, workers = proved_by(pairs["phi3"], [math.nan], [-2.0], [-1.0, -2.0, -1.0])
    assert proof.proved
    assert [worker.alphas for worker in workers] == [[4.5], [1.5], [0.5, 1.5, 0.5]]


@pytest.mark.parametrize(("error", "kind"), [(DEAD, EnvironmentFailure), (REFUSED, InputError)])
@pytest.mark.parametrize("before", [[], [[-2.0]]])
def test_an_engine_that_does_not_start_is_an_error(
    pairs: dict[str, Path], before: list[list[float]], error: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=str(error)):
        proved_by(pairs["phi3"], *before, [error])


def test_a_pair_of_which_nothing_moves_needs_no_proof(pairs: dict[str, Path]) -> None:
    work = job("transformers", pairs["phi3"], FIRST)
    assert work.setup.theta is not None
    same = dataclasses.replace(work.setup.theta.pair, shards=())
    work = dataclasses.replace(
        work, setup=dataclasses.replace(work.setup, theta=copy.copy(dataclasses.replace(work.setup.theta, pair=same)))
    )
    proof = switch.prove(lambda: pytest.fail("nothing is to be started"), work)
    assert (proof.proved, proof.worker, proof.reason) == (True, None, "no tensor moves with α")


@pytest.mark.slow
def test_a_switch_is_proved_with_real_processes(pairs: dict[str, Path]) -> None:
    work = job("transformers", pairs["llama"], FIRST)
    proof = switch.prove(lambda: Worker(work, helpers.environment(), stays=True), work)
    assert (proof.proved, proof.reason[:26]) == (True, "switched to α = 4.5 and ba"), proof
    assert proof.worker is not None
    try:
        assert proof.worker.exit_code() is None
        assert (proof.start_seconds or 0) > (proof.switch_seconds or 0) > 0
    finally:
        proof.worker.end(30)
