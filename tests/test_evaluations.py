"""The official evaluations: their commands, judges and records, and each from end to end with tiny models."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import chat_server
import pytest
import yaml
from made_inputs import real
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_openai import wait_until
from test_orphans import wait_until_gone

from evaluations import alpaca, judge as judges, mt_bench, pairs, results
from evaluations.judge import Judge
from evaluations.results import Column, Result
from evaluations.smoke import judge_server
from expo import recipes
from expo.errors import EnvironmentFailure, InputError
from expo.files import json_lines, read_rows

ROOT = Path(__file__).parents[1]
GPT4 = Judge(mt_bench.PAPER, mt_bench.PAPER, "http://localhost:1/v1")
needs_alpaca_eval = pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="alpaca_eval is not installed")


# --- what the scripts need -----------------------------------------------------------------------------------------

WITHOUT = """
import runpy, sys
blocked, sys.argv = set(sys.argv[1].split()), [sys.argv[2], "--help"]


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def base_install(name: str, extras: frozenset[str], found: set[tuple[str, str]]) -> set[str]:
    """The distributions that pip brings along with one and its extras; `found` has those that are followed already."""
    for extra in {"", *extras}:
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for one in map(Requirement, metadata.requires(name) or ()):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                base_install(canonicalize_name(one.name), frozenset(one.extras), found)
    return {name for name, _ in found}


