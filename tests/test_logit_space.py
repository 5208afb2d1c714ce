"""--space logits: tokens are those of both models' float64 distributions; rows, names, sweeps and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch
from adapters import save_adapter
from crashes import killed_when
from helpers import Pair
from peft import LoraConfig
from test_score import make_reward_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from expo.config import GenerateConfig, SweepConfig
from expo.engines import GENERATORS, Request, find_engine, vllm_tools
from expo.engines.transformers import TransformersGenerator, sampling_noise
from expo.engines.transformers_logits import ReadsAlong, combined
from expo.errors import InputError
from expo.output.sweeps import read_sweep
from expo.rows import EngineKeeper
from expo.settings import settings_of
from expo.theta.names import named_alpha, theta_name
from expo.theta.pair import plan_theta
from expo.verbs import generate as verb, sweep
from expo.verbs.compare.comparison import compare
from expo.verbs.compare.curve import curve_points, spaces_of
from expo.verbs.compare.reading import read_runs
from expo.verbs.compare.run import RowKey, Run, RunRow
from expo.verbs.generate.plan import plan
from expo.verbs.report import figures
from expo.verbs.report.sweep import with_alphas
from expo.verbs.sweep.estimate import _probed
from expo.verbs.sweep.placement import PROCESS_BYTES
from expo.verbs.sweep.plan import plan as plan_sweep

PROMPTS = [" ".join(f"w{(3 * row + word) % 50}" for word in range(1 + row % 7)) for row in range(12)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


def of(pair: Pair, task: Path, alpha: float = 1.5, **others: Any) -> GenerateConfig:
    fixed = {"task": str(task), "output_dir": str(task.parent), "engine": "transformers", "device": "cpu"}
    sizes = {"max_tokens": 9, "batch_tokens": 60, "dtype": "float32", "space": "logits"}
    return GenerateConfig(**{**fixed, **sizes, "sft": str(pair[0]), "dpo": str(pair[1]), "alpha": alpha, **others})


# --- the distribution ---------------------------------------------------------------------------------------------


def reference(pair: Pair, config: GenerateConfig, request: Request, stop_ids: Sequence[int]) -> list[int]:
    """An answer by both models in float64: everything read again at each step, one row at a time."""
    sft, dpo = (AutoModelForCausalLM.from_pretrained(side).double() for side in pair)
    noise, made = sampling_noise(config, request), list[int]()
    while len(made) < request.max_tokens and not (made and made[-1] in stop_ids):
        ids = torch.tensor([[*request.prompt_ids, *made]])
        with torch.no_grad():
            of_dpo, of_sft = (model(ids).logits[0, -1].softmax(-1) for model in (dpo, sft))
        scores = (of_dpo ** (1 + config.alpha) / of_sft**config.alpha).log()
        counts = torch.bincount(torch.tensor(made, dtype=torch.long), minlength=len(scores))
        scores -= config.frequency_penalty * counts + config.presence_penalty * (counts > 0)
        made.append(_drawn(scores, config, request, float(noise[len(made)])))
    return made


def _drawn(scores: Tensor, config: GenerateConfig, request: Request, noise: float) -> int:
    if not request.temperature:
        return int(scores.argmax())
    order = scores.argsort(descending=True)[: config.top_k]
    chances = (scores[order] / request.temperature).softmax(0)
    kept = order[(chances.cumsum(0) - chances) < config.top_p].sort().values  # as few as have top_p together
    mass = (scores[kept] / request.temperature).softmax(0).cumsum(0)
    return int(kept[int((mass <= noise * mass[-1]).sum())])


def test_tokens_are_those_of_a_float64_loop_without_a_cache(llama_pair: Pair, task: Path) -> None:
    """One batch of unequal prompts, limits and temperatures; then another α in the same engine, which loads nothing."""
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.3, "top_k": 20, "batch_tokens": 4096}
    works = [plan(of(llama_pair, task, alpha, **penalties)) for alpha in (2.5, -0.5)]
    rows = zip(works[0].requests[:6], (9, 2, 5, 9, 1, 7), (0.0, 0.7, 1.3, 0.7, 0.0, 0.0), strict=True)
    requests = [replace(one, max_tokens=most, temperature=heat) for one, most, heat in rows]
    with closing(TransformersGenerator(works[0].setup)) as engine:
        held = engine.held()
        for work in works:
            engine.load(work.setup)
            (batch,) = engine.generate(requests, set())
            wanted = {one.key: reference(llama_pair, work.config, one, work.setup.stop_ids) for one in requests}
            assert {one.request.key: list(one.token_ids) for one in batch} == wanted
        assert engine.held() == held, "a model was loaded or changed"


def test_a_model_without_a_cache_reads_everything_again(llama_pair: Pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_pair[0]).float()

    def forward(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> SimpleNamespace:
        out = model(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return SimpleNamespace(logits=out.logits)

    ids = torch.randint(6, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    without = type("Bare", (), {"forward": staticmethod(forward), "__call__": lambda self, **given: forward(**given)})()
    readers = [ReadsAlong(one, mask, 0.7) for one in (model, without)]
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for length in range(4, 10):
            cached, bare = (reader(ids[:, :length], scores) for reader in readers)
            torch.testing.assert_close(cached, bare, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 3.0, 3e38, -0.5, -3.0, -3e38])
def test_it_is_a_distribution_whatever_has_no_probability(alpha: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    dpo, sft = (8 * torch.randn(64, 50, generator=drawn) for _ in range(2))
    never, unknown = (torch.rand(64, 50, generator=drawn) < 0.3 for _ in range(2))
    never[0], unknown[0] = torch.arange(50) < 25, torch.arange(50) >= 25  # no token in common
    never[1], unknown[1] = torch.arange(50) < 0, torch.arange(50) != 7  # SFT has one token
    made = combined(dpo.masked_fill(never, -torch.inf), sft.masked_fill(unknown, -torch.inf), alpha)
    torch.testing.assert_close(made.exp().sum(-1), torch.ones(64))
    masked = never | unknown if alpha < 0 else never
    masked[0] = never[0]
    assert (made[masked] == -torch.inf).all()
    if abs(alpha) > 1e38:
        return
    wide = [one.double().masked_fill(no, -torch.inf).log_softmax(-1) for one, no in ((dpo, never), (sft, unknown))]
    least = wide[1].masked_fill(unknown, torch.inf).amin(-1, keepdim=True)
    wanted = wide[0] + alpha * (wide[0] - torch.where(unknown, least, wide[1]))
    wanted = wanted.masked_fill(masked, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(made.double(), wanted, atol=1e-4, rtol=1e-5)


# --- rows and files -----------------------------------------------------------------------------------------------


def test_dpo_and_sft_answer_by_themselves_at_0_and_minus_1(llama_pair: Pair, task: Path) -> None:
    """Bit for bit what they answer in weight space: alone in memory, and in an engine that has both."""
    weights = {alpha: verb.run(of(llama_pair, task, alpha, space="weights", dtype="auto")) for alpha in (0.0, -1.0)}
    for alpha in (0.0, -1.0):
        work = plan(of(llama_pair, task, alpha, dtype="auto"))
        with closing(TransformersGenerator(work.setup)) as engine:
            assert len(engine.held()) == 1
    with closing(EngineKeeper()) as keeper:
        both = verb.run(of(llama_pair, task, dtype="auto"), keeper)
        rows = {alpha: verb.run(of(llama_pair, task, alpha, dtype="auto"), keeper) for alpha in (0.0, -1.0)}
        assert (keeper.opened, len(keeper._engine.held())) == (False, 2)
    for alpha, made in rows.items():
        assert made.output.name == f"dpo-ExPO-a{alpha!r}-logits.jsonl"
        assert made.output.read_bytes() == weights[alpha].output.read_bytes() != both.output.read_bytes()


def test_a_killed_run_goes_on_and_another_space_is_refused(llama_pair: Pair, task: Path) -> None:
    whole = verb.run(of(llama_pair, task, name="whole"))
    journal = whole.output.with_name(".cut.journal.jsonl")

    def answered() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") > 2

    killed_when(answered, lambda: bool(verb.run(of(llama_pair, task, name="cut")).rows) - 1)
    cut = verb.run(of(llama_pair, task, name="cut"))
    assert cut.output.read_bytes() == whole.output.read_bytes()
    meta = json.loads(cut.meta.read_text())
    assert (meta["space"], meta["alpha"], meta["fingerprint"]["space"]) == ("logits", 1.5, "logits")
    assert {"sft", "dpo", "alpha"} <= meta["fingerprint"].keys()
    with pytest.raises(InputError, match=r"made with a different space \('logits' then, 'weights' now\)"):
        verb.run(of(llama_pair, task, name="cut", space="weights"))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_merged_and_a_side_is_its_own_plan(llama_pair: Pair, task: Path, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    adapter = save_adapter(llama_pair[0], tmp_path / "adapter", lora)
    helpers.write((llama_pair[0], adapter), tmp_path / "merged", 0.0)
    rows = [verb.run(of((llama_pair[0], dpo), task, dtype="auto")) for dpo in (adapter, tmp_path / "merged")]
    assert rows[0].output.read_bytes() == rows[1].output.read_bytes()
    for dpo in (adapter, llama_pair[1]):
        theta = of((llama_pair[0], dpo), task).theta
        assert theta is not None
        for side in (0.0, -1.0):
            assert plan_theta(theta).at(side) == plan_theta(replace(theta, alpha=side))


def test_names() -> None:
    assert theta_name("d", 0.5, space="logits") == "d-ExPO-a0.5-logits"
    assert named_alpha("d-ExPO-a-1e-05-logits") == ("d", -1e-05, "logits")
    assert named_alpha("d-ExPO-a2.0") == ("d", 2.0, "weights")
    assert named_alpha("d-ExPO-a2.0-logit") is None


# --- what it is not for -------------------------------------------------------------------------------------------

REFUSED = [
    ({"engine": "vllm"}, "--space works only with the transformers engine, and this run uses vllm"),
    (
        {"engine": "openai", "base_url": "http://localhost:1"},
        "works only with the vllm and transformers engines, and .* openai",
    ),
    ({"alpha_for": ("norm=0",)}, "--alpha-for is about how weights are combined"),
    ({"exclude": ("norm",)}, "--exclude is about how weights are combined"),
    ({"vocab": "common"}, "--vocab is about how weights are combined"),
    ({"rule": "mine"}, "--rule mine combines weights"),
    ({"dpo": None, "alpha": None, "checkpoint": ("9=x",), "target_step": 18}, "a training run's --checkpoint"),
    ({"sft": None, "dpo": None, "alpha": None, "model": "m"}, "in place of --model"),
    ({"space": "odds"}, "--space must be one of weights, logits"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_has_no_meaning_there_is_refused(llama_pair: Pair, task: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(of(llama_pair, task, **given))


def _other_ids(sft: Path) -> None:
    file = sft / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7"', '"w_"').replace('"w8"', '"w7"').replace('"w_"', '"w8"'))


def _wider(sft: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sft)
    model.resize_token_embeddings(72)
    model.save_pretrained(sft)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_ids, "the token 'w8' has id 13 in sft and 14 in dpo .* of different tokens"),
        (_wider, "vectors for 72 tokens and dpo for 64"),
    ],
)
def test_models_of_other_tokens_are_refused(llama_pair: Pair, task: Path, tmp_path: Path, change, message) -> None:
    sft = shutil.copytree(llama_pair[0], tmp_path / "sft")
    change(sft)
    with pytest.raises(InputError, match=message):
        plan(of((sft, llama_pair[1]), task))


def test_auto_is_transformers_where_vllm_runs_too_and_says_why(llama_pair, task, monkeypatch, caplog) -> None:
    monkeypatch.setattr(vllm_tools, "why_not", lambda: None)
    caplog.set_level("INFO", "expo")
    config = of(llama_pair, task, engine="auto")
    assert find_engine(GENERATORS, "auto", config)[0] == "transformers"
    assert "engine: transformers (vLLM draws tokens from one model's logits" in caplog.text
    assert find_engine(GENERATORS, "auto", replace(config, space="weights"))[0] == "vllm"
    assert "(exploratory" in settings_of(GenerateConfig)["space"].help


# --- a sweep ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reward_model(llama_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("logits-rm") / "rm", llama_pair[1], labels=1, pad_id=2)


@pytest.fixture
def opened(forked_workers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with the number of models in memory, for each α that an engine is given; workers are forks."""
    file, begin = tmp_path / "opened", TransformersGenerator._load_model

    def noted(engine: TransformersGenerator) -> None:
        begin(engine)
        with file.open("a") as stream:
            stream.write(f"{len(engine.held())} ")

    monkeypatch.setattr(TransformersGenerator, "_load_model", noted)
    return file


