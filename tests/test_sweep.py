"""expo sweep: the rows are those of extrapolate, generate and score; nothing is made twice, nothing is lost."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapters import save_adapter
from forks import Fork
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sizes import FULL
from test_score import make_reward_model

from expo.cli import program as cli
from expo.config import ExtrapolateConfig, GenerateConfig, ReportConfig, ScoreConfig, SweepConfig
from expo.engines.transformers import TransformersGenerator
from expo.engines.transformers_reward import TransformersScorer
from expo.errors import InputError
from expo.rows import dates
from expo.verbs import extrapolate, generate, report, score, sweep as verb
from expo.verbs.sweep import conclude
from expo.verbs.sweep.choice import choose
from expo.verbs.sweep.figures import Choice
from expo.verbs.sweep.plan import in_sweep

PROMPTS = [f"w{number} w{number * 7 % 50} w{number * 3 % 50}" for number in range(12)]
ALPHAS = (0.5, 2.0)


@pytest.fixture(autouse=True)
def processes(forked_workers, monkeypatch: pytest.MonkeyPatch) -> list[Fork]:
    """The processes that were started, which are forks of this one."""
    made: list[Fork] = []
    begin = forked_workers.__init__

    def noted(fork: Fork, *args: Any, **others: Any) -> None:
        begin(fork, *args, **others)
        made.append(fork)

    monkeypatch.setattr(forked_workers, "__init__", noted)
    return made


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each engine that is opened or given other weights, in whatever process."""
    file = tmp_path / "engines"
    file.touch()
    for kind, names in ((TransformersGenerator, ("__init__", "load")), (TransformersScorer, ("__init__",))):
        for name in names:
            monkeypatch.setattr(kind, name, noting(file, name, getattr(kind, name)))
    return file


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, verdicts: Path) -> None:
    """Verdicts about switches are kept by the tests: one proof is enough for most."""
    monkeypatch.setenv("EXPO_CACHE", str(verdicts))


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Those that were drawn."""
    return []


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch, pictures: list[bytes]) -> None:
    """A picture is drawn once, and stands for those of other sweeps; `test_sweep_choice.py` looks at pictures."""
    real = conclude.picture

    def picture(choice: Choice) -> bytes:
        if FULL or not pictures:
            pictures.append(real(choice))
        return pictures[-1]

    monkeypatch.setattr(conclude, "picture", picture)


def noting(file: Path, name: str, own: Callable[..., None]) -> Callable[..., None]:
    def noted(engine: Any, setup: Any) -> None:
        with file.open("a") as stream:
            stream.write(f"{type(engine).__name__} {name}\n")
        own(engine, setup)

    return noted


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture(scope="session")
def reward_model(llama_pair, tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("sweep-rm") / "rm", llama_pair[1], labels=1, pad_id=2)


@pytest.fixture
def swept(llama_pair, reward_model, task):
    """A function that gives the settings of a small sweep."""

    def settings(**others: Any) -> SweepConfig:
        defaults: dict[str, Any] = {
            "sft": str(llama_pair[0]),
            "dpo": str(llama_pair[1]),
            "reward_model": (str(reward_model),),
            "task": str(task),
            "output": str(task.parent / "sweep"),
            "alpha": ALPHAS,
            "engine": "transformers",
            "device": "cpu",
            "dtype": "float32",
            "max_tokens": 9,
            "batch_tokens": 60,
            "reward_device": "cpu",
            "reward_dtype": "float32",
            "reward_batch_tokens": 60,
            "any_pair": True,
        }
        return SweepConfig(**{**defaults, **others})

    return settings


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweep lies with which most tests begin."""
    return tmp_path_factory.mktemp("kept") / "sweep"


@pytest.fixture
def finished(swept, kept: Path, engines: Path, processes: list[Fork]) -> SweepConfig:
    """The settings of `swept`, and what a run with them makes."""
    config: SweepConfig = swept()
    if not kept.exists():
        verb.run(config)
        shutil.copytree(config.output, kept)
        processes.clear()
        engines.write_text("")
    else:
        shutil.copytree(kept, config.output)
    return config