@pytest.mark.parametrize("module", ["alpaca", "mt_bench", "leaderboard", "tables"])
def test_a_script_says_what_it_does_with_nothing_but_the_base_install(module: str) -> None:
    there = base_install("llm-expo", frozenset(), set())
    places = metadata.packages_distributions()
    others = [top for top, owners in places.items() if not there & {canonicalize_name(one) for one in owners}]
    command = [sys.executable, "-c", WITHOUT, " ".join(others), f"evaluations.{module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pytest" in others
    assert "transformers" not in others
    assert done.stdout.startswith("usage: ")


# --- from end to end -----------------------------------------------------------------------------------------------


def smoke(module: str, folder: Path) -> list[str]:
    """Run a smoke from another folder than the checkout's, and return what it checked."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"evaluations.{module}", "--smoke"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stderr.splitlines() if line.startswith("checked: ")]


@pytest.mark.full  # in CI test_acceptance.py has AlpacaEval read our file
@pytest.mark.slow
@needs_alpaca_eval
def test_alpaca_eval_from_end_to_end(tmp_path):
    checked = smoke("alpaca", tmp_path)
    assert sum("win rate" in line and "as counted" in line for line in checked) == 2
    assert any("asks for what is missing, and no more" in line for line in checked)


needs_fastchat = pytest.mark.skipif(
    not mt_bench.fastchat_python().exists(), reason="FastChat's environment is not there: scripts/mt_bench.sh makes it"
)


@pytest.mark.full
@pytest.mark.slow
@needs_fastchat
def test_mt_bench_from_end_to_end(tmp_path):
    checked = smoke("mt_bench", tmp_path)
    assert sum("as counted" in line for line in checked) == 3
    assert sum("FastChat's table says" in line for line in checked) == 3


# --- whose answers -------------------------------------------------------------------------------------------------


def options(*words: str) -> argparse.Namespace:
    return alpaca.parser().parse_args(words)


def test_a_recipe_names_a_pair_with_what_is_published():
    pair = pairs.pair_of(options("starling-lm-7b-beta"))
    assert pair.names == ("Starling-LM-7B-beta", "Starling-LM-7B-beta-ExPO-a0.5")
    assert pair.flags(pair.names[0]) == ["--model", "Nexusflow/Starling-LM-7B-beta"]
    assert pair.flags(pair.names[1])[:2] == ["--sft", "openchat/openchat-3.5-0106"]
    assert pair.published["mt_bench"] == (8.10, 8.18)
    assert pairs.pair_of(options("Starling-LM-7B-beta", "--alpha", "0.4")).published is None, "another α, other scores"
    assert pairs.pair_of(options("Starling-LM-7B-beta", "--sft", "mine")).published is None


def test_a_pair_of_ones_own():
    pair = pairs.pair_of(options("--sft", "me/sft", "--dpo", "me/dpo@abc", "--alpha", "1e-3"))
    assert pair.names == ("dpo", "dpo-ExPO-a0.001")
    assert pair.flags("dpo-ExPO-a0.001") == ["--sft", "me/sft", "--dpo", "me/dpo@abc", "--alpha", "0.001"]


UNPUBLISHED = next(name for name in recipes.names() if recipes.load(name).alpha is None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no pair given: name a recipe"),
        (["--sft", "a", "--dpo", "b"], "--alpha is missing"),
        (["--sft", "a", "--alpha", "1"], "no pair given"),
        (["RM-Mistral-7B"], "is a reward model, and no pair"),
        (["nope"], "no recipe 'nope'"),
        ([UNPUBLISHED], f"no α is published for {UNPUBLISHED}: `expo sweep --recipe {UNPUBLISHED} "),
    ],
)
def test_a_pair_that_is_not_whole_is_refused(words, message):
    with pytest.raises(InputError) as refused:
        pairs.pair_of(options(*words))
    assert message in str(refused.value)


@pytest.mark.parametrize("name", [one for one in recipes.names() if recipes.load(one).alpha is not None])
@pytest.mark.parametrize("module", [alpaca, mt_bench])
def test_every_recipe_with_an_alpha_is_evaluated(module, name, capfd, tmp_path):
    """What would run: both models answer, θ(α) without a checkpoint, and the official tool judges each."""
    assert module.main([name, "--dry-run", "--limit", "3", "--output-dir", str(tmp_path)]) == 0
    said = capfd.readouterr()
    commands = [line[2:] for line in said.err.splitlines() if line.startswith("$ ")]
    recipe = recipes.load(name)
    assert len(commands) == 4
    assert [f"--recipe {recipe.name} " in line and "--limit 3" in line for line in commands[:2]] == [True, True]
    assert f"--model {recipe.dpo} " in commands[0]
    assert f"--sft {recipe.sft} --dpo {recipe.dpo} --alpha {recipe.alpha!r} " in commands[1]
    tool = {alpaca: "alpaca_eval evaluate", mt_bench: "fastchat.llm_judge.gen_judgment"}[module]
    assert all(tool in line for line in commands[2:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--limit", "0"], ["--alpha", "nan"], ["--alpha", "inf"], ["--limit", "x"]])
def test_numbers_that_are_none_are_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        options("zephyr-7b-beta", *words)
    assert refused.value.code == 2
    assert f"argument {words[0]}" in capsys.readouterr().err


def test_rows_that_failed_are_told(tmp_path):
    file = tmp_path / "m.json"
    assert pairs.unanswered(file) == 0
    (tmp_path / "m.meta.json").write_text('{"failed": 2}')
    assert pairs.unanswered(file) == 2
    assert pairs.show([result(unanswered=2)], (), None, as_json=True) == 3
    assert pairs.show([result()], (), None, as_json=True) == 0


def test_flags_reach_the_models_that_answer(capfd):
    flags = ["--trust-remote-code", "--allow-pickle", "--generate-args", "--tensor-parallel 4"]
    alpaca.main(["--sft", "a", "--dpo", "b", "--alpha", "1", "--dry-run", *flags])
    dpo, theta = [line for line in capfd.readouterr().err.splitlines() if "expo generate" in line]
    assert dpo.endswith("--trust-remote-code --tensor-parallel 4")
    assert theta.endswith("--trust-remote-code --allow-pickle --tensor-parallel 4")


def test_a_command_that_fails_is_named_with_its_log(tmp_path, capfd):
    program = [sys.executable, "-c", "import sys; print('INFO: noise'); print('shown'); print(input()); sys.exit(4)"]
    with pytest.raises(EnvironmentFailure, match=r"ended with exit code 4: see .*log"):
        pairs.run(program, log=tmp_path / "log", chatter=rb"INFO:.*\n", typed=b"typed\n")
    assert (tmp_path / "log").read_text() == "INFO: noise\nshown\ntyped\n"
    assert "noise" not in capfd.readouterr().err.partition("\n")[2]
    pairs.run(program, accept=(4,), typed=b"typed\n")


STOPPED = """
import sys
from pathlib import Path
from evaluations import pairs
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
sys.exit(pairs.script(lambda: pairs.run([sys.executable, "-c", child, sys.argv[1]])))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_stopped_leaves_nothing_at_work(number, code, tmp_path):
    said = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", STOPPED, said], cwd=ROOT, stderr=subprocess.PIPE) as script:
        wait_until(lambda: said.exists() and said.read_text() != "", script)
        script.send_signal(number)
        error = script.communicate(timeout=60)[1].decode()
    assert (script.returncode, error.splitlines()[-1]) == (code, "expo: stopped; rerun the same command to continue")
    wait_until_gone(int(said.read_text()))


# --- who judges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base-url", "localhost:8000"], "is no address"),
        (["--base-url", "http://me:secret@localhost/v1"], "put the key into OPENAI_API_KEY"),
        (["--judge", "../x", "--base-url", "http://localhost/v1"], "--judge '../x'"),
        ([], "set OPENAI_API_KEY, or name another server"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(words, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError) as refused:
        judges.judge_of(options(*words))
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_server_says_what_a_name_stands_for():
    with judge_server.serve("gpt-4") as served:
        judge = Judge("Qwen/Qwen3-32B", "gpt-4", served.address)
        assert judges.look_up(judge) == "made/gpt-4"
        with pytest.raises(InputError, match="serves no gpt-5: it serves gpt-4"):
            judges.look_up(Judge("x", "gpt-5", served.address))
    with pytest.raises(EnvironmentFailure, match="cannot be reached"):
        judges.look_up(Judge("x", "x", "http://127.0.0.1:9/v1"))
    with chat_server.ChatServer().serve() as without_list:
        assert judges.look_up(Judge("x", "y", without_list.url)) is None


def test_a_server_that_refuses_the_key_is_named():
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.raises(InputError, match="does not take the key"):
            judges.look_up(Judge("x", "x", f"http://127.0.0.1:{server.server_port}/v1"))
        server.shutdown()


# --- AlpacaEval ----------------------------------------------------------------------------------------------------


@needs_alpaca_eval
def test_another_judge_is_asked_as_the_papers_is():
    """The configuration for it is AlpacaEval's own, but for the name."""
    import alpaca_eval.constants as theirs

    config = alpaca.configuration(Judge("me/judge-instruct", "me/judge-instruct", "http://localhost:1/v1"))
    folder = theirs.EVALUATORS_CONFIG_DIR
    official = yaml.safe_load((folder / alpaca.ANNOTATOR / "configs.yaml").read_text())[alpaca.ANNOTATOR]
    kwargs = config["completions_kwargs"]
    assert kwargs.pop("model_name") == "me/judge-instruct"
    assert (kwargs.pop("requires_chatml"), kwargs.pop("price_per_token")) == (True, "nan")
    assert official["completions_kwargs"].pop("model_name") == alpaca.PAPER
    prompts = [Path(one.pop("prompt_template")) for one in (config, official)]
    assert prompts[0].read_text() == (folder / prompts[1]).read_text()
    assert config == official


def test_the_papers_judge_has_alpaca_evals_own_configuration(tmp_path):
    paper, other = Judge(alpaca.PAPER, alpaca.PAPER, judges.OPENAI), Judge("me/j", "me/j", "http://localhost:1/v1")
    words = alpaca.command("007", paper, tmp_path, whole=True)
    assert f'--annotators_config="{alpaca.ANNOTATOR}"' in words
    assert '--name="007"' in words, "its command line reads values as Python"
    assert f'--annotators_config="{tmp_path}/{alpaca.ANNOTATOR}@me--j"' in alpaca.command(
        "m", other, tmp_path, whole=False
    )


def alpaca_file(folder: Path, instructions: Sequence[str], **other: object) -> Path:
    rows = [{"dataset": "d", "instruction": one, "output": "x", "generator": "m", **other} for one in instructions]
    folder.mkdir(exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(rows))
    return folder / "answers.json"


def test_answers_at_the_references_places_have_a_length_controlled_rate(tmp_path):
    reference = alpaca_file(tmp_path / "r", "abcd")
    for answered, whole in (("abcd", True), ("ab", True), ("bd", False), ("ba", False)):
        rows, name, first = alpaca.read_answers(alpaca_file(tmp_path / "a", answered), reference)
        assert (len(rows), name, first) == (len(answered), "m", whole)


@pytest.mark.parametrize(
    ("instructions", "other", "message"),
    [
        ("abz", {}, "answers 1 instructions that"),
        ("aa", {}, "answers an instruction twice"),
        ("", {}, "has no answers"),
        ("ab", {"generator": None}, "does not say in `generator`"),
    ],
)
def test_answers_to_other_instructions_are_refused(instructions, other, message, tmp_path):
    with pytest.raises(InputError) as refused:
        alpaca.read_answers(alpaca_file(tmp_path / "a", instructions, **other), alpaca_file(tmp_path / "r", "abcd"))
    assert message in str(refused.value)


JUDGED = [{"instruction": one, "preference": p} for one, p in (("a", 1.5), ("b", -1), ("c", 2.0), ("d", None))]


def kept(file: Path) -> list[str]:
    alpaca.keep_judgments(file)
    return [row["instruction"] for row in alpaca.whole_rows(file)]


def test_only_answers_without_a_judgment_are_judged_again(tmp_path):
    file = tmp_path / "judgments.json"
    assert kept(file) == []
    file.write_text(json.dumps(JUDGED, indent=2))
    assert kept(file) == ["a", "c"]


def test_what_is_torn_while_it_is_written_loses_nothing_of_before(tmp_path):
    """AlpacaEval writes all judgments anew, in place: a kill leaves some of them, or none."""
    file, whole = tmp_path / "judgments.json", json.dumps(JUDGED, indent=2)
    for end in range(0, len(whole), 11):
        file.write_text(json.dumps(JUDGED[:1]))
        assert kept(file) == ["a"]
        file.write_text(whole[:end])
        found = kept(file)
        assert found == ["a", "c"][: len(found)]
        assert found, end
        (tmp_path / "judgments.kept.json").unlink()


def test_a_judge_whose_token_is_another_word_is_refused(tmp_path):
    def verdict(probability: float) -> dict[str, object]:
        likeliest = [
            {"token": "<think>", "logprob": math.log(1 - probability)},
            {"token": "M", "logprob": math.log(probability)},
        ]
        return {
            "preference": 1.9,
            "preference_raw_completion": {"logprobs": {"content": [{"top_logprobs": likeliest}]}},
        }

    file = tmp_path / "judgments.json"
    for share, refused in ((0.05, False), (0.2, True)):
        rows = [verdict(1e-9 if row < 100 * share else 0.9) for row in range(100)]
        file.write_text(json.dumps(rows))
        if refused:
            with pytest.raises(InputError, match="gpt-4 gives the two names little probability in 20 of 100 verdicts"):
                alpaca.require_verdicts(file, GPT4)
        else:
            alpaca.require_verdicts(file, GPT4)


# --- MT-Bench ------------------------------------------------------------------------------------------------------


def lay_out(folder: Path, **texts: list[str]) -> tuple[Path, Path]:
    """FastChat's data for two questions, and a file of answers."""
    data, file = folder / "served", folder / "m.jsonl"
    questions = [{"question_id": int(name[1:]), "category": "math", "turns": ["?", "!"]} for name in texts]
    contents = {mt_bench.PROMPTS: [{"name": "p"}], mt_bench.QUESTIONS: questions, mt_bench.REFERENCES: [{"r": 1}]}
    for name, rows in contents.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(json_lines(rows))
    answers = [{"question_id": int(name[1:]), "choices": [{"turns": turns}]} for name, turns in texts.items()]
    file.write_text(json_lines(answers))
    return data, file


def judged(work: Path, rows: Sequence[object], tail: str = "") -> Path:
    file = mt_bench.judgments_of(work, GPT4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + tail)
    return file


def rating(question: int, turn: int, score: float, **other: object) -> dict[str, object]:
    return {"question_id": question, "turn": turn, "score": score, **other}


def test_what_a_killed_run_left_counts_once(tmp_path):
    data, file = lay_out(tmp_path, q1=["a", "b"], q2=["c", "d"])
    work = tmp_path / "work"
    mt_bench.lay_out(work, data, file, GPT4, ())
    rows = [rating(1, 1, 3), rating(1, 1, 4), rating(1, 2, -1), rating(2, 1, 5, tstamp=3.0), rating(2, 2, 85)]
    judgments = judged(work, rows, tail='{"question_id": 2, "tu')
    mt_bench.forget_others(judgments, work, file)
    assert mt_bench.read_ratings(judgments) == ({(1, 1): 4, (2, 1): 5}, "1970-01-01T00:00:03+00:00")
    assert len(judgments.read_text().splitlines()) == 2, "FastChat averages the file as it is"


def test_judgments_are_kept_as_fastchat_wrote_them(tmp_path):
    data, file = lay_out(tmp_path, q1=["a\u2028b", "\x85"])
    work = tmp_path / "work"
    mt_bench.lay_out(work, data, file, GPT4, ())
    judgments = judged(work, [rating(1, turn, 5, user_prompt="a\u2028b \x85 \u2029") for turn in (1, 2)])
    before = judgments.read_bytes()
    for _ in range(2):
        mt_bench.forget_others(judgments, work, file)
        assert judgments.read_bytes() == before


def test_ratings_of_other_answers_do_not_count(tmp_path):
    data, file = lay_out(tmp_path, q1=["a", "b"], q2=["c", ""])
    work = tmp_path / "work"
    mt_bench.lay_out(work, data, file, GPT4, ())
    judgments = judged(work, [rating(1, 1, 3), rating(2, 1, 5)])
    lay_out(tmp_path, q1=["a", "b"], q2=["c", "otherwise"])
    mt_bench.forget_others(judgments, work, file)
    assert mt_bench.read_ratings(judgments)[0] == {(1, 1): 3}


@pytest.mark.skipif(real() is None, reason="FastChat's own prompts are not here")
def test_the_judge_that_counts_reads_fastchats_own_prompts():
    fields = {name: f"{name} of a model\n### User: not" for name in ("question", "answer", "question_1", "answer_1")}
    fields |= {"question_2": "?", "answer_2": "the last", "ref_answer_1": "1", "ref_answer_2": "2"}
    prompts = [row for row in read_rows(real().data / "mt_bench" / "judge_prompts.jsonl") if row["type"] == "single"]
    assert len(prompts) == 4
    for row in prompts:
        answer = fields["answer_2" if "multi-turn" in row["name"] else "answer"]
        said = judge_server.rate(row["prompt_template"].format(**fields))["message"]["content"]
        assert said.endswith(f"Rating: [[{judge_server.rating(answer)}]]"), row["name"]


@pytest.mark.full
@needs_fastchat
@pytest.mark.skipif(real() is None, reason="the released answers are not here")
def test_released_answers_are_judged_again_with_fastchats_own_data(tmp_path):
    there = real().data / "mt_bench"
    for name in (mt_bench.PROMPTS, mt_bench.QUESTIONS, mt_bench.REFERENCES):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).symlink_to(there / name.removeprefix("mt_bench/"))
    file = there / "model_answer" / "zephyr-7b-beta.jsonl"
    with judge_server.serve("gpt-4") as judge:
        to = ["--base-url", judge.address, "--data", str(tmp_path / "data"), "--output-dir", str(tmp_path)]
        assert mt_bench.main(["--judge", "counts", *to, "--answers", str(file)]) == 0
    found = results.read(tmp_path / "results_mt_bench" / "counts" / "zephyr-7b-beta.json")
    counted = [[judge_server.rating(turn) for turn in row["choices"][0]["turns"]] for row in read_rows(file)]
    assert found.rows == 80
    for turn, key in enumerate(("first_turn", "second_turn")):
        assert found.scores[key] == pytest.approx(sum(one[turn] for one in counted) / 80)


def test_means_are_those_of_fastchats_table():
    ratings = {(1, 1): 2.0, (2, 1): 4.0, (1, 2): 9.0}
    assert mt_bench.scores_of(ratings) == {"first_turn": 3, "second_turn": 9, "average": 5}
    assert set(mt_bench.scores_of({}).values()) == {None}


def test_data_that_lack_a_file_are_refused(tmp_path):
    data, _ = lay_out(tmp_path, q1=["a", "b"])
    assert mt_bench.fetch_data(str(data), tmp_path) == data
    (data / mt_bench.REFERENCES).unlink()
    with pytest.raises(InputError, match=r"has no mt_bench/reference_answer/gpt-4.jsonl: --data is llm_judge/data"):
        mt_bench.fetch_data(str(data), tmp_path)
    with pytest.raises(EnvironmentFailure, match=r"cannot be read .*: pass --data FOLDER"):
        mt_bench.fetch_data("http://127.0.0.1:9/data", tmp_path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [({"q7": ["a", "b"]}, "answers question 7, which"), ({"q1": ["a"]}, "in 1 turns"), ({}, "has no answers")],
)
def test_answers_to_other_questions_are_refused(texts, message, tmp_path):
    data, _ = lay_out(tmp_path, q1=["a", "b"])
    _, file = lay_out(tmp_path / "other", **texts)
    with pytest.raises(InputError) as refused:
        mt_bench.questions_answered(file, read_rows(file), data)
    assert message in str(refused.value)


def test_a_judge_of_another_name_passes_under_one_that_fastchat_takes(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    for words, asked_as in ((["--judge", "me/j"], "gpt-4"), (["--judge", "gpt-4-turbo"], "gpt-4-turbo")):
        given = mt_bench.parser().parse_args(words)
        assert mt_bench.judge_from(given).asked_as == asked_as
        assert mt_bench.judge_from(given).model == words[1]


# --- records -------------------------------------------------------------------------------------------------------


def result(**other: object) -> Result:
    about = {"judge": GPT4.describe("root"), "versions": {"tool": "1"}, "date": "2026-01-02T03:04:05+00:00"}
    return Result(
        **{"benchmark": "B", "name": "m", "scores": {"s": 1.0}, "rows": 2, "made_from": {"a": [1]}, **about, **other}
    )


def test_only_a_whole_result_of_the_same_is_finished(tmp_path):
    file = tmp_path / "folder" / "m.json"
    assert results.finished(file, {"a": (1,)}) is None
    results.write(file, result())
    assert results.finished(file, {"a": (1,)}) == result()
    assert results.finished(file, {"a": [2]}) is None
    results.write(file, result(failed=1))
    assert results.finished(file, {"a": [1]}) is None
    file.write_text('{"benchmark": "of another version"}')
    assert results.finished(file, {"a": [1]}) is None


def test_a_result_is_made_once_and_again_where_what_it_is_made_from_differs(tmp_path):
    made = []

    def make() -> Result:
        made.append(1)
        return result(failed=int(len(made) == 1))

    for wanted, count in (({"a": [1]}, 1), ({"a": [1]}, 2), ({"a": [1]}, 2), ({"a": [2]}, 3)):
        results.once(tmp_path / "m", wanted, make)
        assert len(made) == count
    assert results.read(tmp_path / "m.json") == result()


def test_one_run_at_a_time_works_in_a_folder(tmp_path):
    refused = pytest.raises(InputError, match="another run is at work in")
    with results.only_one(tmp_path / "m"), refused, results.only_one(tmp_path / "m"):
        pass
    with results.only_one(tmp_path / "m"):
        pass


def test_results_are_filed_under_names():
    assert results.file_name("org/model-ExPO-a0.1") == "org--model-ExPO-a0.1"
    for name in ("../x", "", ".", "a\nb"):
        with pytest.raises(InputError, match="results are filed under it"):
            results.file_name(name)
    results.require_different(["a", "b"])
    with pytest.raises(InputError, match="two files have the answers of a"):
        results.require_different(["a", "b", "a"])
    with pytest.raises(InputError, match="two files have the answers of a--b"):
        results.require_different(["a/b", "a--b"])


def test_the_table_says_who_judged_and_what_is_published():
    columns = (Column("s", "score", 2, "mt_bench"), Column("t", "other"))
    judge = Judge("me/j", "gpt-4", "http://localhost/v1").describe(None)
    shown = results.table([result(), result(name="n", judge=judge, failed=2)], columns, {"mt_bench": (1.5, 2.25)})
    assert [line.split() for line in shown.splitlines()[:-2]] == [
        ["B", "score", "other", "rows"],
        ["─" * len(shown.splitlines()[1])],
        ["m", "1.00", "–", "2"],
        ["n", "1.00", "–", "2", "2", "judgments", "are", "missing:", "rerun", "to", "ask", "again"],
        ["published,", "DPO", "1.50", "–"],
        ["published,", "ExPO", "2.25", "–"],
        [],
    ]
    assert shown.splitlines()[-2:] == [
        "judge: gpt-4 at http://localhost:1/v1; tool 1, 2026-01-02",
        "judge: me/j (asked as gpt-4) at http://localhost/v1; tool 1, 2026-01-02",
    ]
