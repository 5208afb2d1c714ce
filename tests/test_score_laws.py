"""Laws of score, whoever scores: what is read of a text, what is marked, what is recorded, and what a kill leaves."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from crashes import ended, forked
from helpers import CHAT_TEMPLATE, tree
from made_inputs import on_real_inputs_too
from test_score import ROWS, make_reward_model, numbers, rewards_alone, settings, write_outputs

from expo.config import ScoreConfig
from expo.errors import InputError
from expo.journal import Journal
from expo.verbs import score as verb

SPELLED = ("<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "[INST]", "<|im_end|>", "{{ bos_token }}")
TEXTS = [("w1 w2", "w3"), *((f"w1 {word} w2", "w3") for word in SPELLED), *(("w1", f"{w} w2 {w}") for w in SPELLED)]
"""Rows in which a prompt or an answer spells what chat templates write."""


@pytest.fixture(scope="session")
def reward(llama_pair, tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("rm") / "rm", llama_pair[1], labels=1, pad_id=0)


def implicit(pair: tuple[Path, Path], folder: Path, **others) -> ScoreConfig:
    asked = {"implicit_reward": True, "sft": str(pair[0]), "dpo": str(pair[1])}
    return replace(settings(pair[1], folder, **others, **asked), reward_model=())


def both(reward: Path, pair: tuple[Path, Path], folder: Path, **others) -> ScoreConfig:
    return replace(implicit(pair, folder, **others), reward_model=(str(reward),))


def applied(model: Path, messages: list[dict[str, str]]) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model).apply_chat_template(messages, return_dict=False)
    return ids


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


# --- what is read of a text -----------------------------------------------------------------------------------------


@on_real_inputs_too
def test_a_text_is_read_as_it_is_whatever_it_spells(trained, tmp_path):
    """The ids are those of `apply_chat_template`, to which `</s>` in a text is that token; nothing is taken out of it.

    Both models' tokenizers write their texts back letter by letter.
    """
    from transformers import AutoTokenizer

    write_outputs(tmp_path, TEXTS)
    pair = trained / "tiny-sft", trained / "tiny-dpo"
    of_reward = verb.plan(both(trained / "tiny-rm", pair, tmp_path))
    (of_pair,) = of_reward.further
    for job, model in ((of_reward, trained / "tiny-rm"), (of_pair, pair[1])):
        tokenizer = AutoTokenizer.from_pretrained(model)
        for row, (prompt, answer) in zip(job.rows, TEXTS, strict=True):
            ids = applied(model, turns(prompt, answer))
            assert list(row.token_ids) == ids[: len(row.token_ids)]
            text = tokenizer.apply_chat_template(turns(prompt, answer), tokenize=False)
            assert text.count(prompt) >= 1
            assert text.count(answer) >= 1
            assert list(row.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"][: len(row.token_ids)]
            bos = tokenizer.bos_token_id
            assert [number for number, one in enumerate(ids[:3]) if one == bos] in ([], [0])


def test_an_answers_end_is_the_templates_own_not_one_that_it_spells(llama_pair, tmp_path):
    write_outputs(tmp_path, [("w1 </s> w2", "w3 </s> w4"), ("w1", "w3 </s>"), ("w1", "</s>")])
    rows = verb.plan(implicit(llama_pair, tmp_path)).rows
    assert [len(row.token_ids) - row.start for row in rows] == [4, 3, 2]
    assert [row.token_ids[-1] for row in rows] == [2, 2, 2]


def test_empty_answers_and_conversations_of_several_turns_are_scored(reward, llama_pair, tmp_path):
    asked = [
        [{"role": "system", "content": "w9"}, *turns("w1", "w2"), {"role": "user", "content": "w3"}],
        turns("w4", "")[:1],
    ]
    rows = [{"messages": messages, "output": "", "finish_reason": "stop"} for messages in asked]
    write_outputs(tmp_path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = verb.run(both(reward, llama_pair, tmp_path))
    whole = [[*messages, {"role": "assistant", "content": ""}] for messages in asked]
    assert numbers(result.rewards) == pytest.approx([alone(reward, applied(reward, one)) for one in whole], abs=2e-6)
    assert [len(row.token_ids) for row in verb.plan(settings(reward, tmp_path)).rows] == [
        len(applied(reward, messages)) for messages in whole
    ]
    assert (result.n, result.further[0].n, result.failed) == (2, 2, 0)


def alone(model: Path, ids: list[int]) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification

    reference = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        value: float = reference(torch.tensor([ids])).logits[0, 0].item()
    return value


# --- what is marked -------------------------------------------------------------------------------------------------


def test_prompts_that_leave_no_room_for_an_answer_are_said(reward, tmp_path, caplog):
    """Those of 8 ids with the generation prompt, which is all that is read; the rows are scored, and marked."""
    write_outputs(tmp_path)
    with caplog.at_level(logging.WARNING):
        result = verb.run(settings(reward, tmp_path, max_length=8))
    without = sum(4 + len(prompt.split()) >= 8 for prompt, _ in ROWS)
    words = (
        f"{without} of 14 rows have a prompt that fills the maximum length of 8 tokens: their answers are not scored"
    )
    assert words in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "rewards_q" / "m.rows.jsonl").read_text().splitlines()]
    assert [row["truncated"] for row in rows] == [len(applied(reward, turns(*row))) > 8 for row in ROWS]
    assert numbers(result.rewards) == pytest.approx(rewards_alone(reward, ROWS, 8), abs=2e-6)
    caplog.clear()
    verb.plan(settings(reward, tmp_path, max_length=60))
    assert "have a prompt that" not in caplog.text


REFUSING = "{% if 'w50' in messages[0].content %}{{ raise_exception('no w50 here') }}{% endif %}" + CHAT_TEMPLATE


def test_a_row_that_failed_since_the_template_refused_it_does_not_keep_the_others_from_their_rewards(
    reward, llama_pair, tmp_path
):
    (tmp_path / "t.jinja").write_text(REFUSING)
    rows = [{"prompt": f"w{n}", "output": "w1", "finish_reason": "stop"} for n in (48, 49, 50, 51)]
    file = write_outputs(tmp_path)
    for finish in ("error", "stop"):
        rows[2] |= {"output": "" if finish == "error" else "w1", "finish_reason": finish}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = both(reward, llama_pair, tmp_path, chat_template=str(tmp_path / "t.jinja"))
        if finish == "stop":
            with pytest.raises(InputError, match="refuses the prompts: no w50 here"):
                verb.plan(config)
            continue
        result = verb.run(config)
        for one in (result, *result.further):
            assert (one.n, one.failed) == (3, 1)
            assert one.reason == "row 2: m.jsonl has no answer to score, because generating it failed"
            assert [reward is None for reward in numbers(one.rewards)] == [False, False, True, False]


# --- what is recorded -----------------------------------------------------------------------------------------------

FIELDS = {
    *("reward_model", "revision", "n", "mean", "standard_error", "truncated", "failed"),
    *("score_seconds", "tokens_per_second", "prompts_sha256", "outputs_sha256", "fingerprint", "config", "versions"),
}


def test_every_meta_file_has_what_the_contract_lists(reward, llama_pair, tmp_path):
    write_outputs(tmp_path)
    result = verb.run(both(reward, llama_pair, tmp_path))
    metas = [json.loads(one.meta.read_text()) for one in (result, *result.further)]
    for one, meta in zip((result, *result.further), metas, strict=True):
        assert meta.keys() >= FIELDS
        rewards = numbers(one.rewards)
        assert meta["mean"] == pytest.approx(statistics.fmean(rewards))
        assert meta["standard_error"] == pytest.approx(statistics.stdev(rewards) / 14**0.5)
        assert meta["tokens_per_second"] > 0
    for hashes in ("prompts_sha256", "outputs_sha256"):
        assert metas[0][hashes] == metas[1][hashes]
    assert [meta["reward_model"] for meta in metas] == ["rm", "implicit reward of dpo over sft (beta 0.1)"]


def test_the_standard_error_takes_answers_to_one_prompt_together(reward, tmp_path):
    """Three answers that are one are worth one: the error is that of a third of the rows."""
    rows = [(f"w{number}", f"w{3 * number % 40}") for number in range(9)]
    write_outputs(tmp_path / "once", rows)
    write_outputs(tmp_path / "thrice", [row for row in rows for _ in range(3)])
    once, thrice = (verb.run(settings(reward, tmp_path / name)) for name in ("once", "thrice"))
    assert thrice.n == 27
    assert thrice.mean == pytest.approx(once.mean, abs=1e-6)
    assert thrice.standard_error == pytest.approx(once.standard_error, rel=1e-4)


# --- what a kill leaves ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_before_or_after_any_row_is_written_ends_as_no_kill(reward, llama_pair, tmp_path, monkeypatch):
    """By SIGKILL, with a reward model and the implicit reward in one run: no row that was written is made again."""
    write_outputs(tmp_path)
    config = both(reward, llama_pair, tmp_path, batch_tokens=150)
    appended, seen = Journal.append, []

    def noted(self, rows):
        seen.append(len(rows))
        appended(self, rows)

    monkeypatch.setattr(Journal, "append", noted)
    verb.run(config)
    whole, total = tree(tmp_path / "rewards_q"), len(seen)
    assert total >= 8

    def killed(moment: int, after: bool) -> int:
        def append(self, rows):
            if len(seen) == moment and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            noted(self, rows)
            if len(seen) == moment + 1 and after:
                os.kill(os.getpid(), signal.SIGKILL)

        seen.clear()
        Journal.append = append
        verb.run(config)
        return 0

    for moment in range(total):
        shutil.rmtree(tmp_path / "rewards_q")
        assert ended(forked(lambda moment=moment: killed(moment, moment % 2 == 1))) == -signal.SIGKILL
        left = tree(tmp_path / "rewards_q")
        finished = {name: content for name, content in left.items() if not name.startswith(".")}
        assert all(whole[name] == content for name, content in finished.items() if not name.endswith(".meta.json"))
        seen.clear()
        verb.run(config)
        assert len(seen) <= total - moment + 1, "a batch that was written is made again"
        now = tree(tmp_path / "rewards_q")
        assert now.keys() == whole.keys()
        assert all(now[name] == whole[name] for name in whole if not name.endswith(".meta.json"))