def rows_of(folder: Path) -> dict[str, bytes]:
    """The files of rows of a sweep: answers and rewards, without what tells times."""
    return {name: content for name, content in helpers.tree(folder).items() if name.endswith("rows.jsonl") or (
        name.endswith(".jsonl") and "/." not in name)}  # fmt: skip


def assert_same_rows(ours: Path, theirs: Path) -> None:
    """Equal answers, and rewards that differ in their last bits at most, as batches differ."""
    one, other = rows_of(ours), rows_of(theirs)
    assert one.keys() == other.keys()
    for name, content in one.items():
        if name.startswith("outputs"):
            assert content == other[name], name
        elif not name.endswith(".rows.jsonl"):
            rewards = [list(map(float, file.splitlines())) for file in (content, other[name])]
            assert rewards[0] == pytest.approx(rewards[1], abs=1e-5), name


def record_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return content


def test_rows_are_those_of_extrapolate_generate_and_score(swept, llama_pair, reward_model, task, tmp_path):
    config = swept(with_sft=True, n=2)
    verb.run(config)
    folder, plain = Path(config.output), tmp_path / "plain"
    for alpha in (-1.0, 0.0, *ALPHAS):
        [written] = extrapolate.run(
            ExtrapolateConfig(
                sft=str(llama_pair[0]), dpo=str(llama_pair[1]), alpha=(alpha,), output=str(plain / f"model{alpha}")
            )
        )
        name = f"{llama_pair[1].name}-ExPO-a{alpha!r}"
        common = {"task": str(task), "name": name, "output_dir": str(plain), "device": "cpu", "dtype": "float32"}
        sampling = {"max_tokens": 9, "batch_tokens": 60, "n": 2, "engine": "transformers"}
        generate.run(GenerateConfig(model=str(written.path), **common, **sampling))
        score.run(ScoreConfig(reward_model=(str(reward_model),), batch_tokens=60, **common))
        for kind in ("outputs_questions", "rewards_questions"):
            ours, theirs = (base / kind / f"{name}.jsonl" for base in (folder, plain))
            assert ours.read_bytes() == theirs.read_bytes(), (alpha, kind)
    assert len({file.read_bytes() for file in folder.glob("outputs_questions/*.jsonl")}) == 4


def test_one_engine_of_each_kind_makes_all(swept, processes, engines, tmp_path):
    verb.run(swept(limit=2))  # the proof of the switch is made here, if it was not before
    processes.clear()
    engines.write_text("")
    verb.run(swept(output=str(tmp_path / "another")))
    assert len(processes) == 2
    policy = ["TransformersGenerator __init__", *["TransformersGenerator load"] * 2]
    assert sorted(engines.read_text().splitlines()) == [*policy, "TransformersScorer __init__"]
    assert all(process.poll() is not None for process in processes)


def test_where_a_switch_is_not_proved_an_engine_is_started_for_each_alpha(swept, monkeypatch, engines, caplog):
    """An engine that forgets to take other weights says so itself, by its answers."""
    monkeypatch.setenv("EXPO_CACHE", str(engines.with_name("no verdicts")))
    config = swept()
    verb.run(config)
    right = rows_of(Path(config.output))
    monkeypatch.setenv("EXPO_CACHE", str(engines.with_name("none either")))
    monkeypatch.setattr(TransformersGenerator, "load", lambda engine, setup: None)
    engines.write_text("")
    other = swept(output=config.output + "-other")
    verb.run(other)
    assert rows_of(Path(other.output)) == right
    assert "still holds different values from one started there" in caplog.text
    assert "starting a new engine for each α instead" in caplog.text
    assert engines.read_text().count("TransformersGenerator __init__") == 2 + 3
    assert record_of(Path(other.output))["switch"]["proved"] is False


def test_a_rerun_is_complete_and_starts_nothing(swept, processes):
    config = swept()
    first = verb.run(config)
    before, times = helpers.tree(Path(config.output)), {f: f.stat().st_mtime_ns for f in Path(config.output).rglob("*")}
    processes.clear()
    again = verb.run(config)
    assert (first.status, again.status) == ("written", "already complete")
    assert processes == []
    assert helpers.tree(Path(config.output)) == before
    assert {f: f.stat().st_mtime_ns for f in Path(config.output).rglob("*")} == times
    assert again.record == record_of(Path(config.output))