def _sweep(pair: Pair, task: Path, reward_model: Path, **others: Any) -> SweepConfig:
    fixed = {"task": str(task), "output": str(task.parent / "swept"), "reward_model": (str(reward_model),)}
    sides = {"sft": str(pair[0]), "dpo": str(pair[1]), "space": "logits", "alpha": (0.5, 2.0), "any_pair": True}
    sizes = {"max_tokens": 9, "batch_tokens": 60, "dtype": "float32", "reward_dtype": "float32", "device": "cpu"}
    return SweepConfig(**{**fixed, **sides, **sizes, "engine": "auto", "reward_device": "cpu", **others})


def test_a_sweep_has_the_rows_of_single_runs_by_one_engine(llama_pair, task, reward_model, opened, tmp_path) -> None:
    swept = sweep.run(_sweep(llama_pair, task, reward_model))
    assert opened.read_text() == "1 2 2 "
    record = read_sweep(Path(swept.file).parent).content
    assert (record["space"], record["switch"]["way"], record["switch"]["proved"]) == ("logits", "logits", True)
    assert any("--space logits (exploratory)" in note for note in record["notes"])
    for alpha in (0.0, 0.5, 2.0):
        made = verb.run(of(llama_pair, task, alpha))
        assert (swept.file.parent / "outputs_questions" / made.output.name).read_bytes() == made.output.read_bytes()
    runs = read_runs(
        [theta_name("dpo", alpha, space="logits") for alpha in (0.0, 2.0)], output_dir=str(swept.file.parent)
    )
    assert [(run.alpha, run.space) for run in runs] == [(0.0, "logits"), (2.0, "logits")]