def test_more_alphas_extend_it(finished, swept, processes):
    config = finished
    before = rows_of(Path(config.output))
    processes.clear()
    verb.run(swept(alpha=(1.0,)))
    after = rows_of(Path(config.output))
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {
        f"{folder}_questions/dpo-ExPO-a1.0{suffix}.jsonl"
        for folder, suffix in (("outputs", ""), ("rewards", ""), ("rewards", ".rows"))
    }
    assert len(processes) == 2
    assert [one["alpha"] for one in record_of(Path(config.output))["alphas"]] == [0.0, 0.5, 1.0, 2.0]


def test_a_larger_limit_extends_every_alpha(swept, tmp_path):
    verb.run(swept(limit=5))
    config = swept(limit=None)
    verb.run(config)
    whole = swept(output=str(tmp_path / "whole"))
    verb.run(whole)
    assert_same_rows(Path(config.output), Path(whole.output))
    assert record_of(Path(config.output))["n"] == len(PROMPTS)


def test_other_settings_are_refused_by_name_unless_overwritten(finished, swept):
    config = finished
    before = helpers.tree(Path(config.output))
    with pytest.raises(InputError, match="temperature"):
        verb.run(swept(temperature=0.3))
    assert helpers.tree(Path(config.output)) == before
    verb.run(swept(temperature=0.3, overwrite=True))
    assert rows_of(Path(config.output)).keys() == {
        name for name in before if name.endswith(".jsonl")
    }  # none is left behind, and none is missing
    assert record_of(Path(config.output))["fingerprint"] != json.loads(before["sweep.json"])["fingerprint"]


def test_a_lost_record_or_picture_is_made_again_from_the_rows(swept, engines):
    config = swept()
    verb.run(config)
    first = record_of(Path(config.output))
    for name in ("sweep.json", "sweep.png"):
        (Path(config.output) / name).unlink()
        engines.write_text("")
        assert verb.run(config).status == "written"
        assert engines.read_text() == ""
    again = record_of(Path(config.output))
    for key in first.keys() - {"clock", "pair", "switch"}:
        assert again[key] == first[key], key


def test_rewards_that_are_lost_are_scored_again_without_generating(finished, processes):
    config = finished
    before = rows_of(Path(config.output))
    shutil.rmtree(Path(config.output) / "rewards_questions")
    processes.clear()
    verb.run(config)
    assert rows_of(Path(config.output)) == before
    assert len(processes) == 1


def test_a_second_reward_model_can_be_added(finished, swept, reward_model, llama_pair, tmp_path, processes):
    other = make_reward_model(tmp_path / "second", llama_pair[1], labels=1, pad_id=3)
    config = finished
    before = rows_of(Path(config.output))
    processes.clear()
    verb.run(swept(reward_model=(str(reward_model), str(other))))
    after = rows_of(Path(config.output))
    assert before.items() <= after.items()
    assert {name for name in after if "@second" in name} == {
        f"rewards_questions/dpo-ExPO-a{alpha}@second{suffix}"
        for alpha in ("0.0", "0.5", "2.0")
        for suffix in (".jsonl", ".rows.jsonl")
    }
    assert len(record_of(Path(config.output))["further"]) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_its_base_is_a_pair(swept, llama_pair, tmp_path, engines):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    config = swept(dpo=str(save_adapter(llama_pair[0], tmp_path / "adapter", lora)), alpha=(2.0,), limit=4)
    verb.run(config)
    assert engines.read_text().count("TransformersGenerator load") >= 1
    files = sorted(Path(config.output).glob("outputs_questions/*.jsonl"))
    assert [file.name for file in files] == ["adapter-ExPO-a0.0.jsonl", "adapter-ExPO-a2.0.jsonl"]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_questions_of_several_turns(swept, alpaca_data):
    questions = alpaca_data / "mt_bench" / "question.jsonl"
    config = swept(task="mtbench", dataset=str(questions), limit=3, alpha=(2.0,), max_tokens=5, temperature=0.0)
    assert verb.run(config).record["n"] == 6
    assert verb.run(config).status == "already complete"


def test_alpha_0_is_always_there_and_naming_it_is_no_duplicate(swept):
    config = swept(alpha=(0.0, -0.5, 0.5))
    verb.run(config)
    assert [one["alpha"] for one in record_of(Path(config.output))["alphas"]] == [-0.5, 0.0, 0.5]


@pytest.mark.parametrize("copied", [False, True], ids=["one folder", "a copy"])
def test_a_pair_of_equal_models_ends_before_it_costs_anything(swept, llama_pair, tmp_path, engines, copied):
    twin = tmp_path / "twin"
    if copied:
        shutil.copytree(llama_pair[1], twin)
    config = swept(sft=str(twin if copied else llama_pair[1]), any_pair=False)
    result = verb.run(config)
    assert result.record["best_alpha"] == 0.0
    assert engines.read_text() == ""
    assert record_of(Path(config.output)) == result.record
    assert verb.run(config).status == "already complete"


def test_a_pair_that_inspect_finds_unsuited_is_refused_before_it_costs_anything(swept, llama_pair, tmp_path, engines):
    far = tmp_path / "far"
    shutil.copytree(llama_pair[0], far)
    tensors = load_file(far / "model.safetensors")
    save_file({name: 9 * torch.randn_like(tensor) for name, tensor in tensors.items()}, far / "model.safetensors")
    config = swept(sft=str(far), any_pair=False)
    with pytest.raises(InputError, match=r"--any-pair"):
        verb.run(config)
    assert engines.read_text() == ""
    assert not Path(config.output).exists()


def test_a_reward_model_without_a_head_is_refused_before_it_costs_anything(swept, llama_pair, engines):
    config = swept(reward_model=(str(llama_pair[1]),))
    with pytest.raises(InputError, match=llama_pair[1].name):
        verb.run(config)
    assert engines.read_text() == ""


def test_what_a_process_refuses_ends_the_sweep_and_keeps_the_rows(swept, monkeypatch, processes):
    right = TransformersScorer.score

    def refuse(*_: object) -> None:
        raise InputError("no such thing")

    config = swept()
    monkeypatch.setattr(TransformersScorer, "score", refuse)
    with pytest.raises(InputError, match="no such thing"):
        verb.run(config)
    assert all(process.poll() is not None for process in processes)
    monkeypatch.setattr(TransformersScorer, "score", right)
    assert (Path(config.output) / "outputs_questions" / "dpo-ExPO-a0.0.jsonl").exists()
    assert verb.run(config).status == "written"


def test_the_plan_costs_little_and_writes_nothing(swept, processes, tmp_path):
    config = swept(dry_run=True)
    before = helpers.tree(tmp_path)
    said = verb.plan(config).describe()
    assert helpers.tree(tmp_path) == before
    assert said["rows_to_generate"] == 3 * len(PROMPTS)
    assert [one["for"] for one in said["cost"]] == ["policy", "rm"]
    assert all(one["tokens"] > 0 and one["seconds"] >= 0 and one["memory_bytes"] > 0 for one in said["cost"])
    assert [one["on"] for one in said["engines"]] == ["CPU", "CPU"]
    assert said["seconds_of_the_proof"] >= 0
    assert all(process.poll() is not None for process in processes)