def test_both_spaces_beside_each_other_are_two_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO, which is of both, comes from the one where the other lacks it; names say the space where files do not."""
    keys = [RowKey(f"p{row}", 0) for row in range(20)]
    rows = tuple(RunRow(key, key.prompt, "q", (), "an answer", None, 5, "stop") for key in keys)
    names = [theta_name("d", alpha, space=space) for space in ("weights", "logits") for alpha in (0.0, 0.5, 2.0)]
    names.remove("d-ExPO-a0.0-logits")
    made = [Run(name, "t", rows, {"rm": tuple(float(len(names) * place + row % 3) for row in range(20))})
            for place, name in enumerate(names)]  # fmt: skip
    (table,) = compare(with_alphas(made), flips=0).tables
    assert spaces_of(table) == ("weights", "logits")
    for space, heights in (("weights", [0, 5, 10]), ("logits", [0, 15, 20])):
        points = curve_points(table, space)
        assert [point.alpha for point in points] == [0.0, 0.5, 2.0]
        assert [round(point.reward.value - points[0].reward.value) for point in points] == heights
    monkeypatch.setattr(figures, "alpha_curve", lambda points, **_: points)
    charts = [figures._alpha_curve(table, space, "", "", None) for space in spaces_of(table)]
    assert [chart.name for chart in charts] == ["alpha", "alpha-logits"]


def test_a_sweep_counts_two_models_and_probes_both(llama_pair, task, reward_model) -> None:
    config = _sweep(llama_pair, task, reward_model, with_sft=True)
    two, one = plan_sweep(config), plan_sweep(replace(config, space="weights"))
    assert two.places[0].nbytes - PROCESS_BYTES == 2 * (one.places[0].nbytes - PROCESS_BYTES)
    assert (_probed(two), _probed(one)) == (0.5, 0.0)
    with pytest.raises(InputError, match="--switch adapter is about weights"):
        replace(config, switch="adapter")
    with pytest.raises(InputError, match="--write cannot be combined with --space logits"):
        replace(config, write=True)


@pytest.mark.full
def test_a_race_has_both_models_in_one_engine(llama_pair, task, reward_model, opened) -> None:
    task.write_text("".join(json.dumps({"prompt": f"w{n} w{7 * n % 50}"}) + "\n" for n in range(40)))
    swept = sweep.run(_sweep(llama_pair, task, reward_model, search="race", slice=10))
    assert "1" not in opened.read_text().partition("2")[2], "a model was let go"
    assert swept.record["space"] == "logits"