def test_the_chosen_checkpoint_is_the_one_that_the_command_writes(swept, monkeypatch, tmp_path, capsys):
    real = conclude.choose
    monkeypatch.setattr(conclude, "choose", lambda *given: replace(real(*given), best_alpha=0.5))
    monkeypatch.chdir(tmp_path)
    result = verb.run(swept(write=True))
    assert result.checkpoint is not None
    written = helpers.tree(result.checkpoint)
    shutil.rmtree(result.checkpoint)
    words = shlex.split(result.record["command"])
    assert words[0] == "expo"
    assert cli.run(words[1:]) == 0
    assert {n: c for n, c in helpers.tree(result.checkpoint).items() if n.endswith(".safetensors")} == {
        n: c for n, c in written.items() if n.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": (0.0,)}, "--alpha 0 leaves nothing to choose: give an α above 0"),
        ({"alpha": (-0.5,)}, "--alpha -0.5 leaves nothing to choose"),
        ({"alpha_for": ("norm=0.5",)}, "--alpha-for norm=0.5 would also change α = 0"),
        ({"reward_device": "gpu"}, "--reward-device must be auto"),
        ({"reward_engine": "openai"}, "--reward-engine must be one of"),
        ({"alpha": (0.3, 0.3)}, "--alpha 0.3 is given more than once"),
        ({"alpha": (float("nan"),)}, "--alpha must be a finite number"),
        ({"reward_model": ("a", "a")}, "given twice"),
        ({"reward_max_length": 0}, "--reward-max-length must be positive"),
        ({"reward_engine_arg": ("x",)}, "--reward-engine-arg takes KEY=VALUE"),
        ({"search": "hill"}, "--search must be one of"),
        ({"engine": "openai"}, "--engine must be one of"),
    ],
)
def test_settings_that_are_refused(swept, changed, message):
    with pytest.raises(InputError, match=message):
        verb.run(swept(**changed))


# --- what a further run may meet ------------------------------------------------------------------------------------


class AnotherDay:
    """Stands in for `datetime` where dates of templates are taken: each time it is asked, in whatever process, it is
    another day."""

    fromisoformat = staticmethod(datetime.fromisoformat)

    def __init__(self, file: Path) -> None:
        self._file = file
        file.touch()

    def now(self) -> datetime:
        with self._file.open("a") as stream:
            stream.write("\n")
        return datetime(2024, 3, len(self._file.read_text()) % 28 + 1)


def test_all_prompts_of_a_sweep_have_one_date(swept, tmp_path, monkeypatch):
    """Where chat templates write one: whenever α are begun, in whatever process, and by a further run."""
    monkeypatch.setattr(dates, "datetime", AnotherDay(tmp_path / "asked"))
    template = tmp_path / "dated.jinja"
    dated = "{{ bos_token }} w{{ strftime_now('%d') | int }} "
    template.write_text(helpers.CHAT_TEMPLATE.replace("{{ bos_token }}", dated, 1))
    both = {"chat_template": str(template), "reward_chat_template": str(template)}
    verb.run(swept(limit=5, **both))
    config = swept(alpha=(*ALPHAS, 1.0), **both)
    verb.run(config)
    assert verb.run(config).status == "already complete"
    metas = [json.loads(file.read_text()) for file in Path(config.output).rglob("*_questions/*.meta.json")]
    moments = [(meta["command"], meta["fingerprint"]["template_date"]) for meta in metas]
    assert len(moments) == 2 * 4
    assert len(set(moments)) == 2, moments


def test_prompts_of_another_date_are_refused(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(dates, "datetime", AnotherDay(tmp_path / "asked"))
    template = tmp_path / "dated.jinja"
    template.write_text(helpers.CHAT_TEMPLATE + "w{{ strftime_now('%d') | int }}")
    config = swept(chat_template=str(template))
    generate.run(config.generating(0.5, config.output))
    with pytest.raises(InputError, match="writes a date into prompts"):
        verb.run(config)


def test_only_the_reward_models_that_are_given_judge(swept, reward_model, llama_pair, tmp_path, caplog):
    other = make_reward_model(tmp_path / "second", llama_pair[1], labels=1, pad_id=3)
    verb.run(swept(reward_model=(str(reward_model), str(other))))
    assert verb.run(swept()).record["further"] == []
    assert "second judged this sweep before and does not now" in caplog.text
    assert verb.run(swept(alpha=(1.0,))).record["further"] == []
    again = verb.run(swept(temperature=0.3, overwrite=True))  # rewards of the old answers are left, and in no figure
    assert again.record["further"] == []
    assert verb.run(swept(temperature=0.3)).status == "already complete"


@pytest.mark.parametrize("fault", ["no chat template", "another length", "another model"])
def test_what_is_wrong_with_a_reward_model_is_said_before_it_costs_anything(
    swept, reward_model, tmp_path, engines, fault
):
    if fault == "no chat template":
        bare = Path(shutil.copytree(reward_model, tmp_path / "bare"))
        for file in (bare / "chat_template.jinja", bare / "tokenizer_config.json"):
            if file.suffix == ".json":
                file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": None}))
            else:
                file.unlink(missing_ok=True)
        config, message = swept(reward_model=(str(bare),)), "--reward-chat-template FILE"
    elif fault == "another length":
        verb.run(swept(limit=4))
        config, message = swept(reward_max_length=16), "made with a different max-length"
    else:
        verb.run(swept(limit=4))
        other = make_reward_model(tmp_path / "second", reward_model, labels=1, pad_id=3)
        config, message = swept(reward_model=(str(other),)), "give that one first"
    engines.write_text("")
    before = helpers.tree(Path(config.output)) if Path(config.output).exists() else {}
    with pytest.raises(InputError, match=message):
        verb.run(config)
    assert engines.read_text() == ""
    assert (helpers.tree(Path(config.output)) if Path(config.output).exists() else {}) == before


def test_an_unfinished_extension_has_no_verdict(finished, swept, monkeypatch):
    config = finished
    more = swept(alpha=(1.0,))

    def refuse(*_: object) -> None:
        raise InputError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersScorer, "score", refuse)
        with pytest.raises(InputError, match="no such thing"):
            verb.run(more)
    record = record_of(Path(config.output))
    assert (record["best_alpha"], record["verdict"], record["command"]) == (None, None, None)
    assert "not finished" in record["notes"][0]
    assert not (Path(config.output) / "sweep.png").exists()
    assert verb.run(more).status == "written"
    record = record_of(Path(config.output))
    assert [one["alpha"] for one in record["alphas"]] == [0.0, 0.5, 1.0, 2.0]
    assert record["verdict"]
    assert record["pair"] is not None


def test_alphas_of_unequal_rows_are_reported_as_the_sweep_compared_them(finished, swept, tmp_path):
    config = swept(limit=5, alpha=(1.0,))
    record = verb.run(config).record
    assert [one["n"] for one in record["alphas"]] == [12, 12, 5, 12]
    page = tmp_path / "r.html"
    report.run(ReportConfig(runs=(config.output,), output=str(page)))
    assert (
        report.plan(ReportConfig(runs=(config.output,), output=str(page), overwrite=True)).sweep.best_alpha
        == (record["best_alpha"])
    )
    mean = f"{record['alphas'][2]['mean']:.3f}"[:-1]
    assert mean.replace("-", "\N{MINUS SIGN}") in page.read_text()


def test_a_row_that_fails_counts_once_for_each_alpha(swept, task):
    with task.open("a") as stream:
        stream.write(json.dumps({"prompt": "w1 " * 3000}) + "\n")
    result = verb.run(swept())
    assert (result.failed, result.can_retry) == (3, False)
    assert result.reason


def test_a_mistaken_sft_is_no_obstacle(swept, llama_pair):
    wrong = verb.run(swept(sft=str(llama_pair[1])))
    right = verb.run(swept())
    assert wrong.record.keys() >= right.record.keys() - {"config", "switch", "engines", "clock", "rows_xxh3"}
    for one, other in zip(wrong.record["alphas"], right.record["alphas"], strict=True):
        assert one.keys() == other.keys()


def test_overwrite_replaces_the_checkpoint_too(swept, monkeypatch, llama_pair, tmp_path):
    real = conclude.choose
    monkeypatch.setattr(conclude, "choose", lambda *given: replace(real(*given), best_alpha=0.5))
    dpo = Path(shutil.copytree(llama_pair[1], tmp_path / "dpo"))
    first = verb.run(swept(dpo=str(dpo), write=True))
    assert first.checkpoint is not None
    file = next(dpo.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    before = helpers.tree(first.checkpoint)
    again = verb.run(swept(dpo=str(dpo), write=True, overwrite=True))
    assert again.checkpoint == first.checkpoint
    assert helpers.tree(first.checkpoint) != before


def test_the_plan_counts_what_is_missing(swept, reward_model, llama_pair, tmp_path):
    assert verb.plan(swept(sft=str(llama_pair[1]))).describe()["pair"] == "identical"
    verb.run(swept(limit=5))
    assert verb.plan(swept(limit=5)).describe()["rows_to_generate"] == 0
    said = verb.plan(swept(limit=7)).describe()
    assert (said["rows_to_generate"], said["rows_to_score"]) == (3 * 2, 3 * 2)
    other = make_reward_model(tmp_path / "second", llama_pair[1], labels=1, pad_id=3)
    said = verb.plan(swept(limit=5, reward_model=(str(reward_model), str(other)))).describe()
    assert (said["rows_to_generate"], said["rows_to_score"]) == (0, 3 * 5)
    assert [(one["for"], one["rows"]) for one in said["cost"]] == [("second", 3 * 5)]


def test_the_plan_for_a_cluster_starts_nothing(swept, engines):
    said = verb.plan(swept(ray="127.0.0.1:9", data_parallel=3)).describe()
    assert (said["rows_to_generate"], said["rows_to_score"]) == (3 * len(PROMPTS), 3 * len(PROMPTS))
    assert {one["on"] for one in said["engines"]} == {"the Ray cluster"}
    assert "cost" not in said
    assert engines.read_text() == ""


def test_the_plan_refuses_what_the_run_refuses(swept, llama_pair, tmp_path, engines):
    far = tmp_path / "far"
    shutil.copytree(llama_pair[0], far)
    tensors = load_file(far / "model.safetensors")
    save_file({name: 9 * torch.randn_like(tensor) for name, tensor in tensors.items()}, far / "model.safetensors")
    with pytest.raises(InputError, match=r"--any-pair"):
        verb.plan(swept(sft=str(far), any_pair=False)).describe()
    assert engines.read_text() == ""


def test_shared_seeds_are_said_to_spoil_the_intervals(swept, caplog):
    result = verb.run(swept(seed_mode="shared", limit=3))
    assert any("--seed-mode row" in note for note in result.record["notes"])
    assert "--seed-mode row" in caplog.text


def test_messages_name_the_flags_of_a_sweep():
    said = "--device must be …; pass --chat-template FILE, or another --name or --output-dir, in /a--device/b--name"
    assert in_sweep(said, reward=False) == said.replace(" --name", " --output").replace("--output-dir", "--output")
    assert in_sweep(said, reward=True).startswith("--reward-device must be …; pass --reward-chat-template FILE")
    assert in_sweep(said, reward=True).endswith("/a--device/b--name")


# --- a training run -------------------------------------------------------------------------------------------------


@pytest.fixture
def of_run(swept, llama_pair, tmp_path):
    """A function that gives the settings of a sweep of the steps of a training run, whose last model is the pair's."""
    before, after = map(helpers.read_checkpoint_tensors, llama_pair)
    torch.manual_seed(0)
    middle = {
        name: (one.float().lerp(after[name].float(), 0.4) + 0.002 * torch.randn(one.shape)).to(one.dtype)
        for name, one in before.items()
    }
    early = helpers.write_checkpoint(tmp_path / "step_20", middle)

    def settings(**others: Any) -> SweepConfig:
        course = {"dpo": "", "alpha": (), "checkpoint": (f"20={early}", f"40={llama_pair[1]}")}
        return swept(**{**course, "target_step": (60.0, 120.0), "rule": "linear", **others})

    return settings


def test_steps_are_swept_as_alphas_are(of_run, llama_pair, reward_model, task, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = of_run(with_sft=True)
    found = verb.run(config)
    folder, plain = Path(config.output), tmp_path / "plain"
    names = ["dpo-ExPO-a-1.0", "dpo-ExPO-a0.0", "dpo-ExPO-t60", "dpo-ExPO-t120"]
    assert sorted(file.stem for file in folder.glob("outputs_questions/*.jsonl")) == sorted(names)
    assert [(one["alpha"], one["target_step"], one["name"]) for one in found.record["alphas"]] == list(
        zip((-1.0, 0.0, 0.5, 2.0), (0, 40, 60, 120), names, strict=True)
    )
    assert found.best_step == {0.0: 40, 0.5: 60, 2.0: 120}[found.best_alpha]
    assert "2 (step 120)" in found.text
    assert "trajectory: the lines explain" in caplog.text
    (written,) = extrapolate.run(
        ExtrapolateConfig(
            sft=config.sft, checkpoint=config.checkpoint, target_step=(120.0,), rule="linear", output=str(plain / "m")
        )
    )
    models = {"dpo-ExPO-a0.0": llama_pair[1], "dpo-ExPO-a-1.0": llama_pair[0], "dpo-ExPO-t120": written.path}
    for name, model in models.items():
        common = {"task": str(task), "name": name, "output_dir": str(plain), "device": "cpu", "dtype": "float32"}
        generate.run(GenerateConfig(model=str(model), max_tokens=9, batch_tokens=60, engine="transformers", **common))
        score.run(ScoreConfig(reward_model=(str(reward_model),), batch_tokens=60, **common))
        for kind in ("outputs_questions", "rewards_questions"):
            ours, theirs = (base / kind / f"{name}.jsonl" for base in (folder, plain))
            assert ours.read_bytes() == theirs.read_bytes(), (name, kind)


def test_a_sweep_of_steps_is_complete_extended_and_none_of_another_run(of_run, swept, tmp_path, processes):
    config = of_run()
    verb.run(config)
    processes.clear()
    assert verb.run(config).status == "already complete"
    assert processes == []
    before = rows_of(Path(config.output))
    found = verb.run(of_run(target_step=(80.0,)))
    assert [one["target_step"] for one in found.record["alphas"]] == [40, 60, 80, 120]
    assert before.items() <= rows_of(Path(config.output)).items()
    other = helpers.write_checkpoint(
        tmp_path / "other", helpers.read_checkpoint_tensors(Path(config.checkpoint[0].partition("=")[2]))
    )
    for changed in (
        {"checkpoint": (f"20={other}", config.checkpoint[1])},
        {"checkpoint": (config.checkpoint[0].replace("20=", "30=", 1), config.checkpoint[1])},
        {"rule": None},
    ):
        with pytest.raises(InputError, match="made with a different"):
            verb.run(of_run(**changed))
    with pytest.raises(InputError, match="made with a different"):
        verb.run(swept())


def test_the_chosen_step_is_written_and_the_page_is_of_its_sweep(of_run, monkeypatch, tmp_path):
    monkeypatch.setattr("expo.verbs.sweep.conclude.choose", chosen_last)
    found = verb.run(of_run(write=True))
    assert found.best_step == 120
    assert found.checkpoint == Path(found.file).parent / "checkpoints" / "dpo-ExPO-t120"
    assert "--target-step 120 " in found.record["command"]
    assert "--alpha" not in found.record["command"]
    said = json.loads((found.checkpoint / "expo.json").read_text())
    assert (said["trajectory"]["target_step"], said["trajectory"]["rule"]) == (120, "linear")
    page = report.run(ReportConfig(runs=(str(found.file.parent),), output=str(tmp_path / "page.html")))
    assert list(page.runs) == ["dpo-ExPO-a0.0", "dpo-ExPO-t60", "dpo-ExPO-t120"]
    text = (tmp_path / "page.html").read_text()
    assert "α = 2 (step 120) is chosen" in text
    assert "step T = 40 (1 + α)" in text


def chosen_last(runs: list[Any], raced: Any, last_step: float | None) -> Any:
    """A choice as it is, but for that the last α is the one."""
    choice = choose(runs, raced, last_step)
    return replace(choice, best_alpha=choice.alphas[-1].alpha)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_step": ()}, "--checkpoint needs --target-step"),
        ({"target_step": (30.0, 40.0)}, "--target-step 30 40 leaves nothing to choose: give one beyond the last"),
        ({"target_step": (60.0, 60.0)}, "--target-step 60.0 is given more than once"),
        ({"alpha": (0.3,)}, "--alpha and --target-step cannot be combined"),
        ({"checkpoint": ()}, "--dpo is missing"),
        ({"alpha_for": ("norm=0",)}, "a sweep takes no --alpha-for beside --checkpoint"),
    ],
)
def test_steps_that_are_refused(of_run, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of_run(**changed)
